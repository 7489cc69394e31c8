"""The worker's end of the wire: frames from a file descriptor, without a copy too many, and messages to another."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator

from agent import __version__
from agent import messages as m
from agent.errors import LinkError
from agent.wire import PROTOCOL, Frame, Receiver, control, greeting

_CHUNK = 256 << 10
_PIPE = 1 << 20


class Inlet:
    """Frames that arrive at a descriptor; `timeout` is how long (seconds, perhaps infinite) the other side may be silent."""

    def __init__(self, reading: int, timeout: float, receiver: Receiver) -> None:
        self.timeout = timeout
        self._reading = reading
        self._receiver = receiver
        os.set_blocking(reading, False)
        # sshd gives a pipe of 64 KiB: a larger one lets it go on while we are busy.
        with contextlib.suppress(OSError):
            fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, _PIPE)

    async def frames(self) -> AsyncIterator[Frame]:
        """Yield what arrives until the other side closes; LinkError if it is silent or cut in a frame."""
        while True:
            place = self._receiver.buffer()
            try:
                count = os.readv(self._reading, [place])
            except BlockingIOError:
                await self._readable()
                continue
            except OSError:
                count = 0  # reset instead of closed
            if not count:
                if self._receiver.partial:
                    raise LinkError("the connection ended within a frame")
                return
            complete = self._receiver.received(count)
            if complete is not None:
                yield complete
                await asyncio.sleep(0)  # a stream that never pauses must not starve the writes

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        loop.add_reader(self._reading, _set, ready)
        try:
            async with asyncio.timeout(self.timeout):
                await ready
        except TimeoutError:
            raise LinkError(f"the controller was silent for {self.timeout:.0f} s") from None
        finally:
            loop.remove_reader(self._reading)


class Stdio(Inlet):
    """A conversation: what arrives at one descriptor, and control frames to another."""

    def __init__(self, reading: int, writing: int, timeout: float) -> None:
        super().__init__(reading, timeout, Receiver())
        self.reading = reading
        self._writing = writing
        self._backlog = bytearray()
        self._early: list[Frame] = []
        os.set_blocking(writing, False)

    async def greeted(self) -> tuple[int, m.Any] | None:
        """Exchange greetings and return the controller's first request and its number.

        None if it went away, or speaks another protocol: then it has our greeting, and says what is to be upgraded.
        """
        self._write(greeting(__version__))
        while not self._early:
            data = await self._read_some()
            if not data:
                return None
            self._early += self._receiver.feed(data)
            if self._receiver.greeted and self._receiver.peer_protocol != PROTOCOL:
                return None
        first = self._early.pop(0)
        return first.tag, m.unpack(first.payload)

    def send(self, message: m.Message, tag: int = 0, strand: int = 0) -> None:
        """Send a message without waiting; the messages of a worker are few and small."""
        self._write(control(tag, m.pack(message), strand))

    async def frames(self) -> AsyncIterator[Frame]:
        """Yield what follows the first request."""
        while self._early:
            yield self._early.pop(0)
        async for frame in super().frames():
            yield frame

    async def _read_some(self) -> bytes:
        while True:
            try:
                return os.read(self._reading, _CHUNK)
            except BlockingIOError:
                await self._readable()
            except OSError:
                return b""

    def _write(self, data: bytes) -> None:
        idle = not self._backlog
        self._backlog += data
        if idle:
            self._flush()

    def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._backlog:
                del self._backlog[: os.write(self._writing, self._backlog)]
        except BlockingIOError:
            loop.add_writer(self._writing, self._flush)
            return
        except OSError:
            self._backlog.clear()  # nobody listens any more; reading will tell
        loop.remove_writer(self._writing)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
