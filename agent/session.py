"""The controller's side of a conversation with a worker, over any channel of bytes.

`conversation` keeps one task reading and one sending heartbeats for as long as its body runs; when
the link or the worker dies, the body is cancelled and the reason raised in its place.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from agent import __version__
from agent import messages as m
from agent.compression import Method
from agent.errors import DataError, LinkError, SiphonError, SiteError, rebuilt, ungrouped
from agent.lanes import Channel, Lanes
from agent.model import Checkpoint
from agent.pace import UNLIMITED, Pacer, Timetable
from agent.packing import Packer, packing
from agent.weigh import Growth, Weigher
from agent.wire import PROTOCOL, Frame, Kind, Receiver, control, greeting

T = TypeVar("T", bound=m.Message)
#: How many round trips are measured at the beginning.
_PINGS = 2


@dataclass(frozen=True)
class Transfer:
    """How data travel: None leaves the packing, or the number of lanes, to what the link shows."""

    method: Method | None = None
    lanes: int | None = None
    limit: Timetable = UNLIMITED


class Far(Protocol):
    """The target site, whatever answers there: requests are answered in turn, and frames go out in between."""

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

    def expect_much(self) -> None:
        """Hear that a first copy is coming."""

    async def send(self, segment: int, offset: int, length: int, data: memoryview | None) -> int:
        """Send an extent (zeros where `data` is None) and return its checksum; waits while too much is under way."""


#: Opens a channel to a worker.
Connect = Callable[[], AbstractAsyncContextManager[Channel]]
#: Reaches the target site; what it is called with takes warnings.
Dial = Callable[[Callable[[str], None]], AbstractAsyncContextManager[Far]]


class Session:
    """One conversation: a greeting, lanes for data, and a strand for each image that it is about."""

    def __init__(
        self, channel: Channel, timeout: float, warn: Callable[[str], None], transfer: Transfer, say: Callable[[str], None]
    ) -> None:
        self.lanes: Lanes
        self.pacer = Pacer(transfer.limit)
        self._channel = channel
        self._timeout = timeout
        self._warn = warn
        self._weigher = Weigher(transfer.method)
        self.lanes = Lanes(channel, self._weigher, Growth(transfer.lanes), self.pacer, say)
        self.packer: Packer | None = None
        self._pings = 0
        self._rtt = math.inf
        self._pinged = 0.0
        self._welcome: asyncio.Future[m.Welcome] | None = None
        self._receiver = Receiver()
        self._number = 0
        self._waiting: dict[int, asyncio.Future[m.Any]] = {}
        self._strands: dict[int, Strand] = {}
        self._opened = 0
        self._greeted = asyncio.Event()

    def strand(self) -> Strand:
        """Return a part of the conversation for one more image."""
        self._opened += 1
        self._strands[self._opened] = strand = Strand(self, self._opened)
        return strand

    def forget(self, number: int) -> None:
        """A strand has ended."""
        self._strands.pop(number, None)

    async def hello(self, run: str) -> m.Welcome:
        """Greet, and return who is at the other end; SiteError if it speaks another protocol. Again is answered at once."""
        if self._welcome is None:
            self._welcome = asyncio.get_running_loop().create_future()
            self.write(greeting(__version__))
            try:
                welcome = await self.asked(m.Hello(run=run, timeout=self._timeout), self.next(), 0)
                if not isinstance(welcome, m.Welcome):
                    raise DataError(f"the worker answered the greeting with {type(welcome).__name__}")
            except SiphonError as error:
                self._welcome.set_exception(error)  # for whoever greets after us
                self._welcome.exception()  # which may be nobody
                raise
            self._ping()
            self._welcome.set_result(welcome)
            self.lanes.admit(welcome.door, welcome.secret)
        return await asyncio.shield(self._welcome)

    def _ping(self) -> None:
        self._pings += 1
        self._pinged = asyncio.get_running_loop().time()
        self.write(control(0, m.pack(m.Ping())))

    def _measured(self, rtt: float) -> None:
        """Take the shortest of a few round trips: a busy host answers late."""
        self._rtt = min(self._rtt, rtt)
        if self._pings < _PINGS:
            self._ping()
        else:
            self._weigher.far(self._rtt)
            self.lanes.measured(self._rtt)

    def next(self) -> int:
        """Return the number of the next request."""
        self._number += 1
        return self._number

    async def asked(self, request: m.Message, number: int, strand: int) -> m.Any:
        """Send request `number` and return what was answered; raises what the worker refused it with."""
        self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self.write(control(number, m.pack(request), strand), strand)
            answer = await self._waiting[number]
        finally:
            del self._waiting[number]
        if isinstance(answer, m.Failure):
            raise rebuilt(answer.kind, answer.message, answer.hint)
        return answer

    def write(self, data: bytes, strand: int = 0) -> None:
        """Send a control frame, or the greeting."""
        if strand in self._strands:
            self._strands[strand].sent += len(data)
        self._channel.write(data)

    async def carry_data(self) -> None:
        """Send data over the channels, and look after them; the conversation's third task."""
        async with asyncio.TaskGroup() as group, packing(self.lanes, self._weigher, group) as self.packer:
            group.create_task(self.lanes.carry(self._channel))
            await self.lanes.govern()

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
                self._see_versions()
            for frame in frames:
                self._take(frame)

    async def beat(self) -> None:
        """Send heartbeats; the conversation's other task."""
        await self._greeted.wait()
        while True:
            await asyncio.sleep(min(5.0, self._timeout / 4))
            self.write(control(0, m.pack(m.Heartbeat())))

    def _see_versions(self) -> None:
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
        strand = self._strands.get(frame.segment)
        match message:
            case m.Heartbeat():
                pass
            case m.Pong():
                self._measured(asyncio.get_running_loop().time() - self._pinged)
            case m.Durable():
                if strand is not None:
                    strand.durable(message.checkpoint)
            case m.Failure() if frame.tag == 0:
                error = rebuilt(message.kind, message.message, message.hint)
                if frame.segment == 0:
                    raise error
                if strand is not None:
                    strand.failed(error)
            case _:
                waiting = self._waiting.get(frame.tag)
                if waiting is not None and not waiting.done():
                    waiting.set_result(message)


class Strand:
    """The part of a conversation that is about one image: requests, answered in turn, and the data of its steps."""

    def __init__(self, session: Session, number: int) -> None:
        self.durable: Callable[[Checkpoint], None] = lambda _: None
        self.sent = 0
        self._session = session
        self._number = number
        self._step = 0
        self._asking: set[asyncio.Task[m.Any]] = set()
        self._error: SiphonError | None = None
        self._closed = False

    @property
    def grain(self) -> int:
        """The largest extent that `send` should be given at present, bytes."""
        return self._session.pacer.grain

    async def hello(self, run: str) -> m.Welcome:
        """Greet, if nobody has, and return who is at the other end; SiteError if it speaks another protocol."""
        return await self._session.hello(run)

    async def ask(self, request: m.Message, kind: type[T]) -> T:
        """Send a request and return its answer, which is of `kind`; raises what the worker refused it with."""
        self._check()
        number = self._session.next()
        if isinstance(request, m.Begin):
            self._step = number
        asking = asyncio.ensure_future(self._session.asked(request, number, self._number))
        self._asking.add(asking)
        try:
            answer = await asking
        except asyncio.CancelledError:
            asking.cancel()
            self._check()
            raise
        finally:
            self._asking.discard(asking)
        if not isinstance(answer, kind):
            raise DataError(f"the worker answered {type(request).__name__} with {type(answer).__name__}")
        self._closed = isinstance(request, m.Close)
        return answer

    def tell(self, message: m.Message) -> None:
        """Send a message that is not answered."""
        self._session.write(control(0, m.pack(message), self._number), self._number)

    def expect_much(self) -> None:
        """Hear that a first copy is coming."""
        self._session.lanes.expect_much()

    async def send(self, segment: int, offset: int, length: int, data: memoryview | None) -> int:
        """Send an extent (zeros where `data` is None) and return its checksum; waits while too much is under way."""
        self._check()
        packer = self._session.packer
        assert packer is not None
        if data is None:
            return await packer.zeros(self._step, segment, offset, length, self._count)
        return await packer.data(self._step, segment, offset, data, self._count)

    async def leave(self) -> None:
        """End this part; the worker lets go of the image, if it has not yet."""
        try:
            if not self._closed:
                await self._session.asked(m.Close(), self._session.next(), self._number)
        finally:
            self._session.forget(self._number)

    def failed(self, error: SiphonError) -> None:
        """Something went wrong at the other end beside a request: whoever waits or sends next hears of it."""
        self._error = self._error or error
        for each in self._asking:
            each.cancel()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _count(self, size: int) -> None:
        self.sent += size


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
    """Return a dial that converses with a worker of its own, behind the channels of `connect`; `say` gets decisions."""

    @asynccontextmanager
    async def dial(warn: Callable[[str], None]) -> AsyncIterator[Far]:
        async with connect() as channel, conversation(channel, timeout, warn, transfer, say) as session:
            yield session.strand()

    return dial
