"""A whole image from a file or a pipe: the raw content, or rbd's image format 2 with its snapshots.

The image gets its name once it is complete; until then it is called `siphon-importing-…`, and what
fails or is interrupted is removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from agent.cluster import COPIED_FEATURES, Image, Pool, copied_features
from agent.diff import Banner, Data, End, Event, FormatError, Protected, Size, ToSnapshot, Zero
from agent.errors import ConflictError, DataError, SiphonError, UsageError
from agent.files import CHUNK, Reading
from agent.imagefile import ImageHeader, ImageReader
from agent.model import ImageSpec, Shape
from agent.names import IMPORTING, METADATA_PREFIX
from agent.threads import blocking
from agent.writes import Imported, Writes, resize


@dataclass(frozen=True)
class Layout:
    """How a new image is to be laid out; zeros leave it to the file or to the cluster's defaults."""

    order: int = 0
    data_pool: str = ""


async def import_image(
    pool: Pool, spec: ImageSpec, source: Reading, form: int, layout: Layout, say: Callable[[str], None]
) -> Imported:
    """Make the image `spec` from an export; `form` is the format the user named, 0 for what the file is.

    `say` gets a line about what of the file the image does not get.
    """
    if await blocking(pool.image_id, spec.image) is not None:
        raise ConflictError(f"{spec} exists already", hint="name another image; nothing is imported over one that exists")
    first = await blocking(source.read, CHUNK)
    reader = ImageReader()
    events: list[Event | ImageHeader] = []
    try:
        events = reader.feed(first)
    except FormatError:
        if reader.kind != "raw":  # which has no banner to read
            raise
    if reader.kind == "diff":
        raise UsageError(f"{source.name} is a diff", hint=f"apply it to an image: rbd-siphon import-diff {source.name} {spec}")
    if form == 2 and reader.kind != "image":
        raise UsageError(f"{source.name} is no image of format 2: it has no banner", hint="it may be raw: --export-format 1")
    if form == 1 and reader.kind == "image":
        raise UsageError(f"{source.name} is an image of format 2, as its banner says", hint="--export-format 2, or leave it out")
    if reader.kind != "image":
        return await _raw(pool, spec, source, first, layout)
    return await _format_2(pool, spec, source, reader, events, layout, say)


async def _raw(pool: Pool, spec: ImageSpec, source: Reading, first: bytes, layout: Layout) -> Imported:
    size = source.size if source.regular else len(first)
    async with new_image(pool, spec, Shape(size, layout.order or 22, 0), layout) as image:
        writes, at, data = Writes(image, blank=True), 0, first
        try:
            while data:
                if at + len(data) > size:
                    # A pipe tells its length at its end: grow ahead, in steps that cost little.
                    size = max(at + len(data), size * 2 if size > CHUNK else 64 * CHUNK)
                    await blocking(image.resize, size)
                await writes.data(at, data)
                at += len(data)
                data = await blocking(source.read, CHUNK)
            await writes.settle()
            if size != at:
                await blocking(image.resize, at)
        finally:
            await writes.abandon()
        return Imported("imported", at, writes.written)


async def _format_2(
    pool: Pool,
    spec: ImageSpec,
    source: Reading,
    reader: ImageReader,
    events: list[Event | ImageHeader],
    layout: Layout,
    say: Callable[[str], None],
) -> Imported:
    header = next((each for each in events if isinstance(each, ImageHeader)), None)
    if header is None:
        reader.end()
        raise DataError(f"the header of {source.name} is longer than {CHUNK} bytes")
    _, left_out = copied_features(header.features)
    if left_out:
        say(f"{spec} does not get these features of the image that was exported: {', '.join(left_out)}")
    striping = header.stripe_count if header.stripe_count > 1 else 0
    shape = Shape(
        size=0,
        order=layout.order or header.order,
        features=header.features & COPIED_FEATURES,
        stripe_unit=header.stripe_unit if striping else 0,
        stripe_count=striping,
    )
    async with new_image(pool, spec, shape, layout) as image:
        for key, value in header.metadata.items():
            if not key.startswith(METADATA_PREFIX):  # what the agent knew of another image is false of this one
                await blocking(image.set_metadata, key, value)
        writes = Writes(image, blank=True)
        target = _Snapshots(image, writes)
        total = 0
        try:
            data = b""
            while True:
                await target.take(events)
                data = await blocking(source.read, CHUNK)
                total += len(data)
                if not data:
                    break
                events = reader.feed(data)
            reader.end()
            await writes.settle()
        finally:
            await writes.abandon()
        return Imported("imported", total, writes.written)


class _Snapshots:
    """Applies the diffs of an export in turn, with a snapshot behind each that names one."""

    def __init__(self, image: Image, writes: Writes) -> None:
        self._image = image
        self._writes = writes
        self._end = ""
        self._protected = False

    async def take(self, events: list[Event | ImageHeader]) -> None:  # one case an event
        """Apply the next events."""
        for event in events:
            match event:
                case Banner():
                    self._end, self._protected = "", False
                case ToSnapshot(name):
                    self._end = name
                case Protected(protected):
                    self._protected = protected
                case Size(size):
                    await self._writes.settle()
                    await blocking(resize, self._image, size)
                case Data(offset, data):
                    await self._writes.data(offset, data)
                case Zero(offset, length):
                    await self._writes.zeros(offset, length)
                case End() if self._end:
                    await self._writes.settle()
                    await blocking(self._close)
                case _:
                    pass

    def _close(self) -> None:
        self._image.take_snapshot(self._end)
        if self._protected:
            self._image.protect(self._end)


def unfinished_prefix(spec: ImageSpec) -> str:
    """Return how the image that is to become `spec` is called until it is complete, but for what tells attempts apart."""
    return f"{IMPORTING}{hashlib.blake2s(str(spec).encode()).hexdigest()[:12]}-"


@asynccontextmanager
async def new_image(pool: Pool, spec: ImageSpec, shape: Shape, layout: Layout) -> AsyncIterator[Image]:
    """Make an image under a temporary name; give it its own if the block ends well, remove it otherwise."""
    prefix = unfinished_prefix(spec)
    for leftover in await blocking(pool.images):
        if leftover.startswith(prefix):  # of an import that was killed
            await blocking(_remove, pool, leftover)
    name = prefix + secrets.token_hex(4)
    try:
        await blocking(pool.create, name, shape, layout.data_pool)
        image = await blocking(pool.open, name, writable=True)
        try:
            yield image
        finally:
            await blocking(image.close)
        await blocking(pool.rename, name, spec.image)
    except BaseException:
        await asyncio.shield(blocking(_remove, pool, name))
        raise


def _remove(pool: Pool, name: str) -> None:
    """Remove an unfinished image; one that is in use stays, for the next attempt to remove."""
    with contextlib.suppress(SiphonError):
        with pool.open(name) as image:
            if image.watchers():
                return  # it may be another import's that is still at work
        with pool.open(name, writable=True) as image:
            for each in image.snapshots():
                if image.is_protected(each.name):
                    image.unprotect(each.name)
                image.remove_snapshot(each.name)
        pool.remove(name)
