"""Measuring two ways of one job by turns: what a case is, and how a round is timed."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .ceph import Cluster
from .lab import Lab
from .say import run


@dataclass
class Case:
    """Seconds of each round on both sides, and the largest resident memory seen, bytes."""

    name: str
    ours: list[float] = field(default_factory=list)
    stock: list[float] = field(default_factory=list)
    controller: int = 0
    worker: int = 0
    verdict: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the stock pipeline, median of the rounds' ratios."""
        pairs = [theirs / ours for ours, theirs in zip(self.ours, self.stock, strict=False)]
        return statistics.median(pairs) if pairs else None


def timed(work: Callable[[], None]) -> float:
    # A monitor commits once a second, and a snapshot waits for that. The clean-up before each round sets
    # the beat, so without this pause one side might always meet it at its best and the other at its worst.
    time.sleep(1 + random.random())  # noqa: S311  # not a secret
    began = time.monotonic()
    work()
    return time.monotonic() - began


def shell(lab: Lab, command: str) -> None:
    run(["bash", "-o", "pipefail", "-c", command], env=lab.environment, timeout=600)


def drop(cluster: Cluster, image: str) -> None:
    pool, name = image.split("/")
    if name in cluster.rbd("ls", pool).split():
        cluster.rbd("snap", "purge", image)
        cluster.rbd("rm", image)
