"""How an archive's points hang together: chains, what was replaced, which points lead where."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.chain import Entry, chains_of, packed, parsed, snapshot_names, to_fold, up_to
from agent.errors import DataError, NotFoundError, UsageError
from agent.manifest import Point
from agent.model import ImageIdentity, Snapshot

SOURCE = ImageIdentity("fsid", "id")


def point(number: int) -> Point:
    return Point(Snapshot(number, f"s{number}", 100), f"2026-11-{number:02d}T12:00:00+00:00")


def entry(base: int | None, end: int, replaces: tuple[str, ...] = ()) -> Entry:
    start = point(base) if base is not None else None
    return Entry(SOURCE, "vms/x", start, point(end), 100, "now", "test", replaces=replaces)


FULL, FIRST, SECOND = entry(None, 1), entry(1, 2), entry(2, 3)


@given(st.permutations([FULL, FIRST, SECOND]))
def test_points_form_a_chain_in_whatever_order_they_are_found(entries: list[Entry]) -> None:
    assert chains_of(entries) == ([[FULL, FIRST, SECOND]], [])


def test_a_full_that_lies_behind_begins_a_chain_of_its_own() -> None:
    later, after = entry(None, 5), entry(5, 6)
    chains, replaced = chains_of([later, FULL, after, FIRST])
    assert chains == [[FULL, FIRST], [later, after]]
    assert replaced == []
    assert up_to(chains, "") == [later, after]
    assert up_to(chains, "s2") == [FULL, FIRST]


def test_what_was_merged_is_replaced_and_what_is_left_of_it_is_told() -> None:
    merged = entry(None, 2, (FULL.name, FIRST.name))
    for left in ([FULL, FIRST], [FIRST], []):
        chains, replaced = chains_of([*left, merged, SECOND])
        assert chains == [[merged, SECOND]]
        assert replaced == sorted(each.name for each in left)


def test_an_increment_whose_base_is_missing_is_a_broken_archive() -> None:
    with pytest.raises(DataError, match="the point s3 has lost"):
        chains_of([FULL, SECOND])


def test_points_are_found_by_name_and_by_time() -> None:
    chains, _ = chains_of([FULL, FIRST, SECOND])
    assert up_to(chains, "s1") == [FULL]
    assert up_to(chains, "2026-11-02T18:00:00+00:00") == [FULL, FIRST]
    assert up_to(chains, "") == [FULL, FIRST, SECOND]
    for absent in ("s9", "2026-10-01T00:00:00+00:00", "yesterday"):
        with pytest.raises(NotFoundError) as caught:
            up_to(chains, absent)
        assert "s1 (2026-11-01" in caught.value.hint


@pytest.mark.parametrize(("keep", "folded"), [(0, 3), (1, 3), (2, 2), (3, 0), (9, 0)])
def test_folding_leaves_as_many_points_as_are_kept(keep: int, folded: int) -> None:
    assert len(to_fold([FULL, FIRST, SECOND], keep)) == folded


def test_documents_are_read_back_and_damage_and_later_forms_are_told() -> None:
    assert parsed(packed(SECOND), "x") == SECOND
    with pytest.raises(DataError, match="x is damaged"):
        parsed(packed(SECOND)[:-9], "x")
    with pytest.raises(UsageError, match="later version"):
        parsed(packed(SECOND).replace(b"{", b'{"form": 99,', 1), "x")


def test_snapshots_of_one_name_are_told_apart_by_their_ids_but_for_the_last() -> None:
    nightly = [
        msgspec.structs.replace(each, end=Point(Snapshot(each.end.snapshot.id, "nightly", 100), "")) for each in (FULL, SECOND)
    ]
    assert snapshot_names([nightly[0], FIRST, nightly[1]]) == ["nightly-1", "s2", "nightly"]
