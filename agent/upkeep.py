"""What surrounds a step on a replica, whoever moves the bytes: the mark, the base, the commit, the clearing up.

What a crash leaves at each point, and how the next run goes on (the mark lies in the image's
metadata, so it is replicated by Ceph like the data):

    mark written, not ready   the image is somewhere between its state before and the base: roll back
    mark ready                the base plus a part of this step: resume at the mark's checkpoint
    snapshot `siphon-committing-…` exists
                              everything was durable and right: record its origin, rename it
    snapshot renamed          remove the mark
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from typing import Protocol

import msgspec

from agent.continuity import Standing
from agent.errors import ConflictError, LinkError, SiphonError
from agent.model import Mark, Origin, Replica, Snapshot, Step, encode
from agent.names import MARK_KEY, ORIGIN_PREFIX, committing_name, is_committing, origin_key
from agent.survey import Described, described
from agent.threads import blocking


class Kept(Described, Protocol):
    """What upkeep does to an image; methods block."""

    def set_metadata(self, key: str, value: str) -> None:
        """Set one entry of the image's metadata."""

    def remove_metadata(self, key: str) -> None:
        """Remove one entry of the image's metadata, if it is there."""

    def rename_snapshot(self, name: str, new: str) -> None:
        """Give a snapshot another name."""

    def remove_snapshot(self, name: str) -> None:
        """Remove a snapshot."""

    def roll_back(self, name: str) -> None:
        """Make the present content that of a snapshot."""

    def resize(self, size: int) -> None:
        """Change the image's size, bytes."""


class Held(Protocol):
    """A replica that nobody else of ours writes."""

    @property
    def image(self) -> Kept:
        """The replica's image."""

    async def trust(self) -> None:
        """Record that the content is proven from now on (it was rolled back)."""

    async def judged(self, replica: Replica, stand: Standing | None) -> Replica:
        """Return `replica` with its head judged."""


class Upkeep:
    """One replica, held, and the mark of its unfinished step."""

    def __init__(self, held: Held, replica: Replica) -> None:
        self.replica = replica
        self.mark = replica.mark
        self._held = held
        self._image = held.image

    async def ready(self, step: Step, *, discard: bool) -> Mark:
        """Bring the image to where `step` can go on, and return its mark.

        ConflictError if its content is neither the base nor a part of this very step, unless
        `discard` gives up what differs.
        """
        mark = self.mark
        if mark is None or mark.step != step or not mark.ready or self.replica.head != "resumable":
            mark = await self._prepare(step, discard=discard)
        if await blocking(self._image.size) != step.end.size:
            await blocking(self._image.resize, step.end.size)
        return mark

    async def _prepare(self, step: Step, *, discard: bool) -> Mark:
        """Make the image equal to the step's base and mark the step."""
        copies = self.replica.origins()
        base = copies.get(step.base.id) if step.base else None
        newest = max(copies.values(), key=lambda each: each.id, default=None)
        if (step.base is not None and base is None) or (step.base is None and newest is not None):
            raise ConflictError(f"{self.replica.spec} does not hold the base of the step {step}", hint="run the same command again")
        if base is not None and step.base is not None and base.size != step.base.size:
            raise ConflictError(
                f"the base {base.name} of {self.replica.spec} has {base.size} bytes, the source's has {step.base.size}"
            )
        if self.replica.head == "touched" and not discard:
            raise ConflictError(f"{self.replica.spec} was changed by somebody else", hint="--rollback gives those changes up")
        at_base = self.replica.head == "clean" and base == newest
        mark = Mark(
            step=step, snapshot=committing_name(secrets.randbits(64)), started_at=datetime.now(UTC).isoformat(timespec="seconds")
        )
        await self.write_mark(mark)
        self.replica = msgspec.structs.replace(self.replica, head="unsure", mark=mark)
        if base is None:
            if not at_base:
                await blocking(self._image.resize, 0)
        elif not at_base:
            await blocking(self._image.roll_back, base.name)
        if await blocking(self._image.size) != step.end.size:
            await blocking(self._image.resize, step.end.size)
        await self._held.trust()
        ready = msgspec.structs.replace(mark, ready=True)
        await self.write_mark(ready)
        self.replica = msgspec.structs.replace(self.replica, head="resumable", mark=ready)
        return ready

    async def write_mark(self, mark: Mark) -> None:
        """Write the mark onto the replica."""
        self.mark = mark
        await blocking(self._image.set_metadata, MARK_KEY, encode(mark))

    async def committed(self, origin: Origin) -> Replica:
        """Give the snapshot that was made its origin and its name, forget the mark, and return what the replica is now."""
        assert self.mark is not None
        await _finish_commit(self._image, self.mark, origin)
        self.mark = None
        self.replica = msgspec.structs.replace(await blocking(described, self._image), head="clean")
        return self.replica

    async def remove(self, snapshots: tuple[int, ...]) -> tuple[tuple[str, ...], dict[str, str]]:
        """Remove snapshots of ours by id; return the names that are gone, and those kept with the reason."""
        copies = {each.id: each for each in self.replica.snapshots if each.origin is not None}
        newest = max(copies, default=0)
        gone: list[str] = []
        kept: dict[str, str] = {}
        for snapshot_id in snapshots:
            if snapshot_id not in copies:
                continue
            name = copies[snapshot_id].name
            if snapshot_id == newest:
                kept[name] = "it is the last common snapshot"
                continue
            try:
                await blocking(self._image.remove_snapshot, name)
                await blocking(self._image.remove_metadata, origin_key(snapshot_id))
                gone.append(name)
            except LinkError:
                raise
            except SiphonError as error:
                kept[name] = str(error)
        self.replica = msgspec.structs.replace(await blocking(described, self._image), head=self.replica.head)
        return tuple(gone), kept


async def ordered(held: Held, seen: Replica | None, stand: Standing | None) -> Replica:
    """Bring a replica that was just taken into order, and return it judged.

    Finishes a commit that was broken off, and clears away what an abandoned step left in snapshots
    and metadata. `seen` and `stand` are what was found before it was ours; where the mark is another
    one by now, nothing is known of how far it came.
    """
    image = held.image
    replica = await blocking(described, image)
    if replica.mark is not None and (seen is None or seen.mark is None or replica.mark.step != seen.mark.step):
        stand = Standing.UNSURE
    mark, lineage = replica.mark, replica.lineage
    if mark is not None and lineage is not None and is_committed(replica, mark):
        await _finish_commit(image, mark, Origin(lineage.source, mark.step.end, datetime.now(UTC).isoformat(timespec="seconds")))
        replica = await blocking(described, image)
    for each in replica.snapshots:
        if is_committing(each.name) and (replica.mark is None or each.name != replica.mark.snapshot):
            await blocking(image.remove_snapshot, each.name)
    live = {origin_key(each.id) for each in replica.snapshots}
    for key in await blocking(image.metadata):
        if key.startswith(ORIGIN_PREFIX) and key not in live:
            await blocking(image.remove_metadata, key)
    return await held.judged(await blocking(described, image), stand)


def is_committed(replica: Replica, mark: Mark) -> bool:
    """Tell whether the marked step's snapshot is made already, so that only the commit is left to finish."""
    return mark.step.end.id in replica.origins() or any(each.name == mark.snapshot for each in replica.snapshots)


async def _finish_commit(image: Kept, mark: Mark, origin: Origin) -> None:
    """From a snapshot under its temporary name to a committed one; again is harmless."""
    snapshots: dict[str, Snapshot] = {each.name: each for each in await blocking(image.snapshots)}
    made = snapshots.get(mark.snapshot)
    if made is not None:
        await blocking(image.set_metadata, origin_key(made.id), encode(origin))
        await blocking(image.rename_snapshot, made.name, mark.step.end.name)
    await blocking(image.remove_metadata, MARK_KEY)
