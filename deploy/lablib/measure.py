"""Measuring two ways of one job by turns: what a case is, how a round is timed, and what it costs the processors."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shlex
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from .ceph import Cluster
from .demo import MIB, ext4_image, patch
from .lab import Lab
from .say import LabError, run

#: The images that most cases are about, each with a snapshot `a`.
IMAGE, NOISE = "vms/bench", "vms/noise"


@dataclass(frozen=True)
class Bench:
    """A run of the bench, and the images that its cases share: each is made once, by the first case that wants it."""

    lab: Lab
    rounds: int
    quick: bool

    def timed(self, work: Callable[[], object]) -> float:
        """Return the seconds that `work` takes."""
        if not self.quick:
            # A monitor commits once a second, and a snapshot waits for that. The clean-up before each round sets
            # the beat, so without this pause one side might always meet it at its best and the other at its worst.
            time.sleep(1 + random.random())  # noqa: S311  # not a secret
        began = time.monotonic()
        work()
        return time.monotonic() - began

    def measured(self, work: Callable[[], object]) -> tuple[float, float]:
        """Return the seconds that `work` takes, and the processor seconds of what it starts here and through the SSH server."""
        before = _spent(self.lab)
        seconds = self.timed(work)
        time.sleep(0.3)  # the server reaps its sessions
        return seconds, _spent(self.lab) - before

    @property
    def noise_size(self) -> int:
        """The size of the incompressible image, MiB."""
        return 64 if self.quick else 512

    @property
    def image_size(self) -> int:
        """The size of the image with a file system, MiB."""
        return 64 if self.quick else 2048

    @cache  # noqa: B019  # there is one bench a process
    def image(self) -> None:
        """Make the image with an ext4 file system (in a quick run a small one with something in it)."""
        drop(self.lab.source, IMAGE)
        if self.quick:
            self.lab.source.rbd("create", "--size", f"{self.image_size}M", IMAGE)
            patch(self.lab, IMAGE, [(at * 4 * MIB, os.urandom(MIB)) for at in range(self.image_size // 4)])
        else:
            self.lab.source.rbd("import", str(ext4_image(self.lab)), IMAGE)
        self.lab.source.rbd("snap", "create", f"{IMAGE}@a")

    @cache  # noqa: B019  # there is one bench a process
    def noise(self) -> None:
        """Make the incompressible image."""
        drop(self.lab.source, NOISE)
        self.lab.source.rbd("create", "--size", f"{self.noise_size}M", NOISE)
        for at in range(0, self.noise_size, 16):
            patch(self.lab, NOISE, [(at * MIB, os.urandom(16 * MIB))])
        self.lab.source.rbd("snap", "create", f"{NOISE}@a")


@dataclass
class Case:
    """Seconds of each round on both sides, processor seconds, and the largest resident memory seen, bytes."""

    name: str
    ours: list[float] = field(default_factory=list)
    stock: list[float] = field(default_factory=list)
    ours_cpu: list[float] = field(default_factory=list)
    stock_cpu: list[float] = field(default_factory=list)
    controller: int = 0
    worker: int = 0
    verdict: str = ""

    def add(self, side: Literal["ours", "stock"], cost: tuple[float, float]) -> None:
        """Add a round's seconds and processor seconds."""
        seconds, cpu = (self.ours, self.ours_cpu) if side == "ours" else (self.stock, self.stock_cpu)
        seconds.append(cost[0])
        cpu.append(cost[1])

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the stock pipeline, median of the rounds' ratios."""
        pairs = [theirs / ours for ours, theirs in zip(self.ours, self.stock, strict=False)]
        return statistics.median(pairs) if pairs else None

    @property
    def cpu_ratio(self) -> float | None:
        """How much processor time for each second of the stock pipeline's, median of the rounds' ratios; 2 is twice as much."""
        pairs = [ours / theirs for ours, theirs in zip(self.ours_cpu, self.stock_cpu, strict=False) if theirs]
        return statistics.median(pairs) if pairs else None


def _spent(lab: Lab) -> float:
    """Return the processor seconds of our ended children, and of the SSH server's (proc(5): cutime and cstime)."""
    mine = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = Path(f"/proc/{lab.ssh.pid()}/stat").read_text().rpartition(")")[2].split()
    return mine.ru_utime + mine.ru_stime + (int(words[13]) + int(words[14])) / os.sysconf("SC_CLK_TCK")


def ours(lab: Lab, case: Case, words: list[str], config: Path) -> dict[str, Any]:
    """Run `rbd-siphon sync` and return its result, with the seconds between its first and last data; LabError if it failed."""
    command = [str(lab.venv / "bin" / "rbd-siphon"), "sync", *words, "--json"]
    environment = {**os.environ, **lab.environment, "RBD_SIPHON_SSH_CONFIG": str(config)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as running:
        over = threading.Event()
        watch = threading.Thread(target=_watch, args=(lab, case, running.pid, over))
        watch.start()
        assert running.stdout is not None
        lines = [json.loads(line) for line in running.stdout.read().splitlines()]
        over.set()
        watch.join()
    last: dict[str, Any] = lines[-1]
    if last["type"] not in ("result", "summary") or last.get("failed"):
        raise LabError(f"the sync failed: {last}")
    steps = [each["seconds"] for each in lines if each["type"] == "progress"]
    return {**last, "streaming": max(steps, default=0.0)}


def _watch(lab: Lab, case: Case, pid: int, over: threading.Event) -> None:
    """Keep the largest resident memory of the controller and of its worker."""
    while not over.wait(0.05):
        case.controller = max(case.controller, _peak(pid))
        for worker in _workers(lab):
            case.worker = max(case.worker, _peak(worker))


def _workers(lab: Lab) -> list[int]:
    program = str(lab.venv / "bin" / "rbd-siphon")
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if program in words and "worker" in words:
                    found.append(int(entry.name))
    return found


def _peak(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return 0


def shell(lab: Lab, command: str) -> None:
    """Run a command of stock tools."""
    run(["bash", "-o", "pipefail", "-c", command], env=lab.environment, timeout=900)


@contextlib.contextmanager
def quick_rounds(bench: Bench) -> Iterator[None]:
    """Have the monitors commit at once while images are prepared; a quick run leaves them as they are."""
    clusters = () if bench.quick else (bench.lab.source, bench.lab.target)
    for cluster in clusters:
        cluster.ceph("config", "set", "mon", "paxos_propose_interval", "0.05")
    try:
        yield
    finally:
        for cluster in clusters:
            cluster.ceph("config", "rm", "mon", "paxos_propose_interval")


def host(config: Path) -> str:
    """Return the words of a shell that reach the target's host."""
    return f"ssh -F {shlex.quote(str(config))} dr-site"


def drop(cluster: Cluster, image: str) -> None:
    """Remove an image and its snapshots, if it is there."""
    pool, name = image.split("/")
    if name in cluster.rbd("ls", pool).split():
        cluster.rbd("snap", "purge", image)
        cluster.rbd("rm", image)
