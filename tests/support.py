"""What the tests against real clusters share: images, digests, runs, cuts. Ceph's own bindings are the judge."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import rados
import rbd

from agent import events as e
from agent.controller import Sync
from agent.errand import Request
from agent.plan import Accept
from agent.remote import SshSettings, shell, worker_channel
from agent.retention import Keep
from agent.session import Transfer, dial_worker
from agent.settings import ClusterSettings
from agent.spec import parse_source, parse_target
from agent.stock import dial_stock
from lablib.ceph import Cluster as LabCluster
from lablib.lab import Lab
from lablib.relay import Relay

MIB = 1 << 20
SIPHON = str(Path(sys.prefix) / "bin" / "rbd-siphon")
_numbers = itertools.count(1)
_given: list[str] = []


def unique(stem: str) -> str:
    """Return an image name that no other test uses, in this run of the tests or an earlier one."""
    name = f"{stem}-{os.getpid()}-{next(_numbers)}"
    _given.append(name)
    return name


@dataclass
class Site:
    """One cluster through Ceph's own bindings, as the user that the agent uses."""

    cluster: LabCluster
    pool: str
    _handle: rados.Rados = field(init=False)

    def __post_init__(self) -> None:
        self._handle = rados.Rados(conffile=str(self.cluster.conf), rados_id="siphon", conf={"rbd_cache": "false"})
        self._handle.connect()

    def close(self) -> None:
        self._handle.shutdown()

    @property
    def address(self) -> str:
        return str(self._handle.get_addrs())

    def ioctx(self, pool: str = "", namespace: str = "") -> Any:
        ioctx = self._handle.open_ioctx(pool or self.pool)
        ioctx.set_namespace(namespace)
        return ioctx

    @contextmanager
    def image(self, name: str, snapshot: str | None = None, namespace: str = "", pool: str = "") -> Iterator[Any]:
        with rbd.Image(self.ioctx(pool, namespace), name, snapshot=snapshot, read_only=snapshot is not None) as image:
            yield image

    def create(self, name: str, size: int = 32 * MIB, *, order: int = 20, features: int = 61, **more: Any) -> str:
        namespace = more.pop("namespace", "")
        rbd.RBD().create(self.ioctx(namespace=namespace), name, size, order=order, features=features, **more)
        return name

    def names(self, pool: str = "") -> list[str]:
        return list(rbd.RBD().list(self.ioctx(pool)))

    def write(self, name: str, offset: int, data: bytes) -> None:
        with self.image(name) as image:
            image.write(data, offset)

    def snap(self, name: str, snapshot: str) -> int:
        with self.image(name) as image:
            image.create_snap(snapshot)
            return int(image.snap_get_id(snapshot))

    def unsnap(self, name: str, snapshot: str) -> None:
        with self.image(name) as image:
            image.remove_snap(snapshot)

    def snapshots(self, name: str, **where: str) -> list[str]:
        with self.image(name, **where) as image:
            return [each["name"] for each in sorted(image.list_snaps(), key=lambda each: each["id"])]

    def metadata(self, name: str) -> dict[str, str]:
        with self.image(name) as image:
            return dict(image.metadata_list())

    def lock_owner(self, name: str) -> str:
        with self.image(name) as image:
            return next((each["owner"] for each in image.lock_get_owners()), "")

    def used(self, name: str) -> int:
        """Return the bytes allocated in the head of an image, object by object as `rbd diff` tells."""
        total = 0

        def add(_: int, length: int, exists: bool) -> None:
            nonlocal total
            total += length if exists else 0

        with self.image(name) as image:
            image.diff_iterate(0, image.size(), None, add, True, False)
        return total

    def digest(self, name: str, snapshot: str | None = None, **where: str) -> str:
        """Return the SHA-256 of a snapshot's size and bytes (of the head where none is named)."""
        with self.image(name, snapshot, **where) as image:
            size = image.size()
            state = hashlib.sha256(str(size).encode())
            for offset in range(0, size, 4 * MIB):
                state.update(image.read(offset, min(4 * MIB, size - offset)))
        return state.hexdigest()

    def discard(self, name: str) -> None:
        """Remove an image, if nothing holds it."""
        with suppress(rbd.Error):
            with self.image(name) as image:
                for each in list(image.list_snaps()):
                    if image.is_protected_snap(each["name"]):
                        image.unprotect_snap(each["name"])
            self.remove(name)

    def remove(self, name: str) -> None:
        with self.image(name) as image:
            for each in list(image.list_snaps()):
                image.remove_snap(each["name"])
        rbd.RBD().remove(self.ioctx(), name)


def fill(site: Site, name: str, seed: int, spans: int = 12, length: int = 512 << 10) -> None:
    """Write random data over an image, here and there."""
    chance = random.Random(seed)
    with site.image(name) as image:
        for _ in range(spans):
            offset = chance.randrange(0, image.size() - length) // 512 * 512
            image.write(chance.randbytes(length), offset)


@dataclass
class Pair:
    """Both sites, and ways to run the agent between them."""

    lab: Lab
    source: Site
    target: Site

    def new(self, stem: str, *, fill_with: int | None = 1, **shape: Any) -> str:
        """Make a source image with data in it and return its name."""
        name = self.source.create(unique(stem), **shape)
        if fill_with is not None:
            fill(self.source, name, fill_with)
        return name

    def sweep(self) -> None:
        """Remove the images of this run: a lab that is used for long would fill up."""
        for site in (self.source, self.target):
            there = set(site.names())
            with ThreadPoolExecutor(8) as threads:
                # Clones were made after their parents.
                list(threads.map(site.discard, [name for name in reversed(_given) if name in there]))

    def place(self, name: str) -> str:
        return f"dr-site:{self.target.pool}/{name}"

    def same(self, name: str, replica: str = "") -> list[str]:
        """See that every snapshot on the target is the source's of that name, byte for byte; return their names."""
        names = self.target.snapshots(replica or name)
        assert names, "the replica has no snapshots"
        for each in names:
            assert self.target.digest(replica or name, each) == self.source.digest(name, each), each
        # The head is what the next step builds on.
        assert self.target.digest(replica or name) == self.target.digest(replica or name, names[-1])
        return names

    async def sync(self, name: str, snapshot: str = "", *, config: Path | None = None, to: str = "", **options: Any) -> Run:
        """Run one sync in this process and return what it told; raises what it raised."""
        run = Run()
        source = parse_source(f"{self.source.pool}/{name}" + (f"@{snapshot}" if snapshot else ""))
        target = parse_target(to or self.place(name), source.image)
        timeout = options.pop("timeout", 60.0)
        worker = options.pop("worker", "rbd-siphon worker")
        wrap = options.pop("wrap", None)
        stock = options.pop("stock", False)
        transfer = options.pop("transfer", Transfer())
        request = Request(
            source=source,
            target=target,
            cluster=ClusterSettings().completed(os.environ),
            timeout=timeout,
            keep=Keep(last=options.pop("keep", 3)),
            accept=options.pop("accept", Accept.NOTHING),
            **options,
        )
        ssh = SshSettings(config=str(config or self.lab.ssh.client_config))

        @asynccontextmanager
        async def connect() -> AsyncIterator[Any]:
            async with worker_channel(target, ssh, f"{worker} --timeout {timeout:g}", timeout, run.say) as channel:
                yield wrap(channel) if wrap else channel

        dial = dial_worker(connect, timeout, transfer, run.say)
        if stock:
            dial = dial_stock(partial(shell, target, ssh, timeout, run.say), ClusterSettings(), timeout, transfer.limit)
        run.result = await Sync(request, dial, run).run()
        return run

    def sync_now(self, name: str, snapshot: str = "", **options: Any) -> Run:
        """Run one sync to its end."""
        return asyncio.run(self.sync(name, snapshot, **options))

    @asynccontextmanager
    async def relay(self, **how: Any) -> AsyncIterator[tuple[Relay, Path]]:
        """Put a relay before the SSH server; yields it and the SSH configuration that goes through it."""
        relay = Relay(self.lab.ssh.port, **how)
        port = await relay.start()
        config = self.lab.ssh.write_client_config(self.lab.home / f"test-{port}.config", port)
        try:
            yield relay, config
        finally:
            await relay.stop()
            config.unlink()
            config.with_suffix(".known_hosts").unlink()


class Run:
    """What a run told."""

    def __init__(self) -> None:
        self.events: list[e.Event] = []
        self.times: list[float] = []
        self.words: list[str] = []
        self.result: e.Result

    @property
    def end(self) -> str:
        assert self.result.end is not None
        return self.result.end

    def emit(self, event: e.Event) -> None:
        self.events.append(event)
        self.times.append(time.monotonic())
        if not isinstance(event, e.Progress):
            print(event)

    def say(self, words: str) -> None:
        self.words.append(words)
        print(words)

    def of(self, kind: type[e.Event]) -> list[Any]:
        return [each for each in self.events if isinstance(each, kind)]


def command(*words: str, env: dict[str, str] | None = None, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run the installed `rbd-siphon` and return how it ended."""
    return subprocess.run(
        [SIPHON, *words], env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout, check=False
    )


def json_lines(text: str) -> list[dict[str, Any]]:
    """Parse `--json` output."""
    return [json.loads(line) for line in text.splitlines()]


def worker_pids() -> list[int]:
    """Return the processes that run a worker of the installation under test."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if SIPHON.encode() in words and b"worker" in words:
                found.append(int(entry.name))
    return found


def kill_workers(number: int = signal.SIGKILL) -> int:
    """Send every worker a signal; return to how many."""
    pids = worker_pids()
    for pid in pids:
        os.kill(pid, number)
    return len(pids)


def ours(*words: str) -> str:
    """Run the installed `rbd-siphon`, which must end well, and return what it printed."""
    done = command(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def same(pair: Pair, name: str, copy: str, points: tuple[str, ...] = ("a", "b", "c")) -> None:
    """See that these points ("" is the present content) of a copy at the target are the source's."""
    for point in points:
        assert pair.target.digest(copy, point or None) == pair.source.digest(name, point or None), point
