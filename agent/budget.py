"""A bound on bytes in flight."""

from __future__ import annotations

import asyncio


class Budget:
    """Lets at most `limit` bytes (and always one piece, however large) be taken at a time.

    For one taker: `take` waits until there is room, `give` returns what was taken.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._room = asyncio.Event()

    async def take(self, count: int) -> None:
        """Wait until `count` more bytes fit."""
        while self._taken and self._taken + count > self._limit:
            self._room.clear()
            await self._room.wait()
        self._taken += count

    def give(self, count: int) -> None:
        """Return `count` bytes."""
        self._taken -= count
        self._room.set()
