"""Taking an image for writing and letting go of it: the exclusive lock, the guard, fencing our own dead.

Every change of hands is written into the guard before it happens (agent/continuity.py says why).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import msgspec

from agent.cluster import Image, Pool
from agent.continuity import hand_of
from agent.errors import LockedError
from agent.model import Guard, Hand, ImageSpec, encode
from agent.names import guard_object
from agent.survey import Footing
from agent.threads import blocking

#: A living owner refuses at once; one that said nothing for so long (seconds) is dead or cut off.
_ASK = 1.5
#: How long a living worker of ours is given to leave, and how often it is asked (seconds).
_LEAVE = 3.0
_AGAIN = 0.25


class Holding:
    """An image held for writing: its exclusive lock is ours until `release`."""

    def __init__(self, pool: Pool, image: Image, guard: Guard) -> None:
        self.pool = pool
        self.image = image
        self._guard = guard
        self._image_id = image.id()

    async def confirm(self) -> None:
        """Record that the lock is ours."""
        await self._record(self._guard)

    async def trust(self) -> None:
        """Record that the content is proven from now on (it was rolled back)."""
        if not self._guard.trusted:
            await self._record(msgspec.structs.replace(self._guard, trusted=True))

    async def release(self, *, unfinished: bool) -> None:
        """Let go of the lock and the image; `unfinished` keeps the proof that nobody comes between."""
        await self._record(msgspec.structs.replace(self._guard, state="releasing"))
        await blocking(self.image.close)
        if unfinished:
            version = await blocking(self.pool.header_version, self._image_id)
            await self._record(msgspec.structs.replace(self._guard, state="released", version=version))
        else:
            await blocking(self.pool.remove_object, guard_object(self._image_id))

    async def _record(self, guard: Guard) -> None:
        self._guard = guard
        await blocking(_write, self.pool, self._image_id, guard)


def refuse_stranger(spec: ImageSpec, found: Footing) -> None:
    """LockedError if a living client that is none of ours owns the image's lock."""
    if found.alive and hand_of(found.owner, found.guard) is None:
        raise LockedError(
            f"{spec} is locked by another client, {found.owner}",
            hint=f"find it at the target with: rbd status '{spec}'; rbd lock ls '{spec}'",
        )


async def take(pool: Pool, spec: ImageSpec, found: Footing, me: Hand, *, trusted: bool, say: Callable[[str], None]) -> Holding:
    """Open the image for writing and take its lock; LockedError if somebody else has it.

    A dead worker of ours is fenced first; a living one of the same run, which that run has given
    up, is given a moment to leave and then fenced; anybody else's lock is respected. `trusted`
    says that the content is proven; `say` gets a line about what was decided.
    """
    image = await blocking(pool.open, spec.image, writable=True)
    try:
        owner = hand_of(found.owner, found.guard) if found.owner else None
        keeps = found.guard.version if found.guard and found.guard.version == found.version and trusted else 0
        guard = Guard(holder=me, state="taking", replaced=owner, version=keeps, trusted=trusted)
        await blocking(_write, pool, image.id(), guard)
        await _lock(image, owner, me, say)
        holding = Holding(pool, image, msgspec.structs.replace(guard, state="holding", version=0))
        await holding.confirm()
    except BaseException:
        await blocking(image.close)
        raise
    return holding


async def _lock(image: Image, owner: Hand | None, me: Hand, say: Callable[[str], None]) -> None:
    patience = asyncio.get_running_loop().time() + _LEAVE
    while True:
        asking = asyncio.ensure_future(blocking(image.lock))
        try:
            async with asyncio.timeout(_ASK if owner else None):
                return await asyncio.shield(asking)
        except TimeoutError:
            assert owner is not None
            say(f"fencing {owner}: it holds the lock of {image.spec} and does not answer")
            await _fence(image, owner)
            return await asking
        except LockedError:
            if asyncio.get_running_loop().time() < patience:
                # librbd tells nobody when a lock is given back: asking again is all there is.
                await asyncio.sleep(_AGAIN)
            elif owner is not None and owner.run == me.run:
                say(f"fencing {owner}: this run has given it up")
                await _fence(image, owner)
            else:
                held = str(owner) if owner else await blocking(image.lock_owner)
                raise LockedError(
                    f"{image.spec} is being written by another run: {held}", hint="wait for it to end, or stop it there"
                ) from None


async def _fence(image: Image, owner: Hand) -> None:
    with contextlib.suppress(LockedError):
        await blocking(image.break_lock, owner.address)


def _write(pool: Pool, image_id: str, guard: Guard) -> None:
    pool.write_object(guard_object(image_id), encode(guard).encode())
