"""A diff or an export into an image: proven to fit before the first byte, and resumed after an interruption.

`rbd import-diff` checks names. Here the start point must be the newest snapshot and the present
content equal to it, by comparison, or a part of this very diff. How far a diff has come is recorded
(agent/diffmark.py): the bytes of the stream that are durable, and a digest of all that may have been
written, so that only the same stream goes on where it stopped. That nobody else wrote meanwhile is
proven as for a replica (agent/continuity.py).
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from agent.cluster import EXCLUSIVE_LOCK, Cluster, Image, Pool
from agent.continuity import Standing
from agent.diff import Event
from agent.difffile import DiffFile
from agent.diffmark import DiffMark, begin_mark, found_mark, move_mark, remove_mark
from agent.errors import ConflictError, DataError, LinkError, NotFoundError, UsageError
from agent.holding import Holding, settled_footing, take
from agent.manifest import Manifest
from agent.merge import Header
from agent.model import Hand, ImageIdentity, ImageSpec, Origin, Snapshot, decode, encode
from agent.names import LINEAGE_KEY, origin_key
from agent.survey import Footing, differs, looked
from agent.threads import blocking
from agent.writes import Imported, Writes, resize, write_all

#: How much of a stream is announced at a time before it is written, bytes; it is held in memory.
_WINDOW = 32 << 20


@dataclass(frozen=True)
class Options:
    """What the user allows."""

    allow_shrink: bool = False
    unchecked: bool = False


class DiffImport:
    """One diff into one image."""

    def __init__(
        self, cluster: Cluster, pool: Pool, spec: ImageSpec, manifest: Manifest | None, options: Options, say: Callable[[str], None]
    ) -> None:
        self._cluster = cluster
        self._pool = pool
        self._spec = spec
        self._manifest = manifest
        self._options = options
        self._say = say
        self._ahead: asyncio.Task[_Window] | None = None
        self._ready = asyncio.Event()

    async def run(self, diff: DiffFile) -> Imported:
        """Apply `diff` and take its end snapshot; ConflictError if it does not fit."""
        found, glance = await blocking(_look, self._pool, self._spec)
        header = diff.header
        if self._manifest is not None:
            _same_diff(self._manifest, header)
        if self._options.unchecked:
            return await self._unchecked(diff, found)
        if found.replica:
            raise ConflictError(
                f"{self._spec} is a replica that `rbd-siphon sync` writes",
                hint="import into another image, or allow it with --unchecked",
            )
        if found.mark is not None and found.mark.whole and found.mark.header == header and header.end in found.snapshots:
            return await self._finish(diff, found.mark)
        if done := self._already(found, header):
            return done
        self._fits(found, header)
        if found.mark is None:
            # Read while the lock is taken and the content compared.
            self._ahead = asyncio.create_task(_window(diff, self._ready, _reader))
            self._ahead.add_done_callback(_seen)
        try:
            return await self._taken(diff, found, glance)
        finally:
            if self._ahead is not None:
                self._ahead.cancel()

    async def _taken(self, diff: DiffFile, found: _Found, glance: Footing | None) -> Imported:
        if not found.lockable or glance is None:
            self._say(f"{self._spec} has no exclusive lock: see that nobody else writes it meanwhile")
            return await self._unlocked(diff, found)
        image_id = found.image_id
        footing = await settled_footing(self._pool, self._spec, image_id, unfinished=found.mark is not None, found=glance)
        trusted = found.mark is None or footing.standing is Standing.RESUMABLE
        holding = await take(self._pool, self._spec, image_id, footing, self._me(), trusted=trusted, say=self._say)
        if holding is None:
            raise ConflictError(f"{self._spec} changed hands just now", hint="run the same command again")
        return await self._held(diff, holding, found, resumable=found.mark is not None and trusted)

    async def _held(self, diff: DiffFile, holding: Holding, found: _Found, *, resumable: bool) -> Imported:
        try:
            await blocking(self._still, holding.image, found)
            result = await self._apply(diff, holding.image, found, resumable=resumable, trust=holding.trust)
        except LinkError:
            # What timed out may still reach the disks: the lock is kept, and the next run fences it.
            raise
        except BaseException:
            await holding.release(unfinished=True)
            raise
        await holding.release(unfinished=False)
        return result

    def _still(self, image: Image, found: _Found) -> None:
        """ConflictError if the image is not any more as it was before we held it."""
        if _found(self._pool, image) != found:
            raise ConflictError(f"{self._spec} was changed just now", hint="run the same command again")

    async def _unlocked(self, diff: DiffFile, found: _Found) -> Imported:
        image = await blocking(self._pool.open, self._spec.image, writable=True)
        try:
            return await self._apply(diff, image, found, resumable=False, trust=None)
        finally:
            await blocking(image.close)

    async def _unchecked(self, diff: DiffFile, found: _Found) -> Imported:
        """Do as `rbd import-diff` does."""
        header = diff.header
        found.base_of(header)
        if header.end in found.snapshots:
            raise ConflictError(f"{self._spec}@{header.end} exists already")
        image = await blocking(self._pool.open, self._spec.image, writable=True)
        writes = Writes(image)
        try:
            await blocking(resize, image, header.size)
            while events := await blocking(diff.batch):
                await write_all(writes, events, header.size)
            self._as_told(diff)
            await writes.settle()
            if header.end:
                await blocking(image.take_snapshot, header.end)
        finally:
            await writes.abandon()
            await blocking(image.close)
        return Imported("imported", diff.position, writes.written)

    def _as_told(self, diff: DiffFile) -> None:
        """DataError if what was read is not what the manifest tells of."""
        told = self._manifest
        if told is not None and (diff.digest, diff.position) != (told.digest, told.bytes):
            raise DataError(f"{diff.source.name} is not what its manifest says: it was changed or cut; no snapshot was taken")

    def _already(self, found: _Found, header: Header) -> Imported | None:
        """Return the result where the very snapshot that the diff leads to is there."""
        there = found.snapshots.get(header.end)
        if there is None:
            return None
        end = self._manifest.end if self._manifest is not None else None
        if self._manifest is not None and end is not None and found.origin(there) == (self._manifest.source, end.snapshot):
            return Imported("up-to-date", 0, 0)
        raise ConflictError(
            f"{self._spec}@{header.end} exists already", hint="was this diff imported before? see: rbd snap ls " + str(self._spec)
        )

    def _fits(self, found: _Found, header: Header) -> None:
        """See what can be seen without reading content."""
        spec, manifest = self._spec, self._manifest
        base = found.base_of(header)
        if base is not None and base != found.newest:
            assert found.newest is not None
            raise ConflictError(
                f"the diff begins at {base.name}, and {spec} has a newer snapshot, {found.newest.name}",
                hint=f"go back with: rbd snap rollback {spec}@{base.name}, after removing the snapshots behind it",
            )
        if base is not None and manifest is not None and manifest.base is not None:
            known = found.origin(base)
            if known is None:
                self._say(f"nothing tells which snapshot {spec}@{base.name} is a copy of: only its name was compared")
            elif known != (manifest.source, manifest.base.snapshot):
                raise ConflictError(
                    f"{spec}@{base.name} is a copy of snapshot id {known[1].id} of image {known[0].image_id}, and the diff begins "
                    f"at snapshot id {manifest.base.snapshot.id} of {manifest.image} (image id {manifest.source.image_id})"
                )
        if header.size < found.size and not self._options.allow_shrink:
            raise ConflictError(
                f"the diff shrinks {spec} from {found.size} to {header.size} bytes", hint="--allow-shrink gives up what lies behind"
            )
        if found.mark is not None and found.mark.header != header:
            self._say(f"{spec} is in the middle of another diff, to {found.mark.header.end or 'no snapshot'}")

    async def _apply(
        self, diff: DiffFile, image: Image, found: _Found, *, resumable: bool, trust: Callable[[], Awaitable[None]] | None
    ) -> Imported:
        header, mark = diff.header, found.mark
        held: list[Event] = []
        resumed: int | None = None
        blank = False
        if resumable and mark is not None and mark.header == header:
            held = await self._same_stream(diff, mark)
            resumed = mark.durable
        else:
            await self._equals_base(image, found, header)
            blank = not header.base
            mark = await blocking(begin_mark, image, header)
        if trust is not None:
            await trust()
        await blocking(resize, image, header.size)
        writes = Writes(image, blank=blank)
        try:
            await write_all(writes, held, header.size)
            await self._stream(diff, image, writes, mark)
            self._as_told(diff)
            await writes.settle()
        finally:
            await writes.abandon()
        await blocking(move_mark, self._pool, image, mark, diff.position, diff.position, diff.digest, whole=True)
        if header.end:
            await blocking(image.take_snapshot, header.end)
        await blocking(self._settle, image, header)
        return Imported("imported", diff.position, writes.written, resumed)

    async def _finish(self, diff: DiffFile, mark: DiffMark) -> Imported:
        """Do what was left to do when a run was killed behind its snapshot, once this is seen to be the same stream."""
        while await blocking(diff.batch):
            pass
        self._as_told(diff)
        if (diff.digest, diff.position) != (mark.digest, mark.begun):
            raise ConflictError(f"{self._spec}@{diff.header.end} exists already, and another diff made it")
        await blocking(self._settled, diff.header)
        return Imported("imported", diff.position, 0)

    def _settled(self, header: Header) -> None:
        with self._pool.open(self._spec.image, writable=True) as image:
            self._settle(image, header)

    def _settle(self, image: Image, header: Header) -> None:
        """Record what the end snapshot is a copy of, and that nothing is under way any more."""
        if header.end:
            made = next(each for each in image.snapshots() if each.name == header.end)
            if self._manifest is not None and self._manifest.end is not None:
                now = datetime.now(UTC).isoformat(timespec="seconds")
                image.set_metadata(origin_key(made.id), encode(Origin(self._manifest.source, self._manifest.end.snapshot, now)))
        remove_mark(self._pool, image)

    async def _same_stream(self, diff: DiffFile, mark: DiffMark) -> list[Event]:
        """Read as far as an earlier run may have written, and see that it is the same stream; return what is not durable of it."""
        held: list[Event] = []
        for until, keep in ((mark.durable, False), (mark.begun, True)):
            while diff.position < until and (events := await blocking(diff.batch, until)):
                if keep:
                    held += events
        if mark.begun and (diff.position, diff.digest) != (mark.begun, mark.digest):
            raise ConflictError(
                f"{self._spec} is in the middle of another diff of the same points: what was imported of it, {mark.begun} bytes, "
                f"is not how {diff.source.name} begins",
                hint=_way_back(self._spec, mark.header),
            )
        if mark.durable:
            self._say(f"going on at byte {mark.durable:,} of {diff.source.name}")
        return held

    async def _equals_base(self, image: Image, found: _Found, header: Header) -> None:
        base = found.snapshots[header.base] if header.base else None
        changed = await differs(self._pool, image, base)
        if not changed:
            return
        what = f"differs from {base.name}" if base else "is not empty, and the diff begins at the image's creation"
        middle = " (it is in the middle of another diff)" if found.mark is not None else ""
        raise ConflictError(
            f"the present content of {self._spec} {what}{middle}: up to {changed} bytes would be lost or left behind",
            hint=_way_back(self._spec, header),
        )

    async def _stream(self, diff: DiffFile, image: Image, writes: Writes, mark: DiffMark) -> None:
        """Write what is left of the stream, each window once it is announced.

        While one is written the next is read and announced: who fills the pipe need not wait for the
        disks, nor the disks for an announcement that stands behind the writes in their queue.
        """
        landings: deque[tuple[int, asyncio.Task[None]]] = deque()
        durable = mark.durable

        async def announced(reading: Awaitable[_Window]) -> _Window:
            nonlocal durable
            window = await reading
            while landings and landings[0][1].done():
                durable, landing = landings.popleft()
                landing.result()
            if window.events:
                await blocking(move_mark, self._pool, image, mark, durable, window.end, window.digest)
            return window

        self._ready.set()
        coming = asyncio.create_task(announced(self._ahead or _window(diff)))
        try:
            while (window := await coming).events:
                coming = asyncio.create_task(announced(_window(diff)))
                await write_all(writes, window.events, mark.header.size)
                landings.append((window.end, writes.landing()))
        finally:
            # An announcement under way must not outlive the image.
            coming.cancel()
            await asyncio.wait([coming])

    def _me(self) -> Hand:
        return Hand(
            address=self._cluster.address,
            host=socket.gethostname(),
            pid=os.getpid(),
            run=secrets.token_hex(6),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )


@dataclass(frozen=True)
class _Window:
    """What a stream holds next, where in it that ends, and the digest of everything up to there."""

    events: list[Event]
    end: int
    digest: str


def _reader(diff: DiffFile) -> asyncio.Future[list[Event]]:
    """Read in a thread that nobody waits for: a silent pipe must not keep an import that was refused from ending."""
    thread = ThreadPoolExecutor(1, "reading")
    reading = asyncio.get_running_loop().run_in_executor(thread, diff.batch)
    thread.shutdown(wait=False)
    return reading


def _seen(window: asyncio.Task[_Window]) -> None:
    if not window.cancelled():
        window.exception()  # told to whoever takes the window, if anybody does


async def _window(
    diff: DiffFile, enough: asyncio.Event | None = None, read: Callable[[DiffFile], Awaitable[list[Event]]] | None = None
) -> _Window:
    """Read a window, a smaller one if what there is has been `enough` meanwhile; `read` reads a batch in its own way."""
    start, events = diff.position, list[Event]()
    while diff.position - start < _WINDOW and not (events and enough is not None and enough.is_set()):
        if not (more := await (read(diff) if read else blocking(diff.batch))):
            break
        events += more
    return _Window(events, diff.position, diff.digest)


@dataclass(frozen=True)
class _Found:
    """What the image holds before anything is written."""

    spec: ImageSpec
    image_id: str
    size: int
    snapshots: dict[str, Snapshot]
    origins: dict[int, Origin]
    mark: DiffMark | None
    replica: bool
    lockable: bool

    @property
    def newest(self) -> Snapshot | None:
        return max(self.snapshots.values(), key=lambda each: each.id, default=None)

    def base_of(self, header: Header) -> Snapshot | None:
        """Return the snapshot the diff begins at; NotFoundError if it is not there."""
        if not header.base:
            return None
        if header.base not in self.snapshots:
            raise NotFoundError(
                f"the diff begins at {header.base}, and there is no snapshot {self.spec}@{header.base}",
                hint="its snapshots: " + (", ".join(self.snapshots) or "none"),
            )
        return self.snapshots[header.base]

    def origin(self, snapshot: Snapshot) -> tuple[ImageIdentity, Snapshot] | None:
        """Return which snapshot of which image this one is a copy of, itself where nothing says it is a copy."""
        found = self.origins.get(snapshot.id)
        return (found.source, found.snapshot) if found is not None else None


def _look(pool: Pool, spec: ImageSpec) -> tuple[_Found, Footing | None]:
    """Return what the image holds, and who may write it (None for one of format 1, which knows no locks)."""
    if image_id := pool.image_id(spec.image):
        return looked(pool, spec, image_id, partial(_found, pool))
    with pool.open(spec.image) as image:
        return _found(pool, image), None


def _found(pool: Pool, image: Image) -> _Found:
    metadata = image.metadata()
    snapshots = {each.name: each for each in image.snapshots()}
    where = f"the metadata of {image.spec}"
    origins = {
        each.id: decode(metadata[key], Origin, where) for each in snapshots.values() if (key := origin_key(each.id)) in metadata
    }
    return _Found(
        spec=image.spec,
        image_id=image.id(),
        size=image.size(),
        snapshots=snapshots,
        origins=origins,
        mark=found_mark(pool, image.id(), metadata, where),
        replica=LINEAGE_KEY in metadata,
        lockable=bool(image.shape().features & EXCLUSIVE_LOCK),
    )


def _same_diff(manifest: Manifest, header: Header) -> None:
    """UsageError if the manifest is another diff's."""
    base = manifest.base.snapshot.name if manifest.base else ""
    end = manifest.end.snapshot.name if manifest.end else ""
    if (base, end, manifest.size) != (header.base, header.end, header.size):
        raise UsageError(
            f"the manifest is another diff's: it says {base or '(creation)'} → {end or '(present)'}, {manifest.size} bytes, "
            f"the diff says {header.base or '(creation)'} → {header.end or '(present)'}, {header.size} bytes"
        )


def _way_back(spec: ImageSpec, header: Header) -> str:
    if header.base:
        return f"give up what differs with: rbd snap rollback {spec}@{header.base}"
    return "import into a new image: rbd create --size … POOL/IMAGE"
