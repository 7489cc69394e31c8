"""The far end of the wire: answers one controller's requests on this site's cluster.

One task reads frames and starts writes, another carries out requests one after the other, a third
sends heartbeats. When the connection ends, for whatever reason, writes in flight are finished, how
far they came is saved, the lock is given back, and the process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import secrets
import socket
from collections.abc import Callable
from datetime import UTC, datetime

from agent import messages as m
from agent.cluster import Cluster, Pool, copied_features
from agent.continuity import Standing
from agent.door import Door, HandedOver
from agent.errors import (
    ConflictError,
    DataError,
    LinkError,
    LockedError,
    NotFoundError,
    SiphonError,
    SiteError,
    UsageError,
    ungrouped,
)
from agent.holding import settled_footing, take
from agent.model import Checkpoint, Hand, ImageIdentity, ImageSpec, Replica, Shape, encode
from agent.names import LINEAGE_KEY, METADATA_PREFIX, creating_prefix
from agent.replica import Writer, opened
from agent.settings import ClusterSettings
from agent.stdio import Inlet, Stdio
from agent.survey import described, survey
from agent.threads import blocking
from agent.upkeep import is_committed
from agent.wire import Frame, Kind, Receiver

#: How long the end may take (seconds) before the process ends itself, leaving the rest to fencing.
_LAST_GRACE = 10.0
#: How long an error waits for the cluster's health, seconds.
_HEALTH = 3.0
#: Requests that may wait; the controller asks one at a time.
_QUEUE = 4


class Worker:
    """One conversation with one controller."""

    def __init__(self, cluster: Cluster, stdio: Stdio, say: Callable[[str], None]) -> None:
        self._cluster = cluster
        self._stdio = stdio
        self._say = say
        self._writer: Writer | None = None
        self._requests: asyncio.Queue[tuple[int, m.Any]] = asyncio.Queue(_QUEUE)
        self._run = "unknown"
        self._door = Door()

    async def serve(self, first: tuple[int, m.Any]) -> None:
        """Answer the `first` request and those that follow, until the controller is gone; raises what broke the conversation."""
        self._requests.put_nowait(first)
        try:
            async with asyncio.TaskGroup() as group:
                helpers = [group.create_task(each) for each in (self._answer_all(), self._beat(), self._admit())]
                await self._read_all()
                # Whatever hangs from here on, the process ends; what it held is fenced by the next run.
                asyncio.get_running_loop().call_later(_LAST_GRACE, _leave, 1)
                for helper in helpers:
                    helper.cancel()
        finally:
            self._door.close()
            if self._writer is not None:
                await self._writer.close()

    async def _admit(self) -> None:
        """Take in lanes, each read by a task of its own."""
        async with asyncio.TaskGroup() as group:
            async for lane in self._door.lanes():
                group.create_task(self._read_lane(lane))

    async def _read_lane(self, lane: HandedOver) -> None:
        try:
            async for frame in Inlet(lane.fd, math.inf, Receiver(greeted=True)).frames():
                if frame.kind is Kind.CONTROL:
                    raise DataError("a message arrived over a lane of data")
                await self._extent(frame)
        except LinkError:
            self._say("a lane was cut: what it carried is sent again")
        finally:
            lane.close()

    async def _read_all(self) -> None:
        async for frame in self._stdio.frames():
            if frame.kind is Kind.CONTROL:
                await self._control(frame)
            else:
                await self._extent(frame)

    async def _extent(self, frame: Frame) -> None:
        writer = self._writer
        if writer is None:
            raise UsageError("data arrived for no image")
        writer.put(frame)
        if writer.busy:
            await writer.settled()

    async def _control(self, frame: Frame) -> None:
        message = m.unpack(frame.payload)
        match message:
            case m.Heartbeat():
                pass
            case m.Ping():
                self._stdio.send(m.Pong())
            case m.Checkpointed():
                if self._writer is None:
                    raise UsageError("a checkpoint arrived for no image")
                self._writer.announced(message.segment, message.frames, message.digest, message.checkpoint)
            case _:
                await self._requests.put((frame.tag, message))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(min(5.0, self._stdio.timeout / 4))
            self._stdio.send(m.Heartbeat())

    async def _answer_all(self) -> None:
        while True:
            tag, request = await self._requests.get()
            try:
                answer = await self._answer(request)
            except SiphonError as error:
                if isinstance(error, LinkError):
                    error = await explained(self._cluster, error)
                answer = m.Failure(type(error).__name__, str(error), error.hint)
            self._stdio.send(answer, tag)

    async def _answer(self, request: m.Any) -> m.Message:
        match request:
            case m.Hello():
                self._run, self._stdio.timeout = request.run, request.timeout
                return await blocking(self._welcome)
            case m.Survey():
                return m.Seen(await survey(await blocking(self._pool, request.image), request.image, request.source))
            case m.Open():
                return m.Seen(await self._open(request.image, request.source, discard=request.discard))
            case m.Trash():
                await self._trash(request.image, request.image_id)
                return m.Done()
            case m.Create():
                return await self._create(request)
            case m.Begin():
                return m.Begun(await self._held.begin(request.step, discard=request.discard))
            case m.Commit():
                await self._held.commit(request.checkpoint, request.origin, self._stdio.timeout)
                return m.Seen(self._held.replica)
            case m.Remove():
                return m.Removed(*await self._held.remove(request.snapshots))
            case m.Close():
                await self._close()
                return m.Done()
            case _:
                raise UsageError(f"{type(request).__name__} is no request")

    @property
    def _held(self) -> Writer:
        if self._writer is None:
            raise UsageError("no image is open")
        return self._writer

    def _welcome(self) -> m.Welcome:
        return m.Welcome(
            fsid=self._cluster.fsid,
            host=socket.gethostname(),
            pid=os.getpid(),
            user=self._cluster.user,
            conf=self._cluster.conf,
            trouble=self._cluster.trouble(),
            door=self._door.name,
            secret=self._door.secret,
        )

    def _pool(self, spec: ImageSpec) -> Pool:
        try:
            return self._cluster.pool(spec.pool, spec.namespace)
        except NotFoundError as error:
            make = f"rbd namespace create {spec.pool}/{spec.namespace}"
            if "no pool" in str(error):
                make = f"ceph osd pool create {spec.pool} && rbd pool init {spec.pool}"
            raise ConflictError(f"the target cannot hold {spec}: {error}", hint=f"make it there: {make}") from error

    def _refuse_full(self, pool: str) -> None:
        if self._cluster.full(pool):
            raise SiteError(
                f"the target's pool {pool!r} is full", hint="make room or raise its quota, then run the same command again"
            )

    def _me(self) -> Hand:
        return Hand(
            address=self._cluster.address,
            host=socket.gethostname(),
            pid=os.getpid(),
            run=self._run,
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    async def _open(self, spec: ImageSpec, source: ImageIdentity, *, discard: bool) -> Replica | None:
        await self._close()
        pool = await blocking(self._pool, spec)
        if await blocking(pool.image_id, spec.image) is None:
            return None
        image = await blocking(pool.open, spec.image)
        try:
            seen = await blocking(described, image)
            if seen.lineage is None or seen.lineage.source != source:
                return seen
        finally:
            await blocking(image.close)
        await blocking(self._refuse_full, spec.pool)  # or taking the lock would wait for room
        while True:
            found = await settled_footing(pool, spec, seen.image_id, unfinished=seen.mark is not None)
            stand = found.standing if seen.mark else None
            if stand is not None:
                self._say(
                    f"{spec} is in the middle of a step: {stand.value} (lock {found.owner or 'free'}, header {found.version}, "
                    f"guard {encode(found.guard) if found.guard else 'none'})"
                )
            committing = seen.mark is not None and is_committed(seen, seen.mark)
            if stand is Standing.TOUCHED and not discard and not committing:
                # Taking the lock would make it look as if the content were known.
                return await survey(pool, spec, source)
            trusted = stand in (None, Standing.RESUMABLE) or committing
            holding = await take(pool, spec, seen.image_id, found, self._me(), trusted=trusted, say=self._say)
            if holding is not None:
                break
        self._writer = await opened(holding, seen, stand, self._durable)
        return self._writer.replica

    async def _trash(self, spec: ImageSpec, image_id: str) -> None:
        await self._close()
        pool = await blocking(self._pool, spec)
        found = await blocking(pool.image_id, spec.image)
        if found is None:
            return
        if found != image_id:
            raise ConflictError(f"{spec} is another image by now (id {found}, not {image_id})", hint="run the same command again")
        await blocking(self._refuse_used, pool, spec)
        await blocking(pool.trash, spec.image)

    def _refuse_used(self, pool: Pool, spec: ImageSpec) -> None:
        """LockedError if anybody has the image open: librbd moves it to the trash all the same."""
        with pool.open(spec.image, writable=True) as image:
            others = [each for each in image.watchers() if each != self._cluster.address]
        if others:
            raise LockedError(f"{spec} is in use by {', '.join(others)}", hint=f"stop it first; see: rbd status '{spec}'")

    async def _create(self, request: m.Create) -> m.Created:
        await self._close()
        spec = request.image
        pool = await blocking(self._pool, spec)
        await blocking(self._refuse_full, request.data_pool or spec.pool)
        left_out = await blocking(_make, pool, request)
        replica = await self._open(spec, request.lineage.source, discard=False)
        if replica is None or self._writer is None:
            raise ConflictError(f"{spec} was taken away while it was being created", hint="run the same command again")
        return m.Created(replica, left_out)

    async def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            await writer.close()

    def _durable(self, checkpoint: Checkpoint) -> None:
        self._stdio.send(m.Durable(checkpoint))


def _make(pool: Pool, request: m.Create) -> tuple[str, ...]:
    """Make an empty image that carries its lineage from the moment it bears its name.

    Returns the features of the source that a replica is not given. What a crash leaves under the
    temporary name is removed by the next attempt.
    """
    prefix = creating_prefix(str(request.image), request.lineage.source.image_id)
    for leftover in pool.images():
        if leftover.startswith(prefix):
            with contextlib.suppress(LockedError, NotFoundError):  # a dead worker's watch lasts half a minute
                pool.remove(leftover)
    temporary = prefix + secrets.token_hex(4)
    features, left_out = copied_features(request.shape.features)
    shape = Shape(
        size=request.shape.size,
        order=request.shape.order,
        features=features,
        stripe_unit=request.shape.stripe_unit,
        stripe_count=request.shape.stripe_count,
    )
    pool.create(temporary, shape, request.data_pool)
    with pool.open(temporary, writable=True) as image:
        for key, value in request.metadata.items():
            if not key.startswith(METADATA_PREFIX):
                image.set_metadata(key, value)
        image.set_metadata(LINEAGE_KEY, encode(request.lineage))
    pool.rename(temporary, request.image.image)
    return left_out


async def run_worker(settings: ClusterSettings, stdio: Stdio, first: tuple[int, m.Any], say: Callable[[str], None]) -> int:
    """Serve the controller whose `first` request has come, and return the exit code.

    The conversation's timeout bounds, in seconds, the controller's silence and each of the cluster's operations.
    """
    loop = asyncio.get_running_loop()
    try:
        cluster = await blocking(Cluster, settings, stdio.timeout)
    except SiphonError as error:
        stdio.send(m.Failure(type(error).__name__, f"at the target: {error}", error.hint), first[0])
        return error.exit_code
    code = 0
    # Kept until the end: an image that is garbage is closed by librbd, and its lock given back.
    worker = Worker(cluster, stdio, say)
    try:
        with ungrouped():
            await worker.serve(first)
    except SiphonError as error:
        code = error.exit_code
        hanging = isinstance(error, LinkError)
        if hanging:
            error = await explained(cluster, error)
        say(f"worker ends: {error}")
        with contextlib.suppress(OSError):
            stdio.send(m.Failure(type(error).__name__, str(error), error.hint))
        if hanging:
            # Operations may hang in librbd: closing would wait for them.
            _leave(code)
    loop.call_later(_LAST_GRACE, _leave, code)
    await blocking(cluster.close)
    return code


async def explained(cluster: Cluster, error: SiphonError) -> SiphonError:
    """Return the error with what the cluster's health says about it, if that is to be had soon."""
    asking = asyncio.get_running_loop().run_in_executor(None, cluster.trouble)
    done, _ = await asyncio.wait([asking], timeout=_HEALTH)
    trouble = "; ".join(asking.result()) if done else ""
    return LinkError(f"{error} (the target cluster says: {trouble})", hint=error.hint) if trouble else error


def _leave(code: int) -> None:
    os._exit(code)
