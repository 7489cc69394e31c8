"""Blocks that the target may have already: how they are named, and whether asking for them pays. Pure.

A block that a guest wrote again with the same content shows in a diff like any other. Names are BLAKE2b's,
which nobody can make two contents share: with a checksum, a guest could keep a block of its from being sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

#: What is compared at a time, bytes; also what OpenSSH and the packing like.
BLOCK = 64 << 10
#: Length of a block's name, bytes.
NAME = 16
#: Until so much was compared nothing is known, and after as much again the past counts half (bytes).
_ENOUGH = 16 << 20
#: Which share of blocks must be equal at the least, and which share of batches is compared though it did not pay.
_SHARE, _PROBE = 0.01, 16


def names(blocks: Iterable[bytes | memoryview]) -> bytes:
    """Return the names of blocks, one behind the other."""
    return b"".join(hashlib.blake2b(each, digest_size=NAME).digest() for each in blocks)


def each_name(joined: bytes) -> Iterator[bytes]:
    """Take `names` apart again."""
    for at in range(0, len(joined), NAME):
        yield joined[at : at + NAME]


class Thrift:
    """Weighs what comparing costs (seconds of waiting for answers) against what it saves (seconds of sending)."""

    def __init__(self) -> None:
        self._compared = self._equal = self._waited = 0.0
        self._sent = self._sending = 0.0
        self._turn = 0

    def compared(self, size: int, equal: int, waited: float) -> None:
        """`size` bytes were compared, `equal` of them need not be sent, and the answer was waited for."""
        self._compared += size
        self._equal += equal
        self._waited += waited
        if self._compared > 2 * _ENOUGH:
            self._compared /= 2
            self._equal /= 2
            self._waited /= 2
            self._sent /= 2
            self._sending /= 2

    def sent(self, size: int, seconds: float) -> None:
        """Sending `size` bytes took `seconds`."""
        self._sent += size
        self._sending += seconds

    def worth(self) -> bool:
        """Tell whether to compare the next batch."""
        self._turn += 1
        if self._compared < _ENOUGH or self._turn % _PROBE == 0:
            return True
        if self._equal < self._compared * _SHARE:
            return False
        # Where nothing had to be sent yet, nothing says that sending is cheap.
        saved = self._equal * self._sending / self._sent if self._sent else self._waited
        return saved >= self._waited
