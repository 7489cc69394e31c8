"""Merging consecutive diffs into one: what a later diff writes hides what earlier ones wrote there. Pure.

All inputs are read side by side in ascending order, so memory does not depend on their size. Where
an image shrank, what lay beyond is gone for good: growing again brings zeros, which are laid between
the diffs like a diff of their own. (The rules of `rbd merge-diff`, for any number of diffs.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from agent.diff import Encoder
from agent.errors import ConflictError
from agent.model import Value


class Header(Value, frozen=True):
    """What a diff says before its records: names ("" for none) and the size at its end, bytes."""

    base: str
    end: str
    size: int


@dataclass(frozen=True, slots=True)
class Span:
    """Where a record lies; `holds` is False for zeros."""

    offset: int
    end: int
    holds: bool


class Input(Protocol):
    """One diff: its header, and its records one after the other, in ascending order."""

    header: Header

    def next(self) -> Span | None:
        """Go on to the next record, over what is left of the data of this one; None at the end."""

    def data(self, count: int) -> Iterator[bytes | memoryview]:
        """Yield the next `count` bytes of this record's data."""


class _Zeros:
    """The zeros that growing from `size` to `to` brings."""

    def __init__(self, size: int, to: int) -> None:
        self.header = Header(base="", end="", size=to)
        self._spans = [Span(size, to, holds=False)]

    def next(self) -> Span | None:
        return self._spans.pop() if self._spans else None

    def data(self, count: int) -> Iterator[bytes | memoryview]:  # noqa: ARG002  # as Input has it
        return iter(())


class _Layer:
    """An input and how far it has been taken."""

    def __init__(self, source: Input) -> None:
        self._source = source
        self.span = source.next()

    def data(self, count: int) -> Iterator[bytes | memoryview]:
        """Yield `count` bytes from where the span begins, and begin it behind them."""
        assert self.span is not None
        yield from self._source.data(count)
        self._cut(self.span.offset + count)

    def drop(self, until: int) -> None:
        """Forget everything below `until`."""
        while self.span is not None and self.span.offset < until:
            stop = min(until, self.span.end)
            if self.span.holds and stop < self.span.end:
                for _ in self._source.data(stop - self.span.offset):
                    pass
            self._cut(stop)

    def _cut(self, at: int) -> None:
        span = self.span
        assert span is not None
        self.span = Span(at, span.end, span.holds) if at < span.end else self._source.next()


def joined(headers: Sequence[tuple[str, Header]]) -> Header:
    """Return the header of the merged diff; ConflictError, naming both files, where one does not follow the other."""
    for (name, first), (other, second) in pairwise(headers):
        if first.end != second.base:
            ends = f"ends at the snapshot {first.end!r}" if first.end else "ends at no snapshot"
            begins = f"begins at the snapshot {second.base!r}" if second.base else "begins at the image's creation"
            raise ConflictError(
                f"the diffs do not join: {name} {ends}, {other} {begins}", hint="name them in the order they were made"
            )
        if not second.base:
            raise ConflictError(f"the diffs do not join: {name} ends at no snapshot, so nothing tells that {other} follows it")
    return Header(base=headers[0][1].base, end=headers[-1][1].end, size=headers[-1][1].size)


def merged(inputs: Sequence[Input], header: Header, encoder: Encoder) -> Iterator[bytes | memoryview]:
    """Yield the bytes of the merged diff."""
    yield encoder.banner
    if header.base:
        yield encoder.from_snapshot(header.base)
    if header.end:
        yield encoder.to_snapshot(header.end)
    yield encoder.size(header.size)
    # From the one that hides to the ones that are hidden.
    layers = [_Layer(each) for each in reversed(list(_with_growth(inputs)))]
    while (found := _lowest(layers)) is not None:
        top, at = found
        if at >= header.size:
            break  # the image ends before it
        span = layers[top].span
        assert span is not None
        stop = min(span.end, header.size, *(each.span.offset for each in layers[:top] if each.span is not None))
        if span.holds:
            yield encoder.data_header(at, stop - at)
            yield from layers[top].data(stop - at)
        else:
            yield encoder.zero(at, stop - at)
        for layer in layers:
            layer.drop(stop)
    # What lies behind the image's end is read all the same: whether the inputs are whole is known only then.
    for layer in layers:
        layer.drop(1 << 63)
    yield encoder.end


def _with_growth(inputs: Sequence[Input]) -> Iterator[Input]:
    before: Input | None = None
    for each in inputs:
        if before is not None and each.header.size > before.header.size:
            yield _Zeros(before.header.size, each.header.size)
        yield each
        before = each


def _lowest(layers: list[_Layer]) -> tuple[int, int] | None:
    """Return the layer to take next and from where: the lowest offset, the later diff where two begin there."""
    begin = [(layer.span.offset, index) for index, layer in enumerate(layers) if layer.span is not None]
    if not begin:
        return None
    at, index = min(begin)
    return index, at
