"""A diff being read from a file or a pipe, record by record. Blocking."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import pairwise

import xxhash

from agent.diff import Data, DataRecord, Decoder, End, Event, FormatError, FromSnapshot, Size, ToSnapshot, Zero
from agent.errors import UsageError
from agent.files import CHUNK, Reading
from agent.merge import Header, Span

#: Bytes read to find the header.
_START = 4 << 10
#: Bytes read where only a record's head is wanted.
_HEAD = 64 << 10
#: From how many bytes on a record's data are read by themselves, and the head of the record behind it.
_LARGE, _SMALL = 256 << 10, 17
#: Bytes of data handed on at a time.
_PIECE = 1 << 20


class DiffFile:
    """One diff: its header at once, what follows in batches. `position` and `digest` say what was read so far."""

    def __init__(self, source: Reading) -> None:
        """Read the header; FormatError if there is none."""
        self.source = source
        self.position = 0
        self._decoder = Decoder()
        self._events: list[Event] = []
        self._large = False
        self._state = xxhash.xxh3_128()
        base = end = ""
        size: int | None = None
        while size is None:
            for event in self._read(_START):
                match event:
                    case FromSnapshot(name) if size is None:
                        base = name
                    case ToSnapshot(name) if size is None:
                        end = name
                    case Size(value) if size is None:
                        size = value
                    case Data() | DataRecord() | Zero() | End() if size is None:
                        raise FormatError(f"{source.name} names no size before its first record")
                    case _ if size is not None:
                        self._events.append(event)
                    case _:
                        pass
        self.header = Header(base=base, end=end, size=size)

    @property
    def digest(self) -> str:
        """Return the xxh3-128 of the bytes read so far, 32 hexadecimal digits."""
        return self._state.hexdigest()

    @property
    def done(self) -> bool:
        """Whether everything has been handed out."""
        return self._decoder.done and not self._events

    def batch(self, until: int | None = None) -> list[Event]:
        """Return the next events, reading no further than byte `until`; empty at the end; FormatError on damage."""
        events, self._events = self._events, []
        # A chunk may complete nothing: only the end of the stream, or of what was asked for, is an end.
        while not events and not self._decoder.done and (until is None or self.position < until):
            count = self._wanted()
            events = self._read(count if until is None else min(count, until - self.position))
        if not events and self._decoder.done:
            # A pipe is read to its end: whoever writes it must not break, and nothing may follow.
            self._read(1)
        if any(isinstance(each, FromSnapshot | ToSnapshot | Size) for each in events):
            raise FormatError(f"{self.source.name} names a snapshot or a size behind its header")
        return events

    def _wanted(self) -> int:
        """Return how much to read: the data of a large record end where a piece of ours ends, and need no copy."""
        if self._decoder.missing >= _LARGE:
            self._large = True
            return min(self._decoder.missing, CHUNK)
        if self._large and not self._decoder.missing:
            self._large = False
            return _SMALL
        return CHUNK

    def events(self) -> Iterator[Event]:
        """Yield everything that follows the header."""
        while events := self.batch():
            yield from events

    def _read(self, count: int) -> list[Event]:
        data = self.source.read(count)
        self.position += len(data)
        self._state.update(data)
        try:
            if not data:
                self._decoder.end()
            return self._decoder.feed(data)
        except FormatError as error:
            raise FormatError(f"{self.source.name}: {error}", hint=error.hint) from error


class Ordered:
    """An input of a merge that is read as it comes."""

    def __init__(self, diff: DiffFile) -> None:
        self.header = diff.header
        self.begin(diff.source.name, diff.events())

    def begin(self, name: str, events: Iterator[Event]) -> None:
        """Read `events` from here on; `name` is what errors call them."""
        self._name = name
        self._events = events
        self._left = memoryview(b"")
        self._at = 0

    def next(self) -> Span | None:
        """Go on to the next record; UsageError if it lies before the last one."""
        self._left = memoryview(b"")
        for event in self._events:
            match event:
                case DataRecord(offset, length) if length:
                    return self._behind(Span(offset, offset + length, holds=True))
                case Zero(offset, length) if length:
                    return self._behind(Span(offset, offset + length, holds=False))
                case _:
                    continue
        return None

    def _behind(self, span: Span) -> Span:
        if span.offset < self._at:
            raise UsageError(
                f"{self._name} is not in ascending order (at {span.offset}), as diffs of striped images are not",
                hint="give it as a file, not through a pipe",
            )
        self._at = span.end
        return span

    def data(self, count: int) -> Iterator[bytes | memoryview]:
        """Yield the next `count` bytes of the record."""
        while count:
            if not self._left:
                event = next(self._events)
                assert isinstance(event, Data)
                self._left = memoryview(event.data)
            piece, self._left = self._left[:count], self._left[count:]
            count -= len(piece)
            yield piece


class Sorted:
    """An input of a merge whose records are not in order: an index of them is kept, some 200 bytes each."""

    def __init__(self, source: Reading, header: Header, spans: list[tuple[int, int, int, int]]) -> None:
        self.header = header
        self._source = source
        self._spans = iter(spans)
        self._position = self._offset = 0
        for (offset, end, _, _), (following, _, _, _) in pairwise(spans):
            if following < end:
                raise UsageError(f"{source.name} has records that overlap, at {offset} and {following}")

    def next(self) -> Span | None:
        """Go on to the next record."""
        found = next(self._spans, None)
        if found is None:
            return None
        offset, end, self._position, holds = found
        return Span(offset, end, holds=bool(holds))

    def data(self, count: int) -> Iterator[bytes | memoryview]:
        """Yield the next `count` bytes of the record."""
        while count:
            piece = self._source.read_at(self._position, min(count, _PIECE))
            if not piece:
                raise FormatError(f"{self._source.name} became shorter while it was read")
            self._position += len(piece)
            count -= len(piece)
            yield piece


def for_merging(source: Reading) -> Ordered | Sorted:
    """Return an input of a merge; a regular file is first looked through, over its data."""
    if not source.regular:
        return Ordered(DiffFile(source))
    in_order, at = True, 0
    for offset, length, _, _ in _records(source):
        in_order, at = in_order and offset >= at, offset + length
    source.rewind()
    if in_order:
        return Ordered(DiffFile(source))
    numbers = array("Q")
    for record in _records(source):
        numbers.extend(record)
    source.rewind()
    spans = sorted((numbers[i], numbers[i] + numbers[i + 1], numbers[i + 2], numbers[i + 3]) for i in range(0, len(numbers), 4))
    return Sorted(source, DiffFile(source).header, spans)


def _records(source: Reading) -> Iterator[tuple[int, int, int, int]]:
    """Yield (offset, length, position of its data, holds data) of every record that is not empty."""
    decoder = Decoder()
    at = 0
    while not decoder.done:
        data = source.read(_HEAD)
        at += len(data)
        if not data:
            decoder.end()
        for event in decoder.feed(data):
            match event:
                case DataRecord(offset, length, position) if length:
                    yield offset, length, position, 1
                case Zero(offset, length) if length:
                    yield offset, length, 0, 0
                case _:
                    pass
        if over := decoder.pass_over():
            at += over
            if at > source.size:
                raise FormatError(f"{source.name} is truncated: it ends at byte {source.size} within a data record")
            source.rewind(at)
