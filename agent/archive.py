"""An archive of an image: push a point, verify, fold old ones together, read a chain back.

    DEST/IMAGE.ID/END-full/       entry.json, parts-000000.json …, 000000000.zst, 000000001.zst …
    DEST/IMAGE.ID/END-from-BASE/  an increment
    DEST/IMAGE.ID/.pushing/       the point that is being written; its last list of parts says how far
    DEST/IMAGE.ID/.folding/       the same for a merge

A point's folder gets its name once all of it is there. The parts of a point unpack to a plain diff:
`cat *.zst | zstd -d | rbd import-diff - …` restores it without this program.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from functools import partial
from typing import Protocol
from urllib.parse import quote

import msgspec
import xxhash
import zstandard

from agent import __version__
from agent.chain import Entry, Part, Parts, chains_of, is_list, is_point, list_name, packed, parsed, parsed_parts, to_fold
from agent.cluster import Image
from agent.diff import Decoder, Encoder, Event, FormatError
from agent.difffile import Ordered
from agent.errors import DataError, NotFoundError
from agent.exporting import owned
from agent.inspection import Inspection
from agent.manifest import Point
from agent.merge import Header, merged
from agent.model import ImageIdentity, Snapshot
from agent.source import Piece, Tally, reading
from agent.store import Store
from agent.threads import blocking

#: How much of a diff one part holds, bytes: what an interrupted push at worst sends again.
PART = 32 << 20
#: How many parts one list names: it is written anew with each of them.
LISTED = 256
_LEVEL = 3
_GATHER = 4 << 20
#: How much of their parts the points of a merge hold together, and one of them at least, bytes.
_FETCHED, _LEAST_FETCHED = 64 << 20, 1 << 20
#: How much is unpacked at a time, bytes of a part.
_FED = 64 << 10
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

    async def push(
        self, image: Image, entry: Entry, base: Snapshot | None, still: Callable[[], None], say: Callable[[str], None]
    ) -> Entry:
        """Write the point `entry` (without parts), going on where an earlier push of it stopped.

        `base` is the entry's base as the source calls it now, which may be another name. `still` (in a
        thread) raises if what was read is not to be believed, since its snapshots are gone.
        """
        folder = f"{self.folder}/{_PUSHING}"
        begun = await self.begun()
        writer = _Writer(self._store, folder, entry)
        if begun is not None and (begun.source, begun.base, begun.end) == (entry.source, entry.base, entry.end):
            await writer.go_on()
        if writer.whole:
            say("all of it is there already")
            await blocking(still)
            return await self._finish(writer, _PUSHING)
        if writer.until:
            say(f"going on at {writer.until:,} bytes of the image: {writer.count} part(s) are there")
        else:
            await self._store.remove(folder)
            writer = _Writer(self._store, folder, entry)
            await self._store.write(f"{folder}/{ENTRY}", packed(entry))
        end, encoder = entry.end.snapshot, Encoder()
        if not writer.count:
            await writer.put(_head(encoder, Header(entry.base.snapshot.name if entry.base else "", end.name, end.size)))
        async with reading(image, base, end, writer.until, Tally()) as pieces:
            async for piece in pieces:
                await writer.piece(encoder, piece)
        await writer.put(encoder.end)
        await blocking(still)
        return await self._finish(writer, _PUSHING)

    async def _finish(self, writer: _Writer, folder: str) -> Entry:
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
            last,
            base=None,
            parts=0,
            stored=0,
            records=0,
            data=0,
            zeros=0,
            made_at=now(),
            replaces=tuple(each.name for each in group),
        )
        writer = _Writer(self._store, f"{self.folder}/{_FOLDING}", entry)
        stream = merged(self.layers(group), Header("", last.end.snapshot.name, last.size), Encoder())
        inspection = Inspection()
        while data := await blocking(_gather, stream):
            await blocking(inspection.feed, data)
            await writer.put(data)
        made = inspection.finish().diffs[0]
        writer.counted(made.records, made.data, made.zeros)
        return await self._finish(writer, _FOLDING)

    def layers(self, group: Sequence[Entry]) -> list[Layer]:
        """Return the points as inputs of a merge, to be read in threads: the event loop fetches their parts.

        However many they are, together they hold `_FETCHED` bytes of parts and what these unpack to.
        """
        loop = asyncio.get_running_loop()
        piece = max(_LEAST_FETCHED, _FETCHED // max(1, len(group)))

        def fetch(name: str, at: int = 0, count: int | None = None) -> bytes:
            return asyncio.run_coroutine_threadsafe(self._store.read(name, at, count), loop).result()

        return [Layer(each, self._unpacked_in_thread(each, fetch, piece)) for each in group]

    def _unpacked_in_thread(self, entry: Entry, fetch: Fetch, piece: int) -> Iterator[bytes]:
        """Yield a point's diff in pieces; what is wrong with a part shows behind its last piece at the latest."""
        folder = f"{self.folder}/{entry.name}"
        for name in map(list_name, range(entry.lists)):
            for part in parsed_parts(fetch(f"{folder}/{name}"), f"{folder}/{name}").parts:
                yield from _pieces(part, partial(fetch, f"{folder}/{part.name}"), piece, entry.name)

    async def unpacked(self, entry: Entry) -> AsyncIterator[bytes]:
        """Yield a point's diff, part by part; DataError where one is not what it was."""
        count, folder = 0, f"{self.folder}/{entry.name}"
        for name in map(list_name, range(entry.lists)):
            for part in parsed_parts(await self._stored(f"{folder}/{name}"), f"{folder}/{name}").parts:
                yield await blocking(_unpack, part, await self._stored(f"{folder}/{part.name}"), entry.name)
                count += 1
        if count != entry.parts:
            raise DataError(f"{folder} lists {count} parts, and its entry counts {entry.parts}")

    async def _stored(self, path: str) -> bytes:
        try:
            return await self._store.read(path)
        except NotFoundError as error:
            raise DataError(f"a file is missing: {path}") from error

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


class Fetch(Protocol):
    """Reads a file of the archive, whole or a piece of it; blocks."""

    def __call__(self, name: str, at: int = 0, count: int | None = None) -> bytes:
        """Return `count` bytes from `at` on."""


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


def _pieces(part: Part, fetch: Callable[[int, int], bytes], piece: int, where: str) -> Iterator[bytes]:
    """Yield what is packed in a part, fetching `piece` bytes of it at a time; DataError if it is not what was written."""
    unpacking = zstandard.ZstdDecompressor().decompressobj(write_size=piece)
    state = xxhash.xxh3_128()
    try:
        for at in range(0, part.bytes, piece):
            stored = fetch(at, min(piece, part.bytes - at))
            state.update(stored)
            # Bounded, however well it packs: a few bytes of a frame may hold all of a part's zeros.
            for begin in range(0, len(stored), _FED):
                if data := unpacking.decompress(stored[begin : begin + _FED]):
                    yield data
    except zstandard.ZstdError as error:
        raise DataError(f"{where}/{part.name} cannot be unpacked: {error}") from error
    if state.hexdigest() != part.digest:
        raise DataError(f"{where}/{part.name} was changed or cut: it is not what its entry says")


def _head(encoder: Encoder, header: Header) -> bytes:
    base = encoder.from_snapshot(header.base) if header.base else b""
    return encoder.banner + base + encoder.to_snapshot(header.end) + encoder.size(header.size)


def now() -> str:
    """Return the time as entries give it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def entry_for(source: ImageIdentity, image: str, base: Point | None, end: Point) -> Entry:
    """Return the entry of a point that is about to be pushed."""
    return Entry(source, image, base, end, end.snapshot.size, now(), f"rbd-siphon {__version__}")


class _Writer:
    """Writes a diff as parts; a list in the folder always tells of those that are there."""

    def __init__(self, store: Store, folder: str, entry: Entry) -> None:
        self._store = store
        self._folder = folder
        self._entry = entry
        self._number = 0  # of the list at hand
        self._listed = Parts()
        self._held: list[bytes | memoryview] = []
        self._size = 0
        self._at = 0

    @property
    def count(self) -> int:
        """How many parts are written."""
        return self._listed.before + len(self._listed.parts)

    @property
    def whole(self) -> bool:
        """Whether the parts hold all of the diff."""
        return self._listed.whole

    @property
    def until(self) -> int:
        """Up to which offset of the image the parts hold what changed."""
        return self._listed.until

    async def go_on(self) -> None:
        """Take up where the last list in the folder ends."""
        lists = [name for name in await self._store.names(self._folder) if is_list(name)]
        if lists:
            path = f"{self._folder}/{lists[-1]}"
            self._number, self._listed = len(lists) - 1, parsed_parts(await self._store.read(path), path)

    async def piece(self, encoder: Encoder, piece: Piece) -> None:
        """Take a piece of the image; a part ends between two of them."""
        if self._size >= PART:
            await self._flush()
        listed = self._listed
        if piece.data is None:
            self._take(encoder.zero(piece.offset, piece.length))
            self.counted(listed.records + 1, listed.data, listed.zeros + piece.length)
        else:
            self._take(encoder.data_header(piece.offset, piece.length), piece.data)
            self.counted(listed.records + 1, listed.data + piece.length, listed.zeros)
        self._at = piece.offset + piece.length

    def counted(self, records: int, data: int, zeros: int) -> None:
        """Say what the diff holds so far."""
        self._listed = msgspec.structs.replace(self._listed, records=records, data=data, zeros=zeros)

    async def put(self, data: bytes) -> None:
        """Take bytes that stand for no place of the image: a head, an end, or the stream of a merge."""
        self._take(data)
        if self._size >= PART and not self._at:
            await self._flush()

    def _take(self, *parts: bytes | memoryview) -> None:
        self._held += map(owned, parts)
        self._size += sum(len(part) for part in parts)

    async def _flush(self, *, last: bool = False) -> None:
        data = b"".join(self._held)
        self._held, self._size = [], 0
        stored = await blocking(zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress, data)
        part = Part(f"{self.count:09d}.zst", len(stored), xxhash.xxh3_128_hexdigest(stored), len(data))
        await self._store.write(f"{self._folder}/{part.name}", stored)
        listed = self._listed
        if len(listed.parts) >= LISTED:
            self._number += 1
            listed = msgspec.structs.replace(listed, before=self.count, parts=())
        self._listed = msgspec.structs.replace(
            listed, parts=(*listed.parts, part), stored=listed.stored + len(stored), until=self._at, whole=last
        )
        await self._store.write(f"{self._folder}/{list_name(self._number)}", packed(self._listed))

    async def close(self) -> Entry:
        """Write what is left, and return the whole entry."""
        if not self.whole:
            await self._flush(last=True)
        listed = self._listed
        whole = msgspec.structs.replace(
            self._entry,
            parts=self.count,
            lists=self._number + 1,
            stored=listed.stored,
            records=listed.records,
            data=listed.data,
            zeros=listed.zeros,
        )
        await self._store.write(f"{self._folder}/{ENTRY}", packed(whole))
        return whole
