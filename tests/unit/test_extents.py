"""Extents stay small and zeros are found wherever they lie."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.extents import Extents, pieces
from agent.zeros import ZERO_BLOCK, runs


def test_neighbours_of_one_kind_are_joined() -> None:
    found = Extents()
    for offset, length, exists in [(0, 10, True), (10, 5, True), (15, 5, False), (30, 5, False), (35, 1, False)]:
        found.add(offset, length, exists)
    assert list(found) == [(0, 15, True), (15, 5, False), (30, 6, False)]
    assert (len(found), found.bytes) == (3, 26)


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(1, 999))
def test_pieces_cover_an_extent_and_end_at_multiples(offset: int, length: int, unit: int) -> None:
    cut = list(pieces(offset, length, unit))
    assert sum(size for _, size in cut) == length
    at = offset
    for start, size in cut:
        assert start == at
        assert 0 < size <= unit
        assert start // unit == (start + size - 1) // unit
        at += size


@given(
    st.integers(0, 3 * ZERO_BLOCK),
    st.lists(st.tuples(st.booleans(), st.integers(1, 3 * ZERO_BLOCK)), min_size=1, max_size=6),
    st.sampled_from([1, 512]),
)
def test_runs_cover_everything_and_zeros_are_zero(offset: int, parts: list[tuple[bool, int]], grain: int) -> None:
    data = b"".join((b"\xaa" if full else b"\0") * (size // grain * grain) for full, size in parts)
    found = runs(offset, data)
    at = 0
    for start, end, holds in found:
        assert start == at < end
        at = end
        if not holds:
            assert not any(data[start:end])
        else:
            # No whole aligned block of zeros is left in what counts as data.
            first = -(offset + start) % ZERO_BLOCK + start
            for block in range(first, end - ZERO_BLOCK + 1, ZERO_BLOCK):
                assert any(data[block : block + ZERO_BLOCK])
    assert at == len(data)


def test_one_byte_in_the_middle_of_a_block_is_data() -> None:
    data = bytearray(4 * ZERO_BLOCK)
    data[2 * ZERO_BLOCK + 100] = 1
    assert runs(0, bytes(data)) == [
        (0, 2 * ZERO_BLOCK, False),
        (2 * ZERO_BLOCK, 3 * ZERO_BLOCK, True),
        (3 * ZERO_BLOCK, 4 * ZERO_BLOCK, False),
    ]
