"""What the source keeps for its copies: snapshots taken, the last one each copy confirmed, and which may go."""

from __future__ import annotations

from dataclasses import dataclass, field

from agent.cluster import Image, Pool
from agent.errors import NotFoundError, SiphonError
from agent.model import ImageSpec, Snapshot, Value, decode, encode
from agent.names import PEER_PREFIX
from agent.retention import Keep, expendable


class Peer(Value, frozen=True):
    """What the source image remembers of one replica: the last snapshot confirmed on both sides."""

    replica: str
    snapshot: Snapshot
    confirmed_at: str


def take_snapshot(pool: Pool, spec: ImageSpec, image_id: str, name: str) -> tuple[Snapshot, tuple[Snapshot, ...]]:
    """Take a snapshot of the source; return it, and all there are now (blocks). NotFoundError if the name is another image's."""
    with pool.open(spec.image, writable=True) as image:
        if image.id() != image_id:
            raise NotFoundError(f"{spec} is another image by now (id {image.id()}, not {image_id})")
        image.take_snapshot(name)
        there = image.snapshots()
    return next(each for each in there if each.name == name), there


@dataclass(frozen=True)
class Pruned:
    """Names of snapshots that are gone, and of those that stay with the reason."""

    gone: tuple[str, ...] = ()
    kept: dict[str, str] = field(default_factory=dict)


def confirm(pool: Pool, spec: ImageSpec, key: str, peer: Peer, *, replica_tag: str = "", keep: Keep | None = None) -> Pruned:
    """Record the last common snapshot on the source image; then, if `keep` is given, remove what is not kept (blocks).

    What any of the image's replicas confirmed last stays, as does what `peer` confirms.
    """
    gone: list[str] = []
    kept: dict[str, str] = {}
    with pool.open(spec.image, writable=True) as image:
        image.set_metadata(key, encode(peer))
        pinned = {each.snapshot.id for each in _peers(image)} | {peer.snapshot.id}
        candidates = expendable(image.snapshots(), replica_tag=replica_tag, keep=keep, pinned=pinned) if keep else ()
        for each in candidates:
            try:
                image.remove_snapshot(each.name)
                gone.append(each.name)
            except SiphonError as error:
                kept[each.name] = str(error)
    return Pruned(tuple(gone), kept)


def is_confirmed(pool: Pool, spec: ImageSpec, replica: str) -> bool:
    """Tell whether any snapshot is known to have been confirmed by that replica (blocks)."""
    with pool.open(spec.image) as image:
        return any(each.replica == replica for each in _peers(image))


def _peers(image: Image) -> list[Peer]:
    known = [value for name, value in image.metadata().items() if name.startswith(PEER_PREFIX)]
    return [decode(value, Peer, f"the metadata of {image.spec}") for value in known]
