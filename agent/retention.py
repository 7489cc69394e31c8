"""Which snapshots may go, as a pure function: the last common one never does."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from agent.model import Snapshot
from agent.names import is_own


def expendable(snapshots: Iterable[Snapshot], *, replica_tag: str, keep: int, pinned: Collection[int]) -> tuple[Snapshot, ...]:
    """Return the snapshots to remove, oldest first.

    Candidates are those that the agent took for the replica of `replica_tag`; the newest `keep`
    (at least one) of them stay, and so does every id in `pinned`: the last common snapshot of
    this replica and of any other replica of the image.
    """
    own = sorted((each for each in snapshots if is_own(each.name, replica_tag)), key=lambda each: each.id)
    return tuple(each for each in own[: -max(keep, 1)] if each.id not in pinned)
