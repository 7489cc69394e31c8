"""A TCP relay before the SSH server: adds delay, limits the rate, cuts after so many bytes.

Delay is per direction (half of the round trip it adds); the rate holds for each direction; the
cut counts what the client sent and then resets both sides, as a firewall that lost its state does.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from .ports import LOOPBACK

CHUNK = 256 << 10


@dataclass
class Relay:
    """One relay to `port`; `delay` in seconds each way, `rate` in bytes a second, `cut_after` in bytes.

    The rate is that of the line: all connections share it, either direction for itself.

    `cuts` is how many connections may still be cut. `held` makes it swallow everything without
    closing anything, as a dead link does.
    """

    port: int
    delay: float = 0.0
    rate: float = 0.0
    cut_after: int | None = None
    cuts: int = 1
    cut_downstream: bool = False
    held: bool = False
    on_bytes: Callable[[int], None] | None = None
    sent: int = 0
    _free_at: dict[bool, float] = field(default_factory=dict)
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    async def start(self, port: int = 0) -> int:
        """Listen on loopback and return the port."""
        self._server = await asyncio.start_server(self._serve, LOOPBACK, port, limit=4 << 20)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Stop listening and reset what is open."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            _reset(writer)

    def cut_now(self) -> None:
        """Reset every open connection."""
        for writer in list(self._writers):
            _reset(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(LOOPBACK, self.port, limit=4 << 20)
        except OSError:
            writer.close()
            return
        pair = (writer, far_writer)
        for each in pair:
            each.transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._writers.update(pair)
        cut = asyncio.Event()
        tasks = [
            asyncio.create_task(self._pump(reader, far_writer, cut, up=True)),
            asyncio.create_task(self._pump(far_reader, writer, cut, up=False)),
            asyncio.create_task(cut.wait()),
        ]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for each in pair:
            if cut.is_set():
                _reset(each)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for each in pair:
            with contextlib.suppress(OSError):
                each.close()
            self._writers.discard(each)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, cut: asyncio.Event, *, up: bool) -> None:
        counted = up is not self.cut_downstream
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=1024)
        sender = asyncio.create_task(self._send(queue, writer))
        loop = asyncio.get_running_loop()
        passed = 0
        try:
            while data := await reader.read(CHUNK):
                if self.held:
                    continue
                if counted:
                    passed += len(data)
                    self.sent += len(data)
                    if self.on_bytes is not None:
                        self.on_bytes(self.sent)
                    if self.cut_after is not None and passed >= self.cut_after and self.cuts > 0:
                        self.cuts -= 1
                        data = data[: len(data) - (passed - self.cut_after)]
                        writer.write(data)
                        cut.set()
                        return
                if self.rate:
                    free_at = max(self._free_at.get(up, 0.0), loop.time()) + len(data) / self.rate
                    self._free_at[up] = free_at
                    await asyncio.sleep(max(0.0, free_at - loop.time() - 0.002))
                await queue.put((loop.time() + self.delay, data))
            await queue.put((0.0, b""))
            await sender
        except OSError:
            pass
        finally:
            sender.cancel()

    async def _send(self, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while True:
                due, data = await queue.get()
                if not data:
                    return
                if (wait := due - loop.time()) > 0:
                    await asyncio.sleep(wait)
                writer.write(data)
                await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with a TCP reset instead of an orderly end."""
    with contextlib.suppress(OSError):
        sock = writer.transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
