"""The controller's side of a conversation with a worker, over any channel of bytes.

`conversation` keeps one task reading and one sending heartbeats for as long as its body runs; when
the link or the worker dies, the body is cancelled and the reason raised in its place.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from agent import __version__
from agent import messages as m
from agent.compression import Method
from agent.errors import DataError, LinkError, SiteError, rebuilt, ungrouped
from agent.lanes import Channel, Lanes
from agent.model import Checkpoint
from agent.pace import UNLIMITED, Pacer, Timetable
from agent.packing import Packer, packing
from agent.weigh import Growth, Weigher
from agent.wire import PROTOCOL, Frame, Kind, Receiver, control, greeting

T = TypeVar("T", bound=m.Message)


@dataclass(frozen=True)
class Transfer:
    """How data travel: None leaves the packing, or the number of lanes, to what the link shows."""

    method: Method | None = None
    lanes: int | None = None
    limit: Timetable = UNLIMITED


class Far(Protocol):
    """The target site, whatever answers there: requests go out one at a time, and frames in between."""

    #: Called with what is durable there, whenever that has moved on.
    durable: Callable[[Checkpoint], None]

    @property
    def sent(self) -> int:
        """Bytes sent so far."""

    @property
    def grain(self) -> int:
        """The largest extent that `send` should be given at present, bytes."""

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

    def __init__(
        self, channel: Channel, timeout: float, warn: Callable[[str], None], transfer: Transfer, say: Callable[[str], None]
    ) -> None:
        self._channel = channel
        self._timeout = timeout
        self._warn = warn
        self._weigher = Weigher(transfer.method)
        self._pacer = Pacer(transfer.limit)
        self._lanes = Lanes(channel, self._weigher, Growth(transfer.lanes), self._pacer, say)
        self._packer: Packer | None = None
        self._pinged = 0.0
        self._welcomed: asyncio.Future[m.Welcome] = asyncio.get_running_loop().create_future()
        self._receiver = Receiver()
        self._number = 0
        self._told = 0
        self._waiting: asyncio.Future[m.Any] | None = None
        self._greeted = asyncio.Event()
        self.durable: Callable[[Checkpoint], None] = lambda _: None

    @property
    def sent(self) -> int:
        """Bytes given to the channels so far."""
        return self._lanes.sent + self._told

    @property
    def grain(self) -> int:
        """The largest extent that `send` should be given at present, bytes."""
        return self._pacer.grain

    async def hello(self, run: str) -> m.Welcome:
        """Greet, and return who is at the other end; SiteError if it speaks another protocol."""
        self._write(greeting(__version__))
        welcome = await self.ask(m.Hello(run=run, timeout=self._timeout), m.Welcome)
        self._pinged = asyncio.get_running_loop().time()
        self.tell(m.Ping())
        self._welcomed.set_result(welcome)
        return welcome

    async def ask(self, request: m.Message, kind: type[T]) -> T:
        """Send a request and return its answer, which is of `kind`; raises what the worker refused it with."""
        self._number += 1
        self._waiting = asyncio.get_running_loop().create_future()
        self._write(control(self._number, m.pack(request)))
        if isinstance(request, m.Create):
            self._lanes.expect_much()
        answer = await self._waiting
        if isinstance(answer, m.Failure):
            raise rebuilt(answer.kind, answer.message, answer.hint)
        if not isinstance(answer, kind):
            raise DataError(f"the worker answered {type(request).__name__} with {type(answer).__name__}")
        return answer

    def tell(self, message: m.Message) -> None:
        """Send a message that is not answered."""
        self._write(control(0, m.pack(message)))

    async def send(self, segment: int, offset: int, length: int, data: memoryview | None) -> int:
        """Send an extent (zeros where `data` is None) and return its checksum; waits while too much is under way."""
        assert self._packer is not None
        if data is None:
            return await self._packer.zeros(self._number, segment, offset, length)
        return await self._packer.data(self._number, segment, offset, data)

    async def carry_data(self) -> None:
        """Send data over the channels, and look after them; the conversation's third task."""
        async with asyncio.TaskGroup() as group, packing(self._lanes, self._weigher, group) as self._packer:
            group.create_task(self._lanes.carry(self._channel))
            welcome = await self._welcomed
            await self._lanes.govern(welcome.door, welcome.secret)

    def _write(self, data: bytes) -> None:
        self._told += len(data)
        self._channel.write(data)

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
            case m.Pong():
                self._lanes.rtt = asyncio.get_running_loop().time() - self._pinged
                self._weigher.far(self._lanes.rtt)
            case m.Durable():
                self.durable(message.checkpoint)
            case m.Failure() if frame.tag == 0:
                raise rebuilt(message.kind, message.message, message.hint)
            case _:
                if frame.tag == self._number and self._waiting is not None and not self._waiting.done():
                    self._waiting.set_result(message)


@asynccontextmanager
async def conversation(
    channel: Channel, timeout: float, warn: Callable[[str], None], transfer: Transfer, say: Callable[[str], None]
) -> AsyncIterator[Session]:
    """Talk to the worker at the other end of `channel`; `timeout` is how long it may be silent (seconds), `say` gets decisions."""
    session = Session(channel, timeout, warn, transfer, say)
    with ungrouped():
        async with asyncio.TaskGroup() as group:
            helpers = [group.create_task(each) for each in (session.read_all(), session.beat(), session.carry_data())]
            yield session
            for helper in helpers:
                helper.cancel()


def dial_worker(connect: Connect, timeout: float, transfer: Transfer, say: Callable[[str], None]) -> Dial:
    """Return a dial that converses with the worker behind the channels of `connect`; `say` gets decisions."""

    @asynccontextmanager
    async def dial(warn: Callable[[str], None]) -> AsyncIterator[Far]:
        async with connect() as channel, conversation(channel, timeout, warn, transfer, say) as session:
            yield session

    return dial
