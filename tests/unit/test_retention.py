"""Retention removes the agent's own old snapshots and never a pinned one."""

from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from agent.model import ImageSpec, Snapshot
from agent.names import committing_name, is_committing, is_own, snapshot_name, tag
from agent.retention import expendable

HERE = tag("fsid", ImageSpec("dr", "web"))
THERE = tag("fsid", ImageSpec("dr", "other"))


def own(number: int, replica_tag: str = HERE) -> Snapshot:
    return Snapshot(number, snapshot_name(datetime(2026, 1, 1, tzinfo=UTC), replica_tag, number), 1)


def test_the_newest_stay_and_the_oldest_go_first() -> None:
    every = [own(3), own(1), own(4), own(2)]
    assert [each.id for each in expendable(every, replica_tag=HERE, keep=2, pinned=())] == [1, 2]


def test_one_always_stays() -> None:
    assert expendable([own(1)], replica_tag=HERE, keep=0, pinned=()) == ()


def test_others_snapshots_are_no_candidates() -> None:
    every = [Snapshot(1, "nightly", 1), own(2, THERE), Snapshot(3, "siphon-mine", 1), own(4), own(5)]
    assert [each.id for each in expendable(every, replica_tag=HERE, keep=1, pinned=())] == [4]


@given(st.sets(st.integers(1, 99)), st.integers(0, 10), st.sets(st.integers(1, 99)))
def test_pinned_snapshots_and_the_newest_never_go(ids: set[int], keep: int, pinned: set[int]) -> None:
    gone = {each.id for each in expendable([own(each) for each in ids], replica_tag=HERE, keep=keep, pinned=pinned)}
    assert not gone & pinned
    assert len(ids - gone) >= min(len(ids), max(keep, 1))
    assert all(each < max(ids) for each in gone)


def test_names_are_told_apart() -> None:
    assert is_own(own(1).name, HERE)
    assert not is_own(own(1).name, THERE)
    assert not is_own("siphon-20260101T000000Z-xyz", HERE)
    assert is_committing(committing_name(5))
    assert not is_committing("siphon-committing-")
