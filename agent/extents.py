"""Extents: lists of them that stay small, and cutting them at multiples of a unit. Pure."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

#: How many sets of objects one diff looks at: bounds the extents held in memory (6 MiB at the very worst, unstriped).
_WINDOW_OBJECTS = 512 << 10


class Extents:
    """Extents as librbd lists them, 24 bytes each; neighbours of one kind are joined unless `join` is False."""

    def __init__(self, *, join: bool = True) -> None:
        self._join = join
        self._numbers = array("Q")  # start, end, holds data
        self.bytes = 0

    def add(self, offset: int, length: int, exists: bool) -> None:  # noqa: FBT001  # librbd calls it so
        """Append an extent that lies behind all others; `exists` is False for one that holds zeros."""
        numbers = self._numbers
        self.bytes += length
        if self._join and numbers and numbers[-2] == offset and numbers[-1] == exists:
            numbers[-2] = offset + length
        else:
            numbers.extend((offset, offset + length, int(exists)))

    def __iter__(self) -> Iterator[tuple[int, int, bool]]:
        """Yield (offset, length, exists)."""
        numbers = self._numbers
        for index in range(0, len(numbers), 3):
            yield numbers[index], numbers[index + 1] - numbers[index], bool(numbers[index + 2])

    def __len__(self) -> int:
        return len(self._numbers) // 3


def windows(start: int, size: int, period: int) -> Iterator[tuple[int, int]]:
    """Cut an image, from the multiple of `period` at or before `start`, into what one diff may look at.

    `period` is what a set of objects holds, bytes: object size times stripe count. Some releases of librbd
    answer wrongly for offsets that are no multiple of it (Ceph trackers 53784, 53885).
    """
    first = start // period * period
    return pieces(first, size - first, period * _WINDOW_OBJECTS)


def pieces(offset: int, length: int, unit: int) -> Iterator[tuple[int, int]]:
    """Cut an extent at multiples of `unit`."""
    end = offset + length
    while offset < end:
        stop = min(end, (offset // unit + 1) * unit)
        yield offset, stop - offset
        offset = stop
