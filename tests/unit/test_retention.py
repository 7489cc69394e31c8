"""Retention removes the agent's own old snapshots and never a pinned one."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from agent.model import ImageSpec, Snapshot
from agent.names import committing_name, is_committing, is_own, snapshot_name, tag
from agent.retention import Keep, expendable

HERE = tag("fsid", ImageSpec("dr", "web"))
THERE = tag("fsid", ImageSpec("dr", "other"))


def own(number: int, replica_tag: str = HERE) -> Snapshot:
    return Snapshot(number, snapshot_name(datetime(2026, 1, 1, tzinfo=UTC), replica_tag, number), 1)


def test_the_newest_stay_and_the_oldest_go_first() -> None:
    every = [own(3), own(1), own(4), own(2)]
    assert [each.id for each in expendable(every, replica_tag=HERE, keep=Keep(last=2), pinned=())] == [1, 2]


def test_one_always_stays() -> None:
    assert expendable([own(1)], replica_tag=HERE, keep=Keep(last=0), pinned=()) == ()


def test_others_snapshots_are_no_candidates() -> None:
    every = [Snapshot(1, "nightly", 1), own(2, THERE), Snapshot(3, "siphon-mine", 1), own(4), own(5)]
    assert [each.id for each in expendable(every, replica_tag=HERE, keep=Keep(last=1), pinned=())] == [4]


@given(st.sets(st.integers(1, 99)), st.integers(0, 10), st.sets(st.integers(1, 99)))
def test_pinned_snapshots_and_the_newest_never_go(ids: set[int], keep: int, pinned: set[int]) -> None:
    gone = {each.id for each in expendable([own(each) for each in ids], replica_tag=HERE, keep=Keep(last=keep), pinned=pinned)}
    assert not gone & pinned
    assert len(ids - gone) >= min(len(ids), max(keep, 1))
    assert all(each < max(ids) for each in gone)


def hourly(count: int) -> list[Snapshot]:
    """Return one snapshot an hour, the first at midnight of a Thursday."""
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    names = [snapshot_name(begin + timedelta(hours=hour), HERE, hour) for hour in range(count)]
    return [Snapshot(number, name, 1) for number, name in enumerate(names)]


def stay(every: list[Snapshot], keep: Keep) -> list[int]:
    gone = expendable(every, replica_tag=HERE, keep=keep, pinned=())
    return [each.id for each in every if each not in gone]


def test_of_each_period_its_newest_snapshot_stays() -> None:
    every = hourly(24 * 40)
    last = len(every) - 1
    assert stay(every, Keep(last=1, hourly=3)) == [last - 2, last - 1, last]
    assert stay(every, Keep(last=1, daily=3)) == [last - 48, last - 24, last]
    # Days 37 and 30 are Sundays; the last week has begun on day 38.
    assert stay(every, Keep(last=1, weekly=3)) == [32 * 24 - 1, 39 * 24 - 1, last]
    assert stay(every, Keep(last=1, monthly=5)) == [31 * 24 - 1, last]


def test_periods_without_a_snapshot_are_not_counted() -> None:
    every = [each for each in hourly(24 * 10) if each.id < 24 or each.id >= 24 * 9]
    assert stay(every, Keep(last=1, daily=2)) == [23, 24 * 10 - 1]


@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4), st.integers(0, 4), st.integers(1, 4))
def test_pruning_again_removes_nothing_more(hours: int, days: int, weeks: int, months: int, last: int) -> None:
    keep = Keep(last, hours, days, weeks, months)
    every = hourly(24 * 70)[::5]
    once = stay(every, keep)
    assert stay([each for each in every if each.id in once], keep) == once


def test_names_are_told_apart() -> None:
    assert is_own(own(1).name, HERE)
    assert not is_own(own(1).name, THERE)
    assert not is_own("siphon-20260101T000000Z-xyz", HERE)
    assert not is_own(f"siphon-20269901T000000Z-{HERE}0000", HERE), "no such day"
    assert is_committing(committing_name(5))
    assert not is_committing("siphon-committing-")
