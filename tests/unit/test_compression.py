"""Packing: what is packed comes back, what does not shrink travels as it is, and damage never gets through."""

from __future__ import annotations

import contextlib
import random

import lz4.block
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from agent.compression import RAW, Method, packed, parse_method, unpacked
from agent.errors import DataError, UsageError
from agent.wire import Codec, Frame, Kind, checksum

METHODS = [Method(Codec.LZ4), Method(Codec.ZSTD, 1), Method(Codec.ZSTD, 9), Method(Codec.ZSTD, -5)]


def frame(plain: bytes, codec: Codec, payload: bytes, length: int | None = None) -> Frame:
    size = len(plain) if length is None else length
    return Frame(Kind.DATA, codec, 3, 1, 4096, size, payload, checksum(Kind.DATA, 3, 1, 4096, len(plain), plain))


@given(st.binary(min_size=1, max_size=200), st.integers(1, 500), st.sampled_from(METHODS))
def test_what_is_packed_comes_back(part: bytes, times: int, method: Method) -> None:
    plain = part * times
    codec, payload = packed(memoryview(plain), method)
    if codec is Codec.RAW:
        assert payload == plain
    else:
        assert len(payload) < len(plain)
        assert unpacked(frame(plain, codec, bytes(payload))) == plain


@pytest.mark.parametrize("method", METHODS)
def test_what_does_not_shrink_travels_as_it_is(method: Method) -> None:
    noise = random.Random(1).randbytes(100_000)
    assert packed(noise, method) == (Codec.RAW, noise)
    assert packed(noise, RAW) == (Codec.RAW, noise)


@given(st.sampled_from(METHODS), st.integers(0, 1 << 20), st.integers(0, 7))
def test_no_flipped_bit_gets_through(method: Method, at: int, bit: int) -> None:
    plain = bytes(range(256)) * 40
    codec, payload = packed(plain, method)
    damaged = bytearray(payload)
    damaged[at % len(damaged)] ^= 1 << bit
    with contextlib.suppress(DataError):
        assert unpacked(frame(plain, codec, bytes(damaged))) == plain


@given(st.sampled_from([Codec.LZ4, Codec.ZSTD]), st.binary(max_size=300), st.integers(1, 1 << 20))
def test_garbage_raises_our_own_error(codec: Codec, garbage: bytes, length: int) -> None:
    with pytest.raises(DataError):
        unpacked(frame(b"", codec, garbage, length))


@pytest.mark.parametrize("codec", [Codec.LZ4, Codec.ZSTD])
def test_a_bomb_is_refused_before_it_unfolds(codec: Codec) -> None:
    bomb = bytes(64 << 20)
    payload = zstandard.compress(bomb) if codec is Codec.ZSTD else lz4.block.compress(bomb, store_size=False)
    with pytest.raises(DataError):
        unpacked(frame(b"x" * 4096, codec, payload, 4096))


def test_methods_are_read_as_they_are_typed() -> None:
    assert parse_method("auto") is None
    assert parse_method("none") == RAW
    assert [str(parse_method(text)) for text in ("lz4", "zstd", "zstd:9", "zstd:-3")] == ["lz4", "zstd:1", "zstd:9", "zstd:-3"]
    for wrong in ("", "gzip", "zstd:", "zstd:99", "zstd:x", "lz4:3", "none:1"):
        with pytest.raises(UsageError, match="there is no compression"):
            parse_method(wrong)
