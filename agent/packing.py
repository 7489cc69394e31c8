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

    def __init__(self, lanes: Lanes, weigher: Weigher) -> None:
        self._lanes = lanes
        self._weigher = weigher
        self._blocks: asyncio.Queue[tuple[_Block, Method]] = asyncio.Queue()
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
            # A small view would keep all of what was read with it alive for as long as it waits for a lane.
            await self._put(block, Codec.RAW, bytes(data) if len(data) <= _INLINE else data)
        elif len(data) <= _INLINE:
            await self._tried(block, *packed(data, method))
        else:
            await self._budget.take(len(data))
            self._blocks.put_nowait((block, method))
        return signed

    def _method(self) -> Method:
        if self._unshrunk >= _STUBBORN:
            self._unshrunk += 1
            if self._unshrunk % _STUBBORN:
                return RAW
        return self._weigher.method

    async def pack_all(self, threads: ThreadPoolExecutor) -> None:
        """Pack blocks as they come, one at a time; several of these run beside each other."""
        loop = asyncio.get_running_loop()
        while True:
            block, method = await self._blocks.get()
            try:
                await self._tried(block, *await loop.run_in_executor(threads, packed, block.data, method))
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
    count = os.cpu_count() or 1
    threads = ThreadPoolExecutor(count, "packing")
    packer = Packer(lanes, weigher)
    # One more than threads: while a block waits for a lane, the next is packed.
    for _ in range(count + 1):
        group.create_task(packer.pack_all(threads))
    try:
        yield packer
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
