"""An archive and a cluster: push an image's point, and bring points back as an image or a raw file."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial

from agent.archive import Archive, entry_for, now
from agent.chain import Entry, snapshot_names
from agent.cluster import Cluster, Image, Pool
from agent.diff import Data, Decoder, Encoder, Event, FormatError, Zero
from agent.errors import ConflictError, DataError, NotFoundError
from agent.files import Writing
from agent.manifest import Point
from agent.merge import Header, merged
from agent.model import ImageSpec, Shape, Snapshot, Source
from agent.names import PEER_PREFIX, snapshot_name, tag
from agent.release import Peer, confirm, take_snapshot
from agent.restoring import Layout, new_image
from agent.retention import Keep
from agent.source import observe, require_still
from agent.spec import SourceSpec
from agent.store import Store
from agent.threads import blocking
from agent.writes import Writes, resize, write_all

Say = Callable[[str], None]


async def push(store: Store, cluster: Cluster, pool: Pool, spec: SourceSpec, say: Say) -> Entry | None:
    """Add the image's snapshot, or one taken now, to its archive; None if it is there already."""
    source = await blocking(observe, pool, spec.image, cluster.fsid)
    archive = await Archive.of(store, source.identity, spec.image.image)
    async with archive.locked():
        return await _push(archive, cluster, pool, spec, say)


async def _push(archive: Archive, cluster: Cluster, pool: Pool, spec: SourceSpec, say: Say) -> Entry | None:
    source = await blocking(observe, pool, spec.image, cluster.fsid)
    chains = await archive.chains()
    last = chains[-1][-1] if chains else None
    which = await archive.identity()
    place = tag(f"archive {which}", ImageSpec("", source.identity.image_id))
    end = await _end(archive, pool, source, spec, place, last)
    if last is not None and last.end.snapshot.id >= end.id:
        if last.end.snapshot.id == end.id:
            return None
        raise ConflictError(
            f"the archive is at {last.end.snapshot.name} already, which is newer than {end.name}", hint="push a newer snapshot"
        )
    base = source.by_id(last.end.snapshot.id) if last is not None else None
    if last is not None and base is None:
        say(f"the source has lost {last.end.snapshot.name}, where the archive ends: this push is a full one")
    image = await blocking(pool.open, spec.image.image)
    try:
        point = Point(end, await blocking(image.taken_at, end.id))
        entry = entry_for(source.identity, str(spec.image), last.end if last and base else None, point)
        done = await archive.push(image, entry, base, partial(require_still, pool, image, base, end), say)
    finally:
        await blocking(image.close)
    peer = Peer(f"archive {which}", end, now())
    keep = None if spec.snapshot else Keep(last=1)
    await blocking(confirm, pool, spec.image, f"{PEER_PREFIX}{place}", peer, replica_tag=place, keep=keep)
    return done


async def _end(archive: Archive, pool: Pool, source: Source, spec: SourceSpec, place: str, last: Entry | None) -> Snapshot:
    """Return the snapshot to push: the one named, the one whose push was broken off, or one taken now."""
    if spec.snapshot:
        found = next((each for each in source.snapshots if each.name == spec.snapshot), None)
        if found is None:
            raise NotFoundError(f"there is no snapshot {spec.image}@{spec.snapshot}")
        return found
    begun = await archive.begun()
    newer = begun is not None and (last is None or begun.end.snapshot.id > last.end.snapshot.id)
    if begun is not None and newer and begun.end.snapshot in source.snapshots:
        return begun.end.snapshot
    name = snapshot_name(datetime.now(UTC), place, secrets.randbits(16))
    taken, _ = await blocking(take_snapshot, pool, spec.image, source.identity.image_id, name)
    return taken


async def restore_image(
    archive: Archive, points: Sequence[Entry], pool: Pool, spec: ImageSpec, layout: Layout, *, all_points: bool
) -> None:
    """Make the image `spec` from a chain's points; with `all_points` each of them becomes a snapshot."""
    if await blocking(pool.image_id, spec.image) is not None:
        raise ConflictError(f"{spec} exists already", hint="name another image; nothing is restored over one that exists")
    shape = Shape(points[0].size, layout.order or 22, 0)
    async with new_image(pool, spec, shape, layout) as image:
        writes = Writes(image, blank=True)
        try:
            if all_points:
                for each, name in zip(points, snapshot_names(points), strict=True):
                    await _apply(archive, each, name, image, writes)
            else:
                await blocking(resize, image, points[-1].size)
                stream = _stream(archive, points)
                decoder = Decoder()
                while events := await blocking(_some, stream, decoder):
                    await write_all(writes, events, points[-1].size)
                await writes.settle()
        finally:
            await writes.abandon()


async def _apply(archive: Archive, entry: Entry, name: str, image: Image, writes: Writes) -> None:
    await blocking(resize, image, entry.size)
    decoder = Decoder()
    try:
        async for data in archive.unpacked(entry):
            await write_all(writes, await blocking(decoder.feed, data), entry.size)
        decoder.end()
    except FormatError as error:
        raise DataError(f"the point {entry.end.snapshot.name} is damaged: {error}") from error
    await writes.settle()
    await blocking(image.take_snapshot, name)


async def restore_file(archive: Archive, points: Sequence[Entry], out: Writing) -> None:
    """Write the content of the last of a chain's points to a raw file, with holes."""
    stream, decoder = _stream(archive, points), Decoder()

    def put(events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Data):
                if event.offset > out.written:
                    out.skip(event.offset - out.written)
                out.write(event.data)

    while events := await blocking(_some, stream, decoder):
        await blocking(put, events)
    if points[-1].size > out.written:
        await blocking(out.skip, points[-1].size - out.written)


def _stream(archive: Archive, points: Sequence[Entry]) -> Iterator[bytes | memoryview]:
    """Yield the diff from nothing to the last point, merged as it is read, so that every byte is written once."""
    header = Header("", points[-1].end.snapshot.name, points[-1].size)
    return merged(archive.layers(points), header, Encoder())


def _some(stream: Iterator[bytes | memoryview], decoder: Decoder) -> list[Event]:
    """Return the next events of a diff, empty at its end."""
    events: list[Event] = []
    while not events and not decoder.done:
        data = next(stream, None)
        if data is None:
            decoder.end()
            break
        events = [each for each in decoder.feed(data) if isinstance(each, Data | Zero)]
    return events
