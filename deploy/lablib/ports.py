"""Free TCP ports on loopback, outside the range the kernel hands out for outgoing connections."""

from __future__ import annotations

import random
import socket

LOOPBACK = "127.0.0.1"


def free(count: int) -> int:
    """Return the first of `count` consecutive ports that nothing listens on."""
    for _ in range(200):
        first = random.randrange(20_000, 30_000 - count)  # noqa: S311  # not a secret
        if all(_is_free(port) for port in range(first, first + count)):
            return first
    raise OSError("no free ports between 20000 and 30000")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True
