"""The target site with nothing but Ceph's own tools, over SSH: a `Far` of agent/session.py.

What a worker does through librbd is done by `rbd` and `rados` commands here, and the data goes into
one `rbd import-diff -` a step. An interrupted step is rolled back and sent again from its start.

Three things stand for what a worker's exclusive lock gives:

- **The lease.** `rados watch` on an object beside the image, for as long as a run works on it. A run
  looks for other watchers after its own watch is registered, so of two at least one gives way.
- **Nobody else has the image open.** Every client that may write has a watch on its header; a run
  begins when there is none, and one that is left by our own cut-off import (`Mark.holder`) is fenced.
  While data flow the header must not change: every opening for writing changes it.
- **The note.** Each command of ours begins by comparing the traces that taking the lock leaves with
  those that our last one noted (agent/rbdsite.py). So nobody's writes come between two of them unseen.

What remains are the milliseconds between the import's end and its note, and between a comparison
and the command behind it: a client that opens, writes and closes the replica within them is not seen.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import secrets
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from typing import TypeVar

import msgspec

from agent import messages as m
from agent import rbdtool
from agent.cluster import copied_features, feature_names
from agent.continuity import Standing
from agent.diff import Encoder
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
from agent.health import fsid, is_full, trouble
from agent.model import Checkpoint, ImageIdentity, ImageSpec, Mark, Origin, Replica, Step, encode
from agent.names import LINEAGE_KEY, METADATA_PREFIX, PROBE_OBJECT, creating_prefix
from agent.pace import Pacer, Timetable
from agent.rbdsite import RbdImage, Site, failure, judged, standing
from agent.rbdtool import Tool
from agent.remote import Ran, Shell, SshChannel
from agent.session import Dial, Far, T
from agent.settings import ClusterSettings
from agent.survey import described
from agent.threads import blocking, unbroken
from agent.upkeep import Upkeep, is_committed, ordered

V = TypeVar("V")

#: How long another run, or a client that has the image open, is given to leave, and how often we look (seconds).
_LEAVES_SOON, _AGAIN = 5.0, 0.5
#: How long RADOS keeps the watch of a client that is dead, and some (seconds).
_WATCH_LASTS = 40.0
#: From how many bytes on a piece is hashed in a thread.
_IN_THREAD = 64 << 10
WARNING = (
    "--worker rbd: an interrupted step is rolled back and sent again from its start, over one channel; "
    "with rbd-siphon at the target it would go on where it stopped"
)


class Hold:
    """An image that this run alone works on, for as long as its lease lives: a `Held` of agent/upkeep.py."""

    def __init__(self, image: RbdImage, stack: AsyncExitStack) -> None:
        self.image = image
        self._stack = stack

    async def trust(self) -> None:
        """Nothing to record: content that is not proven is never gone on with."""

    async def judged(self, replica: Replica, stand: Standing | None) -> Replica:
        """Return `replica` with its head judged: by `stand` in the middle of a step, by its content otherwise."""
        return await judged(self.image, replica, stand)

    async def release(self) -> None:
        """Give the lease back."""
        await unbroken(self._stack.aclose())


class Import:
    """One `rbd import-diff -` and the diff that goes into it."""

    def __init__(self, channel: SshChannel, spec: ImageSpec, patience: float) -> None:
        self._channel = channel
        self._spec = spec
        self._patience = patience
        self._encoder = Encoder()
        self._digest = hashlib.blake2b()
        self._out = bytearray()
        self._ended = asyncio.Event()

    @property
    def sent(self) -> int:
        """Bytes sent so far."""
        return self._channel.sent

    async def read_all(self) -> None:
        """Read what the far end prints, to its end."""
        while data := await self._channel.receive():
            self._out += data
        self._ended.set()

    async def begin(self, base: str, size: int) -> None:
        """Send what a diff begins with. It names no end: the snapshot is made once all was found right."""
        head = self._encoder.banner + (self._encoder.from_snapshot(base) if base else b"") + self._encoder.size(size)
        await self._send(head)

    async def put(self, offset: int, length: int, data: memoryview | None) -> None:
        """Send an extent, zeros where `data` is None."""
        if data is None:
            await self._send(self._encoder.zero(offset, length))
        else:
            await self._send(self._encoder.data_header(offset, length))
            await self._send(data)

    async def drain(self) -> None:
        """Wait until all of it has left this side."""
        while not await self._moving(self._channel.emptied(), self._channel.unsent):
            pass

    async def finish(self) -> None:
        """End the diff and see that the far end took it all, and took what was sent."""
        await self._send(self._encoder.end)
        self._channel.end()
        await self.drain()
        try:
            async with asyncio.timeout(self._patience):
                await self._ended.wait()
        except TimeoutError:
            raise LinkError(f"rbd import-diff into {self._spec} does not end within {self._patience:.0f} s") from None
        status, digest = rbdtool.imported(bytes(self._out))
        if status != 0:
            raise self.verdict()
        if digest != self._digest.hexdigest():
            raise DataError(f"what reached rbd import-diff at the target is not what was sent to {self._spec}")

    @property
    def ended(self) -> bool:
        """Whether the far end has ended, which is early before `finish`."""
        return self._ended.is_set()

    async def _send(self, data: bytes | memoryview) -> None:
        if self._ended.is_set():
            raise self.verdict()
        if len(data) < _IN_THREAD:
            self._digest.update(data)
        else:
            await blocking(self._digest.update, data)
        self._channel.write(data)
        while not await self._moving(self._channel.drain(), self._channel.unsent):
            pass

    async def _moving(self, work: Coroutine[object, object, object], unsent: int) -> bool:
        """Wait for `work`; False if it takes long and bytes leave, LinkError if none do."""
        try:
            async with asyncio.timeout(self._patience):
                await work
        except TimeoutError:
            if self._channel.unsent < unsent:
                return False
            raise LinkError(f"rbd import-diff into {self._spec} took nothing for {self._patience:.0f} s") from None
        return True

    async def gone(self) -> SiphonError:
        """Return why the far end has ended, which is known to have."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._patience):
                await self._ended.wait()
        return self.verdict()

    def verdict(self) -> SiphonError:
        """Tell why the far end ended early."""
        status, _ = rbdtool.imported(bytes(self._out))
        if status is None:
            return self._channel.verdict(greeted=True)
        return failure(Ran(status, b"", self._channel.words), f"rbd import-diff into {self._spec}")


class Stock:
    """The target through its own commands; one request at a time."""

    def __init__(self, site: Site, data: Shell, settings: ClusterSettings, group: asyncio.TaskGroup, pacer: Pacer) -> None:
        self.durable: Callable[[Checkpoint], None] = lambda _: None
        self._site = site
        self._data = data
        self._pacer = pacer
        self._trace = b""
        self._settings = settings
        self._group = group
        self._importing = AsyncExitStack()
        self._hold: Hold | None = None
        self._osd_dump = b""
        self._upkeep: Upkeep | None = None
        self._import: Import | None = None
        self._sent = 0

    @property
    def sent(self) -> int:
        """Bytes of diffs sent so far."""
        return self._sent + (self._import.sent if self._import else 0)

    @property
    def grain(self) -> int:
        """The largest extent that `send` should be given at present, bytes."""
        return self._pacer.grain

    async def hello(self, run: str) -> m.Welcome:  # noqa: ARG002  # the lease tells runs apart
        """Look at the site: the cluster's id and what its health says against writing."""
        tool, site = self._site.tool, self._site
        health, self._osd_dump = await asyncio.gather(
            site.run(tool.ceph("health", "--format=json"), "asking for the cluster's health"),
            site.run(tool.ceph("osd", "dump", "--format=json"), "asking for the cluster's pools"),
        )
        user = f"client.{self._settings.user or 'admin'}"
        return m.Welcome(fsid=fsid(self._osd_dump), host="", pid=0, user=user, conf=self._settings.conf, trouble=trouble(health))

    async def ask(self, request: m.Message, kind: type[T]) -> T:
        """Carry out a request."""
        answer = await self._answer(request)
        assert isinstance(answer, kind)
        return answer

    def expect_much(self) -> None:
        """Hear that a first copy is coming: there is one channel, whatever comes."""

    def tell(self, message: m.Message) -> None:
        """Nothing is durable before all of it is, so there is nothing to be told."""

    async def send(self, segment: int, offset: int, length: int, data: memoryview | None) -> int:  # noqa: ARG002  # a Far's
        """Send an extent; the checksum is 0, since the diff has one of its own."""
        if self._import is None:
            raise UsageError("data was sent outside a step")
        await self._pacer.passing(0 if data is None else length)
        await self._import.put(offset, length, data)
        if not self._trace:
            self._trace = await self._locked(self._import)
        return 0

    async def _answer(self, request: m.Message) -> m.Message:
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
                return m.Begun(await self._begin(request.step, discard=request.discard))
            case m.Commit():
                return m.Seen(await self._commit(request.origin))
            case m.Remove():
                return m.Removed(*await self._held.remove(request.snapshots))
            case m.Close():
                await self._close()
                return m.Done()
            case _:
                raise UsageError(f"{type(request).__name__} is no request")

    async def _look(self, request: m.Survey | m.Probe) -> m.Message:
        """Answer what takes no image."""
        if isinstance(request, m.Survey):
            return m.Seen(await self._survey(request.image, request.source))
        tool, doing = self._site.tool, f"trying to write to the pool {request.image.pool}"
        await self._site.run(tool.names(request.image), doing)  # which a namespace that is not there refuses
        for words in (("put", PROBE_OBJECT, "/dev/null"), ("rm", PROBE_OBJECT)):
            await self._site.run(tool.rados(*words, at=request.image), doing)
        return m.Done()

    @property
    def _held(self) -> Upkeep:
        if self._upkeep is None:
            raise UsageError("no image is open")
        return self._upkeep

    async def _survey(self, spec: ImageSpec, source: ImageIdentity) -> Replica | None:
        image = await self._site.found(spec)
        if image is None:
            return None
        replica = await blocking(described, image)
        if replica.lineage is None or replica.lineage.source != source:
            return replica
        return await judged(image, replica, await standing(image, replica.mark) if replica.mark else None)

    async def _open(self, spec: ImageSpec, source: ImageIdentity, *, discard: bool) -> Replica | None:
        await self._close()
        image = await self._site.found(spec)
        if image is None:
            return None
        seen = await blocking(described, image)
        if seen.lineage is None or seen.lineage.source != source:
            return seen
        hold = Hold(image, await self._lease(spec, rbdtool.lease_object(image.id())))
        try:
            await self._alone(image, seen.mark)  # looks anew: what was seen before it was ours may be another by now
            seen = await blocking(described, image)
            stand = await standing(image, seen.mark) if seen.mark else None
            committing = seen.mark is not None and is_committed(seen, seen.mark)
            if stand is Standing.TOUCHED and not discard and not committing:
                await hold.release()
                return await judged(image, seen, stand)
            await blocking(image.take_note)
            owner = (await blocking(image.look)).locker
            if owner is not None:  # it is dead, or it would have a watch: rbd would wait for it
                await blocking(image.break_lock, owner)
            self._upkeep = Upkeep(hold, await ordered(hold, seen, stand))
        except BaseException:
            await hold.release()
            raise
        self._hold = hold
        return self._upkeep.replica

    async def _lease(self, spec: ImageSpec, lease: str) -> AsyncExitStack:
        """Register our watch on the object `lease`, until what is returned is closed; LockedError if another run's is there.

        Its heartbeat goes where the commands go, and data over another connection: it must not queue behind them.
        """
        site = self._site
        silence = max(2.0, site.timeout / 2)
        stack = AsyncExitStack()
        script = rbdtool.shell(rbdtool.keeper(site.tool, spec, lease, silence))
        try:
            channel = await stack.enter_async_context(site.shell.start(shlex.join(script)))
            await _watching(channel, spec, site.timeout)
            keeping = self._group.create_task(_keep(channel, spec, silence / 4))
            stack.callback(keeping.cancel)
            await self._alone_at_lease(spec, lease)
        except BaseException:
            await unbroken(stack.aclose())
            raise
        return stack

    async def _alone_at_lease(self, spec: ImageSpec, lease: str) -> None:
        """See that our watch on the lease is the only one; LockedError if another run's stays."""
        clock = asyncio.get_running_loop().time
        words = self._site.tool.rados("listwatchers", lease, at=spec)
        until = clock() + random.uniform(0.5, 1) * _LEAVES_SOON  # noqa: S311  # two that meet do not leave together
        while len((await self._site.run(words, f"looking who works on {spec}")).splitlines()) != 1:
            if clock() > until:
                raise LockedError(f"{spec} is being written by another run", hint="wait for it to end, or stop it there")
            await asyncio.sleep(_AGAIN)

    async def _alone(self, image: RbdImage, mark: Mark | None) -> None:
        """See that nobody has the image open; LockedError if somebody keeps it."""
        began = asyncio.get_running_loop().time()
        fenced = ""
        while there := [each for each in (await blocking(image.look)).watchers if each != fenced]:
            waited = asyncio.get_running_loop().time() - began
            if mark is not None and mark.holder and there == [mark.holder] and waited > _LEAVES_SOON:
                await blocking(image.fence, mark.holder)
                fenced = mark.holder
            elif waited > (_WATCH_LASTS if mark else _LEAVES_SOON):
                raise LockedError(
                    f"{image.spec} is open for writing by another client, {', '.join(there)}",
                    hint=f"find it with: rbd status '{image.spec}'",
                )
            else:
                await asyncio.sleep(_AGAIN)

    def _refuse_full(self, pool: str) -> None:
        if is_full(self._osd_dump, pool):
            raise SiteError(
                f"the target's pool {pool!r} is full", hint="make room or raise its quota, then run the same command again"
            )

    async def _trash(self, spec: ImageSpec, image_id: str) -> None:
        await self._close()
        image = await self._site.found(spec)
        if image is None:
            return
        if image.id() != image_id:
            raise ConflictError(
                f"{spec} is another image by now (id {image.id()}, not {image_id})", hint="run the same command again"
            )
        if others := (await blocking(image.look)).watchers:
            raise LockedError(f"{spec} is in use by {', '.join(others)}", hint=f"stop it first; see: rbd status '{spec}'")
        await self._site.run(self._site.tool.trash(spec), f"moving {spec} to the trash", slow=True)

    async def _create(self, request: m.Create) -> m.Created:
        """Make an empty image that carries its lineage from the moment it bears its name."""
        await self._close()
        spec, site = request.image, self._site
        self._refuse_full(request.data_pool or spec.pool)
        prefix = creating_prefix(str(spec), request.lineage.source.image_id)
        features, left_out = copied_features(request.shape.features)
        # One at a time makes this image: the lease is on its name, since there is no id yet.
        async with await self._lease(spec, f"rbd_siphon.{prefix}lease"):
            there = rbdtool.names(await site.run(site.tool.names(spec), f"listing the images of {spec.pool}"))
            for leftover in (each for each in there if each.startswith(prefix)):
                with suppress(LockedError, NotFoundError):  # a dead command's watch lasts half a minute
                    old = msgspec.structs.replace(spec, image=leftover)
                    await site.run(site.tool.rbd("rm", "--no-progress", at=old), f"removing {old}", slow=True)
            if spec.image in there:
                raise ConflictError(f"{spec} was made by somebody else just now", hint="run the same command again")
            temporary = msgspec.structs.replace(spec, image=prefix + secrets.token_hex(4))
            words = site.tool.create(temporary, request.shape, feature_names(features), request.data_pool)
            await site.run(words, f"creating {spec}")
            image = await site.found(temporary)
            assert image is not None
            await blocking(image.take_note)
            for key, value in request.metadata.items():
                if not key.startswith(METADATA_PREFIX):
                    await blocking(image.set_metadata, key, value)
            await blocking(image.set_metadata, LINEAGE_KEY, encode(request.lineage))
            rename = site.tool.rbd("rename", *site.tool.destination(spec), at=temporary)
            await site.run(rename, f"giving {spec} its name")
        replica = await self._open(spec, request.lineage.source, discard=False)
        if replica is None or self._upkeep is None:
            raise ConflictError(f"{spec} was taken away while it was being created", hint="run the same command again")
        return m.Created(replica, left_out)

    async def _begin(self, step: Step, *, discard: bool) -> Checkpoint:
        upkeep = self._held
        assert self._hold is not None
        image = self._hold.image
        self._refuse_full(image.spec.pool)  # or rbd would wait for room
        mark = await upkeep.ready(step, discard=discard)
        base = next(
            (each.name for each in upkeep.replica.snapshots if step.base and each.origin and each.origin.snapshot == step.base), ""
        )
        channel = await self._importing.enter_async_context(self._data.start(shlex.join(image.importing())))
        self._import, self._trace = Import(channel, image.spec, self._site.timeout), b""
        self._group.create_task(self._import.read_all())
        await self._import.begin(base, step.end.size)
        # Who writes is put down before it gets anything to write: what is left of it can be fenced.
        holder = await self._opened(image, self._import)
        await upkeep.write_mark(msgspec.structs.replace(mark, holder=holder))
        return Checkpoint()

    async def _opened(self, image: RbdImage, importing: Import) -> str:
        """Return the address of our import, once it has the image open; LockedError if another client has, too."""
        there = await self._until(importing, lambda: blocking(image.watchers), f"{image.spec} to be opened")
        if len(there) > 1:
            raise LockedError(f"{image.spec} was opened by another client just now: {', '.join(there)}")
        return there[0]

    async def _locked(self, importing: Import) -> bytes:
        """Return when the image was last opened for writing, once the lock is our import's: from then on nobody else may."""
        assert self._hold is not None
        image, mark = self._hold.image, self._held.mark
        assert mark is not None
        locker = await self._until(importing, lambda: blocking(image.locker), f"the lock of {image.spec}")
        if locker.address != mark.holder:
            raise LockedError(f"the lock of {image.spec} is another client's, {locker.address}")
        return await self._undisturbed(image, b"")

    async def _undisturbed(self, image: RbdImage, before: bytes) -> bytes:
        """Return when the image was last opened for writing; LockedError unless it was our import, and it is still alone."""
        assert self._upkeep is not None and self._upkeep.mark is not None  # noqa: PT018  # both are one state
        trace, there = await blocking(image.disturbed)
        if not there and self._import is not None:
            raise await self._import.gone()
        if (before and trace != before) or there != (self._upkeep.mark.holder,):
            raise LockedError(
                f"{image.spec} was opened by another client while it was being written: {', '.join(there)}",
                hint="stop that client, then run the same command again: it rolls back and starts over",
            )
        return trace

    async def _until(self, importing: Import, look: Callable[[], Awaitable[V | None]], what: str) -> V:
        """Look until there is something to be seen; raises why the import ended, LinkError if it takes too long."""
        try:
            async with asyncio.timeout(self._site.timeout):
                while not (found := await look()):
                    if importing.ended:
                        raise importing.verdict()
                    await asyncio.sleep(_AGAIN / 5)  # Ceph tells nobody
        except TimeoutError:
            raise LinkError(f"rbd import-diff waits longer than {self._site.timeout:.0f} s for {what}") from None
        return found

    async def _commit(self, source: Origin) -> Replica:
        upkeep, importing = self._held, self._import
        assert self._hold is not None
        if importing is None or upkeep.mark is None or source.snapshot != upkeep.mark.step.end:
            raise UsageError("a commit was asked for outside its step")
        image = self._hold.image
        await importing.drain()
        if self._trace:
            await self._undisturbed(image, self._trace)
        await importing.finish()
        await self._importing.aclose()
        self._sent, self._import = self.sent, None
        # Compares with the import's own note before it takes the snapshot.
        await blocking(image.take_snapshot, upkeep.mark.snapshot)
        made = next(each for each in await blocking(image.snapshots) if each.name == upkeep.mark.snapshot)
        if made.size != source.snapshot.size:  # rbd import-diff goes on where its resize fails
            await blocking(image.remove_snapshot, made.name)
            raise DataError(f"{image.spec} does not have the size of {source.snapshot.name}")
        return await upkeep.committed(source)

    async def aclose(self) -> None:
        """Let go of everything; an import in the middle ends without its end, which makes no snapshot."""
        await self._importing.aclose()
        await self._close()

    async def _close(self) -> None:
        hold, self._hold, self._upkeep = self._hold, None, None
        if hold is not None:
            await hold.release()


async def _watching(channel: SshChannel, spec: ImageSpec, patience: float) -> None:
    """Wait until the keeper has registered its watch."""
    said = b""
    try:
        async with asyncio.timeout(patience):
            while rbdtool.WATCHING not in said:
                data = await channel.receive()
                if not data:
                    status = channel.status
                    raise failure(Ran(status, b"", channel.words), f"taking the lease of {spec}")
                said += data
    except TimeoutError:
        raise LinkError(f"taking the lease of {spec}: the target's cluster does not answer within {patience:.0f} s") from None


async def _keep(channel: SshChannel, spec: ImageSpec, every: float) -> None:
    """Keep the lease alive; LinkError if it ends."""
    beating = asyncio.create_task(_beat(channel, every))
    try:
        while await channel.receive():
            pass
    finally:
        beating.cancel()
    raise LinkError(f"the lease of {spec} was lost: {channel.words or 'the connection broke'}")


async def _beat(channel: SshChannel, every: float) -> None:
    while True:
        channel.write(b".")
        await asyncio.sleep(every)


def dial_stock(
    connect: Callable[[], AbstractAsyncContextManager[Shell]], settings: ClusterSettings, timeout: float, limit: Timetable
) -> Dial:
    """Return a dial that works through the commands of the host behind `connect`."""

    @asynccontextmanager
    async def dial(warn: Callable[[str], None]) -> AsyncIterator[Far]:
        warn(WARNING)
        with ungrouped():
            async with connect() as commands, connect() as data, asyncio.TaskGroup() as group:
                stock = Stock(Site(commands, Tool(settings.words()), timeout), data, settings, group, Pacer(limit))
                try:
                    yield stock
                finally:
                    await stock.aclose()

    return dial
