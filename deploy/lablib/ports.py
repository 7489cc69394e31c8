"""Free TCP ports on loopback, outside the range the kernel hands out for outgoing connections."""

from __future__ import annotations

import random
import socket

LOOPBACK = "127.0.0.1"


def free(count: int) -> int:
    """Return the first of `count` consecutive ports that nothing listens on."""
    for _ in range(200):
        first = random.randrange(20_000, 30_000 - count)  # noqa: S311  # not a secret
        if all(is_free(port) for port in range(first, first + count)):
            return first
    raise OSError("no free ports between 20000 and 30000")


def is_free(port: int) -> bool:
    """Tell whether nothing listens on `port`."""
    with socket.socket() as probe:
        # As daemons do: a connection that lingers in TIME_WAIT is nobody's.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True
