r"""Image format 2 of `rbd export`: a description of the image, then a diff for each snapshot and the present. Sans-IO.

    "rbd image v2\n", records: tag u8, le64 L, payload:
        O le64 order · T le64 features · U le64 stripe unit · C le64 stripe count
        M le32 n, key, le32 n, value
    a bare E; "rbd image diffs v2\n", le64 N (snapshots and one more), N diffs of version 2,
    the last without an end snapshot.

(Ceph: src/tools/rbd/action/Export.cc.) Image format 1 is the raw content, with no banner at all.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Generator
from typing import Literal

from agent.diff import BANNER_V1, BANNER_V2, Decoder, Event, FormatError
from agent.model import Value

IMAGE_BANNER = b"rbd image v2\n"
DIFFS_BANNER = b"rbd image diffs v2\n"
#: Longest header record, and most diffs, that are taken: a damaged length allocates nothing.
MAX_RECORD = 1 << 20
MAX_DIFFS = 1 << 20


class ImageHeader(Value, frozen=True):
    """How the image is laid out, its metadata, and how many diffs follow."""

    order: int
    features: int
    stripe_unit: int
    stripe_count: int
    metadata: dict[str, str]
    diffs: int


def header_bytes(header: ImageHeader) -> bytes:
    """Return everything that precedes the first diff."""
    numbers = ((b"O", header.order), (b"T", header.features), (b"U", header.stripe_unit), (b"C", header.stripe_count))
    parts = [IMAGE_BANNER, *(_record(tag, struct.pack("<Q", number)) for tag, number in numbers)]
    for key, value in header.metadata.items():
        parts.append(_record(b"M", _string(key) + _string(value)))
    return b"".join([*parts, b"E", DIFFS_BANNER, struct.pack("<Q", header.diffs)])


def _record(tag: bytes, payload: bytes) -> bytes:
    return tag + struct.pack("<Q", len(payload)) + payload


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<I", len(raw)) + raw


class ImageReader:
    """Turns the bytes of an image export, or of a single diff, into events.

    `kind` tells which it is once that is known: "image", "diff" or "raw"; the last is told by a
    FormatError too.
    """

    def __init__(self) -> None:
        self.kind: Literal["", "image", "diff", "raw"] = ""
        self._buffer = bytearray()
        self._position = 0
        self._diff: Decoder | None = None
        self._left = 0
        self._header: ImageHeader | None = None
        self._parser = self._parse()
        self._expected = "the banner"
        next(self._parser)

    def feed(self, data: bytes) -> list[Event | ImageHeader]:
        """Take the next bytes and return what they complete; FormatError on damage."""
        events: list[Event | ImageHeader] = []
        rest: bytes | memoryview = data
        if self._diff is None and self._expected != "nothing":
            rest = self._begin(data)
            if self._header is not None:
                events.append(self._header)
                self._header = None
        while self._diff is not None and rest:
            events += self._diff.feed(rest)
            rest = self._diff.rest()
            if self._diff.done:
                self._next_diff(self._diff)
        if self._expected == "nothing" and rest:
            raise FormatError(f"{len(rest)} bytes follow the last diff")
        return events

    def _begin(self, data: bytes) -> bytes:
        """Take what precedes the first diff; return what belongs to that."""
        self._buffer += data
        self._parser.send(None)
        if self._diff is None:
            return b""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    def end(self) -> None:
        """Say that no more bytes come; FormatError if something is missing."""
        if self._diff is not None:
            self._diff.end()
            return
        if self._expected != "nothing":
            raise FormatError(f"it is truncated: it ends at byte {self._position + len(self._buffer)} within {self._expected}")

    def _next_diff(self, done: Decoder) -> None:
        if self.kind == "diff":
            return
        self._left -= 1
        self._diff = Decoder(embedded=True, position=done.position) if self._left else None
        self._expected = "a diff" if self._left else "nothing"

    def _take(self, size: int, what: str) -> Generator[None, None, bytes]:
        self._expected = what
        while len(self._buffer) < size:
            yield
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        self._position += size
        return taken

    def _parse(self) -> Generator[None, None, None]:
        yield
        # Twelve bytes tell a diff, thirteen an image; a raw image may be shorter than either.
        while len(self._buffer) < len(BANNER_V1):
            if not IMAGE_BANNER.startswith(self._buffer[:12]) and not _begins_diff(self._buffer):
                break
            yield
        if self._buffer[:12] in (BANNER_V1, BANNER_V2):
            self.kind = "diff"
            self._diff = Decoder()
            yield
            return
        while IMAGE_BANNER.startswith(self._buffer) and len(self._buffer) < len(IMAGE_BANNER):
            yield
        if not self._buffer.startswith(IMAGE_BANNER):
            self.kind = "raw"
            raise FormatError(f"neither a diff nor an image of format 2: it begins with {bytes(self._buffer[:12])!r}")
        self.kind = "image"
        yield from self._image()
        yield

    def _image(self) -> Generator[None, None, None]:
        yield from self._take(len(IMAGE_BANNER), "the banner")
        numbers = {b"O": 22, b"T": 0, b"U": 0, b"C": 0}
        metadata: dict[str, str] = {}
        while (tag := (yield from self._take(1, "a header record"))) != b"E":
            where = self._position - 1
            length = int.from_bytes((yield from self._take(8, "a header record")), "little")
            if length > MAX_RECORD:
                raise FormatError(f"the header record {tag!r} at byte {where} has {length} bytes")
            payload = yield from self._take(length, f"the header record {tag!r}")
            if tag in numbers:
                numbers[tag] = int.from_bytes(payload[:8], "little")
            elif tag == b"M":
                key, value = _pair(payload, where)
                metadata[key] = value
        if not 12 <= numbers[b"O"] <= 25:
            raise FormatError(f"the image's object size is 2^{numbers[b'O']} bytes, which RBD does not have")
        banner = yield from self._take(len(DIFFS_BANNER), "the banner of the diffs")
        if banner != DIFFS_BANNER:
            raise FormatError(f"at byte {self._position - len(banner)} the diffs should begin, and {banner!r} is there")
        count = int.from_bytes((yield from self._take(8, "the number of diffs")), "little")
        if not 1 <= count <= MAX_DIFFS:
            raise FormatError(f"the export says that it holds {count} diffs")
        self._left = count
        self._header = ImageHeader(numbers[b"O"], numbers[b"T"], numbers[b"U"], numbers[b"C"], metadata, count)
        self._diff = Decoder(embedded=True, position=self._position)
        self._expected = "a diff"


def _begins_diff(data: bytes | bytearray) -> bool:
    return BANNER_V1.startswith(data) or BANNER_V2.startswith(data)


def _pair(payload: bytes, where: int) -> tuple[str, str]:
    """Return key and value of a metadata record."""
    size = int.from_bytes(payload[:4], "little")
    key, rest = payload[4 : 4 + size], payload[4 + size :]
    if len(key) == size and len(rest) == 4 + int.from_bytes(rest[:4], "little"):
        with contextlib.suppress(UnicodeDecodeError):
            return key.decode(), rest[4:].decode()
    raise FormatError(f"the metadata record at byte {where} is damaged")
