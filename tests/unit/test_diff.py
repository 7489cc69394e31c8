"""The diff codec: events in pieces of any size, and damage told by place."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import diff
from agent.diff import (
    Banner,
    Data,
    DataRecord,
    Decoder,
    Encoder,
    End,
    Event,
    FormatError,
    FromSnapshot,
    Protected,
    Size,
    ToSnapshot,
    Zero,
)

ENCODER = Encoder()
V1 = (
    diff.BANNER_V1
    + ENCODER.from_snapshot("a")
    + ENCODER.to_snapshot("grüße")
    + ENCODER.size(4096)
    + ENCODER.data_header(512, 5)
    + b"hello"
    + ENCODER.zero(2048, 512)
    + ENCODER.end
)


def v2(tag: bytes, payload: bytes, length: int | None = None) -> bytes:
    return tag + struct.pack("<Q", len(payload) if length is None else length) + payload


V2 = (
    diff.BANNER_V2
    + v2(b"t", struct.pack("<I", 1) + b"b")
    + v2(b"p", b"\1", 8)
    + v2(b"s", struct.pack("<Q", 99))
    + v2(b"?", b"from a later version")
    + v2(b"w", struct.pack("<QQ", 7, 3) + b"abc")
    + v2(b"z", struct.pack("<QQ", 20, 5))
    + b"e"
)


def joined(events: list[Event]) -> list[Event]:
    """Join neighbouring pieces of data, which come as they arrive."""
    out: list[Event] = []
    for each in events:
        last = out[-1] if out else None
        if isinstance(each, Data) and isinstance(last, Data) and last.offset + len(last.data) == each.offset:
            out[-1] = Data(last.offset, bytes(last.data) + bytes(each.data))
        else:
            out.append(each)
    return out


def read(stream: bytes, step: int = 1 << 20) -> list[Event]:
    decoder, events = Decoder(), []
    for at in range(0, len(stream), step):
        events += decoder.feed(stream[at : at + step])
    decoder.end()
    return joined(events)


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_version_1_is_read_in_pieces_of_any_size(step: int) -> None:
    data = DataRecord(512, 5, V1.index(b"hello"))
    assert read(V1, step) == [
        Banner(1), FromSnapshot("a"), ToSnapshot("grüße"), Size(4096), data, Data(512, b"hello"), Zero(2048, 512), End(),
    ]  # fmt: skip


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_version_2_is_read_with_either_length_of_p_and_unknown_tags_skipped(step: int) -> None:
    for stream in (V2, V2.replace(v2(b"p", b"\1", 8), v2(b"p", b"\1"))):
        data = DataRecord(7, 3, stream.index(b"abc"))
        assert read(stream, step) == [
            Banner(2), ToSnapshot("b"), Protected(True), Size(99), data, Data(7, b"abc"), Zero(20, 5), End(),
        ]  # fmt: skip


@pytest.mark.parametrize("stream", [V1, V2])
def test_truncation_anywhere_is_found_and_named(stream: bytes) -> None:
    for cut in range(len(stream)):
        with pytest.raises(FormatError, match=f"ends at byte {cut} within"):
            read(stream[:cut])


def test_bytes_behind_the_end_are_refused() -> None:
    with pytest.raises(FormatError, match="follow the end"):
        read(V1 + b"x")
    decoder = Decoder()
    decoder.feed(V1)
    with pytest.raises(FormatError, match="follow the end"):
        decoder.feed(b"x")


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (b"rbd image v2\n", "not an rbd diff"),
        (diff.BANNER_V1 + b"q", "unknown record b'q' at byte 12"),
        (diff.BANNER_V1 + b"f" + struct.pack("<I", 1 << 30), "has a name of"),
        (diff.BANNER_V1 + b"t" + struct.pack("<I", 1) + b"\xff", "not UTF-8"),
        (diff.BANNER_V2 + v2(b"w", struct.pack("<QQ", 0, 5), 99), "gives two lengths"),
    ],
)
def test_damage_is_told_by_place(stream: bytes, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        read(stream)


@given(st.sampled_from([diff.BANNER_V1, diff.BANNER_V2]), st.binary(max_size=200))
def test_garbage_raises_nothing_but_our_own_error(banner: bytes, garbage: bytes) -> None:
    with contextlib.suppress(FormatError):
        read(banner + garbage, 17)
