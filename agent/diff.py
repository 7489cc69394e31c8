"""The diff format of `rbd export-diff` and `rbd import-diff`, versions 1 and 2. Sans-IO.

A stream is a banner, then records of a tag byte and a payload, all integers little-endian:

    v1   f le32 n, name · t le32 n, name · s le64 · w le64 offset, le64 length, data
         z le64 offset, le64 length · e
    v2   the same with le64 L after every tag but e (unknown tags are skipped by it), and
         p u8 (was the end snapshot protected?)

(Ceph: doc/dev/rbd-diff.rst.) `Decoder` takes bytes in pieces of any size and gives events; data
comes as it arrives and is never gathered whole. It has three outcomes: events, need more (an empty
list), or FormatError. `Encoder` returns the bytes of one record.
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from dataclasses import dataclass

from agent.errors import UsageError

BANNER_V1 = b"rbd diff v1\n"
BANNER_V2 = b"rbd diff v2\n"
_PAIR = struct.Struct("<QQ")
#: Longest snapshot name taken (librbd's names are far shorter), so that a damaged length allocates nothing.
MAX_NAME = 4096
#: Largest offset or length taken; librbd's images end far below, and a damaged one shows here.
MAX_EXTENT = 1 << 62


class FormatError(UsageError):
    """The stream is no diff, or a damaged one."""


@dataclass(frozen=True, slots=True)
class Banner:
    """The first line: which version follows."""

    version: int


@dataclass(frozen=True, slots=True)
class FromSnapshot:
    """Name of the start point; absent for a diff from the beginning."""

    name: str


@dataclass(frozen=True, slots=True)
class ToSnapshot:
    """Name of the end point; absent when that is the image's present content."""

    name: str


@dataclass(frozen=True, slots=True)
class Protected:
    """Whether the end snapshot was protected (version 2)."""

    protected: bool


@dataclass(frozen=True, slots=True)
class Size:
    """Size of the image at the end point, bytes."""

    size: int


@dataclass(frozen=True, slots=True)
class DataRecord:
    """A record of changed data begins; its data follow as they arrive, from byte `position` of the stream."""

    offset: int
    length: int
    position: int


@dataclass(frozen=True, slots=True)
class Data:
    """A piece of a record's data; a record may give several."""

    offset: int
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Zero:
    """A zeroed extent."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class End:
    """The stream is complete."""


Event = Banner | FromSnapshot | ToSnapshot | Protected | Size | DataRecord | Data | Zero | End


class Decoder:
    """Turns the bytes of one diff into events.

    `position` counts the bytes taken. An `embedded` diff may be followed by something else, which
    `rest` gives back; its positions count from `position` on.
    """

    def __init__(self, *, embedded: bool = False, position: int = 0) -> None:
        self.position = position
        self._embedded = embedded
        self._chunk = memoryview(b"")  # what was fed last, and how much of it was taken
        self._at = 0
        self._partly = 0  # bytes of the item at hand that came with earlier chunks
        self._events: list[Event] = []
        self._done = False
        self._expected = "the banner"
        self._left = 0
        self._parser = self._parse()
        next(self._parser)

    def feed(self, data: bytes | memoryview) -> list[Event]:
        """Take the next bytes and return what they complete; FormatError on damage. Data are views of what was fed."""
        self._chunk, self._at = memoryview(data), 0
        self._parser.send(None)
        # Copied, not replaced: the parser may be in the middle of appending to this very list.
        events = self._events.copy()
        self._events.clear()
        return events

    def pass_over(self) -> int:
        """Leave out what is still to come of the data record at hand; return how many bytes not to feed."""
        left, self._left = self._left, 0
        self.position += left
        return left

    @property
    def missing(self) -> int:
        """How many bytes of the data record at hand are still to come."""
        return self._left

    @property
    def done(self) -> bool:
        """Whether the end record has been read."""
        return self._done

    def rest(self) -> memoryview:
        """Return and forget what was fed behind the end of an embedded diff."""
        rest, self._at = self._chunk[self._at :], len(self._chunk)
        return rest

    def end(self) -> None:
        """Say that no more bytes come; FormatError if the diff is not complete."""
        if not self._done:
            raise FormatError(f"the diff is truncated: it ends at byte {self.position + self._partly} within {self._expected}")

    @property
    def _fed(self) -> int:
        """How many bytes of the last chunk are still to be taken."""
        return len(self._chunk) - self._at

    def _cut(self, size: int) -> memoryview:
        view = self._chunk[self._at : self._at + size]
        self._at += len(view)
        return view

    def _take(self, size: int, what: str) -> Generator[None, None, bytes]:
        self._expected = what
        taken = bytes(self._cut(size))
        while len(taken) < size:
            self._partly = len(taken)
            yield
            taken += self._cut(size - len(taken))
        self._partly = 0
        self.position += size
        return taken

    def _integer(self, size: int, what: str) -> Generator[None, None, int]:
        return int.from_bytes((yield from self._take(size, what)), "little")

    def _parse(self) -> Generator[None, None, None]:
        yield
        banner = yield from self._take(len(BANNER_V1), "the banner")
        if banner not in (BANNER_V1, BANNER_V2):
            raise FormatError(f"not an rbd diff: it begins with {banner!r}")
        version = 1 if banner == BANNER_V1 else 2
        self._events.append(Banner(version))
        while (tag := (yield from self._take(1, "a record's tag"))) != b"e":
            yield from self._record(tag, version)
        self._events.append(End())
        self._done = True
        while True:
            if self._fed and not self._embedded:
                raise FormatError(f"{self._fed} bytes follow the end record, at byte {self.position}")
            yield

    def _record(self, tag: bytes, version: int) -> Generator[None, None, None]:
        where = self.position - 1
        length = (yield from self._integer(8, f"a {tag!r} record's length")) if version == 2 else None
        if tag in b"ft":
            name = yield from self._name(tag, where)
            self._events.append(FromSnapshot(name) if tag == b"f" else ToSnapshot(name))
        elif tag == b"s":
            size = yield from self._integer(8, "the size")
            if size > MAX_EXTENT:
                raise FormatError(f"the record at byte {where} says that the image has {size} bytes")
            self._events.append(Size(size))
        elif tag == b"w":
            yield from self._data(length, where)
        elif tag == b"z":
            offset, count = _PAIR.unpack((yield from self._take(16, "a zero record")))
            if offset > MAX_EXTENT or count > MAX_EXTENT:
                raise FormatError(f"the zero record at byte {where} lies at {offset} and has {count} bytes")
            self._events.append(Zero(offset, count))
        elif tag == b"p" and version == 2:
            # Ceph 16.2 says that eight bytes follow and writes one; 18.2 says one. One it is.
            self._events.append(Protected((yield from self._integer(1, "the protection status")) != 0))
        elif length is not None:
            yield from self._skip(length, tag)
        else:
            raise FormatError(f"unknown record {tag!r} at byte {where}")

    def _name(self, tag: bytes, where: int) -> Generator[None, None, str]:
        size = yield from self._integer(4, "a snapshot's name")
        if size > MAX_NAME:
            raise FormatError(f"the {tag!r} record at byte {where} has a name of {size} bytes")
        try:
            return (yield from self._take(size, "a snapshot's name")).decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"the name in the {tag!r} record at byte {where} is not UTF-8") from error

    def _data(self, length: int | None, where: int) -> Generator[None, None, None]:
        offset, left = _PAIR.unpack((yield from self._take(16, "a data record")))
        if length is not None and length != left + 16:
            raise FormatError(f"the data record at byte {where} gives two lengths: {length} and {left} + 16")
        if left > MAX_EXTENT or offset > MAX_EXTENT:
            raise FormatError(f"the data record at byte {where} lies at {offset} and has {left} bytes")
        self._events.append(DataRecord(offset, left, self.position))
        self._expected = f"the data record at byte {where} ({left} bytes)"
        self._left = left
        while self._left:
            piece = self._cut(self._left)
            if not piece:
                yield
                continue
            self._events.append(Data(offset, piece))
            offset += len(piece)
            self.position += len(piece)
            self._left -= len(piece)

    def _skip(self, length: int, tag: bytes) -> Generator[None, None, None]:
        self._expected = f"a {tag!r} record"
        while length:
            count = len(self._cut(length))
            self.position += count
            length -= count
            if not count:
                yield


class Encoder:
    """Returns the bytes of records, of version 1 (what `rbd import-diff` takes) or 2 (inside image format 2)."""

    def __init__(self, version: int = 1) -> None:
        self.banner = BANNER_V1 if version == 1 else BANNER_V2
        self.end = b"e"
        self._version = version

    def from_snapshot(self, name: str) -> bytes:
        """Return a record that names the start point."""
        return self._named(b"f", name)

    def to_snapshot(self, name: str) -> bytes:
        """Return a record that names the end point."""
        return self._named(b"t", name)

    def protected(self, *, protected: bool) -> bytes:
        """Return a record that tells whether the end snapshot is protected (version 2 only)."""
        return self._head(b"p", 1) + bytes((protected,))

    def size(self, value: int) -> bytes:
        """Return a record of the image's size at the end point, bytes."""
        return self._head(b"s", 8) + struct.pack("<Q", value)

    def data_header(self, offset: int, length: int) -> bytes:
        """Return what precedes `length` bytes of changed data."""
        return self._head(b"w", 16 + length) + struct.pack("<QQ", offset, length)

    def zero(self, offset: int, length: int) -> bytes:
        """Return a record of a zeroed extent."""
        return self._head(b"z", 16) + struct.pack("<QQ", offset, length)

    def _named(self, tag: bytes, name: str) -> bytes:
        raw = name.encode()
        return self._head(tag, 4 + len(raw)) + struct.pack("<I", len(raw)) + raw

    def _head(self, tag: bytes, length: int) -> bytes:
        return tag if self._version == 1 else tag + struct.pack("<Q", length)
