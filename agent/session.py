"""The controller's side of a conversation with a worker, over any channel of bytes.

`conversation` keeps one task reading and one sending heartbeats for as long as its body runs; when
the link or the worker dies, the body is cancelled and the reason raised in its place.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol, TypeVar

from agent import __version__
from agent import messages as m
from agent.errors import DataError, LinkError, SiphonError, SiteError, rebuilt, ungrouped
from agent.model import Checkpoint
from agent.wire import PROTOCOL, Frame, Kind, Receiver, control, greeting, header

#: A payload up to this many bytes travels in one packet with its header.
_JOINED = 16 << 10

T = TypeVar("T", bound=m.Message)


class Channel(Protocol):
    """Bytes to and from a worker."""

    sent: int

    def write(self, data: bytes | memoryview) -> None:
        """Send bytes, without waiting."""

    async def drain(self) -> None:
        """Wait until more may be written."""

    async def receive(self) -> bytes:
        """Return the next bytes, b"" once the other side is gone."""

    def verdict(self, *, greeted: bool) -> SiphonError:
        """Tell why the other side is gone."""


class Far(Protocol):
    """The target site, whatever answers there: requests go out one at a time, and frames in between."""

    #: Called with what is durable there, whenever that has moved on.
    durable: Callable[[Checkpoint], None]

    @property
    def sent(self) -> int:
        """Bytes sent so far."""

    async def hello(self, run: str) -> m.Welcome:
        """Greet, and return who is at the other end."""

    async def ask(self, request: m.Message, kind: type[T]) -> T:
        """Send a request and return its answer, which is of `kind`; raises what it was refused with."""

    def tell(self, message: m.Message) -> None:
        """Send a message that is not answered."""

    async def send(self, segment: int, offset: int, length: int, data: memoryview | None) -> int:
        """Send an extent (zeros where `data` is None) and return its checksum; waits while too much is under way."""


#: Opens a channel to a worker.
Connect = Callable[[], AbstractAsyncContextManager[Channel]]
#: Reaches the target site; what it is called with takes warnings.
Dial = Callable[[Callable[[str], None]], AbstractAsyncContextManager[Far]]


class Session:
    """Requests to one worker, one at a time, and frames in between."""

    def __init__(self, channel: Channel, timeout: float, warn: Callable[[str], None]) -> None:
        self._channel = channel
        self._timeout = timeout
        self._warn = warn
        self._receiver = Receiver()
        self._number = 0
        self._waiting: asyncio.Future[m.Any] | None = None
        self._greeted = asyncio.Event()
        self.durable: Callable[[Checkpoint], None] = lambda _: None

    @property
    def sent(self) -> int:
        """Bytes given to the channel so far."""
        return self._channel.sent

    async def hello(self, run: str) -> m.Welcome:
        """Greet, and return who is at the other end; SiteError if it speaks another protocol."""
        self._channel.write(greeting(__version__))
        await self._greeted.wait()
        return await self.ask(m.Hello(run=run, timeout=self._timeout), m.Welcome)

    async def ask(self, request: m.Message, kind: type[T]) -> T:
        """Send a request and return its answer, which is of `kind`; raises what the worker refused it with."""
        self._number += 1
        self._waiting = asyncio.get_running_loop().create_future()
        self._channel.write(control(self._number, m.pack(request)))
        answer = await self._waiting
        if isinstance(answer, m.Failure):
            raise rebuilt(answer.kind, answer.message, answer.hint)
        if not isinstance(answer, kind):
            raise DataError(f"the worker answered {type(request).__name__} with {type(answer).__name__}")
        return answer

    def tell(self, message: m.Message) -> None:
        """Send a message that is not answered."""
        self._channel.write(control(0, m.pack(message)))

    async def send(self, segment: int, offset: int, length: int, data: memoryview | None) -> int:
        """Send an extent (zeros where `data` is None) and return its checksum; waits while too much is under way."""
        if data is None:
            head, checksum = header(Kind.ZERO, self._number, segment, offset, b"", length)
            self._channel.write(head)
        else:
            head, checksum = header(Kind.DATA, self._number, segment, offset, data)
            if length <= _JOINED:
                self._channel.write(head + data)
            else:
                self._channel.write(head)
                self._channel.write(data)
        await self._channel.drain()
        return checksum

    async def read_all(self) -> None:
        """Read until the other side is gone, which is an error; the conversation's reading task."""
        while True:
            try:
                async with asyncio.timeout(self._timeout):
                    data = await self._channel.receive()
            except TimeoutError:
                raise LinkError(f"the target site was silent for {self._timeout:.0f} s") from None
            if not data:
                raise self._channel.verdict(greeted=self._receiver.greeted)
            frames = self._receiver.feed(data)
            if self._receiver.greeted and not self._greeted.is_set():
                self._welcome()
            for frame in frames:
                self._take(frame)

    async def beat(self) -> None:
        """Send heartbeats; the conversation's other task."""
        await self._greeted.wait()
        while True:
            await asyncio.sleep(min(5.0, self._timeout / 4))
            self.tell(m.Heartbeat())

    def _welcome(self) -> None:
        if self._receiver.noise.strip():
            noise = self._receiver.noise.strip()[:120].decode(errors="replace")
            self._warn(f"the target's shell printed before the worker began, which was skipped: {noise!r}")
        theirs = self._receiver.peer_protocol
        if theirs != PROTOCOL:
            side = "the target" if theirs < PROTOCOL else "this host"
            raise SiteError(
                f"the versions do not match: rbd-siphon {__version__} here speaks protocol {PROTOCOL}, "
                f"{self._receiver.peer_version} at the target speaks {theirs}",
                hint=f"upgrade rbd-siphon on {side}",
            )
        self._greeted.set()

    def _take(self, frame: Frame) -> None:
        if frame.kind is not Kind.CONTROL:
            raise DataError("the worker sent data")
        message = m.unpack(frame.payload)
        match message:
            case m.Heartbeat():
                pass
            case m.Durable():
                self.durable(message.checkpoint)
            case m.Failure() if frame.tag == 0:
                raise rebuilt(message.kind, message.message, message.hint)
            case _:
                if frame.tag == self._number and self._waiting is not None and not self._waiting.done():
                    self._waiting.set_result(message)


@asynccontextmanager
async def conversation(channel: Channel, timeout: float, warn: Callable[[str], None]) -> AsyncIterator[Session]:
    """Talk to the worker at the other end of `channel`; `timeout` is how long it may be silent (seconds)."""
    session = Session(channel, timeout, warn)
    with ungrouped():
        async with asyncio.TaskGroup() as group:
            helpers = [group.create_task(session.read_all()), group.create_task(session.beat())]
            yield session
            for helper in helpers:
                helper.cancel()


def dial_worker(connect: Connect, timeout: float) -> Dial:
    """Return a dial that converses with the worker behind the channels of `connect`."""

    @asynccontextmanager
    async def dial(warn: Callable[[str], None]) -> AsyncIterator[Far]:
        async with connect() as channel, conversation(channel, timeout, warn) as session:
            yield session

    return dial
