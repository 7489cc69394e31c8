"""Asking the target which changed blocks it has already, some batches ahead of sending the others."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

from agent import messages as m
from agent.errors import DataError, ungrouped
from agent.extents import pieces
from agent.sameness import BLOCK, Thrift, names
from agent.session import Far
from agent.source import Piece
from agent.threads import blocking

#: What one question is about at most, bytes and blocks.
_BATCH_BYTES, _BATCH_BLOCKS = 2 << 20, 512
#: Up to how many bytes a piece is copied.
_SMALL = 256 << 10
#: Questions under way.
_AHEAD = 4


@dataclass
class _Batch:
    """Pieces in order; `answer` tells of each of `blocks` whether the target has it, None where it was not asked."""

    pieces: list[Piece] = field(default_factory=list)
    blocks: list[tuple[int, int]] = field(default_factory=list)
    views: list[memoryview] = field(default_factory=list)
    size: int = 0
    answer: asyncio.Task[bytes] | None = None

    def add(self, piece: Piece) -> None:
        if piece.data is not None and piece.length <= _SMALL:
            # A small view would keep all of what was read with it alive.
            piece = Piece(piece.offset, piece.length, memoryview(bytes(piece.data)))
        self.pieces.append(piece)
        if piece.data is not None:
            for at, count in pieces(piece.offset, piece.length, BLOCK):
                self.blocks.append((at, count))
                self.views.append(piece.data[at - piece.offset : at - piece.offset + count])
            self.size += piece.length

    @property
    def full(self) -> bool:
        return self.size >= _BATCH_BYTES or len(self.blocks) >= _BATCH_BLOCKS or len(self.pieces) >= _BATCH_BLOCKS

    def parted(self, equal: bytes) -> Iterator[tuple[Piece, bool]]:
        """Yield the pieces, cut where what is `equal` at the target, a byte for each block, meets what is not."""
        at = 0
        for piece in self.pieces:
            if piece.data is None:
                yield piece, False
                continue
            blocks = list(pieces(piece.offset, piece.length, BLOCK))
            told = zip(blocks, equal[at : at + len(blocks)], strict=True)
            at += len(blocks)
            for known, run in groupby(told, key=itemgetter(1)):
                run_of = [block for block, _ in run]
                start, length = run_of[0][0], sum(count for _, count in run_of)
                data = piece.data[start - piece.offset : start - piece.offset + length]
                yield Piece(start, length, data), bool(known)


@asynccontextmanager
async def comparing(far: Far, found: AsyncIterator[Piece], thrift: Thrift) -> AsyncIterator[AsyncIterator[tuple[Piece, bool]]]:
    """Yield an iterator of the same pieces in the same order, cut into those that the target has already (True) and others."""
    with ungrouped():
        async with asyncio.TaskGroup() as group:
            yield _compared(far, found, thrift, group)


async def _compared(
    far: Far, found: AsyncIterator[Piece], thrift: Thrift, group: asyncio.TaskGroup
) -> AsyncIterator[tuple[Piece, bool]]:
    asked: deque[_Batch] = deque()
    async for batch in _batches(found):
        if batch.blocks and thrift.worth():
            batch.answer = group.create_task(_ask(far, batch))
        asked.append(batch)
        if len(asked) > _AHEAD:
            for part in await _settled(asked.popleft(), thrift):
                yield part
    while asked:
        for part in await _settled(asked.popleft(), thrift):
            yield part


async def _batches(found: AsyncIterator[Piece]) -> AsyncIterator[_Batch]:
    batch = _Batch()
    async for piece in found:
        batch.add(piece)
        if batch.full:
            yield batch
            batch = _Batch()
    if batch.pieces:
        yield batch


async def _ask(far: Far, batch: _Batch) -> bytes:
    joined = await blocking(names, batch.views)
    answer = await far.ask(m.Compare(extents=tuple(batch.blocks), names=joined), m.Compared)
    if len(answer.equal) != len(batch.blocks):
        raise DataError(f"the worker compared {len(answer.equal)} of {len(batch.blocks)} blocks")
    return answer.equal


async def _settled(batch: _Batch, thrift: Thrift) -> Iterable[tuple[Piece, bool]]:
    if batch.answer is None:
        return ((piece, False) for piece in batch.pieces)
    clock = asyncio.get_running_loop().time
    began = clock()
    equal = await batch.answer
    saved = sum(count for (_, count), known in zip(batch.blocks, equal, strict=True) if known)
    thrift.compared(batch.size, saved, clock() - began)
    return batch.parted(equal)
