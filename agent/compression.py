"""Packing a block for the wire: zstd, lz4, or as it is where it does not shrink. Pure; large blocks leave the GIL alone.

What arrives is unpacked into no more than the length its frame gives, whatever the packed bytes say.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import lz4.block
import zstandard

from agent.errors import DataError, UsageError
from agent.wire import Codec, Frame, verify

#: A block that keeps more than this share of its length travels as it is: unpacking it would cost more than it saves.
_WORTH = 15 / 16
#: zstd's levels that may be asked for; the negative ones are its fast ones.
_LEVELS = range(-20, 20)
_own = threading.local()


@dataclass(frozen=True, slots=True)
class Method:
    """How blocks are packed; `level` is zstd's."""

    codec: Codec
    level: int = 0

    def __str__(self) -> str:
        return f"zstd:{self.level}" if self.codec is Codec.ZSTD else self.codec.name.lower()


RAW = Method(Codec.RAW)


def parse_method(text: str) -> Method | None:
    """Read `none`, `lz4`, `zstd` or `zstd:LEVEL`; None for `auto`, UsageError for anything else."""
    name, colon, level = text.partition(":")
    if text == "auto":
        return None
    if text in ("none", "lz4"):
        return RAW if text == "none" else Method(Codec.LZ4)
    if name == "zstd" and (not colon or (level.lstrip("-").isdecimal() and int(level) in _LEVELS)):
        return Method(Codec.ZSTD, int(level) if colon else 1)
    raise UsageError(
        f"there is no compression {text!r}", hint=f"auto, none, lz4, zstd or zstd:LEVEL ({_LEVELS[0]} to {_LEVELS[-1]})"
    )


def packed(data: bytes | memoryview, method: Method) -> tuple[Codec, bytes | memoryview]:
    """Return how `data` travels: packed by `method`, or as it is where that is hardly longer."""
    match method.codec:
        case Codec.ZSTD:
            small = _compressor(method.level).compress(data)
        case Codec.LZ4:
            small = lz4.block.compress(data, store_size=False)
        case _:
            return Codec.RAW, data
    return (method.codec, small) if len(small) < len(data) * _WORTH else (Codec.RAW, data)


def unpacked(frame: Frame) -> bytes:
    """Return a data frame's plain bytes; DataError if they are not what was sent."""
    if frame.codec is Codec.RAW:
        return frame.payload  # checked as it arrived
    try:
        if frame.codec is Codec.ZSTD:
            if zstandard.frame_content_size(frame.payload) != frame.length:
                raise DataError(f"a packed block at {frame.offset} gives another length than its frame")
            plain = _decompressor().decompress(frame.payload)
        else:
            plain = lz4.block.decompress(frame.payload, uncompressed_size=frame.length)
    except (zstandard.ZstdError, lz4.block.LZ4BlockError) as error:
        raise DataError(f"a block at {frame.offset} cannot be unpacked: {error}") from error
    verify(frame, plain)
    return plain


def _compressor(level: int) -> zstandard.ZstdCompressor:
    """Return this thread's compressor: each belongs to one thread, and making one costs more than a small block.

    One level is kept: the higher ones hold tens of megabytes.
    """
    made: tuple[int, zstandard.ZstdCompressor] | None = getattr(_own, "compressor", None)
    if made is None or made[0] != level:
        made = _own.compressor = (level, zstandard.ZstdCompressor(level=level))
    return made[1]


def _decompressor() -> zstandard.ZstdDecompressor:
    found: zstandard.ZstdDecompressor | None = getattr(_own, "decompressor", None)
    if found is None:
        found = _own.decompressor = zstandard.ZstdDecompressor()
    return found
