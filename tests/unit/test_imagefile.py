"""Exports of format 2: read in pieces of any size, whichever release wrote them, and damage told by place."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.diff import Banner, Data, DataRecord, Encoder, End, FormatError, FromSnapshot, Protected, Size, ToSnapshot
from agent.imagefile import IMAGE_BANNER, ImageHeader, ImageReader, header_bytes
from agent.inspection import Inspection

V2 = Encoder(2)
HEADER = ImageHeader(22, 61, 1 << 22, 1, {"key one": "wert ü"}, 2)
FIRST = V2.banner + V2.to_snapshot("a") + V2.protected(protected=True) + V2.size(99) + V2.data_header(7, 3) + b"abc" + V2.end
EXPORT = header_bytes(HEADER) + FIRST + V2.banner + V2.from_snapshot("a") + V2.size(120) + V2.end


def read(stream: bytes, step: int) -> list[object]:
    reader, events = ImageReader(), []
    for at in range(0, len(stream), step):
        events += reader.feed(stream[at : at + step])
    reader.end()
    return [each for each in events if not isinstance(each, Data | DataRecord)]


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_an_export_is_read_in_pieces_of_any_size(step: int) -> None:
    assert read(EXPORT, step) == [
        HEADER, Banner(2), ToSnapshot("a"), Protected(True), Size(99), End(), Banner(2), FromSnapshot("a"), Size(120), End(),
    ]  # fmt: skip


def test_both_lengths_that_releases_write_before_the_protection_are_read() -> None:
    short = b"p" + struct.pack("<Q", 1) + b"\1"
    assert short in EXPORT  # as Ceph 18.2 writes it
    assert read(EXPORT.replace(short, b"p" + struct.pack("<Q", 8) + b"\1"), 5) == read(EXPORT, 5)  # as 16.2 does


def test_truncation_anywhere_is_found() -> None:
    for cut in range(len(IMAGE_BANNER), len(EXPORT)):
        with pytest.raises(FormatError):
            read(EXPORT[:cut], 1000)
    with pytest.raises(FormatError, match="follow the last diff"):
        read(EXPORT + b"x", 1000)


@given(st.binary(max_size=300), st.integers(1, 50))
def test_garbage_raises_nothing_but_our_own_error(garbage: bytes, step: int) -> None:
    for stream in (garbage, IMAGE_BANNER + garbage, header_bytes(HEADER) + garbage):
        with contextlib.suppress(FormatError):
            read(stream, step)


@given(st.integers(0, len(EXPORT) * 8 - 1), st.integers(1, 50))
def test_a_flipped_bit_never_breaks_an_inspection(bit: int, step: int) -> None:
    damaged = bytearray(EXPORT)
    damaged[bit // 8] ^= 1 << bit % 8
    inspection = Inspection()
    for at in range(0, len(damaged), step):
        inspection.feed(bytes(damaged[at : at + step]))
    facts = inspection.finish()
    assert facts.bytes == len(EXPORT)
    assert facts.kind in ("image", "raw", "diff", "")


def facts_of(stream: bytes) -> Inspection:
    inspection = Inspection()
    inspection.feed(stream)
    inspection.finish()
    return inspection


def test_inspection_counts_records_and_tells_order_overlaps_and_what_lies_beyond() -> None:
    v1 = Encoder()
    records = [(0, 10), (5, 10), (40, 10), (20, 5)]
    stream = v1.banner + v1.from_snapshot("a") + v1.to_snapshot("b") + v1.size(45)
    for offset, length in records:
        stream += v1.data_header(offset, length) + b"x" * length
    facts = facts_of(stream + v1.zero(30, 4) + v1.end).facts
    one = facts.diffs[0]
    assert (facts.kind, facts.damage, one.base, one.end, one.size) == ("diff", "", "a", "b", 45)
    assert (one.records, one.data, one.zeros) == (5, 35, 4)
    assert (one.overlaps, one.backwards, one.beyond) == (1, 1, 5)
    assert one.complete


def test_inspection_tells_where_a_stream_breaks_off() -> None:
    facts = facts_of(FIRST[:-5]).facts
    assert "ends at byte" in facts.damage
    assert not facts.diffs[0].complete
    assert facts_of(b"").facts.kind == "empty"
    assert facts_of(b"an ext4 image, perhaps, which is long enough").facts.kind == "raw"
