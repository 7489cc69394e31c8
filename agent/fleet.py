"""Many images in one run: one conversation with the target for all of them, several images at a time.

Most of what an increment costs is waiting: for a monitor's round when a snapshot is taken, for round trips. So
many images are under way at once, and `parallel` of them send data.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from agent import events as e
from agent.controller import Sync
from agent.errand import Home, Request
from agent.errors import SiphonError, ungrouped
from agent.session import Connect, Dial, Far, Session, Strand, Transfer, conversation
from agent.threads import unbroken

#: Images under way for each that may send data.
_UNDER_WAY = 16


@dataclass(frozen=True)
class _Link:
    """A conversation, and a future that fails when it breaks."""

    session: Session
    broken: asyncio.Future[None]


class Switchboard:
    """Dials one conversation for everybody, and a new one once that broke."""

    def __init__(self, connect: Connect, timeout: float, transfer: Transfer, say: Callable[[str], None]) -> None:
        self._connect = connect
        self._timeout = timeout
        self._transfer = transfer
        self._say = say
        self._link: asyncio.Future[_Link] | None = None
        self._over = asyncio.Event()
        self._keeping: asyncio.TaskGroup

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Dial]:
        """Yield the dial; its conversation ends with the block."""
        async with asyncio.TaskGroup() as self._keeping:
            yield self._dial
            self._over.set()

    @asynccontextmanager
    async def _dial(self, warn: Callable[[str], None]) -> AsyncIterator[Far]:
        link = await asyncio.shield(self._current(warn))
        strand = link.session.strand()
        with ungrouped():
            async with asyncio.TaskGroup() as group:
                # The group ends the body when the conversation breaks.
                watch = group.create_task(_wait(link.broken))
                try:
                    yield strand
                finally:
                    # From here on what went wrong is told, not that the conversation ended over it.
                    watch.cancel()
                    # Nobody may dial for this image again before the worker has let go of it.
                    await unbroken(_left(strand, link.broken))

    def _current(self, warn: Callable[[str], None]) -> asyncio.Future[_Link]:
        link = self._link
        if link is None or (link.done() and (link.exception() is not None or link.result().broken.done())):
            link = self._link = asyncio.get_running_loop().create_future()
            self._keeping.create_task(self._keep(link, warn))
        return link

    async def _keep(self, link: asyncio.Future[_Link], warn: Callable[[str], None]) -> None:
        """Converse until all is over or the conversation breaks."""
        broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            async with self._connect() as channel, conversation(channel, self._timeout, warn, self._transfer, self._say) as session:
                link.set_result(_Link(session, broken))
                await self._over.wait()
        except SiphonError as error:
            (broken if link.done() else link).set_exception(error)
        finally:
            for each in (link, broken):
                if not each.done():
                    each.cancel()
                elif not each.cancelled():
                    each.exception()  # whoever waits sees it, and nobody may


async def _left(strand: Strand, broken: asyncio.Future[None]) -> None:
    """End a strand in good order, unless its conversation breaks first."""
    leaving = asyncio.ensure_future(strand.leave())
    await asyncio.wait([leaving, broken], return_when=asyncio.FIRST_COMPLETED)
    leaving.cancel()
    with suppress(SiphonError, asyncio.CancelledError):
        await leaving


async def _wait(broken: asyncio.Future[None]) -> None:
    await asyncio.shield(broken)


class _Tagged:
    """Passes events on with the image they are about."""

    def __init__(self, observer: e.Observer, image: str) -> None:
        self._observer = observer
        self._image = image

    def emit(self, event: e.Event) -> None:
        """Pass the event on."""
        self._observer.emit(e.about(event, self._image))


async def sync_all(requests: list[Request], home: Home, dial: Dial, observer: e.Observer, parallel: int) -> e.Summary:
    """Sync every image, `parallel` of them sending at a time; what fails is told and does not stop the others."""
    under_way, streaming = asyncio.Semaphore(parallel * _UNDER_WAY), asyncio.Semaphore(parallel)
    began = asyncio.get_running_loop().time()
    results: list[e.Result] = []
    codes: list[int] = []
    # One run, whoever of us dials: a worker that it has given up may be fenced for any of its images.
    run = secrets.token_hex(6)

    async def one(request: Request) -> None:
        tagged = _Tagged(observer, str(request.source.image))
        async with under_way:
            try:
                result = await Sync(request, dial, tagged, home=home, streaming=streaming, run=run).run()
            except SiphonError as error:
                codes.append(error.exit_code)
                tagged.emit(e.Error(code=error.exit_code, message=str(error), hint=error.hint))
            else:
                results.append(result)
                tagged.emit(result)

    async with asyncio.TaskGroup() as group:
        for request in requests:
            group.create_task(one(request))
    return e.Summary(
        images=len(requests),
        committed=sum(each.state == "committed" for each in results),
        failed=len(codes),
        code=0 if not codes else codes[0] if len(set(codes)) == 1 else 1,
        bytes_read=sum(each.bytes_read for each in results),
        bytes_sent=sum(each.bytes_sent for each in results),
        bytes_skipped=sum(each.bytes_skipped for each in results),
        seconds=round(asyncio.get_running_loop().time() - began, 3),
    )
