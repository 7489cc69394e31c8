"""Looking at a replica: lineage, origins, the mark, and whether its content is what it should be.

Nothing here writes. Content is judged by comparing, not by flags: a diff tells where to look (an
object that was rolled back still shows in it), then both versions are read and compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, TypeVar

import msgspec

from agent.cluster import Image, Pool
from agent.continuity import Standing, hand_of, standing
from agent.extents import Extents, pieces, windows
from agent.model import Guard, ImageIdentity, ImageSpec, Lineage, Mark, Origin, Replica, ReplicaSnapshot, Snapshot, Value, decode
from agent.names import LINEAGE_KEY, MARK_KEY, guard_object, origin_key
from agent.threads import blocking

T = TypeVar("T")

#: Bytes compared at a time.
_PIECE = 4 << 20
#: How often a footing is read anew while hands change.
_LOOKS = 20
_HEADS: dict[Standing, Literal["resumable", "unsure", "touched"]] = {
    Standing.RESUMABLE: "resumable",
    Standing.UNSURE: "unsure",
    Standing.TOUCHED: "touched",
}


class Described(Protocol):
    """What describing a replica asks of its image; methods block."""

    spec: ImageSpec

    def id(self) -> str:
        """Return the image's id."""

    def size(self) -> int:
        """Return the size in bytes."""

    def snapshots(self) -> tuple[Snapshot, ...]:
        """Return the snapshots in the user's namespace, oldest first."""

    def metadata(self) -> dict[str, str]:
        """Return all of the image's metadata."""


class Footing(Value, frozen=True):
    """What was true of an image before we took it; `watchers` are the clients that had it open for writing."""

    owner: str
    watchers: tuple[str, ...]
    guard: Guard | None
    version: int

    @property
    def strangers(self) -> tuple[str, ...]:
        """Return the watchers that are no workers of ours."""
        return tuple(each for each in self.watchers if hand_of(each, self.guard) is None)

    @property
    def standing(self) -> Standing:
        """Return what this says of an image in the middle of a step."""
        return standing(self.owner, self.guard, self.version)


def footing(pool: Pool, spec: ImageSpec, image_id: str) -> Footing:
    """Read who owns the image's lock, its guard and its header's version (blocks)."""
    return looked(pool, spec, image_id, Image.id)[1]


def looked(pool: Pool, spec: ImageSpec, image_id: str, look: Callable[[Image], T]) -> tuple[T, Footing]:
    """Return what `look` finds in an image, and who may write it, as of one moment (blocks)."""
    before = _hands(pool, image_id)
    for _ in range(_LOOKS):
        # Open for reading only: looking must leave no watch that another worker would have to wonder about.
        with pool.open(spec.image) as image:
            found, owner, watchers = look(image), image.lock_owner(), image.watchers()
        after = _hands(pool, image_id)
        if after == before:
            break
        before = after  # hands changed while we looked: what was read belongs to two moments
    (guard, _), version = after
    return found, Footing(owner, watchers, guard, version)


def _hands(pool: Pool, image_id: str) -> tuple[tuple[Guard | None, int], int]:
    return read_guard(pool, image_id), pool.header_version(image_id)


def read_guard(pool: Pool, image_id: str) -> tuple[Guard | None, int]:
    """Return the guard of an image and its version, None and 0 if there is none (blocks)."""
    raw, version = pool.read_object(guard_object(image_id))
    return decode(raw, Guard, guard_object(image_id)) if version else None, version


def described(image: Described) -> Replica:
    """Read everything but the content; `head` stays "foreign" (blocks)."""
    metadata = image.metadata()
    lineage, mark = metadata.get(LINEAGE_KEY), metadata.get(MARK_KEY)
    where = f"the metadata of {image.spec}"
    snapshots = []
    for each in image.snapshots():
        origin = metadata.get(origin_key(each.id))
        known = decode(origin, Origin, where) if origin else None
        snapshots.append(ReplicaSnapshot(each.id, each.name, each.size, known))
    return Replica(
        spec=image.spec,
        image_id=image.id(),
        size=image.size(),
        lineage=decode(lineage, Lineage, where) if lineage else None,
        snapshots=tuple(snapshots),
        head="foreign",
        mark=decode(mark, Mark, where) if mark else None,
    )


async def survey(pool: Pool, spec: ImageSpec, source: ImageIdentity) -> Replica | None:
    """Return what the target holds under that name, None if nothing; NotFoundError for no such pool."""
    if await blocking(pool.image_id, spec.image) is None:
        return None
    image = await blocking(pool.open, spec.image)
    try:
        replica = await blocking(described, image)
        if replica.lineage is None or replica.lineage.source != source:
            return replica
        stand = (await blocking(footing, pool, spec, replica.image_id)).standing if replica.mark else None
        return await judged(pool, image, replica, stand)
    finally:
        await blocking(image.close)


async def judged(pool: Pool, image: Image, replica: Replica, stand: Standing | None) -> Replica:
    """Return `replica` with its head judged: by `stand` in the middle of a step, by its content otherwise."""
    if replica.mark is not None and stand is not None:
        return msgspec.structs.replace(replica, head=_HEADS[stand])
    found = await _differs(pool, image, replica)
    return msgspec.structs.replace(replica, head="touched" if found else "clean", differs=found)


async def _differs(pool: Pool, image: Image, replica: Replica) -> int:
    """Return 0 if the present content equals the newest committed snapshot, else the bytes in changed extents."""
    newest = max(replica.origins().values(), key=lambda each: each.id, default=None)
    return await differs(pool, image, Snapshot(newest.id, newest.name, newest.size) if newest else None)


async def differs(pool: Pool, image: Image, snapshot: Snapshot | None) -> int:
    """Return 0 if the present content equals `snapshot` (None: is empty), else the bytes in changed extents, at least 1."""
    size = await blocking(image.size)
    base = await blocking(pool.open, image.spec.image, snapshot=snapshot.id) if snapshot else None
    name = snapshot.name if snapshot else None
    try:
        total, proven = 0, snapshot is not None and snapshot.size != size
        whole = not await blocking(image.regrown, snapshot.id if snapshot else 0, None, size)
        for start, span in windows(0, size, (await blocking(image.shape)).period):
            changed = await blocking(image.diff, start, span, name, whole_object=whole)
            total += changed.bytes
            if not proven:
                proven = await _any_difference(image, base, changed)
        return max(total, 1) if proven else 0
    finally:
        if base is not None:
            await blocking(base.close)


async def _any_difference(image: Image, base: Image | None, changed: Extents) -> bool:
    """Compare the extents `changed` of the image with those of `base` (None: with zeros)."""
    limit = 0 if base is None else await blocking(base.size)
    for offset, length, _ in changed:
        for at, size in pieces(offset, length, _PIECE):
            now = await image.read(at, size)
            there = max(0, min(size, limit - at))
            before = await base.read(at, there) if base is not None and there else b""
            if now != before.ljust(size, b"\0"):
                return True
    return False
