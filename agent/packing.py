"""Blocks into frames: checksummed, packed in threads as the transfer's method says, and handed to the lanes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from agent.budget import Budget
from agent.compression import RAW, Method, packed
from agent.lanes import Lanes
from agent.weigh import Weigher
from agent.wire import Codec, Kind, checksum, header

#: Blocks being packed, bytes.
_PACKING = 16 << 20
#: A block of at most so many bytes is packed on the spot: a thread's turn would take longer.
_INLINE = 32 << 10
#: After so many blocks in a row that did not shrink, only one of as many is tried.
_STUBBORN = 8


@dataclass(frozen=True, slots=True)
class _Block:
    """An extent's data on its way, its checksum, and who counts what travels for it."""

    tag: int
    segment: int
    offset: int
    data: memoryview
    signed: int
    count: Callable[[int], None]


class Packer:
    """Makes frames of extents; they may leave in another order than they came."""

    def __init__(self, lanes: Lanes, weigher: Weigher, group: asyncio.TaskGroup, threads: ThreadPoolExecutor) -> None:
        self._lanes = lanes
        self._weigher = weigher
        self._group = group
        self._threads = threads
        self._budget = Budget(_PACKING)
        self._unshrunk = 0

    async def zeros(self, tag: int, segment: int, offset: int, length: int, count: Callable[[int], None]) -> int:
        """Send an extent of zeros and return its checksum; `count` is told the bytes that travel for it."""
        signed = checksum(Kind.ZERO, tag, segment, offset, length, b"")
        head = header(Kind.ZERO, tag, segment, offset, length, signed, size=0)
        count(len(head))
        await self._lanes.put(head, b"")
        return signed

    async def data(self, tag: int, segment: int, offset: int, data: memoryview, count: Callable[[int], None]) -> int:
        """Send an extent's data, perhaps after this returns, and return its checksum; waits while too much is under way."""
        signed = checksum(Kind.DATA, tag, segment, offset, len(data), data)
        block = _Block(tag, segment, offset, data, signed, count)
        method = self._method()
        if method == RAW:
            await self._put(block, Codec.RAW, data)
        elif len(data) <= _INLINE:
            await self._tried(block, *packed(data, method))
        else:
            await self._budget.take(len(data))
            self._group.create_task(self._pack(block, method))
        return signed

    def _method(self) -> Method:
        if self._unshrunk >= _STUBBORN:
            self._unshrunk += 1
            if self._unshrunk % _STUBBORN:
                return RAW
        return self._weigher.method

    async def _pack(self, block: _Block, method: Method) -> None:
        try:
            await self._tried(block, *await asyncio.get_running_loop().run_in_executor(self._threads, packed, block.data, method))
        finally:
            self._budget.give(len(block.data))

    async def _tried(self, block: _Block, codec: Codec, payload: bytes | memoryview) -> None:
        self._unshrunk = 0 if codec is not Codec.RAW else self._unshrunk + 1
        await self._put(block, codec, payload)

    async def _put(self, block: _Block, codec: Codec, payload: bytes | memoryview) -> None:
        head = header(
            Kind.DATA, block.tag, block.segment, block.offset, len(block.data), block.signed, codec=codec, size=len(payload)
        )
        block.count(len(head) + len(payload))
        await self._lanes.put(head, payload)


@asynccontextmanager
async def packing(lanes: Lanes, weigher: Weigher, group: asyncio.TaskGroup) -> AsyncIterator[Packer]:
    """Yield a packer whose threads end with the block."""
    threads = ThreadPoolExecutor(os.cpu_count() or 1, "packing")
    try:
        yield Packer(lanes, weigher, group, threads)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
