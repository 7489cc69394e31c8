"""A replica held for writing: the extents of its steps, written many at a time and made durable in order.

What surrounds the writing (mark, base, commit) is agent/upkeep.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import msgspec

from agent.cluster import Image
from agent.compression import unpacked
from agent.continuity import Standing
from agent.errors import DataError, LinkError, SiphonError, UsageError
from agent.holding import Holding
from agent.ledger import Ledger
from agent.model import Checkpoint, Origin, Replica, Step
from agent.sameness import NAME, each_name, names
from agent.threads import blocking, unbroken
from agent.upkeep import Upkeep, ordered
from agent.wire import MAX_PAYLOAD, Codec, Frame, Kind

#: Writes in flight, bytes and operations: what bounds the worker's memory.
_FLIGHT_BYTES = 32 << 20
_FLIGHT_WRITES = 256
#: A packed block of at most so many bytes is unpacked on the spot: a thread's turn would take longer.
_INLINE = 64 << 10
#: How often the checkpoint is written onto the replica: what a killed worker's successor repeats.
_MARK_BYTES = 64 << 20
_MARK_SECONDS = 2.0


class Flight:
    """Writes in flight on all replicas of a worker, which bounds its memory; `taken` counts those begun so far."""

    def __init__(self) -> None:
        self.taken = 0
        self._bytes = self._writes = 0
        self._landed = asyncio.Event()

    def start(self, weight: int) -> None:
        """A write of `weight` bytes begins."""
        self.taken += 1
        self._bytes += weight
        self._writes += 1

    def end(self, weight: int) -> None:
        """It is over."""
        self._bytes -= weight
        self._writes -= 1
        self._landed.set()

    async def room(self) -> None:
        """Wait until something more can be taken."""
        while self._bytes >= _FLIGHT_BYTES or self._writes >= _FLIGHT_WRITES:
            self._landed.clear()
            await self._landed.wait()


class Writer:
    """One replica, held; the steps of a run are applied through it, one after the other.

    `durable` is called with how far a step has come, `failed` as soon as something went wrong beside a request.
    """

    def __init__(
        self,
        holding: Holding,
        replica: Replica,
        flight: Flight,
        durable: Callable[[Checkpoint], None],
        failed: Callable[[SiphonError], None],
    ) -> None:
        self._holding = holding
        self._upkeep = Upkeep(holding, replica)
        self._image = holding.image
        self._flight = flight
        self._durable = durable
        self._tell_failed = failed
        self._ledger: Ledger | None = None
        self._writes: set[asyncio.Task[None]] = set()
        self._since_mark = 0
        self._marked_at = 0.0
        self._moved = asyncio.Event()
        self._marking = asyncio.Lock()
        self._saving: asyncio.Task[None] | None = None
        self._failed: SiphonError | None = None

    @property
    def replica(self) -> Replica:
        """What the replica was when it was last looked at."""
        return self._upkeep.replica

    async def begin(self, step: Step, *, discard: bool) -> Checkpoint:
        """Bring the image to where `step` can go on, and return from where.

        ConflictError if its content is neither the base nor a part of this very step, unless
        `discard` gives up what differs.
        """
        if self._ledger is not None:
            raise UsageError("a step is already under way on this replica")
        with self._hanging():
            mark = await self._upkeep.ready(step, discard=discard)
        self._ledger = Ledger(mark.checkpoint)
        self._moved.set()
        self._marked_at = asyncio.get_running_loop().time()
        return mark.checkpoint

    def put(self, frame: Frame) -> None:
        """Start writing the extent of a data or zero frame."""
        mark = self._upkeep.mark
        if self._ledger is None or mark is None:
            raise UsageError("data arrived outside a step")
        if frame.length == 0 or frame.offset + frame.length > mark.step.end.size:
            raise DataError(f"an extent at {frame.offset} of {frame.length} bytes does not lie in the image")
        weight = frame.length if frame.kind is Kind.DATA else 0
        self._flight.start(weight)
        task = asyncio.get_running_loop().create_task(self._apply(self._ledger, frame, weight))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _apply(self, ledger: Ledger, frame: Frame, weight: int) -> None:
        try:
            if frame.kind is Kind.ZERO:
                ledger.arrived(frame.segment, frame.checksum)
                await self._image.write_zeroes(frame.offset, frame.length)
            else:
                hop = frame.codec is not Codec.RAW and frame.length > _INLINE
                data = await blocking(unpacked, frame) if hop else unpacked(frame)
                ledger.arrived(frame.segment, frame.checksum)
                await self._image.write(frame.offset, data)
            self._since_mark += weight
            if ledger.durable(frame.segment):
                self._advanced()
        except SiphonError as error:
            self._fail(error)
        finally:
            self._flight.end(weight)
            self._moved.set()

    def _fail(self, error: SiphonError) -> None:
        if self._failed is None or (isinstance(error, LinkError) and not isinstance(self._failed, LinkError)):
            self._failed = error  # what timed out may still be done, whatever else went wrong
            self._tell_failed(error)

    async def compare(self, extents: tuple[tuple[int, int], ...], wanted: bytes) -> bytes:
        """Return a byte for each extent, 1 where it holds what is named in `wanted` (agent/sameness.py)."""
        mark = self._upkeep.mark
        if self._ledger is None or mark is None:
            raise UsageError("a comparison was asked for outside a step")
        end = max((at + count for at, count in extents), default=0)
        total = sum(count for _, count in extents)
        if end > mark.step.end.size or total > MAX_PAYLOAD or len(wanted) != len(extents) * NAME:
            raise DataError(
                f"{len(extents)} extents of {total} bytes up to {end} cannot be compared with {len(wanted)} bytes of names"
            )
        # None of the reads may outlive the image, whatever happens meanwhile.
        there = await unbroken(_all_read(self._image, extents))
        ours = await blocking(names, there)
        return bytes(mine == theirs for mine, theirs in zip(each_name(ours), each_name(wanted), strict=True))

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
            self._fail(error)
            self._moved.set()
        finally:
            self._saving = None

    def _check(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _mark_due(self) -> bool:
        late = asyncio.get_running_loop().time() - self._marked_at > _MARK_SECONDS
        return late or self._since_mark >= _MARK_BYTES

    async def save(self) -> None:
        """Write the checkpoint onto the replica."""
        async with self._marking:
            mark = self._upkeep.mark
            if self._ledger is None or mark is None or self._ledger.checkpoint == mark.checkpoint:
                return
            self._since_mark, self._marked_at = 0, asyncio.get_running_loop().time()
            checkpoint = self._ledger.checkpoint
            # An image's own settings (conf_rbd_cache) may have turned a cache on that we turned off.
            await self._image.flush()
            await self._upkeep.write_mark(msgspec.structs.replace(mark, checkpoint=checkpoint))

    async def commit(self, total: Checkpoint, source: Origin, patience: float) -> None:
        """See that everything up to `total` is durable and right, then make the snapshot.

        DataError if for `patience` seconds nothing arrives while something is missing.
        """
        ledger, mark = self._ledger, self._upkeep.mark
        if ledger is None or mark is None or source.snapshot != mark.step.end:
            raise UsageError("a commit arrived outside its step")
        while not ledger.complete(total):
            self._check()
            self._moved.clear()
            taken = self._flight.taken
            try:
                async with asyncio.timeout(patience):
                    await self._moved.wait()
            except TimeoutError:
                if self._flight.taken != taken:
                    continue  # what is missing stands behind other images' data
                raise DataError(f"the step is not complete: {ledger.checkpoint} is here, {total} was sent") from None
        self._check()
        with self._hanging():
            await self._image.flush()
            async with self._marking:
                await blocking(self._image.take_snapshot, mark.snapshot)
                self._ledger = None
                await self._upkeep.committed(source)

    async def remove(self, snapshots: tuple[int, ...]) -> tuple[tuple[str, ...], dict[str, str]]:
        """Remove snapshots of ours by id; return the names that are gone, and those kept with the reason."""
        with self._hanging():
            return await self._upkeep.remove(snapshots)

    async def close(self) -> None:
        """Let writes in flight finish, save how far they came, and let go of the image."""
        await unbroken(self._close())

    async def _close(self) -> None:
        if self._writes:
            await asyncio.wait(self._writes)
        if self._saving is not None:
            await asyncio.wait([self._saving])
        if self._failed is None:
            await self.save()
        if isinstance(self._failed, LinkError):
            # What timed out here may still reach the disks: keep the lock, so that the next run fences it.
            raise self._failed
        await self._holding.release(unfinished=self._upkeep.mark is not None)

    @contextmanager
    def _hanging(self) -> Iterator[None]:
        """Note that an operation timed out: it may still be done, so the lock must not be given back."""
        try:
            yield
        except LinkError as error:
            self._fail(error)
            raise


async def _all_read(image: Image, extents: Iterable[tuple[int, int]]) -> list[bytes]:
    read = await asyncio.gather(*(image.read(at, count) for at, count in extents), return_exceptions=True)
    for each in read:
        if isinstance(each, BaseException):
            raise each
    return [each for each in read if isinstance(each, bytes)]


async def opened(
    holding: Holding,
    seen: Replica | None,
    stand: Standing | None,
    flight: Flight,
    durable: Callable[[Checkpoint], None],
    failed: Callable[[SiphonError], None],
) -> Writer:
    """Bring a replica that was just taken into order, and return the writer for it.

    `seen` and `stand` are what was found before the lock was ours; where the mark is another one by
    now, nothing is known of how far it came. Whatever goes wrong, the image is let go as it was found.
    """
    try:
        return Writer(holding, await ordered(holding, seen, stand), flight, durable, failed)
    except LinkError:
        raise  # what timed out may still be done: the next run fences us
    except BaseException:
        await holding.release(unfinished=True)
        raise
