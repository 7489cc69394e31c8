"""The far end of the wire: one controller's conversation, about one image or many, on this site's cluster.

One task reads frames and starts writes, one for each lane does the same, one for each image carries out its
requests (agent/strand.py), and one sends heartbeats. When the connection ends, for whatever reason, writes in
flight are finished, how far they came is saved, the locks are given back, and the process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
from collections.abc import Callable

from agent import messages as m
from agent.cluster import Cluster
from agent.door import Door, HandedOver
from agent.errors import DataError, LinkError, SiphonError, UsageError, ungrouped
from agent.replica import Flight
from agent.settings import ClusterSettings
from agent.stdio import Inlet, Stdio
from agent.strand import Strand, explained
from agent.threads import blocking
from agent.wire import Frame, Kind, Receiver

#: How long the end may take (seconds) before the process ends itself, leaving the rest to fencing.
_LAST_GRACE = 10.0


class Worker:
    """One conversation with one controller; `hanging` once an operation timed out that may still be done."""

    def __init__(self, cluster: Cluster, stdio: Stdio, hello: m.Hello, say: Callable[[str], None]) -> None:
        self._cluster = cluster
        self._stdio = stdio
        self._run = hello.run
        self._say = say
        self.hanging = False
        self._door = Door()
        self._flight = Flight()
        self._strands: dict[int, Strand] = {}
        self._steps: dict[int, Strand] = {}
        self._group: asyncio.TaskGroup
        self._answering: set[asyncio.Task[None]] = set()
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def serve(self, tag: int) -> None:
        """Answer the greeting `tag` and what follows, until the controller is gone; raises what broke the conversation."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                helpers = [group.create_task(each) for each in (self._welcome(tag), self._beat(), self._admit(), self._survive())]
                await self._read_all()
                # Whatever hangs from here on, the process ends; what it held is fenced by the next run.
                asyncio.get_running_loop().call_later(_LAST_GRACE, _leave, 1)
                for helper in (*helpers, *self._answering):
                    helper.cancel()
        finally:
            self._door.close()
            with ungrouped():
                async with asyncio.TaskGroup() as closing:
                    for strand in self._strands.values():
                        closing.create_task(self._closed(strand))

    async def _closed(self, strand: Strand) -> None:
        try:
            await strand.close()
        except LinkError:
            self.hanging = True
            raise

    async def _survive(self) -> None:
        await self._broken

    def _abort(self, error: SiphonError) -> None:
        self.hanging = True
        if not self._broken.done():
            self._broken.set_exception(error)

    async def _admit(self) -> None:
        """Take in lanes, each read by a task of its own."""
        async with asyncio.TaskGroup() as group:
            async for lane in self._door.lanes():
                group.create_task(self._read_lane(lane))

    async def _read_lane(self, lane: HandedOver) -> None:
        try:
            async for frame in Inlet(lane.fd, math.inf, Receiver(greeted=True)).frames():
                if frame.kind is Kind.CONTROL:
                    raise DataError("a message arrived over a lane of data")
                await self._extent(frame)
        except LinkError:
            self._say("a lane was cut: what it carried is sent again")
        finally:
            lane.close()

    async def _read_all(self) -> None:
        async for frame in self._stdio.frames():
            if frame.kind is Kind.CONTROL:
                await self._control(frame)
            else:
                await self._extent(frame)

    async def _extent(self, frame: Frame) -> None:
        # Data of a step that was given up may still come: they find no strand.
        if strand := self._steps.get(frame.tag):
            strand.put(frame)
            await self._flight.room()

    async def _control(self, frame: Frame) -> None:
        message = m.unpack(frame.payload)
        match message:
            case m.Heartbeat():
                pass
            case m.Ping():
                self._stdio.send(m.Pong())
            case m.Checkpointed():
                if strand := self._strands.get(frame.segment):
                    strand.announced(message)
            case _:
                strand = self._strands.get(frame.segment) or self._strand(frame.segment)
                if isinstance(message, m.Begin):
                    self._steps[frame.tag] = strand
                await strand.asked(frame.tag, message)

    def _strand(self, number: int) -> Strand:
        def send(message: m.Message, tag: int = 0) -> None:
            self._stdio.send(message, tag, number)

        strand = Strand(self._cluster, self._run, self._stdio.timeout, self._flight, send, self._abort, self._say)
        self._strands[number] = strand
        task = self._group.create_task(self._answered(number, strand))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)
        return strand

    async def _answered(self, number: int, strand: Strand) -> None:
        await strand.answer_all()
        del self._strands[number]
        self._steps = {tag: each for tag, each in self._steps.items() if each is not strand}

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(min(5.0, self._stdio.timeout / 4))
            self._stdio.send(m.Heartbeat())

    async def _welcome(self, tag: int) -> None:
        welcome = m.Welcome(
            fsid=self._cluster.fsid,
            host=socket.gethostname(),
            pid=os.getpid(),
            user=self._cluster.user,
            conf=self._cluster.conf,
            trouble=await blocking(self._cluster.trouble),
            door=self._door.name,
            secret=self._door.secret,
        )
        self._stdio.send(welcome, tag)


async def run_worker(settings: ClusterSettings, stdio: Stdio, first: tuple[int, m.Any], say: Callable[[str], None]) -> int:
    """Serve the controller whose `first` request has come, and return the exit code.

    The conversation's timeout bounds, in seconds, the controller's silence and each of the cluster's operations.
    """
    loop = asyncio.get_running_loop()
    tag, hello = first
    if not isinstance(hello, m.Hello):
        stdio.send(m.Failure("UsageError", f"a conversation does not begin with {type(hello).__name__}"), tag)
        return UsageError.exit_code
    stdio.timeout = hello.timeout
    try:
        cluster = await blocking(Cluster, settings, stdio.timeout)
    except SiphonError as error:
        stdio.send(m.Failure(type(error).__name__, f"at the target: {error}", error.hint), tag)
        return error.exit_code
    code = 0
    # Kept until the end: an image that is garbage is closed by librbd, and its lock given back.
    worker = Worker(cluster, stdio, hello, say)
    try:
        with ungrouped():
            await worker.serve(tag)
    except SiphonError as error:
        code = error.exit_code
        hanging = worker.hanging or isinstance(error, LinkError)
        if isinstance(error, LinkError):
            error = await explained(cluster, error)
        say(f"worker ends: {error}")
        with contextlib.suppress(OSError):
            stdio.send(m.Failure(type(error).__name__, str(error), error.hint))
        if hanging:
            # Operations may hang in librbd: closing would wait for them.
            _leave(code)
    loop.call_later(_LAST_GRACE, _leave, code)
    await blocking(cluster.close)
    return code


def _leave(code: int) -> None:
    os._exit(code)
