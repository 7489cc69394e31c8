"""Taking an image for writing and letting go of it: the exclusive lock, the guard, fencing our own dead.

Every change of hands is written into the guard before it happens (agent/continuity.py says why).
While a worker holds the lock it is the authority on the guard; after it let go it writes there only
if nobody else has announced himself.
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
from agent.survey import Footing, footing, read_guard
from agent.threads import blocking

#: A living owner refuses at once; one that said nothing for so long (seconds) is dead or cut off.
_ASK = 1.5
#: How long a worker of ours is given to leave by itself before and after it was asked, and how often we look (seconds).
_LEAVES_SOON, _LEAVES_AT_LAST, _AGAIN = 1.0, 3.0, 0.1
#: How long the lock may stay away once its owner is fenced (seconds).
_AFTER_FENCE = 15.0


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
        """Let go of the lock and the image; `unfinished` leaves proof of how the image was then."""
        try:
            await self._record(msgspec.structs.replace(self._guard, state="releasing"))
            quiet = not self._strangers(await blocking(self.image.watchers))
        finally:
            await blocking(self.image.close)
        version = 0
        if unfinished and quiet:
            version = await blocking(self.pool.header_version, self._image_id)
        now = await blocking(read_guard, self.pool, self._image_id)
        if now is not None and now.holder.address == self._guard.holder.address:
            # Without a version the next run finds that somebody else may have written.
            await self._record(msgspec.structs.replace(self._guard, state="released", version=version))

    def _strangers(self, watchers: tuple[str, ...]) -> list[str]:
        return [each for each in watchers if hand_of(each, self._guard) is None]

    async def _record(self, guard: Guard) -> None:
        self._guard = guard
        await blocking(_write, self.pool, self._image_id, guard)


async def settled_footing(pool: Pool, spec: ImageSpec, image_id: str, *, unfinished: bool) -> Footing:
    """Return the footing of an image, after a worker of ours that is on its way out had a moment to leave.

    LockedError if a living client that is none of ours owns the lock, or has an image open that is
    in the middle of a step (`unfinished`).
    """
    found = await _unowned(pool, spec, image_id, _LEAVES_SOON)
    strangers = found.strangers
    if found.owner in strangers or (strangers and unfinished):
        who = found.owner if found.owner in strangers else ", ".join(strangers)
        raise LockedError(
            f"{spec} is {'locked' if found.owner in strangers else 'open for writing'} by another client, {who}",
            hint=f"find it with: rbd status '{spec}'; rbd lock ls '{spec}'",
        )
    return found


async def _unowned(pool: Pool, spec: ImageSpec, image_id: str, patience: float) -> Footing:
    """Look until no worker of ours owns the lock, at most for `patience` seconds."""
    until = asyncio.get_running_loop().time() + patience
    while True:
        found = await blocking(footing, pool, spec, image_id)
        if hand_of(found.owner, found.guard) is None or asyncio.get_running_loop().time() > until:
            return found
        # librbd tells nobody when a lock is given back: looking again is all there is.
        await asyncio.sleep(_AGAIN)


async def take(
    pool: Pool, spec: ImageSpec, image_id: str, found: Footing, me: Hand, *, trusted: bool, say: Callable[[str], None]
) -> Holding | None:
    """Open the image for writing and take its lock; None if its owner left meanwhile: look again.

    A dead worker of ours is fenced first; a living one of the same run, which that run has given
    up, too; anybody else's lock is respected with a LockedError. `trusted` says that the content is
    proven; `say` gets a line about what was decided.
    """
    image = await blocking(pool.open, spec.image, writable=True)
    try:
        owner = hand_of(found.owner, found.guard)
        keeps = found.version if found.guard and found.guard.version == found.version else 0
        guard = Guard(holder=me, state="taking", replaced=owner, version=keeps, trusted=trusted)
        await blocking(_write, pool, image_id, guard)
        try:
            await _lock(image, owner, me, say)
        except LockedError:
            await _withdraw(pool, image_id, guard, found.guard)
            raise
        holding = Holding(pool, image, msgspec.structs.replace(guard, state="holding", version=0))
        await holding.confirm()
    except LockedError:
        await blocking(image.close)
        now = await _unowned(pool, spec, image_id, _LEAVES_AT_LAST)
        if now.owner != found.owner and not now.strangers:
            return None
        raise _held(spec, now) from None
    except BaseException:
        await blocking(image.close)
        raise
    return holding


def _held(spec: ImageSpec, found: Footing) -> LockedError:
    who = hand_of(found.owner, found.guard) or found.owner or "a client that came and went"
    return LockedError(f"{spec} is being written by another run: {who}", hint="wait for it to end, or stop it there")


async def _lock(image: Image, owner: Hand | None, me: Hand, say: Callable[[str], None]) -> None:
    asking = asyncio.ensure_future(blocking(image.lock))
    try:
        try:
            async with asyncio.timeout(_ASK):
                return await asyncio.shield(asking)
        except TimeoutError:
            if owner is None:
                raise LockedError(f"{image.spec} is locked, and its owner does not answer") from None
            say(f"fencing {owner}: it holds the lock of {image.spec} and does not answer")
        except LockedError:
            if owner is None or owner.run != me.run:
                raise
            say(f"fencing {owner}: this run has given it up")
            asking = asyncio.ensure_future(_once_more(image, owner))
            await asyncio.shield(asking)
            return None
        with contextlib.suppress(LockedError):  # it may have gone at this very moment
            await blocking(image.break_lock, owner.address)
        async with asyncio.timeout(_AFTER_FENCE):
            await asyncio.shield(asking)
    except TimeoutError:
        raise LockedError(f"the lock of {image.spec} does not come, though its owner was fenced") from None
    except asyncio.CancelledError:
        # Nobody may close the image under a call that still uses it.
        await asyncio.wait([asking])
        raise


async def _once_more(image: Image, owner: Hand) -> None:
    with contextlib.suppress(LockedError):
        await blocking(image.break_lock, owner.address)
    await blocking(image.lock)


async def _withdraw(pool: Pool, image_id: str, announced: Guard, before: Guard | None) -> None:
    """Take back an announcement, unless somebody has written there since."""
    if before is not None and await blocking(read_guard, pool, image_id) == announced:
        await blocking(_write, pool, image_id, before)


def _write(pool: Pool, image_id: str, guard: Guard) -> None:
    pool.write_object(guard_object(image_id), encode(guard).encode())
