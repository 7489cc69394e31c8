"""Merging: applied once, the merged diff does what its inputs do one after the other."""

from __future__ import annotations

import os
import tempfile
import threading
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.diff import Data, Decoder, Encoder, FormatError, Size, Zero
from agent.difffile import for_merging
from agent.errors import ConflictError, UsageError
from agent.files import Reading
from agent.merge import joined, merged

ENCODER = Encoder()
Spans = list[tuple[int, int, int]]  # offset, length, fill; a fill of 0 is a zero record


def stream(base: str, end: str, size: int, spans: Spans) -> bytes:
    out = ENCODER.banner + (ENCODER.from_snapshot(base) if base else b"") + (ENCODER.to_snapshot(end) if end else b"")
    out += ENCODER.size(size)
    for offset, length, fill in spans:
        out += ENCODER.zero(offset, length) if not fill else ENCODER.data_header(offset, length) + bytes([fill]) * length
    return out + ENCODER.end


def applied(content: bytes, diff: bytes) -> bytes:
    """Do what an import does, the plainest way."""
    decoder = Decoder()
    now = bytearray(content)
    for event in decoder.feed(diff):
        match event:
            case Size(size):
                now = now[:size].ljust(size, b"\0")
            case Data(offset, data):
                now[offset : offset + len(data)] = data
            case Zero(offset, length):
                length = max(0, min(length, len(now) - offset))
                now[offset : offset + length] = bytes(length)
    decoder.end()
    return bytes(now)


def merge(*diffs: bytes) -> bytes:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        inputs = []
        for number, diff in enumerate(diffs):
            path = Path(folder) / str(number)
            path.write_bytes(diff)
            inputs.append(for_merging(stack.enter_context(Reading(str(path)).open())))
        header = joined([(str(number), each.header) for number, each in enumerate(inputs)])
        return b"".join(merged(inputs, header, ENCODER))


@st.composite
def diffs(draw: st.DrawFn) -> list[bytes]:
    """Two to five consecutive diffs; the image grows and shrinks between them."""
    out = []
    for number in range(draw(st.integers(2, 5))):
        size = draw(st.integers(1, 60))
        cuts = sorted(draw(st.sets(st.integers(0, size), max_size=8)))
        spans = [(start, stop - start, draw(st.integers(0, 3))) for start, stop in pairwise(cuts) if draw(st.booleans())]
        if draw(st.booleans()):
            spans = draw(st.permutations(spans))  # as in diffs of striped images
        out.append(stream(f"s{number}", f"s{number + 1}", size, spans))
    return out


@given(diffs(), st.integers(1, 60))
def test_a_merged_diff_applied_once_is_its_inputs_applied_in_turn(inputs: list[bytes], size: int) -> None:
    in_turn = once = bytes(range(100, 100 + size))
    for each in inputs:
        in_turn = applied(in_turn, each)
    assert applied(once, merge(*inputs)) == in_turn


@given(diffs())
def test_merging_in_two_steps_is_merging_at_once(inputs: list[bytes]) -> None:
    content = bytes(range(50))
    stepwise = inputs[0]
    for each in inputs[1:]:
        stepwise = merge(stepwise, each)
    assert applied(content, stepwise) == applied(content, merge(*inputs))


def test_what_lies_between_a_shrink_and_a_growth_is_zero_not_what_was_there_before() -> None:
    found = merge(stream("a", "b", 10, [(2, 3, 7)]), stream("b", "c", 40, []))
    assert applied(b"x" * 40, found) == (b"xx" + b"\7" * 3 + b"x" * 5).ljust(40, b"\0")


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (("a", "b"), ("c", "d"), "0 ends at the snapshot 'b', 1 begins at the snapshot 'c'"),
        (("a", "b"), ("", "c"), "1 begins at the image's creation"),
        (("a", ""), ("b", "c"), "0 ends at no snapshot"),
        (("a", ""), ("", "c"), "0 ends at no snapshot"),
    ],
)
def test_diffs_that_do_not_join_are_refused_with_the_names(first: tuple[str, str], second: tuple[str, str], words: str) -> None:
    with pytest.raises(ConflictError, match=words):
        merge(stream(*first, 9, []), stream(*second, 9, []))


def test_an_input_that_ends_early_is_no_merge() -> None:
    whole = stream("b", "c", 50, [(0, 20, 1), (30, 5, 2)])
    for cut in range(len(whole)):
        with pytest.raises(FormatError):
            merge(stream("a", "b", 50, [(0, 50, 3)]), whole[:cut])


def test_damage_behind_the_images_end_is_found_too() -> None:
    with pytest.raises(FormatError):
        merge(stream("a", "b", 50, [(40, 10, 1)])[:-1], stream("b", "c", 5, []))


def through_pipe(diff: bytes, other: bytes) -> bytes:
    """Merge `other` with what comes from a pipe behind it."""
    reading, writing = os.pipe()

    def feed() -> None:
        os.write(writing, diff)
        os.close(writing)

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            path = Path(folder) / "first"
            path.write_bytes(other)
            files = [str(path), f"/dev/fd/{reading}"]
            inputs = [for_merging(stack.enter_context(Reading(name).open())) for name in files]
            header = joined([(name, each.header) for name, each in zip(files, inputs, strict=True)])
            return b"".join(merged(inputs, header, ENCODER))
    finally:
        feeder.join()
        os.close(reading)


def test_a_pipe_is_merged_as_it_comes() -> None:
    first, second = stream("a", "b", 30, [(0, 20, 1)]), stream("b", "c", 30, [(5, 5, 2), (15, 10, 0)])
    assert applied(b"x" * 30, through_pipe(second, first)) == applied(applied(b"x" * 30, first), second)


def test_a_pipe_that_is_out_of_order_is_refused_with_the_way_out() -> None:
    with pytest.raises(UsageError, match="ascending order") as caught:
        through_pipe(stream("b", "c", 30, [(20, 5, 2), (0, 5, 1)]), stream("a", "b", 30, []))
    assert "as a file" in caught.value.hint
