"""Which snapshots may go, as a pure function: the last common one never does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from datetime import datetime

from agent.model import Snapshot, Value
from agent.names import is_own, taken_at


class Keep(Value, frozen=True, forbid_unknown_fields=True, omit_defaults=False):
    """How many stay: the `last` ones, and the newest of each of so many hours, days, weeks and months that have one (UTC)."""

    last: int = 3
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0


#: What tells the periods of each kind apart.
_PERIODS: dict[str, Callable[[datetime], object]] = {
    "hourly": lambda at: (at.date(), at.hour),
    "daily": datetime.date,
    "weekly": lambda at: at.isocalendar()[:2],
    "monthly": lambda at: (at.year, at.month),
}


def expendable(snapshots: Iterable[Snapshot], *, replica_tag: str, keep: Keep, pinned: Collection[int]) -> tuple[Snapshot, ...]:
    """Return the snapshots to remove, oldest first.

    Candidates are those that the agent took for the replica of `replica_tag`; those that `keep` names
    (at least the newest) stay, and so does every id in `pinned`: the last common snapshot of
    this replica and of any other replica of the image.
    """
    own = sorted((each for each in snapshots if is_own(each.name, replica_tag)), key=lambda each: each.id)
    stay = {each.id for each in own[-max(keep.last, 1) :]} | set(pinned)
    for kind, period in _PERIODS.items():
        newest: dict[object, int] = {}
        for each in own:
            newest[period(taken_at(each.name))] = each.id
        count = getattr(keep, kind)
        stay.update(list(newest.values())[-count:] if count else ())
    return tuple(each for each in own if each.id not in stay)
