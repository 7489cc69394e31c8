"""An archive of an image: push a point, verify, fold old ones together, read a chain back.

    DEST/IMAGE.ID/END-full/       entry.json, 000000.zst, 000001.zst …
    DEST/IMAGE.ID/END-from-BASE/  an increment
    DEST/IMAGE.ID/.pushing/       the point that is being written; its entry says how far
    DEST/IMAGE.ID/.folding/       the same for a merge

A point's folder gets its name once all of it is there. The parts of a point unpack to a plain diff:
`cat *.zst | zstd -d | rbd import-diff - …` restores it without this program.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from urllib.parse import quote

import msgspec
import xxhash
import zstandard

from agent import __version__
from agent.chain import Entry, Part, chains_of, is_point, packed, parsed, to_fold
from agent.cluster import Image
from agent.diff import Decoder, Encoder, Event, FormatError
from agent.difffile import Ordered
from agent.errors import DataError, NotFoundError
from agent.exporting import owned
from agent.inspection import Inspection
from agent.manifest import Point
from agent.merge import Header, merged
from agent.model import ImageIdentity
from agent.source import Piece, Tally, reading
from agent.store import Store
from agent.threads import blocking

#: How much of a diff one part holds, bytes: what an interrupted push at worst sends again.
PART = 32 << 20
_LEVEL = 3
_GATHER = 4 << 20
ENTRY, _ID = "entry.json", "archive-id"
_PUSHING, _FOLDING, _REMOVING = ".pushing", ".folding", ".removing"


def folder_of(source: ImageIdentity, image: str) -> str:
    """Return the name of an image's folder: readable, and found by the id alone once the image is renamed."""
    return f"{quote(image, safe='')}.{source.image_id}"


class Archive:
    """The archive of one image in a store."""

    def __init__(self, store: Store, folder: str) -> None:
        self.folder = folder
        self._store = store

    @classmethod
    async def of(cls, store: Store, source: ImageIdentity, image: str) -> Archive:
        """Return the archive of an image, whatever it was called at its first push."""
        for name in await store.names(""):
            if name.endswith(f".{source.image_id}"):
                return cls(store, name)
        return cls(store, folder_of(source, image))

    @classmethod
    async def named(cls, store: Store, image: str) -> Archive:
        """Return the archive that goes by an image's name (or by its whole folder's); NotFoundError if there is none."""
        names = await store.names("")
        found = [name for name in names if name == image or name.rpartition(".")[0] == quote(image, safe="")]
        if len(found) == 1:
            return cls(store, found[0])
        what = f"{store.place} holds no archive of {image}" if not found else f"{store.place} holds several archives of {image}"
        raise NotFoundError(what, hint="name one of: " + (", ".join(found or names) or "none"))

    async def entries(self) -> list[Entry]:
        """Return every whole point."""
        found = []
        for name in await self._store.names(self.folder):
            if is_point(name):
                path = f"{self.folder}/{name}/{ENTRY}"
                try:
                    found.append(parsed(await self._store.read(path), f"{self._store.place}/{path}"))
                except NotFoundError as error:
                    raise DataError(f"{self.folder}/{name} is no whole point: {error}") from error
        return found

    async def chains(self) -> list[list[Entry]]:
        """Return the chains, the newest last."""
        return chains_of(await self.entries())[0]

    async def begun(self) -> Entry | None:
        """Return the point whose push was broken off, None if there is none."""
        try:
            path = f"{self.folder}/{_PUSHING}/{ENTRY}"
            return parsed(await self._store.read(path), path)
        except NotFoundError:
            return None

    async def push(self, image: Image, entry: Entry, still: Callable[[], None], say: Callable[[str], None]) -> Entry:
        """Write the point `entry` (without parts), going on where an earlier push of it stopped.

        `still` (in a thread) raises if what was read is not to be believed, since its snapshots are gone.
        """
        begun = await self.begun()
        if begun is not None and (begun.source, begun.base, begun.end) == (entry.source, entry.base, entry.end) and begun.until:
            say(f"going on at {begun.until:,} bytes of the image: {len(begun.parts)} part(s) are there")
            entry = begun
        else:
            await self._store.remove(f"{self.folder}/{_PUSHING}")
        writer = _Parts(self._store, f"{self.folder}/{_PUSHING}", entry)
        base, end = entry.base.snapshot if entry.base else None, entry.end.snapshot
        encoder = Encoder()
        if not entry.parts:
            await writer.put(_head(encoder, Header(base.name if base else "", end.name, end.size)))
        async with reading(image, base, end, entry.until, Tally()) as pieces:
            async for piece in pieces:
                await writer.piece(encoder, piece)
        await writer.put(encoder.end)
        await blocking(still)
        return await self._finish(writer, _PUSHING)

    async def _finish(self, writer: _Parts, folder: str) -> Entry:
        done = await writer.close()
        await self._store.rename(f"{self.folder}/{folder}", f"{self.folder}/{done.name}")
        return done

    async def fold(self, keep: int, say: Callable[[str], None]) -> Entry | None:
        """Merge the newest chain's oldest points into one full, so that the newest `keep` stay; return what was made."""
        chains, replaced = chains_of(await self.entries())
        group = to_fold(chains[-1], keep) if chains else []
        made = None
        if group:
            say(f"merging {len(group)} points into {group[-1].end.snapshot.name}")
            made = await self._merge(group)
            await self.verify(made)  # as it lies there, before anything it replaces goes
            replaced += made.replaces
        for name in replaced:
            if made is None or name != made.name:
                await self._remove(name)
        return made

    async def _remove(self, name: str) -> None:
        """Remove a point: it stops being one at once, however long its files take."""
        await self._store.remove(f"{self.folder}/{_REMOVING}")
        await self._store.rename(f"{self.folder}/{name}", f"{self.folder}/{_REMOVING}")
        await self._store.remove(f"{self.folder}/{_REMOVING}")

    def locked(self) -> AbstractAsyncContextManager[None]:
        """Keep other commands off this archive; LockedError if one is at work."""
        return self._store.lock(self.folder)

    async def identity(self) -> str:
        """Return what tells this archive from every other, wherever it lies now and however that is spelt."""
        name = f"{self.folder}/{_ID}"
        try:
            return (await self._store.read(name)).decode(errors="replace").strip()
        except NotFoundError:
            made = secrets.token_hex(16)
            await self._store.write(name, f"{made}\n".encode())
            return made

    async def drop(self, chain: list[Entry]) -> None:
        """Remove a whole chain, its newest point first, so that what is left can always be restored."""
        for each in reversed(chain):
            await self._remove(each.name)

    async def _merge(self, group: list[Entry]) -> Entry:
        last = group[-1]
        await self._store.remove(f"{self.folder}/{_FOLDING}")
        entry = msgspec.structs.replace(
            last, base=None, parts=(), records=0, data=0, zeros=0, made_at=now(), replaces=tuple(each.name for each in group)
        )
        writer = _Parts(self._store, f"{self.folder}/{_FOLDING}", entry)
        stream = merged(self.layers(group), Header("", last.end.snapshot.name, last.size), Encoder())
        inspection = Inspection()
        while data := await blocking(_gather, stream):
            await blocking(inspection.feed, data)
            await writer.put(data)
        made = inspection.finish().diffs[0]
        writer.entry = msgspec.structs.replace(writer.entry, records=made.records, data=made.data, zeros=made.zeros)
        return await self._finish(writer, _FOLDING)

    def layers(self, group: Sequence[Entry]) -> list[Layer]:
        """Return the points as inputs of a merge, to be read in threads: the event loop fetches their parts."""
        loop = asyncio.get_running_loop()

        def fetch(name: str) -> bytes:
            return asyncio.run_coroutine_threadsafe(self._store.read(name), loop).result()

        return [Layer(each, self._unpacked_in_thread(each, fetch)) for each in group]

    def _unpacked_in_thread(self, entry: Entry, fetch: Callable[[str], bytes]) -> Iterator[bytes]:
        for part in entry.parts:
            yield _unpack(part, fetch(f"{self.folder}/{entry.name}/{part.name}"), entry.name)

    async def unpacked(self, entry: Entry) -> AsyncIterator[bytes]:
        """Yield a point's diff, part by part; DataError where one is not what it was."""
        for part in entry.parts:
            path = f"{self.folder}/{entry.name}/{part.name}"
            try:
                stored = await self._store.read(path)
            except NotFoundError as error:
                raise DataError(f"a part is missing: {path}") from error
            yield await blocking(_unpack, part, stored, entry.name)

    async def verify(self, entry: Entry) -> None:
        """Read a point whole; DataError if anything in it is not as its entry says."""
        inspection = Inspection()
        async for data in self.unpacked(entry):
            await blocking(inspection.feed, data)
        facts = inspection.finish()
        where = f"{self.folder}/{entry.name}"
        if facts.damage or facts.kind != "diff":
            raise DataError(f"{where}: {facts.damage or 'it is no diff'}")
        found = facts.diffs[0]
        base = entry.base.snapshot.name if entry.base else None
        if (found.base, found.end, found.size) != (base, entry.end.snapshot.name, entry.size):
            raise DataError(f"{where} is the diff {found.base} → {found.end}, and its entry says otherwise")
        if (found.records, found.data, found.zeros) != (entry.records, entry.data, entry.zeros):
            raise DataError(f"{where} does not hold the records that its entry counts")


class Layer(Ordered):
    """A point as an input of a merge: its header comes from its entry, so that nothing is read before it is needed."""

    def __init__(self, entry: Entry, parts: Iterator[bytes]) -> None:
        self.header = Header(entry.base.snapshot.name if entry.base else "", entry.end.snapshot.name, entry.size)
        self.begin(f"the archive's point {entry.end.snapshot.name}", _events(parts))


def _events(parts: Iterator[bytes]) -> Iterator[Event]:
    decoder = Decoder()
    try:
        for data in parts:
            yield from decoder.feed(data)
        decoder.end()
    except (FormatError, NotFoundError) as error:
        raise DataError(f"a point of the archive is damaged: {error}") from error


def _gather(stream: Iterator[bytes | memoryview]) -> bytes:
    """Return some megabytes of a stream, b"" at its end."""
    held, size = [], 0
    for part in stream:
        held.append(part)
        size += len(part)
        if size >= _GATHER:
            break
    return b"".join(held)


def _unpack(part: Part, stored: bytes, where: str) -> bytes:
    """Return what is packed in a part; DataError if it is not what was written."""
    if (len(stored), xxhash.xxh3_128_hexdigest(stored)) != (part.bytes, part.digest):
        raise DataError(f"{where}/{part.name} was changed or cut: it is not what its entry says")
    try:
        return zstandard.ZstdDecompressor().decompress(stored, max_output_size=part.plain)
    except zstandard.ZstdError as error:
        raise DataError(f"{where}/{part.name} cannot be unpacked: {error}") from error


def _head(encoder: Encoder, header: Header) -> bytes:
    base = encoder.from_snapshot(header.base) if header.base else b""
    return encoder.banner + base + encoder.to_snapshot(header.end) + encoder.size(header.size)


def now() -> str:
    """Return the time as entries give it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def entry_for(source: ImageIdentity, image: str, base: Point | None, end: Point) -> Entry:
    """Return the entry of a point that is about to be pushed."""
    return Entry(source, image, base, end, end.snapshot.size, (), now(), f"rbd-siphon {__version__}")


@dataclass
class _Parts:
    """Writes a diff as parts; the entry in the folder always tells of those that are there."""

    store: Store
    folder: str
    entry: Entry
    _held: list[bytes | memoryview] = field(default_factory=list)
    _size: int = 0
    _at: int = 0

    async def piece(self, encoder: Encoder, piece: Piece) -> None:
        """Take a piece of the image; a part ends between two of them."""
        if self._size >= PART:
            await self._flush()
        entry = self.entry
        if piece.data is None:
            self._take(encoder.zero(piece.offset, piece.length))
            self.entry = msgspec.structs.replace(entry, records=entry.records + 1, zeros=entry.zeros + piece.length)
        else:
            self._take(encoder.data_header(piece.offset, piece.length), piece.data)
            self.entry = msgspec.structs.replace(entry, records=entry.records + 1, data=entry.data + piece.length)
        self._at = piece.offset + piece.length

    async def put(self, data: bytes) -> None:
        """Take bytes that stand for no place of the image: a head, an end, or the stream of a merge."""
        self._take(data)
        if self._size >= PART and not self._at:
            await self._flush()

    def _take(self, *parts: bytes | memoryview) -> None:
        self._held += map(owned, parts)
        self._size += sum(len(part) for part in parts)

    async def _flush(self) -> None:
        data = b"".join(self._held)
        self._held, self._size = [], 0
        stored = await blocking(zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress, data)
        part = Part(f"{len(self.entry.parts):06d}.zst", len(stored), xxhash.xxh3_128_hexdigest(stored), len(data))
        await self.store.write(f"{self.folder}/{part.name}", stored)
        self.entry = msgspec.structs.replace(self.entry, parts=(*self.entry.parts, part), until=self._at)
        await self.store.write(f"{self.folder}/{ENTRY}", packed(self.entry))

    async def close(self) -> Entry:
        """Write what is left, and return the whole entry."""
        # With the last part the entry says that nothing is left to go on with.
        self._at = 0
        await self._flush()
        return self.entry
