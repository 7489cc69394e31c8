"""One sync: observe, plan, send step by step, release; again from the start after a transient error.

A retry repeats the whole attempt. What was committed meanwhile shows as common, what is durable of
an unfinished step is not sent again, so an acknowledgement that was lost costs a look and no more.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from time import monotonic

import msgspec
import tenacity

from agent import events as e
from agent import messages as m
from agent.cluster import Pool
from agent.errand import Home, Request, named, open_source
from agent.errors import ConflictError, DataError, LinkError, NotFoundError, SiphonError
from agent.model import (
    Checkpoint,
    ImageSpec,
    Lineage,
    Origin,
    Replica,
    Shape,
    Snapshot,
    Source,
    Step,
)
from agent.names import METADATA_PREFIX, PEER_PREFIX, snapshot_name, tag
from agent.plan import Accept, Ground, ground, steps
from agent.rehearsal import rehearse
from agent.release import Peer, confirm, take_snapshot
from agent.retention import expendable
from agent.sender import send_step
from agent.session import Dial, Far
from agent.source import Tally, changed, fast, observe, require, require_still
from agent.threads import blocking

#: Pauses between attempts: exponential with jitter, seconds.
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
#: How often progress is told, seconds.
_TELL = 0.25


@dataclass
class _Account:
    """What the run has done so far, over all attempts."""

    attempt: int = 0
    fruitless: int = 0
    read: int = 0
    equal: int = 0
    sites: list[Far] = field(default_factory=list)
    committed: list[Step] = field(default_factory=list)
    resumed_from: int | None = None
    base: str | None = None
    removed: list[str] = field(default_factory=list)
    farthest: tuple[Step, int] | None = None
    started: float = field(default_factory=monotonic)

    def reached(self, step: Step, checkpoint: Checkpoint) -> bool:
        """Note how far a step came; tell whether no attempt came that far before."""
        further = self.farthest is None or self.farthest[0] != step or self.farthest[1] < checkpoint.until
        if further:
            self.farthest = (step, checkpoint.until)
        return further

    @property
    def sent(self) -> int:
        return sum(each.sent for each in self.sites)

    @property
    def seconds(self) -> float:
        return round(monotonic() - self.started, 3)


class Sync:
    """One image, one target, now.

    `home` is the source site where it is open already; `streaming` is entered for as long as data are
    sent; `run` tells the target which command this is part of.
    """

    def __init__(
        self,
        request: Request,
        dial: Dial,
        observer: e.Observer,
        *,
        home: Home | None = None,
        streaming: AbstractAsyncContextManager[object] | None = None,
        run: str = "",
    ) -> None:
        self._home = home
        self._streaming = streaming or nullcontext()
        self._request = request
        self._dial = dial
        self._observer = observer
        self._run = run or secrets.token_hex(6)
        self._account = _Account()
        self._end: Snapshot | None = None
        self._taken: Snapshot | None = None
        self._warned: set[str] = set()
        self._recreated = False

    async def run(self) -> e.Result:
        """Do it, retrying what is transient; raises what stays."""
        # Both sites are woken at the same time.
        opening = asyncio.create_task(self._at_home())
        try:
            async for attempt in self._attempts():
                with attempt:
                    self._account.attempt += 1
                    self._account.fruitless += 1
                    return await self._attempt(opening)
        except (SiphonError, asyncio.CancelledError):
            if self._taken is not None:
                await asyncio.shield(blocking(self._forget_unsent, opening.result().pool))
            raise
        finally:
            await asyncio.wait([opening])
            if self._home is None and opening.exception() is None:
                await blocking(opening.result().cluster.close)
        raise AssertionError("tenacity ended without a result or an error")

    async def _at_home(self) -> Home:
        return await blocking(open_source, self._request) if self._home is None else self._home

    def _attempts(self) -> tenacity.AsyncRetrying:
        return tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, SiphonError) and error.transient),
            stop=lambda _: self._account.fruitless >= self._request.attempts,
            wait=tenacity.wait_exponential(multiplier=_FIRST_WAIT, max=_LONGEST_WAIT) + tenacity.wait_random(0, _FIRST_WAIT),
            before_sleep=self._tell_retry,
            reraise=True,
        )

    def _tell_retry(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        wait = round(state.next_action.sleep, 2) if state.next_action else 0.0
        self._observer.emit(e.Retry(attempt=self._account.attempt, error=str(error), wait=wait))

    async def _attempt(self, opening: asyncio.Task[Home]) -> e.Result:
        try:
            async with self._dial(self._warn) as session:
                self._account.sites.append(session)
                if not self._request.dry_run:
                    opening.add_done_callback(partial(_foretell, session))
                welcome = await session.hello(self._run)
                home = await asyncio.shield(opening)
                for trouble in welcome.trouble:
                    self._warn(f"the target cluster says: {trouble}")
                if self._request.dry_run:
                    plan = await rehearse(session, welcome, self._request, home)
                    self._observer.emit(plan)
                    self._account.base = plan.steps[0].base if plan.steps else None
                    return self._result("planned" if plan.steps else "up-to-date", plan.end)
                return await self._replicate(session, welcome, home)
        except LinkError:
            await asyncio.shield(opening)  # what is wrong at home is told first
            raise

    async def _replicate(self, session: Far, welcome: m.Welcome, home: Home) -> e.Result:
        request, pool = self._request, home.pool
        spec, target = request.source.image, request.target.image
        source = await blocking(observe, pool, spec, home.cluster.fsid)
        discard = request.accept is Accept.ROLLBACK
        seen = await session.ask(m.Open(image=target, source=source.identity, discard=discard), m.Seen)
        replica = seen.replica
        # What was recreated once in this run is ours by now, and goes on like any other replica.
        accept = Accept.NOTHING if self._recreated else request.accept
        where = ground(source, replica, accept)
        if where.pending is not None and self._end is None and not request.snapshot_named:
            # Finish what an earlier run began; then take what changed since.
            replica = await self._send(session, pool, source, replica, where, where.pending.end)
            if not await self._changed_since(pool, where.pending.end):
                return await self._release(session, welcome, pool, replica, where.pending.end)
            where = Ground(base=where.pending.end)
            source = await blocking(observe, pool, spec, home.cluster.fsid)
        if self._end is None:
            source = await self._choose_end(pool, source, tag(welcome.fsid, target))
        assert self._end is not None
        if self._end not in source.snapshots:
            raise NotFoundError(f"snapshot {spec}@{self._end.name} (id {self._end.id}) was removed while it was being sent")
        replica = await self._send(session, pool, source, replica, where, self._end)
        return await self._release(session, welcome, pool, replica, self._end)

    async def _choose_end(self, pool: Pool, source: Source, replica_tag: str) -> Source:
        """Settle on the snapshot that the user named, or take one now; return the source as it is then."""
        spec, wanted = self._request.source.image, self._request.source.snapshot
        if wanted:
            self._end = named(source, wanted)
            return source
        name = snapshot_name(datetime.now(UTC), replica_tag, secrets.randbits(16))
        self._decide(f"rbd snap create {spec}@{name}")
        self._taken, snapshots = await blocking(take_snapshot, pool, spec, source.identity.image_id, name)
        self._end = self._taken
        return msgspec.structs.replace(source, snapshots=snapshots)

    async def _send(
        self,
        session: Far,
        pool: Pool,
        source: Source,
        replica: Replica | None,
        where: Ground,
        end: Snapshot,
    ) -> Replica:
        """Carry the replica from `where` to `end`, and return what it holds then."""
        request = self._request
        way = steps(source, replica, where, end, intermediate=request.intermediate)
        if where.discard and not way:
            raise ConflictError(
                f"{request.target.image} already has {end.name}, and rolling back is part of the next step",
                hint="the same command without @snapshot rolls back and goes on from there",
            )
        creates = (str(request.target.image),) if where.create or where.recreate else ()
        if way:
            self._observer.emit(
                e.Plan(
                    image=str(request.source.image),
                    target=str(request.target),
                    dry_run=False,
                    end=end.name,
                    steps=tuple(e.PlannedStep(base=each.base.name if each.base else None, end=each.end.name) for each in way),
                    creates=creates,
                )
            )
        if where.recreate and replica is not None:
            self._warn(f"moving {replica.spec} (id {replica.image_id}) to the target's trash, as --recreate allows")
            await session.ask(m.Trash(image=replica.spec, image_id=replica.image_id), m.Done)
        if where.create or where.recreate:
            replica = await self._create(session, pool, source, way[0].end)
            self._recreated = True
        assert replica is not None
        if self._account.base is None and not self._account.committed:
            self._account.base = where.base.name if where.base else None
        for number, step in enumerate(way, 1):
            replica = await self._step(session, pool, source, step, (number, len(way)), discard=where.discard and number == 1)
            self._account.committed.append(step)
            self._account.fruitless = 1  # the attempt at hand
        return replica

    async def _create(self, session: Far, pool: Pool, source: Source, end: Snapshot) -> Replica:
        shape, metadata = await blocking(_layout, pool, source.spec, end)
        session.expect_much()
        lineage = Lineage(source.identity, str(source.spec), _now())
        created = await session.ask(
            m.Create(
                image=self._request.target.image,
                shape=shape,
                lineage=lineage,
                metadata=metadata,
                data_pool=self._request.data_pool,
            ),
            m.Created,
        )
        if created.left_out:
            self._warn(f"the replica does not get these features of the source: {', '.join(created.left_out)}")
        return created.replica

    async def _step(
        self, session: Far, pool: Pool, source: Source, step: Step, place: tuple[int, int], *, discard: bool
    ) -> Replica:
        begun = await session.ask(m.Begin(step=step, discard=discard), m.Begun)
        self._taken = None  # the target knows of it: from now on the snapshot belongs to an unfinished step
        start = begun.checkpoint
        if start.until:
            self._decide(f"resuming {step} at {start.until:,} bytes")
            if self._account.resumed_from is None:
                self._account.resumed_from = start.until
        tally = Tally()
        version = await blocking(pool.header_version, source.identity.image_id)
        image = await blocking(pool.open, source.spec.image)
        try:
            if image.id() != source.identity.image_id:
                raise NotFoundError(f"{source.spec} is another image by now (id {image.id()}, not {source.identity.image_id})")
            await blocking(require, image, step.base, step.end)
            async with self._progress(session, step, place, tally, start):
                async with self._streaming:
                    total = await send_step(session, image, step, start, tally, skip=self._request.checksum_skip)
                # What was read is the snapshot's content only if the snapshot is still there.
                await blocking(require_still, pool, image, step.base, step.end, version)
                origin = Origin(source.identity, step.end, _now())
                seen = await session.ask(m.Commit(checkpoint=total, origin=origin), m.Seen)
        finally:
            self._account.read += tally.read
            self._account.equal += tally.equal
            await blocking(image.close)
        if seen.replica is None:
            raise DataError("the worker committed a step and then had no replica")
        return seen.replica

    @asynccontextmanager
    async def _progress(
        self, session: Far, step: Step, place: tuple[int, int], tally: Tally, start: Checkpoint
    ) -> AsyncIterator[None]:
        """Tell about a step now and then while the body runs."""
        durable, began = start.until, monotonic()

        def moved(checkpoint: Checkpoint) -> None:
            nonlocal durable
            durable = checkpoint.until
            if self._account.reached(step, checkpoint):
                self._account.fruitless = 1  # the attempt at hand

        def tell() -> None:
            self._observer.emit(
                e.Progress(
                    step=place[0],
                    steps=place[1],
                    base=step.base.name if step.base else None,
                    end=step.end.name,
                    done=tally.read,
                    known=max(tally.known, tally.read),
                    sent=session.sent,
                    durable=durable,
                    attempt=self._account.attempt,
                    seconds=round(monotonic() - began, 3),
                )
            )

        async def tick() -> None:
            while True:
                tell()
                await asyncio.sleep(_TELL)

        session.durable = moved
        ticking = asyncio.create_task(tick())
        try:
            yield
            tell()
        finally:
            ticking.cancel()
            session.durable = lambda _: None

    async def _changed_since(self, pool: Pool, snapshot: Snapshot) -> bool:
        """Tell whether the source may have changed since `snapshot`."""
        image = await blocking(pool.open, self._request.source.image.image)
        try:
            size = await blocking(image.size)
            if size != snapshot.size or not await blocking(fast, image, snapshot, None):
                return True
            async with aclosing(changed(image, snapshot, 0, size, Tally(), trusted=True)) as found:
                async for extents in found:
                    if extents:
                        return True
            return False
        finally:
            await blocking(image.close)

    async def _release(self, session: Far, welcome: m.Welcome, pool: Pool, replica: Replica, end: Snapshot) -> e.Result:
        """Record what is common now, remove what is not needed any more, and let go of the replica."""
        request = self._request
        spec = request.source.image
        replica_tag = tag(welcome.fsid, request.target.image)
        peer = Peer(str(request.target), end, _now())
        keep = None if request.snapshot_named else request.keep
        # Both sides at the same time: either waits for its monitors.
        at_home = asyncio.ensure_future(
            blocking(confirm, pool, spec, f"{PEER_PREFIX}{replica_tag}", peer, replica_tag=replica_tag, keep=keep)
        )
        try:
            if keep:
                await self._prune_target(session, replica, replica_tag)
        finally:
            pruned = await at_home
        self._account.removed += [f"source@{name}" for name in pruned.gone]
        for name, why in pruned.kept.items():
            self._warn(f"snapshot {name} stays at the source: {why}")
        await session.ask(m.Close(), m.Done)
        return self._result("committed" if self._account.committed else "up-to-date", end.name)

    async def _prune_target(self, session: Far, replica: Replica, replica_tag: str) -> None:
        copies = tuple(Snapshot(each.id, each.name, each.size) for each in replica.origins().values())
        last = max((each.id for each in copies), default=0)
        there = expendable(copies, replica_tag=replica_tag, keep=self._request.keep, pinned={last})
        if not there:
            return
        self._decide(f"removing from the target: {', '.join(each.name for each in there)}")
        removed = await session.ask(m.Remove(snapshots=tuple(each.id for each in there)), m.Removed)
        self._account.removed += [f"target@{name}" for name in removed.names]
        for name, why in removed.kept.items():
            self._warn(f"snapshot {name} stays at the target: {why}")

    def _forget_unsent(self, pool: Pool) -> None:
        """Remove the snapshot that this run took and no step has begun with (blocks)."""
        if self._taken is None:
            return
        with suppress(SiphonError), pool.open(self._request.source.image.image, writable=True) as image:
            if self._taken in image.snapshots():
                image.remove_snapshot(self._taken.name)

    def _result(self, state: str, end: str | None) -> e.Result:
        account = self._account
        return e.Result(
            state=state,  # type: ignore[arg-type]  # one of the literals at each call above
            image=str(self._request.source.image),
            target=str(self._request.target),
            base=account.base,
            end=end,
            bytes_read=account.read,
            bytes_sent=account.sent,
            bytes_skipped=account.equal,
            resumed_from=account.resumed_from,
            attempts=account.attempt,
            seconds=account.seconds,
            steps=len(account.committed),
            removed=tuple(account.removed),
        )

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            self._observer.emit(e.Warned(message=message))

    def _decide(self, message: str) -> None:
        self._observer.emit(e.Decision(message=message))


def _foretell(session: Far, opened: asyncio.Task[Home]) -> None:
    """Tell of a first copy while the worker is still being started, if one is to be expected."""
    if not opened.cancelled() and opened.exception() is None and opened.result().first:
        session.expect_much()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _layout(pool: Pool, spec: ImageSpec, end: Snapshot) -> tuple[Shape, dict[str, str]]:
    with pool.open(spec.image) as image:
        shape = msgspec.structs.replace(image.shape(), size=end.size)
        metadata = {key: value for key, value in image.metadata().items() if not key.startswith(METADATA_PREFIX)}
    return shape, metadata
