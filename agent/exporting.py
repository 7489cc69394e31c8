"""An image to a file or a pipe: a diff, or a whole image in either of rbd's formats."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import xxhash

from agent import __version__
from agent.cluster import Image, Pool
from agent.diff import Encoder
from agent.files import Writing
from agent.imagefile import ImageHeader, header_bytes
from agent.manifest import Manifest, Point
from agent.model import ImageIdentity, Snapshot
from agent.names import METADATA_PREFIX
from agent.source import Piece, Tally, reading, require_still
from agent.threads import blocking

#: How much is gathered before it is written, bytes: many small records cost one thread's turn.
_GATHER = 4 << 20


class Sink:
    """Gathers parts and writes them in a thread; counts and digests what went through."""

    def __init__(self, out: Writing) -> None:
        self.bytes = 0
        self._out = out
        self._parts: list[bytes | memoryview] = []
        self._held = 0
        self._state = xxhash.xxh3_128()

    async def put(self, *parts: bytes | memoryview) -> None:
        """Take parts in order."""
        for part in parts:
            self._parts.append(owned(part))
            self._held += len(part)
            self.bytes += len(part)
        if self._held >= _GATHER:
            await self.flush()

    async def flush(self) -> None:
        """Write what was gathered."""
        parts, self._parts, self._held = self._parts, [], 0
        await blocking(self._write, parts)

    @property
    def digest(self) -> str:
        """Return the xxh3-128 of everything written, 32 hexadecimal digits."""
        return self._state.hexdigest()

    def _write(self, parts: list[bytes | memoryview]) -> None:
        for part in parts:
            self._state.update(part)
        self._out.write(*parts)


def owned(part: bytes | memoryview) -> bytes | memoryview:
    """Return a copy of a small view, which would keep all of what was read alive; anything else as it is."""
    if isinstance(part, memoryview) and 2 * len(part) < memoryview(part.obj).nbytes:
        return bytes(part)
    return part


@dataclass
class Count:
    """Records of a diff, and the bytes in them."""

    records: int = 0
    data: int = 0
    zeros: int = 0


async def export_diff(pool: Pool, image: Image, base: Snapshot | None, end: Snapshot | None, out: Writing, fsid: str) -> Manifest:
    """Write what changed from `base` to `end` (None: the present content) as a diff; return what it is."""
    encoder, sink = Encoder(), Sink(out)
    size = end.size if end is not None else await blocking(image.size)
    await sink.put(encoder.banner)
    if base is not None:
        await sink.put(encoder.from_snapshot(base.name))
    if end is not None:
        await sink.put(encoder.to_snapshot(end.name))
    await sink.put(encoder.size(size))
    count = await _records(image, base, end, encoder, sink)
    await sink.put(encoder.end)
    await sink.flush()
    # What was read is the snapshots' content only if they are still there.
    await blocking(require_still, pool, image, base, end)
    return Manifest(
        source=ImageIdentity(fsid, image.id()),
        image=str(image.spec),
        base=await _point(image, base),
        end=await _point(image, end),
        size=size,
        records=count.records,
        data=count.data,
        zeros=count.zeros,
        bytes=sink.bytes,
        digest=sink.digest,
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        tool=f"rbd-siphon {__version__}",
    )


async def _point(image: Image, snapshot: Snapshot | None) -> Point | None:
    return Point(snapshot, await blocking(image.taken_at, snapshot.id)) if snapshot is not None else None


async def _records(image: Image, base: Snapshot | None, end: Snapshot | None, encoder: Encoder, sink: Sink) -> Count:
    count = Count()
    async with reading(image, base, end, 0, Tally()) as pieces:
        async for piece in _zeros_joined(pieces):
            count.records += 1
            if piece.data is None:
                count.zeros += piece.length
                await sink.put(encoder.zero(piece.offset, piece.length))
            else:
                count.data += piece.length
                await sink.put(encoder.data_header(piece.offset, piece.length), piece.data)
    return count


async def _zeros_joined(pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    """Yield the pieces with neighbouring zeros in one."""
    held: Piece | None = None
    async for piece in pieces:
        if piece.data is None and held is not None and held.offset + held.length == piece.offset:
            held = Piece(held.offset, held.length + piece.length, None)
            continue
        if held is not None:
            yield held
        held = piece if piece.data is None else None
        if piece.data is not None:
            yield piece
    if held is not None:
        yield held


async def export_raw(pool: Pool, image: Image, end: Snapshot | None, out: Writing) -> None:
    """Write the content itself (image format 1), with holes where a file can have them."""
    at = 0
    async with reading(image, None, end, 0, Tally()) as pieces:
        async for piece in pieces:
            assert piece.data is not None  # zeros are told in an increment only
            if piece.offset > at:
                await blocking(out.skip, piece.offset - at)
            await blocking(out.write, piece.data)
            at = piece.offset + piece.length
    size = end.size if end is not None else await blocking(image.size)
    if size > at:
        await blocking(out.skip, size - at)
    await blocking(require_still, pool, image, None, end)


async def export_image(pool: Pool, image: Image, end: Snapshot | None, out: Writing) -> None:
    """Write layout, metadata, every snapshot up to `end` and the content there (image format 2)."""
    sink = Sink(out)
    shape = await blocking(image.shape)
    snapshots = await blocking(image.snapshots)
    if end is not None:
        snapshots = tuple(each for each in snapshots if each.id < end.id)
    metadata = {key: value for key, value in (await blocking(image.metadata)).items() if not key.startswith(METADATA_PREFIX)}
    header = ImageHeader(shape.order, shape.features, shape.stripe_unit, shape.stripe_count, metadata, len(snapshots) + 1)
    await sink.put(header_bytes(header))
    encoder = Encoder(2)
    base: Snapshot | None = None
    for each in (*snapshots, end):
        await sink.put(encoder.banner)
        if base is not None:
            await sink.put(encoder.from_snapshot(base.name))
        if each is not None and each is not end:
            await sink.put(encoder.to_snapshot(each.name))
            await sink.put(encoder.protected(protected=await blocking(image.is_protected, each.name)))
        if each is None:
            await blocking(image.at, None)
        await sink.put(encoder.size(each.size if each is not None else await blocking(image.size)))
        await _records(image, base, each, encoder, sink)
        await sink.put(encoder.end)
        base = each
    await sink.flush()
    for each in (*snapshots, end):
        await blocking(require_still, pool, image, None, each)


@asynccontextmanager
async def opened(pool: Pool, name: str) -> AsyncIterator[Image]:
    """Open an image for reading."""
    image = await blocking(pool.open, name)
    try:
        yield image
    finally:
        await blocking(image.close)
