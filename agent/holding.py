"""Taking an image for writing and letting go of it: the exclusive lock, the guard, fencing our own dead.

Every change of hands is written into the guard before it happens (agent/continuity.py says why).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import msgspec

from agent.cluster import Image, Pool
from agent.continuity import Standing, hand_of
from agent.errors import LockedError
from agent.model import Claim, Guard, Hand, ImageSpec, Replica, Tenure, encode
from agent.names import guard_object
from agent.survey import Footing, footing, judged, read_guard
from agent.threads import blocking, unbroken

#: A living owner refuses at once; one that said nothing for so long (seconds) is dead or cut off.
_ASK = 1.5
#: How long a worker of ours is given to leave by itself before and after it was asked, and how often we look (seconds).
_LEAVES_SOON, _LEAVES_AT_LAST, _AGAIN = 1.0, 3.0, 0.1
#: How long the lock may stay away once its owner is fenced (seconds).
_AFTER_FENCE = 15.0
#: How many workers before the last the guard remembers, and how often a lost race for it is run again.
_REMEMBERED, _SWAPS = 8, 20


class Holding:
    """An image open for writing whose exclusive lock is ours, or asked for."""

    def __init__(self, pool: Pool, image: Image, me: Hand, *, trusted: bool) -> None:
        self.pool = pool
        self.image = image
        self._tenure = Tenure(me, "holding", trusted=trusted)
        self._image_id = image.id()

    async def judged(self, replica: Replica, stand: Standing | None) -> Replica:
        """Return `replica` with its head judged: by `stand` in the middle of a step, by its content otherwise."""
        return await judged(self.pool, self.image, replica, stand)

    async def claim(self, found: Guard | None) -> bool:
        """Announce that we are about to take the lock; False if hands changed since the guard was `found`."""
        claim = Claim(self._tenure.hand, self._tenure.trusted)

        def announced(guard: Guard) -> Guard:
            if guard.tenure != (found.tenure if found else None):
                return guard
            past = (guard.claim.hand, *guard.past) if guard.claim else guard.past
            return msgspec.structs.replace(guard, claim=claim, past=past[:_REMEMBERED])

        return (await self._amend(announced)).claim == claim

    async def confirm(self) -> None:
        """Record that the lock is ours."""

        def confirmed(guard: Guard) -> Guard:
            before = guard.tenure.hand if guard.tenure else None
            past = (before, *guard.past) if before and before != self._tenure.hand else guard.past
            claim = guard.claim if guard.claim and guard.claim.hand != self._tenure.hand else None
            return Guard(self._tenure, claim, past[:_REMEMBERED])

        await self._amend(confirmed)

    async def trust(self) -> None:
        """Record that the content is proven from now on (it was rolled back)."""
        if not self._tenure.trusted:
            await self._record(trusted=True)

    async def release(self, *, unfinished: bool) -> None:
        """Let go of the lock and the image; `unfinished` leaves proof of how the image was then."""
        await unbroken(self._release(unfinished=unfinished))

    async def give_up(self) -> None:
        """Leave in good order while the lock was being taken: it may have come by now, or not."""
        await unbroken(self._give_up())

    async def withdraw(self) -> None:
        """Take the claim back and close the image: the lock is another's."""

        def withdrawn(guard: Guard) -> Guard:
            ours = guard.claim is not None and guard.claim.hand == self._tenure.hand
            return msgspec.structs.replace(guard, claim=None) if ours else guard

        try:
            await self._amend(withdrawn)
        finally:
            await blocking(self.image.close)

    async def _give_up(self) -> None:
        if await blocking(self.image.owns_lock):
            await self.confirm()
            await self._release(unfinished=True)
        else:
            await self.withdraw()

    async def _release(self, *, unfinished: bool) -> None:
        try:
            guard = await self._record(state="releasing")
            strangers = [each for each in await blocking(self.image.watchers) if hand_of(each, guard) is None]
        finally:
            await blocking(self.image.close)
        version = 0
        if unfinished and not strangers:
            version = await blocking(self.pool.header_version, self._image_id)
            # Whoever came in between our closing and this look is in that version.
            after = await blocking(footing, self.pool, self.image.spec, self._image_id)
            if after.owner or after.strangers or after.version != version:
                version = 0
        # Without a version the next run finds that somebody else may have written.
        await self._record(state="released", version=version)

    async def _record(self, **news: Any) -> Guard:
        """Change what the guard says of our tenure, unless another's has begun."""
        self._tenure = msgspec.structs.replace(self._tenure, **news)

        def told(guard: Guard) -> Guard:
            ours = guard.tenure is not None and guard.tenure.hand == self._tenure.hand
            return msgspec.structs.replace(guard, tenure=self._tenure) if ours else guard

        return await self._amend(told)

    async def _amend(self, change: Callable[[Guard], Guard]) -> Guard:
        return await blocking(_amend, self.pool, self._image_id, change)


def _amend(pool: Pool, image_id: str, change: Callable[[Guard], Guard]) -> Guard:
    """Apply `change` to the guard as it is by now, and return what it says then (blocks)."""
    for _ in range(_SWAPS):
        now, version = read_guard(pool, image_id)
        then = change(now or Guard())
        if then == now or pool.swap_object(guard_object(image_id), encode(then).encode(), version):
            return then
    raise LockedError(f"{_SWAPS} times in a row another worker wrote {guard_object(image_id)} first")


async def settled_footing(pool: Pool, spec: ImageSpec, image_id: str, *, unfinished: bool, found: Footing | None = None) -> Footing:
    """Return the footing of an image, after a worker of ours that is on its way out had a moment to leave.

    It is the one that was `found` just now, if that shows nobody on his way.

    LockedError if a living client that is none of ours owns the lock, or has an image open that is
    in the middle of a step (`unfinished`).
    """
    if found is None or not _is_settled(found):
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
    """Look until no worker of ours owns the lock or is about to write its last word, at most for `patience` seconds."""
    until = asyncio.get_running_loop().time() + patience
    while True:
        found = await blocking(footing, pool, spec, image_id)
        if _is_settled(found) or asyncio.get_running_loop().time() > until:
            return found
        # librbd tells nobody when a lock is given back: looking again is all there is.
        await asyncio.sleep(_AGAIN)


def _is_settled(found: Footing) -> bool:
    """Tell whether no worker of ours owns the lock or is about to write its last word."""
    leaving = found.guard is not None and found.guard.tenure is not None and found.guard.tenure.state == "releasing"
    return hand_of(found.owner, found.guard) is None and not leaving


async def take(
    pool: Pool, spec: ImageSpec, image_id: str, found: Footing, me: Hand, *, trusted: bool, say: Callable[[str], None]
) -> Holding | None:
    """Open the image for writing and take its lock; None if its owner left meanwhile: look again.

    A dead worker of ours is fenced first; a living one of the same run, which that run has given
    up, too; anybody else's lock is respected with a LockedError. `trusted` says that the content is
    proven; `say` gets a line about what was decided.
    """
    image = await blocking(pool.open, spec.image, writable=True)
    holding = Holding(pool, image, me, trusted=trusted)
    try:
        if not await holding.claim(found.guard):
            await blocking(image.close)
            return None
        # Whoever opened, wrote and closed since the look has changed the header; an opening alone does not.
        if await blocking(pool.header_version, image_id) != found.version:
            await holding.withdraw()
            return None
        await _lock(image, hand_of(found.owner, found.guard), me, say)
        await holding.confirm()
    except LockedError:
        await holding.give_up()  # the lock may have come all the same
        now = await _unowned(pool, spec, image_id, _LEAVES_AT_LAST)
        if now.owner != found.owner and not now.strangers:
            return None
        raise _held(spec, now) from None
    except BaseException:
        await holding.give_up()
        raise
    return holding


def _held(spec: ImageSpec, found: Footing) -> LockedError:
    who = hand_of(found.owner, found.guard) or found.owner or "a client that came and went"
    return LockedError(f"{spec} is being written by another run: {who}", hint="wait for it to end, or stop it there")


async def _lock(image: Image, owner: Hand | None, me: Hand, say: Callable[[str], None]) -> None:
    asking = asyncio.ensure_future(blocking(image.lock))
    try:
        try:
            # With no owner, or a stranger, there is nobody to fence: only a slow cluster to wait for.
            async with asyncio.timeout(_ASK if owner else _AFTER_FENCE):
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
    finally:
        # Nobody may close the image under a call that still uses it.
        if not asking.done():
            await asyncio.wait([asking])
        if not asking.cancelled():
            asking.exception()


async def _once_more(image: Image, owner: Hand) -> None:
    with contextlib.suppress(LockedError):
        await blocking(image.break_lock, owner.address)
    await blocking(image.lock)
