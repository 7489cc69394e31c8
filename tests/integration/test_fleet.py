"""Many images in one run: over one conversation, each for itself, right after any cut."""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from agent import events as e
from agent.cli.syncing import Selection, Way, sync_pool
from agent.errand import Request
from agent.errors import NotFoundError, UsageError
from agent.plan import Accept
from agent.remote import SshSettings
from agent.session import Transfer
from agent.settings import ClusterSettings
from agent.spec import parse_source, parse_target
from support import MIB, Pair, kill_workers, unique, worker_pids


@dataclass
class Told:
    """What a run told."""

    events: list[e.Event] = field(default_factory=list)
    most_workers: int = 0

    def emit(self, event: e.Event) -> None:
        self.events.append(event)
        self.most_workers = max(self.most_workers, len(worker_pids()))

    def of(self, kind: type[Any]) -> list[Any]:
        return [each for each in self.events if isinstance(each, kind)]


def images(pair: Pair, count: int, size: int = 2) -> list[str]:
    """Make images of random data whose names begin alike, as no others do."""
    stem = unique("fleet")
    names = []
    for number in range(count):
        name = pair.new(f"{stem}-{number}", size=size * MIB, fill_with=None)
        pair.source.write(name, 0, random.Random(name).randbytes(size * MIB))
        names.append(name)
    return names


async def all_of(pair: Pair, names: list[str], told: Told, *, config: Any = None, **options: Any) -> int:
    target = options.pop("target", "dr-site:vms-dr")
    stock, worker = options.pop("stock", False), options.pop("worker", "rbd-siphon worker")

    def request(image: str) -> Request:
        source = parse_source(image)
        return Request(source, parse_target(target, source.image), ClusterSettings().completed(os.environ), **options)

    ssh = SshSettings(config=str(config or pair.lab.ssh.client_config))
    way = Way(ssh, ClusterSettings(), worker, 30.0, Transfer(), stock)
    return await sync_pool(Selection("vms", "", names, (), 3), request, way, told)


def test_all_images_go_over_one_worker_and_again_sends_nothing(pair: Pair) -> None:
    names, told = images(pair, 10), Told()
    assert asyncio.run(all_of(pair, names, told)) == 0
    assert told.most_workers == 1
    summary = told.of(e.Summary)[0]
    assert (summary.images, summary.committed, summary.failed) == (10, 10, 0)
    assert sorted(each.image for each in told.of(e.Result)) == sorted(f"vms/{name}" for name in names)
    for name in names:
        pair.same(name)
    pair.source.write(names[3], MIB, b"changed")
    assert asyncio.run(all_of(pair, names, again := Told())) == 0
    assert again.of(e.Summary)[0].bytes_read < MIB
    for name in names:
        pair.same(name)


def test_what_fails_with_one_image_leaves_the_others_alone(pair: Pair) -> None:
    names, told = images(pair, 5), Told()
    pair.target.create(names[2])
    assert asyncio.run(all_of(pair, names, told)) == 3
    failure = told.of(e.Error)[0]
    assert (failure.image, failure.code) == (f"vms/{names[2]}", 3)
    assert len(told.of(e.Result)) == 4
    for name in (*names[:2], *names[3:]):
        pair.same(name)
    assert pair.target.snapshots(names[2]) == []


@pytest.mark.parametrize("after", [200_000, 3 * MIB, 9 * MIB])
def test_a_cut_is_survived_by_every_image(pair: Pair, after: int) -> None:
    names, told = images(pair, 6, 4), Told()

    async def go() -> int:
        async with pair.relay(cut_after=after, cuts=2) as (_, config):
            return await all_of(pair, names, told, config=config)

    assert asyncio.run(go()) == 0
    assert told.of(e.Retry)
    assert told.of(e.Summary)[0].bytes_sent < 3 * 6 * 4 * MIB  # none is long enough for a checkpoint
    for name in names:
        pair.same(name)


def test_a_killed_worker_is_survived_by_every_image(pair: Pair) -> None:
    names, told = images(pair, 6, 6), Told()

    killed: list[int] = []

    def kill(passed: int) -> None:
        if passed > 12 * MIB and not killed:
            killed.append(kill_workers())

    async def go() -> int:
        async with pair.relay(on_bytes=kill) as (_, config):
            return await all_of(pair, names, told, config=config)

    assert asyncio.run(go()) == 0
    assert killed
    for name in names:
        pair.same(name)


def test_what_keeps_the_worker_from_starting_is_told_for_every_image_and_not_tried_again(pair: Pair) -> None:
    names, told = images(pair, 3), Told()
    assert asyncio.run(all_of(pair, names, told, worker="rbd-siphon worker --id nobody")) in (2, 4)
    assert len(told.of(e.Error)) == 3
    assert all("nobody" in each.message for each in told.of(e.Error))
    assert not told.of(e.Retry)


def test_ceph_own_tools_take_many_images_too(pair: Pair) -> None:
    names, told = images(pair, 2), Told()
    assert asyncio.run(all_of(pair, names, told, stock=True)) == 0
    for name in names:
        pair.same(name)


def test_a_selection_that_cannot_be_meant_is_refused_before_anything_is_done(pair: Pair) -> None:
    names = images(pair, 2)
    run = partial(all_of, pair, told=Told())
    with pytest.raises(NotFoundError, match="no image of vms matches"):
        asyncio.run(run(names=["no-such-*"]))
    with pytest.raises(UsageError, match="names an image"):
        asyncio.run(run(names=names, target="dr-site:vms-dr/one"))
    with pytest.raises(UsageError, match="one image at a time"):
        asyncio.run(run(names=names, accept=Accept.RECREATE))
    assert not set(names) & set(pair.target.names())
