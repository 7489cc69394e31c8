"""How further lanes of a conversation reach the worker that owns the image.

A lane is an SSH session of its own, for which sshd starts a process of its own. That process hands its
standard input over to the worker through a Unix socket, and waits until the worker is done with it: data go
from sshd to the worker without another hop, and one process alone has the image open. The socket lies in
Linux's abstract namespace, so no crash leaves a file behind; who knocks must be of the same user and know the
secret that the worker told its controller.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import secrets
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass

from agent.errors import SiteError
from agent.threads import blocking

#: How long either side of a handing-over may take, seconds.
_PATIENCE = 5.0
_TAKEN = b"taken"
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: unix(7), SO_PEERCRED


@dataclass(frozen=True)
class HandedOver:
    """The descriptor of a lane's input, and the socket that keeps its process waiting."""

    fd: int
    keeper: socket.socket

    def close(self) -> None:
        """Let the lane's process end."""
        os.close(self.fd)
        self.keeper.close()


class Door:
    """Where a worker takes lanes in."""

    def __init__(self) -> None:
        self.name = f"rbd-siphon-{secrets.token_hex(8)}"
        self.secret = secrets.token_hex(16)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._socket.bind(f"\0{self.name}")
        self._socket.listen()

    async def lanes(self) -> AsyncIterator[HandedOver]:
        """Yield lanes as they come."""
        loop = asyncio.get_running_loop()
        while True:
            knocking, _ = await loop.sock_accept(self._socket)
            if lane := await blocking(self._let_in, knocking):
                yield lane

    def close(self) -> None:
        """Take no more."""
        self._socket.close()

    def _let_in(self, knocking: socket.socket) -> HandedOver | None:
        knocking.settimeout(_PATIENCE)
        fds: list[int] = []
        with contextlib.suppress(OSError):
            _, uid, _ = _CREDENTIALS.unpack(knocking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
            if uid == os.geteuid():
                word, fds, _, _ = socket.recv_fds(knocking, 64, 1)
                if fds and hmac.compare_digest(word, self.secret.encode()):
                    knocking.send(_TAKEN)
                    return HandedOver(fds[0], knocking)
        for fd in fds:
            os.close(fd)
        knocking.close()
        return None


async def hand_over(fd: int, name: str, secret: str) -> socket.socket:
    """Give `fd` to the worker behind the door `name`; SiteError if it does not take it.

    Returns a socket that ends once the worker is done with it.
    """
    knocking = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        await blocking(_knock, knocking, fd, name, secret)
    except OSError as error:
        knocking.close()
        raise SiteError(
            f"this lane does not find its worker ({error})", hint="does the host's name lead to several hosts? use --lanes 1"
        ) from error
    knocking.settimeout(0)
    return knocking


def _knock(knocking: socket.socket, fd: int, name: str, secret: str) -> None:
    knocking.settimeout(_PATIENCE)
    knocking.connect(f"\0{name}")
    socket.send_fds(knocking, [secret.encode()], [fd])
    if knocking.recv(len(_TAKEN)) != _TAKEN:
        raise ConnectionRefusedError("it was turned away")
