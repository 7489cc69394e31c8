"""Writing into an image with many operations in flight, whatever the data come from: a diff, an export, an archive."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass

from agent.budget import Budget
from agent.cluster import Image
from agent.diff import Data, Event, Zero
from agent.errors import UsageError
from agent.zeros import runs

#: Writes in flight, bytes.
_FLIGHT = 32 << 20


@dataclass(frozen=True)
class Imported:
    """What an import did; `resumed_from` is the byte of the stream at which it went on."""

    state: str
    bytes: int
    written: int
    resumed_from: int | None = None


class Writes:
    """Writes in flight on an image, bounded; `settle` waits for all of them.

    `blank` says that the image holds nothing: zeros behind all that was written since need no operation.
    """

    def __init__(self, image: Image, *, blank: bool = False) -> None:
        self.written = 0
        self._image = image
        self._blank = blank
        self._top = 0  # where what was written ends
        self._budget = Budget(_FLIGHT)
        self._tasks: set[asyncio.Task[None]] = set()
        self._landings: set[asyncio.Task[None]] = set()
        self._failed: BaseException | None = None

    async def data(self, offset: int, data: bytes | memoryview) -> None:
        """Start writing `data`, its zeros as holes."""
        whole = as_bytes(data)
        for begin, end, holds in runs(offset, whole):
            if holds:
                await self._put(offset + begin, whole[begin:end])
            else:
                await self.zeros(offset + begin, end - begin)

    async def _put(self, offset: int, data: bytes) -> None:
        self._check()
        await self._budget.take(len(data))
        self._top = max(self._top, offset + len(data))
        self._start(self._write(offset, data))
        self.written += len(data)

    async def zeros(self, offset: int, length: int) -> None:
        """Start making an extent zero."""
        self._check()
        if self._blank and offset >= self._top:
            return
        # Zeros weigh nothing, but each is an operation.
        await self._budget.take(64 << 10)
        self._start(self._zero(offset, length))

    async def settle(self) -> None:
        """Wait until everything is durable; raises what failed."""
        await self.landing()

    def landing(self) -> asyncio.Task[None]:
        """Return a task that ends once everything started so far is durable, and raises what failed of it."""
        landing = asyncio.get_running_loop().create_task(self._land(frozenset(self._tasks)))
        self._landings.add(landing)
        landing.add_done_callback(self._landed)
        return landing

    async def abandon(self) -> None:
        """Wait for what is in flight, whatever comes of it: nobody may close the image before."""
        if under_way := self._tasks | self._landings:
            await asyncio.wait(under_way)

    async def _land(self, tasks: frozenset[asyncio.Task[None]]) -> None:
        if tasks:
            await asyncio.wait(tasks)
        self._check()
        # An image's own settings (conf_rbd_cache) may have turned a cache on that we turned off.
        await self._image.flush()

    def _landed(self, landing: asyncio.Task[None]) -> None:
        self._landings.discard(landing)
        if not landing.cancelled():
            landing.exception()  # told to whoever asks for it, and by every later write

    def _check(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _start(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed = self._failed or error

    async def _write(self, offset: int, data: bytes) -> None:
        try:
            await self._image.write(offset, data)
        finally:
            self._budget.give(len(data))

    async def _zero(self, offset: int, length: int) -> None:
        try:
            await self._image.write_zeroes(offset, length)
        finally:
            self._budget.give(64 << 10)


async def write_all(writes: Writes, events: list[Event], size: int) -> None:
    """Start writing what `events` hold; UsageError if it lies behind the image's end at `size`."""
    for event in events:
        match event:
            case Data(offset, data):
                if offset + len(data) > size:
                    raise UsageError(f"the diff writes at {offset}, behind the image's end at {size}")
                await writes.data(offset, data)
            case Zero(offset, length):
                if offset < size:
                    await writes.zeros(offset, min(length, size - offset))
            case _:
                pass


def as_bytes(view: bytes | memoryview) -> bytes:
    """Return what librbd takes: the bytes of `view`, copied only where it is a part of something larger."""
    if isinstance(view, bytes):
        return view
    there = view.obj
    return there if isinstance(there, bytes) and len(there) == len(view) else bytes(view)


def resize(image: Image, size: int) -> None:
    """Give the image that size, unless it has it."""
    if image.size() != size:
        image.resize(size)
