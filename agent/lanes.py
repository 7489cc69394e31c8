"""Frames over several channels at once, each taken by the channel that has room first.

OpenSSH's server gives a channel a window of 2 MiB: at 100 ms one channel carries 20 MB/s however wide the
link is, and a TCP connection has such a bound too. So data goes over further channels, two a connection, into the
worker that owns the image. Control messages stay on the first. A lane that breaks ends the attempt, and the next one
goes on from what is durable; one that cannot be opened is done without.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from agent import __version__
from agent import messages as m
from agent.budget import Budget
from agent.errors import DataError, LinkError, SiphonError, rebuilt
from agent.host import Idle
from agent.pace import Pacer
from agent.weigh import Growth, Look, Weigher
from agent.wire import Receiver, control, greeting

#: Frames that wait for a lane, bytes.
_QUEUED = 4 << 20
#: A payload up to this many bytes travels in one packet with its header.
_JOINED = 16 << 10
#: How often the transfer is looked at, seconds, and for how long the first lane must have been full before others are opened.
_LOOK, _FULL = 0.25, 0.1
#: How long a lane may take to join, seconds.
_PATIENCE = 20.0
#: From how far on (seconds, there and back) lanes are opened on the word of one glance: a busy host looks 10 ms away.
_LONG = 0.03
#: Channels a connection: the windows of two are what a TCP connection's own window holds.
_EACH = 2


class Channel(Protocol):
    """Bytes to and from a process at the far end; `rtt` is about how long (seconds) an answer takes, as its opening showed."""

    sent: int
    rtt: float

    def write(self, data: bytes | memoryview) -> None:
        """Send bytes, without waiting."""

    async def drain(self) -> None:
        """Wait until more may be written."""

    async def receive(self) -> bytes:
        """Return the next bytes, b"" once the other side is gone."""

    def verdict(self, *, greeted: bool) -> SiphonError:
        """Tell why the other side is gone."""

    def more(self, count: int, *, fresh: bool) -> AbstractAsyncContextManager[tuple[Channel, ...]]:
        """Open channels to further processes of the same command, over a connection of their own if `fresh`."""


class Lanes:
    """The channels of one conversation, and what decides about them."""

    def __init__(self, primary: Channel, weigher: Weigher, growth: Growth, pacer: Pacer, say: Callable[[str], None]) -> None:
        self.sent = 0
        self.rtt = primary.rtt
        self.count = 1
        self._primary = primary
        self._weigher = weigher
        self._growth = growth
        self._pacer = pacer
        self._say = say
        self._queue: asyncio.Queue[tuple[bytes, bytes | memoryview]] = asyncio.Queue()
        self._budget = Budget(_QUEUED)
        self._busy = asyncio.Event()
        self._waiting = 0
        self._blocked = self._blocked_since = 0.0
        self._opening = 0
        self._early = False
        self._closed_to_more = False
        self._measured = False
        self._news = asyncio.Event()
        self._door: asyncio.Future[tuple[str, str]] = asyncio.get_running_loop().create_future()

    async def put(self, head: bytes, payload: bytes | memoryview) -> None:
        """Send a frame over whichever lane has room; waits while none has."""
        size = len(head) + len(payload)
        await self._pacer.passing(size)
        now = asyncio.get_running_loop().time
        if not self._waiting:
            self._blocked_since = now()
        self._waiting += 1
        try:
            await self._budget.take(size)
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._blocked += now() - self._blocked_since
        self.sent += size
        self._queue.put_nowait((head, payload))
        self._busy.set()

    def expect_much(self) -> None:
        """Open what the distance asks for now: once the first lane is full, the others would take a second to come."""
        self._early = True
        self._busy.set()
        self._news.set()

    def measured(self, rtt: float) -> None:
        """Take the distance (seconds, there and back) from now on."""
        self.rtt, self._measured = rtt, True
        self._news.set()

    def admit(self, door: str, secret: str) -> None:
        """Take what lanes need to join the worker."""
        self._door.set_result((door, secret))

    async def carry(self, channel: Channel) -> None:
        """Take frames and send them over `channel`, as long as it lives."""
        while True:
            head, payload = await self._queue.get()
            if len(payload) <= _JOINED:
                channel.write(head + payload)
            else:
                channel.write(head)
                channel.write(payload)
            self._budget.give(len(head) + len(payload))
            await channel.drain()

    async def govern(self) -> None:
        """Look now and then at how the transfer goes, and change what helps it."""
        async with asyncio.TaskGroup() as group:
            while not self._measured:
                await self._news.wait()
                self._news.clear()
                if self._early and self.rtt > _LONG:
                    self._extend_to(self._growth.first(self.rtt), group)
            idle = Idle()
            loop = asyncio.get_running_loop()
            full = 0.0
            while True:
                await self._busy.wait()
                self._busy.clear()
                if self._early or self._growth.asked:
                    self._extend_to(self._growth.first(self.rtt), group)
                at, sent, blocked = loop.time(), self.sent, self._blocked_until(loop.time())
                idle.share()
                await asyncio.sleep(_LOOK if full > _FULL else _FULL)
                now = loop.time()
                until = self._blocked_until(now)
                span = now - at
                look = Look(min(1.0, (until - blocked) / span), idle.share(), (self.sent - sent) / span)
                full += until - blocked
                if self._waiting:
                    self._busy.set()
                if full > _FULL and not self._opening:  # how it goes while lanes come says nothing of how it will
                    self._weigher.look(look)
                    wanted = max(self._growth.first(self.rtt), self._growth.look(look, self.count, self.rtt))
                    self._extend_to(wanted, group)

    def _extend_to(self, wanted: int, group: asyncio.TaskGroup) -> None:
        """Open lanes until there are as many as `wanted`, unless some could not be opened."""
        while self.count < wanted and not self._closed_to_more:
            fresh = self.count >= _EACH
            number = min(_EACH if fresh else _EACH - self.count, wanted - self.count)
            self.count += number
            group.create_task(self._extend(number, fresh=fresh))

    def _blocked_until(self, now: float) -> float:
        """Return for how long frames had to wait so far, seconds."""
        return self._blocked + (now - self._blocked_since if self._waiting else 0.0)

    async def _extend(self, number: int, *, fresh: bool) -> None:
        """Open `number` lanes and send over them."""
        joined = False
        self._opening += 1
        try:
            async with self._opened(number, fresh=fresh) as channels:
                joined = True
                self._opening -= 1
                async with asyncio.TaskGroup() as group:
                    for channel in channels:
                        group.create_task(self.carry(channel))
                        group.create_task(_watch(channel))
        except SiphonError as error:
            if joined:
                raise
            self._opening -= 1
            self.count -= number
            self._closed_to_more = True
            self._say(f"no more than {self.count} lane(s): {error}")

    @asynccontextmanager
    async def _opened(self, number: int, *, fresh: bool) -> AsyncIterator[tuple[Channel, ...]]:
        async with self._primary.more(number, fresh=fresh) as channels:
            # The connections may stand before the worker does.
            door, secret = await asyncio.shield(self._door)
            try:
                async with asyncio.timeout(_PATIENCE):
                    await asyncio.gather(*(_join(channel, door, secret) for channel in channels))
            except TimeoutError:
                raise LinkError(f"a lane's process did not answer within {_PATIENCE:.0f} s") from None
            self._say(f"{self.count} lanes at {self.rtt * 1e3:.0f} ms, packing with {self._weigher.method}")
            yield channels


async def _join(channel: Channel, door: str, secret: str) -> None:
    """See that the process behind `channel` hands its input over; an error of ours if it does not."""
    channel.write(greeting(__version__) + control(1, m.pack(m.Join(door, secret))))
    receiver = Receiver()
    while data := await channel.receive():
        for frame in receiver.feed(data):
            match m.unpack(frame.payload):
                case m.Done():
                    return
                case m.Failure(kind, message, hint):
                    raise rebuilt(kind, message, hint)
                case other:
                    raise DataError(f"a lane was answered with {type(other).__name__}")
    raise channel.verdict(greeted=receiver.greeted)


async def _watch(channel: Channel) -> None:
    """Read until the lane is gone, which is an error: what it carried may be lost."""
    while await channel.receive():
        pass
    raise LinkError(f"a lane broke: {channel.verdict(greeted=True)}")
