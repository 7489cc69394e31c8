"""Blocks into frames: checksummed, packed in threads as the transfer's method says, and handed to the lanes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

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


class Packer:
    """Makes frames of extents; they may leave in another order than they came."""

    def __init__(self, lanes: Lanes, weigher: Weigher, group: asyncio.TaskGroup, threads: ThreadPoolExecutor) -> None:
        self._lanes = lanes
        self._weigher = weigher
        self._group = group
        self._threads = threads
        self._budget = Budget(_PACKING)
        self._unshrunk = 0

    async def zeros(self, tag: int, segment: int, offset: int, length: int) -> int:
        """Send an extent of zeros and return its checksum."""
        signed = checksum(Kind.ZERO, tag, segment, offset, length, b"")
        await self._lanes.put(header(Kind.ZERO, tag, segment, offset, length, signed, size=0), b"")
        return signed

    async def data(self, tag: int, segment: int, offset: int, data: memoryview) -> int:
        """Send an extent's data, perhaps after this returns, and return its checksum; waits while too much is under way."""
        signed = checksum(Kind.DATA, tag, segment, offset, len(data), data)
        method = self._method()
        if method == RAW:
            await self._lanes.put(header(Kind.DATA, tag, segment, offset, len(data), signed), data)
        elif len(data) <= _INLINE:
            await self._put(tag, segment, offset, data, signed, *packed(data, method))
        else:
            await self._budget.take(len(data))
            self._group.create_task(self._pack(tag, segment, offset, data, signed, method))
        return signed

    def _method(self) -> Method:
        if self._unshrunk >= _STUBBORN:
            self._unshrunk += 1
            if self._unshrunk % _STUBBORN:
                return RAW
        return self._weigher.method

    async def _pack(self, tag: int, segment: int, offset: int, data: memoryview, signed: int, method: Method) -> None:
        try:
            codec, payload = await asyncio.get_running_loop().run_in_executor(self._threads, packed, data, method)
            await self._put(tag, segment, offset, data, signed, codec, payload)
        finally:
            self._budget.give(len(data))

    async def _put(
        self, tag: int, segment: int, offset: int, data: memoryview, signed: int, codec: Codec, payload: bytes | memoryview
    ) -> None:
        self._unshrunk = 0 if codec is not Codec.RAW else self._unshrunk + 1
        head = header(Kind.DATA, tag, segment, offset, len(data), signed, codec=codec, size=len(payload))
        await self._lanes.put(head, payload)


@asynccontextmanager
async def packing(lanes: Lanes, weigher: Weigher, group: asyncio.TaskGroup) -> AsyncIterator[Packer]:
    """Yield a packer whose threads end with the block."""
    threads = ThreadPoolExecutor(os.cpu_count() or 1, "packing")
    try:
        yield Packer(lanes, weigher, group, threads)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
