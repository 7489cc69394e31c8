"""What `rbd-siphon sync` runs once its words are understood: one image, or many over one conversation."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from agent import events as e
from agent.controller import Sync
from agent.errand import Request, open_pool, selected
from agent.errors import NotFoundError, UsageError
from agent.fleet import Switchboard, sync_all
from agent.plan import Accept
from agent.remote import SshSettings, shell, worker_channel
from agent.session import Connect, Dial, Transfer, dial_worker
from agent.settings import ClusterSettings
from agent.spec import TargetSpec
from agent.stock import dial_stock
from agent.threads import blocking


@dataclass(frozen=True)
class Way:
    """How the target is reached, and what does its part there: a worker of ours, or Ceph's own tools (`stock`)."""

    ssh: SshSettings
    cluster: ClusterSettings
    command: str
    timeout: float
    transfer: Transfer
    stock: bool

    def connect(self, target: TargetSpec, decide: Callable[[str], None]) -> Connect:
        """Return what opens a channel to a worker."""
        command = " ".join([self.command, shlex.join([*self.cluster.words(), "--timeout", f"{self.timeout:g}"])])
        return partial(worker_channel, target, self.ssh, command, self.timeout, decide)

    def dial(self, target: TargetSpec, decide: Callable[[str], None]) -> Dial:
        """Return what reaches the target for one image."""
        if self.stock:
            return dial_stock(
                partial(shell, target, self.ssh, self.timeout, decide), self.cluster, self.timeout, self.transfer.limit
            )
        return dial_worker(self.connect(target, decide), self.timeout, self.transfer, decide)


@dataclass(frozen=True)
class Selection:
    """Which images of a pool, and how many may send at a time."""

    pool: str
    namespace: str
    include: Sequence[str]
    exclude: Sequence[str]
    parallel: int


async def sync_one(request: Request, way: Way, observer: e.Observer) -> int:
    """Sync one image; return the exit code."""
    observer.emit(await Sync(request, way.dial(request.target, _decisions(observer)), observer).run())
    return 0


async def sync_pool(of: Selection, request: Callable[[str], Request], way: Way, observer: e.Observer) -> int:
    """Sync every image that matches; return the exit code. `request` makes one of an image's whole name."""
    place = "/".join(part for part in (of.pool, of.namespace) if part)
    settings = request(f"{place}/any").cluster
    home = await blocking(open_pool, settings, way.timeout, of.pool, of.namespace)
    try:
        wanted = [request(f"{place}/{name}") for name in selected(await blocking(home.pool.images), of.include, of.exclude)]
        _refuse(place, wanted)
        decide = _decisions(observer)
        if way.stock:
            summary = await sync_all(wanted, home, way.dial(wanted[0].target, decide), observer, of.parallel)
        else:
            board = Switchboard(way.connect(wanted[0].target, decide), way.timeout, way.transfer, decide)
            async with board.open() as dial:
                summary = await sync_all(wanted, home, dial, observer, of.parallel)
        observer.emit(summary)
        return summary.code
    finally:
        await blocking(home.cluster.close)


def _refuse(place: str, wanted: Sequence[Request]) -> None:
    if not wanted:
        raise NotFoundError(f"no image of {place} matches", hint=f"its images: rbd ls {place}")
    for each in wanted:
        if each.target.image.image != each.source.image.image:
            raise UsageError(
                f"{each.target} names an image, and {place} has many", hint="name a pool: HOST:POOL, or HOST:POOL/NAMESPACE/"
            )
        if each.accept is Accept.RECREATE:
            raise UsageError("--recreate is for one image at a time", hint="name the image: POOL/IMAGE")


def _decisions(observer: e.Observer) -> Callable[[str], None]:
    def decide(text: str) -> None:
        observer.emit(e.Decision(message=text))

    return decide
