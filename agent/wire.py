"""Frames: what travels between controller and worker. Sans-IO.

Each side first sends one line of text, the greeting, and then frames. A frame is a header of 48
bytes, little-endian, and its payload:

    2  magic "rs"      1 kind        1 codec      4 payload size   4 tag       4 segment
    8  offset          8 length     16 checksum

A control frame carries one message (msgpack); its tag is the number of the request it belongs to,
its segment the strand: which of the images that the conversation is about, 0 for none.
Data and zero frames carry an extent of the step `tag`; they name their segment, so that they may
arrive in any order and over any number of lanes. Data may be packed (`codec`; agent/compression.py).
The checksum is xxh3-128 over kind, tag, segment, offset, length and the extent's plain bytes; the sum of
the data frames' checksums (mod 2^128) is the digest of a step, whatever their order.

The greeting is text so that every future version, and a person, can read it. What a chatty shell
profile prints before it is skipped and reported.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from enum import IntEnum

import xxhash

from agent.errors import DataError, SiteError

PROTOCOL = 2
#: Largest payload of a frame, bytes: no length from the other side allocates more.
MAX_PAYLOAD = 8 << 20
#: How much noise before the greeting is skipped, bytes.
MAX_NOISE = 64 << 10
_MAGIC = b"rs"
_HEADER = struct.Struct("<2sBBIIIQQ16s")
_SIGNED = struct.Struct("<BIIQQ")
_GREETING = re.compile(rb"(?:^|\n)rbd-siphon wire=(\d+) version=(\S{1,40})\n")
DIGEST_MASK = (1 << 128) - 1


class Kind(IntEnum):
    """What a frame is."""

    CONTROL = 1
    DATA = 2
    ZERO = 3


class Codec(IntEnum):
    """How a payload is packed."""

    RAW = 0
    ZSTD = 1
    LZ4 = 2


_KINDS = frozenset(int(each) for each in Kind)
_CODECS = frozenset(int(each) for each in Codec)


@dataclass(frozen=True, slots=True)
class Frame:
    """A received frame; `checksum` as an integer adds up to the digest.

    It was right, unless the payload is packed: then `verify` tells, once it is unpacked.
    """

    kind: Kind
    codec: Codec
    tag: int
    segment: int
    offset: int
    length: int
    payload: bytes
    checksum: int


def greeting(version: str) -> bytes:
    """Return the line that opens a conversation."""
    return f"rbd-siphon wire={PROTOCOL} version={version}\n".encode()


def control(tag: int, message: bytes, strand: int = 0) -> bytes:
    """Return a control frame of a strand, 0 for the conversation itself."""
    signed = checksum(Kind.CONTROL, tag, strand, 0, len(message), message)
    return header(Kind.CONTROL, tag, strand, 0, len(message), signed) + message


def checksum(kind: int, tag: int, segment: int, offset: int, length: int, plain: bytes | memoryview) -> int:
    """Return a frame's checksum; `plain` is the extent's bytes, none for zeros."""
    state = xxhash.xxh3_128(_SIGNED.pack(kind, tag, segment, offset, length))
    state.update(plain)
    return int.from_bytes(state.digest(), "little")


def header(
    kind: Kind, tag: int, segment: int, offset: int, length: int, signed: int, *, codec: Codec = Codec.RAW, size: int | None = None
) -> bytes:
    """Return a frame's header; `signed` is its checksum, `size` that of the payload where it is not `length` (packed, or zeros)."""
    payload = length if size is None else size
    return _HEADER.pack(_MAGIC, kind, codec, payload, tag, segment, offset, length, signed.to_bytes(16, "little"))


def verify(frame: Frame, plain: bytes | memoryview) -> None:
    """DataError if `plain` is not what the frame's checksum was made of."""
    if checksum(frame.kind, frame.tag, frame.segment, frame.offset, frame.length, plain) != frame.checksum:
        raise DataError(f"a frame arrived damaged (offset {frame.offset}, length {frame.length})")


class Receiver:
    """Turns received bytes into frames: the greeting first, then `buffer` and `received` by turns.

    `buffer` gives the place where the next bytes belong, so that a large payload is read straight
    into where it is kept. `feed` does both for bytes that are at hand already.
    """

    def __init__(self, *, greeted: bool = False) -> None:
        """Begin with the greeting; where that was `greeted` elsewhere, with the frames."""
        self.noise = b""
        self.peer_version = ""
        self.peer_protocol = PROTOCOL if greeted else 0
        self._opening = bytearray()
        self._header = bytearray(_HEADER.size)
        self._space = bytearray()
        self._payload: memoryview | None = None
        self._fields: tuple[int, int, int, int, int, int, bytes] | None = None
        self._filled = 0

    @property
    def greeted(self) -> bool:
        """Whether the other side's greeting has arrived."""
        return self.peer_protocol != 0

    @property
    def partial(self) -> bool:
        """Whether a frame is incomplete: an end of stream now is a cut."""
        return self._filled > 0 or self._payload is not None

    def feed(self, data: bytes) -> list[Frame]:
        """Take bytes and return the frames they complete; DataError or SiteError if they are none."""
        view = memoryview(data)
        frames: list[Frame] = []
        if not self.greeted:
            view = memoryview(self._greet(data))
        while view:
            place = self.buffer()
            count = min(len(place), len(view))
            place[:count] = view[:count]
            view = view[count:]
            frame = self.received(count)
            if frame is not None:
                frames.append(frame)
        return frames

    def buffer(self) -> memoryview:
        """Return where the next bytes belong."""
        target = memoryview(self._header) if self._payload is None else self._payload
        return target[self._filled :]

    def received(self, count: int) -> Frame | None:
        """Say that `count` bytes were put into `buffer`; return the frame if it is complete now."""
        self._filled += count
        if self._payload is None:
            if self._filled < _HEADER.size:
                return None
            self._open()
        assert self._payload is not None
        if self._filled < len(self._payload):
            return None
        return self._close()

    def _greet(self, data: bytes) -> bytes:
        self._opening += data
        match = _GREETING.search(self._opening)
        if match is None:
            if len(self._opening) > MAX_NOISE:
                raise SiteError(
                    f"the other end does not speak our protocol; it began with {bytes(self._opening[:80])!r}",
                    hint="a shell profile that prints must not do so for commands; see what it prints with: ssh HOST true",
                )
            return b""
        self.noise = bytes(self._opening[: match.start()])
        self.peer_protocol, self.peer_version = int(match[1]), match[2].decode(errors="replace")
        rest = bytes(self._opening[match.end() :])
        self._opening.clear()
        return rest

    @property
    def opening(self) -> bytes:
        """What has arrived while the greeting has not."""
        return bytes(self._opening)

    def _open(self) -> None:
        magic, kind, codec, size, tag, segment, offset, length, digest = _HEADER.unpack(self._header)
        if magic != _MAGIC or kind not in _KINDS or codec not in _CODECS or size > MAX_PAYLOAD:
            raise DataError(f"what arrived is not a frame: {bytes(self._header[:12])!r}")
        wrong = size > length if codec != Codec.RAW else size != (0 if kind == Kind.ZERO else length)
        if wrong or (codec != Codec.RAW and kind != Kind.DATA) or (kind != Kind.ZERO and length > MAX_PAYLOAD):
            raise DataError(f"a frame's lengths do not agree: {size} and {length}")
        self._fields = (kind, codec, tag, segment, offset, length, digest)
        if size > len(self._space):
            self._space = bytearray(size)
        self._payload = memoryview(self._space)[:size]
        self._filled = 0

    def _close(self) -> Frame:
        assert self._payload is not None
        assert self._fields is not None
        kind, codec, tag, segment, offset, length, digest = self._fields
        payload = bytes(self._payload)
        self._payload, self._fields, self._filled = None, None, 0
        frame = Frame(Kind(kind), Codec(codec), tag, segment, offset, length, payload, int.from_bytes(digest, "little"))
        if frame.codec is Codec.RAW:
            verify(frame, payload)
        return frame
