"""What a diff or an image export holds, found in one pass: counts, order, overlaps, damage. Sans-IO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from agent.diff import Banner, DataRecord, End, FormatError, FromSnapshot, Protected, Size, ToSnapshot, Zero
from agent.diff import Event as DiffEvent
from agent.imagefile import ImageHeader, ImageReader


@dataclass
class DiffFacts:
    """One diff. `backwards` counts records that begin before the one in front of them, as in diffs of striped images.

    `overlaps` counts those that begin within another (as far as all are in order), `beyond` the
    bytes that lie behind the image's end.
    """

    version: int = 0
    base: str | None = None
    end: str | None = None
    protected: bool | None = None
    size: int | None = None
    records: int = 0
    data: int = 0
    zeros: int = 0
    overlaps: int = 0
    backwards: int = 0
    beyond: int = 0
    complete: bool = False


@dataclass
class Facts:
    """A whole file: the diffs in it, and for an image export what describes the image.

    `kind` is "diff", "image", "raw" (neither: perhaps an image of export format 1) or "empty".
    `damage` says where and why it cannot be read on, "" if it can to its end.
    """

    kind: str = "empty"
    bytes: int = 0
    image: ImageHeader | None = None
    diffs: list[DiffFacts] = field(default_factory=list)
    damage: str = ""


class Inspection:
    """Takes a stream piece by piece; `facts` is right after `finish`."""

    def __init__(self, extent: Callable[[int, int, bool], None] | None = None) -> None:
        """`extent` is called with offset, length and whether it holds data, of every record."""
        self.facts = Facts()
        self._extent = extent
        self._reader = ImageReader()
        self._last = self._reach = 0

    def feed(self, data: bytes) -> None:
        """Take the next bytes; after damage they are only counted."""
        self.facts.bytes += len(data)
        if self.facts.damage or self.facts.kind == "raw":
            return
        try:
            events = self._reader.feed(data)
        except FormatError as error:
            self._broken(str(error))
            return
        for event in events:
            self._take(event)

    def finish(self) -> Facts:
        """Say that nothing more comes, and return what was found."""
        facts = self.facts
        if facts.bytes and not facts.damage and facts.kind != "raw":
            try:
                self._reader.end()
            except FormatError as error:
                self._broken(str(error))
        return facts

    def _broken(self, why: str) -> None:
        if self._reader.kind == "raw":
            self.facts.kind = "raw"
        else:
            self.facts.kind = self._reader.kind
            self.facts.damage = why

    def _take(self, event: DiffEvent | ImageHeader) -> None:
        self.facts.kind = self._reader.kind
        if isinstance(event, ImageHeader):
            self.facts.image = event
            return
        if isinstance(event, Banner):
            self.facts.diffs.append(DiffFacts(version=event.version))
            self._last = self._reach = 0
            return
        now = self.facts.diffs[-1]
        match event:
            case FromSnapshot(name):
                now.base = name
            case ToSnapshot(name):
                now.end = name
            case Protected(protected):
                now.protected = protected
            case Size(size):
                now.size = size
            case DataRecord(offset, length):
                now.data += length
                self._record(now, offset, length, holds=True)
            case Zero(offset, length):
                now.zeros += length
                self._record(now, offset, length, holds=False)
            case End():
                now.complete = True
            case _:
                pass

    def _record(self, now: DiffFacts, offset: int, length: int, *, holds: bool) -> None:
        now.records += 1
        now.backwards += offset < self._last
        now.overlaps += not now.backwards and offset < self._reach
        now.beyond += max(0, offset + length - max(offset, now.size or 0))
        self._last, self._reach = offset, max(self._reach, offset + length)
        if self._extent is not None:
            self._extent(offset, length, holds)
