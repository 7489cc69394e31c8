"""One image's part of a conversation: requests about it, answered in turn, and the data of its steps.

A conversation may be about many images at once; what goes wrong with one is told to its strand and leaves the others
alone. Only a cluster that stopped answering ends them all: what timed out may still be done, so the worker must die
with its locks held, and the next one fences it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import Callable
from datetime import UTC, datetime

from agent import messages as m
from agent.cluster import Cluster, Pool, copied_features
from agent.continuity import Standing
from agent.errors import ConflictError, LinkError, LockedError, NotFoundError, SiphonError, SiteError, UsageError
from agent.holding import settled_footing, take
from agent.model import Checkpoint, Hand, ImageIdentity, ImageSpec, Replica, Shape, encode
from agent.names import LINEAGE_KEY, METADATA_PREFIX, creating_prefix
from agent.replica import Flight, Writer, opened
from agent.survey import Footing, described, looked, survey
from agent.threads import blocking
from agent.upkeep import is_committed
from agent.wire import Frame

#: Requests that may wait; the controller asks one at a time.
_QUEUE = 4
#: How long an error waits for the cluster's health, seconds.
_HEALTH = 3.0


class Strand:
    """Answers for one image.

    `send` takes a message and the number of the request it answers, 0 for none; `abort` ends the conversation.
    """

    def __init__(
        self,
        cluster: Cluster,
        run: str,
        patience: float,
        flight: Flight,
        send: Callable[..., None],
        abort: Callable[[SiphonError], None],
        say: Callable[[str], None],
    ) -> None:
        self._cluster = cluster
        self._run = run
        self._patience = patience
        self._flight = flight
        self._send = send
        self._abort = abort
        self._say = say
        self._writer: Writer | None = None
        self._requests: asyncio.Queue[tuple[int, m.Any]] = asyncio.Queue(_QUEUE)
        self._failed = False

    async def asked(self, tag: int, request: m.Any) -> None:
        """Take a request, to be answered in its turn."""
        await self._requests.put((tag, request))

    def put(self, frame: Frame) -> None:
        """Take data; what arrives after something went wrong is of no use any more."""
        if self._writer is None or self._failed:
            return
        try:
            self._writer.put(frame)
        except SiphonError as error:
            self.fail(error)

    def announced(self, message: m.Checkpointed) -> None:
        """Take word of what a segment holds."""
        if self._writer is None or self._failed:
            return
        try:
            self._writer.announced(message.segment, message.frames, message.digest, message.checkpoint)
        except SiphonError as error:
            self.fail(error)

    def fail(self, error: SiphonError) -> None:
        """Tell that something went wrong beside a request."""
        if isinstance(error, LinkError):
            self._abort(error)
        elif not self._failed:
            self._failed = True
            self._send(m.Failure(type(error).__name__, str(error), error.hint))

    async def answer_all(self) -> None:
        """Answer requests in turn, until the image was closed."""
        request: m.Any = m.Heartbeat()  # nothing was asked yet
        while not isinstance(request, m.Close):
            tag, request = await self._requests.get()
            try:
                answer = await self._answer(request)
            except SiphonError as error:
                told = await explained(self._cluster, error) if isinstance(error, LinkError) else error
                self._send(m.Failure(type(told).__name__, str(told), told.hint), tag)
                if isinstance(error, LinkError) and not isinstance(request, m.Survey | m.Probe):
                    # The error keeps what was held alive until the process ends: librbd gives a lock back with its image.
                    self._abort(error)
            else:
                self._send(answer, tag)
        while not self._requests.empty():
            # The controller was stopped while it waited for the first answer to this.
            self._send(m.Done(), self._requests.get_nowait()[0])

    async def close(self) -> None:
        """Finish writes in flight, save how far they came, and let go of the image."""
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                await writer.close()
            except LinkError:
                self._writer = writer  # with its lock, until the process ends
                raise

    async def _answer(self, request: m.Any) -> m.Message:
        match request:
            case m.Survey() | m.Probe():
                return await self._look(request)
            case m.Open():
                return m.Seen(await self._open(request.image, request.source, discard=request.discard))
            case m.Trash():
                await self._trash(request.image, request.image_id)
                return m.Done()
            case m.Create():
                return await self._create(request)
            case m.Begin():
                return m.Begun(await self._held.begin(request.step, discard=request.discard))
            case m.Compare():
                return m.Compared(await self._held.compare(request.extents, request.names))
            case m.Commit():
                await self._held.commit(request.checkpoint, request.origin, self._patience)
                return m.Seen(self._held.replica)
            case m.Remove():
                return m.Removed(*await self._held.remove(request.snapshots))
            case m.Close():
                await self.close()
                return m.Done()
            case _:
                raise UsageError(f"{type(request).__name__} is no request about an image")

    async def _look(self, request: m.Survey | m.Probe) -> m.Message:
        """Answer what takes no image."""
        pool = await blocking(self._pool, request.image)
        if isinstance(request, m.Probe):
            await blocking(pool.probe)
            return m.Done()
        return m.Seen(await survey(pool, request.image, request.source))

    @property
    def _held(self) -> Writer:
        if self._writer is None:
            raise UsageError("no image is open")
        return self._writer

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
        await self.close()
        pool = await blocking(self._pool, spec)
        image_id = await blocking(pool.image_id, spec.image)
        if image_id is None:
            return None
        await blocking(self._refuse_full, spec.pool)  # or taking the lock would wait for room
        seen, first = await blocking(looked, pool, spec, image_id, described)
        if seen.image_id != image_id:
            raise ConflictError(f"{spec} was made anew just now", hint="run the same command again")
        if seen.lineage is None or seen.lineage.source != source:
            return seen
        glance: Footing | None = first
        while True:
            found = await settled_footing(pool, spec, image_id, unfinished=seen.mark is not None, found=glance)
            glance = None
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
            holding = await take(pool, spec, image_id, found, self._me(), trusted=trusted, say=self._say)
            if holding is not None:
                break
        self._writer = await opened(holding, seen, stand, self._flight, self._durable, self.fail)
        return self._writer.replica

    async def _trash(self, spec: ImageSpec, image_id: str) -> None:
        await self.close()
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
        await self.close()
        spec = request.image
        pool = await blocking(self._pool, spec)
        await blocking(self._refuse_full, request.data_pool or spec.pool)
        left_out = await blocking(_make, pool, request)
        replica = await self._open(spec, request.lineage.source, discard=False)
        if replica is None or self._writer is None:
            raise ConflictError(f"{spec} was taken away while it was being created", hint="run the same command again")
        return m.Created(replica, left_out)

    def _durable(self, checkpoint: Checkpoint) -> None:
        self._send(m.Durable(checkpoint))


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


async def explained(cluster: Cluster, error: SiphonError) -> SiphonError:
    """Return the error with what the cluster's health says about it, if that is to be had soon."""
    asking = asyncio.get_running_loop().run_in_executor(None, cluster.trouble)
    done, _ = await asyncio.wait([asking], timeout=_HEALTH)
    trouble = "; ".join(asking.result()) if done else ""
    return LinkError(f"{error} (the target cluster says: {trouble})", hint=error.hint) if trouble else error
