"""The worker's end of the wire: frames over a pair of file descriptors, without a copy too many."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator

from agent import __version__
from agent.errors import LinkError
from agent.messages import Message, pack
from agent.wire import Frame, Receiver, control, greeting

_CHUNK = 256 << 10
_PIPE = 1 << 20


class Stdio:
    """Reads frames from one descriptor and writes control frames to another.

    `timeout` is how long (seconds) the other side may be silent while we listen.
    """

    def __init__(self, reading: int, writing: int, timeout: float) -> None:
        self.timeout = timeout
        self._reading = reading
        self._writing = writing
        self._receiver = Receiver()
        self._backlog = bytearray()
        os.set_blocking(reading, False)
        os.set_blocking(writing, False)
        # sshd gives a pipe of 64 KiB: a larger one lets it go on while we are busy.
        with contextlib.suppress(OSError):
            fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, _PIPE)

    @property
    def peer_protocol(self) -> int:
        """The protocol that the other side speaks, 0 until it has said so."""
        return self._receiver.peer_protocol

    def greet(self) -> None:
        """Send our greeting."""
        self._write(greeting(__version__))

    def send(self, message: Message, tag: int = 0) -> None:
        """Send a message without waiting; the messages of a worker are few and small."""
        self._write(control(tag, pack(message)))

    async def frames(self) -> AsyncIterator[Frame]:
        """Yield what arrives until the other side closes; LinkError if it is silent or cut in a frame."""
        while not self._receiver.greeted:
            data = await self._read_some()
            if not data:
                return
            for frame in self._receiver.feed(data):
                yield frame
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

    async def _read_some(self) -> bytes:
        while True:
            try:
                return os.read(self._reading, _CHUNK)
            except BlockingIOError:
                await self._readable()
            except OSError:
                return b""

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
