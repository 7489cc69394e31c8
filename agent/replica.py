"""A replica held for writing: begin a step, write its extents, commit its snapshot.

What a crash leaves at each point, and how the next run goes on (the mark lies in the image's
metadata, so it is replicated by Ceph like the data):

    mark written, not ready   the image is somewhere between its state before and the base: roll back
    mark ready                the base plus a part of this step: resume at the mark's checkpoint
    snapshot `siphon-committing-…` exists
                              everything was durable and right: record its origin, rename it
    snapshot renamed          remove the mark
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import msgspec

from agent.continuity import Standing
from agent.errors import ConflictError, DataError, LinkError, SiphonError, UsageError
from agent.holding import Holding
from agent.ledger import Ledger
from agent.model import Checkpoint, Mark, Origin, Replica, Snapshot, Step, encode
from agent.names import MARK_KEY, ORIGIN_PREFIX, committing_name, is_committing, origin_key
from agent.survey import described, judged
from agent.threads import blocking, unbroken

#: Writes in flight, bytes and operations: what bounds the worker's memory.
_FLIGHT_BYTES = 32 << 20
_FLIGHT_WRITES = 256
#: How often the checkpoint is written onto the replica: what a killed worker's successor repeats.
_MARK_BYTES = 64 << 20
_MARK_SECONDS = 2.0


class Writer:
    """One replica, held; the steps of a run are applied through it, one after the other."""

    def __init__(self, holding: Holding, replica: Replica, durable: Callable[[Checkpoint], None]) -> None:
        self.replica = replica
        self._holding = holding
        self._image = holding.image
        self._durable = durable
        self._mark = replica.mark
        self._ledger: Ledger | None = None
        self._writes: set[asyncio.Task[None]] = set()
        self._flight = 0
        self._since_mark = 0
        self._marked_at = 0.0
        self._moved = asyncio.Event()
        self._marking = asyncio.Lock()
        self._saving: asyncio.Task[None] | None = None
        self._failed: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether as much is in flight as may be: take no more until `settled`."""
        return self._flight >= _FLIGHT_BYTES or len(self._writes) >= _FLIGHT_WRITES

    async def begin(self, step: Step, *, discard: bool) -> Checkpoint:
        """Bring the image to where `step` can go on, and return from where.

        ConflictError if its content is neither the base nor a part of this very step, unless
        `discard` gives up what differs.
        """
        if self._ledger is not None:
            raise UsageError("a step is already under way on this replica")
        mark = self._mark
        with self._hanging():
            if mark is None or mark.step != step or not mark.ready or self.replica.head != "resumable":
                mark = await self._prepare(step, discard=discard)
            if await blocking(self._image.size) != step.end.size:
                await blocking(self._image.resize, step.end.size)
        self._ledger = Ledger(mark.checkpoint)
        self._moved.set()
        self._marked_at = asyncio.get_running_loop().time()
        return mark.checkpoint

    async def _prepare(self, step: Step, *, discard: bool) -> Mark:
        """Make the image equal to the step's base and mark the step."""
        copies = self.replica.origins()
        base = copies.get(step.base.id) if step.base else None
        newest = max(copies.values(), key=lambda each: each.id, default=None)
        if (step.base is not None and base is None) or (step.base is None and newest is not None):
            raise ConflictError(f"{self.replica.spec} does not hold the base of the step {step}", hint="run the same command again")
        if base is not None and step.base is not None and base.size != step.base.size:
            raise ConflictError(
                f"the base {base.name} of {self.replica.spec} has {base.size} bytes, the source's has {step.base.size}"
            )
        if self.replica.head == "touched" and not discard:
            raise ConflictError(f"{self.replica.spec} was changed by somebody else", hint="--rollback gives those changes up")
        at_base = self.replica.head == "clean" and base == newest
        mark = Mark(
            step=step, snapshot=committing_name(secrets.randbits(64)), started_at=datetime.now(UTC).isoformat(timespec="seconds")
        )
        await self._write_mark(mark)
        self.replica = msgspec.structs.replace(self.replica, head="unsure", mark=mark)
        if base is None:
            if not at_base:
                await blocking(self._image.resize, 0)
        elif not at_base:
            await blocking(self._image.roll_back, base.name)
        if await blocking(self._image.size) != step.end.size:
            await blocking(self._image.resize, step.end.size)
        await self._holding.trust()
        ready = msgspec.structs.replace(mark, ready=True)
        await self._write_mark(ready)
        self.replica = msgspec.structs.replace(self.replica, head="resumable", mark=ready)
        return ready

    def put(self, segment: int, checksum: int, offset: int, data: bytes) -> None:
        """Start writing an extent's data."""
        self._start(segment, checksum, offset, len(data), lambda: self._image.write(offset, data), len(data))

    def zero(self, segment: int, checksum: int, offset: int, length: int) -> None:
        """Start making an extent zero."""
        self._start(segment, checksum, offset, length, lambda: self._image.write_zeroes(offset, length), 0)

    def _start(
        self, segment: int, checksum: int, offset: int, length: int, write: Callable[[], Awaitable[None]], weight: int
    ) -> None:
        ledger, mark = self._ledger, self._mark
        if ledger is None or mark is None:
            raise UsageError("data arrived outside a step")
        if length == 0 or offset + length > mark.step.end.size:
            raise DataError(f"an extent at {offset} of {length} bytes does not lie in the image")
        ledger.arrived(segment, checksum)
        self._flight += weight
        task = asyncio.get_running_loop().create_task(self._apply(write, segment, weight))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _apply(self, write: Callable[[], Awaitable[None]], segment: int, weight: int) -> None:
        try:
            await write()
            self._since_mark += weight
            if self._ledger is not None and self._ledger.durable(segment):
                self._advanced()
        except SiphonError as error:
            self._failed = self._failed or error
        finally:
            self._flight -= weight
            self._moved.set()

    def announced(self, segment: int, frames: int, digest: str, checkpoint: Checkpoint) -> None:
        """The controller said what a segment holds."""
        if self._ledger is None:
            raise UsageError("a checkpoint arrived outside a step")
        if self._ledger.announced(segment, frames, digest, checkpoint):
            self._advanced()
            self._moved.set()

    def _advanced(self) -> None:
        assert self._ledger is not None
        self._durable(self._ledger.checkpoint)
        if self._saving is None and self._mark_due():
            self._saving = asyncio.get_running_loop().create_task(self._save_aside())

    async def _save_aside(self) -> None:
        try:
            await self.save()
        except SiphonError as error:
            self._failed = self._failed or error
            self._moved.set()
        finally:
            self._saving = None

    async def settled(self) -> None:
        """Wait until something more can be taken; raises what a write failed with."""
        while self.busy and self._failed is None:
            self._moved.clear()
            await self._moved.wait()
        self._check()

    def _check(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _mark_due(self) -> bool:
        late = asyncio.get_running_loop().time() - self._marked_at > _MARK_SECONDS
        return late or self._since_mark >= _MARK_BYTES

    async def save(self) -> None:
        """Write the checkpoint onto the replica."""
        async with self._marking:
            if self._ledger is None or self._mark is None or self._ledger.checkpoint == self._mark.checkpoint:
                return
            self._since_mark, self._marked_at = 0, asyncio.get_running_loop().time()
            checkpoint = self._ledger.checkpoint
            # An image's own settings (conf_rbd_cache) may have turned a cache on that we turned off.
            await self._image.flush()
            await self._write_mark(msgspec.structs.replace(self._mark, checkpoint=checkpoint))

    async def commit(self, total: Checkpoint, source: Origin, patience: float) -> None:
        """See that everything up to `total` is durable and right, then make the snapshot.

        DataError if for `patience` seconds nothing arrives of what is still missing.
        """
        ledger, mark = self._ledger, self._mark
        if ledger is None or mark is None or source.snapshot != mark.step.end:
            raise UsageError("a commit arrived outside its step")
        while not ledger.complete(total):
            self._check()
            self._moved.clear()
            try:
                async with asyncio.timeout(patience):
                    await self._moved.wait()
            except TimeoutError:
                raise DataError(f"the step is not complete: {ledger.checkpoint} is here, {total} was sent") from None
        self._check()
        with self._hanging():
            await self._image.flush()
            async with self._marking:
                await blocking(self._image.take_snapshot, mark.snapshot)
                self._ledger = None
                await finish_commit(self._holding, mark, source)
                self._mark = None
        self.replica = msgspec.structs.replace(await blocking(described, self._image), head="clean")

    async def remove(self, snapshots: tuple[int, ...]) -> tuple[tuple[str, ...], dict[str, str]]:
        """Remove snapshots of ours by id; return the names that are gone, and those kept with the reason."""
        copies = {each.id: each for each in self.replica.snapshots if each.origin is not None}
        newest = max(copies, default=0)
        gone: list[str] = []
        kept: dict[str, str] = {}
        for snapshot_id in snapshots:
            if snapshot_id not in copies:
                continue
            name = copies[snapshot_id].name
            if snapshot_id == newest:
                kept[name] = "it is the last common snapshot"
                continue
            try:
                with self._hanging():
                    await blocking(self._image.remove_snapshot, name)
                    await blocking(self._image.remove_metadata, origin_key(snapshot_id))
                gone.append(name)
            except LinkError:
                raise
            except SiphonError as error:
                kept[name] = str(error)
        self.replica = msgspec.structs.replace(await blocking(described, self._image), head=self.replica.head)
        return tuple(gone), kept

    async def close(self) -> None:
        """Let writes in flight finish, save how far they came, and let go of the image."""
        await unbroken(self._close())

    async def _close(self) -> None:
        if self._writes:
            await asyncio.wait(self._writes)
        if self._failed is None:
            await self.save()
        if isinstance(self._failed, LinkError):
            # What timed out here may still reach the disks: keep the lock, so that the next run fences it.
            raise self._failed
        await self._holding.release(unfinished=self._mark is not None)

    async def _write_mark(self, mark: Mark) -> None:
        self._mark = mark
        await blocking(self._image.set_metadata, MARK_KEY, encode(mark))

    @contextmanager
    def _hanging(self) -> Iterator[None]:
        """Note that an operation timed out: it may still be done, so the lock must not be given back."""
        try:
            yield
        except LinkError as error:
            self._failed = self._failed or error
            raise


async def opened(holding: Holding, seen: Replica | None, stand: Standing | None, durable: Callable[[Checkpoint], None]) -> Writer:
    """Bring a replica that was just taken into order, and return the writer for it.

    `seen` and `stand` are what was found before the lock was ours; where the mark is another one by
    now, nothing is known of how far it came. Whatever goes wrong, the image is let go as it was found.
    """
    try:
        return Writer(holding, await _ordered(holding, seen, stand), durable)
    except LinkError:
        raise  # what timed out may still be done: the next run fences us
    except BaseException:
        await holding.release(unfinished=True)
        raise


async def _ordered(holding: Holding, seen: Replica | None, stand: Standing | None) -> Replica:
    """Finish a commit that was broken off, and clear away what an abandoned step left in snapshots and metadata."""
    image = holding.image
    replica = await blocking(described, image)
    if replica.mark is not None and (seen is None or seen.mark is None or replica.mark.step != seen.mark.step):
        stand = Standing.UNSURE
    mark, lineage = replica.mark, replica.lineage
    if mark is not None and lineage is not None and is_committed(replica, mark):
        await finish_commit(holding, mark, Origin(lineage.source, mark.step.end, datetime.now(UTC).isoformat(timespec="seconds")))
        replica = await blocking(described, image)
    for each in replica.snapshots:
        if is_committing(each.name) and (replica.mark is None or each.name != replica.mark.snapshot):
            await blocking(image.remove_snapshot, each.name)
    live = {origin_key(each.id) for each in replica.snapshots}
    for key in await blocking(image.metadata):
        if key.startswith(ORIGIN_PREFIX) and key not in live:
            await blocking(image.remove_metadata, key)
    return await judged(holding.pool, image, await blocking(described, image), stand)


def is_committed(replica: Replica, mark: Mark) -> bool:
    """Tell whether the marked step's snapshot is made already, so that only the commit is left to finish."""
    return mark.step.end.id in replica.origins() or any(each.name == mark.snapshot for each in replica.snapshots)


async def finish_commit(holding: Holding, mark: Mark, origin: Origin) -> None:
    """From a snapshot under its temporary name to a committed one; again is harmless."""
    image = holding.image
    snapshots: dict[str, Snapshot] = {each.name: each for each in await blocking(image.snapshots)}
    made = snapshots.get(mark.snapshot)
    if made is not None:
        await blocking(image.set_metadata, origin_key(made.id), encode(origin))
        await blocking(image.rename_snapshot, made.name, mark.step.end.name)
    await blocking(image.remove_metadata, MARK_KEY)
