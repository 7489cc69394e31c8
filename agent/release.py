"""What the source keeps for its copies: snapshots taken, the last one each copy confirmed, and which may go."""

from __future__ import annotations

from agent.cluster import Image, Pool
from agent.errors import SiphonError
from agent.model import ImageSpec, Snapshot, Value, decode, encode
from agent.names import PEER_PREFIX
from agent.retention import expendable


class Peer(Value, frozen=True):
    """What the source image remembers of one replica: the last snapshot confirmed on both sides."""

    replica: str
    snapshot: Snapshot
    confirmed_at: str


def take_snapshot(pool: Pool, spec: ImageSpec, name: str) -> Snapshot:
    """Take a snapshot of the source and return it (blocks)."""
    with pool.open(spec.image, writable=True) as image:
        image.take_snapshot(name)
        return next(each for each in image.snapshots() if each.name == name)


def confirm(pool: Pool, spec: ImageSpec, key: str, peer: Peer) -> set[int]:
    """Record the last common snapshot on the source image; return those of all its replicas (blocks)."""
    with pool.open(spec.image, writable=True) as image:
        image.set_metadata(key, encode(peer))
        return {each.snapshot.id for each in _peers(image)}


def is_confirmed(pool: Pool, spec: ImageSpec, replica: str) -> bool:
    """Tell whether any snapshot is known to have been confirmed by that replica (blocks)."""
    with pool.open(spec.image) as image:
        return any(each.replica == replica for each in _peers(image))


def _peers(image: Image) -> list[Peer]:
    known = [value for name, value in image.metadata().items() if name.startswith(PEER_PREFIX)]
    return [decode(value, Peer, f"the metadata of {image.spec}") for value in known]


def prune_source(pool: Pool, spec: ImageSpec, replica_tag: str, keep: int, pinned: set[int]) -> tuple[list[str], dict[str, str]]:
    """Remove the agent's own snapshots that are not kept (blocks).

    Returns the names that are gone, and those that stay with the reason.
    """
    gone: list[str] = []
    kept: dict[str, str] = {}
    with pool.open(spec.image, writable=True) as image:
        for each in expendable(image.snapshots(), replica_tag=replica_tag, keep=keep, pinned=pinned):
            try:
                image.remove_snapshot(each.name)
                gone.append(each.name)
            except SiphonError as error:
                kept[each.name] = str(error)
    return gone, kept
