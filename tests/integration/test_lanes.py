"""Data over several lanes: into one worker, cut anywhere, done without where there are none, packed in every way."""

from __future__ import annotations

import asyncio
import random
from typing import Any, NoReturn

import pytest

from agent import events as e
from agent.compression import parse_method
from agent.errors import SiteError
from agent.pace import UNLIMITED, parse_limit
from agent.session import Transfer
from support import MIB, SIPHON, Pair, Run, worker_pids

SEVERAL = Transfer(parse_method("none"), 5)


def noisy(pair: Pair, stem: str, size: int = 48) -> str:
    """Make an image of random data, every byte of which must travel."""
    name = pair.new(stem, size=size * MIB, fill_with=None, order=22)
    pair.source.write(name, 0, random.Random(stem).randbytes(size * MIB))
    return name


def lanes_of(run: Run) -> int:
    """Return the largest number of lanes that the run told of."""
    return max((int(word.split()[0]) for word in run.words if " lanes at " in word), default=1)


def test_data_go_over_several_lanes_into_one_worker(pair: Pair) -> None:
    name = noisy(pair, "several")
    processes, openers = set[int](), set[str]()

    async def go() -> Run:
        async with pair.relay(delay=0.04) as (_, config):
            task = asyncio.create_task(pair.sync(name, config=config, transfer=SEVERAL))
            while not task.done():
                await asyncio.sleep(0.1)
                processes.update(worker_pids())
                if name in pair.target.names():
                    with pair.target.image(name, pool="vms-dr") as image:
                        openers.update(each["addr"] for each in image.watchers_list() if each["addr"] != pair.target.address)
            return await task

    run = asyncio.run(go())
    assert lanes_of(run) == 5
    assert len(processes) == 5
    assert len(openers) == 1, "one process alone may have the image open"
    assert run.result.attempts == 1
    assert pair.same(name) == [run.result.end]


@pytest.mark.parametrize("after", [1, 4, 7, 10])
def test_a_lane_that_is_cut_loses_nothing_and_little_is_sent_again(pair: Pair, after: int) -> None:
    name = noisy(pair, "lane-cut")

    async def go() -> Run:
        async with pair.relay(delay=0.02, cut_after=after * MIB, cuts=2) as (_, config):
            return await pair.sync(name, config=config, transfer=SEVERAL)

    run = asyncio.run(go())
    assert len(run.of(e.Retry)) >= 1
    assert run.result.bytes_sent < 2 * 48 * MIB
    assert pair.same(name) == [run.result.end]


def test_lanes_that_cannot_be_opened_are_done_without(pair: Pair) -> None:
    name = noisy(pair, "alone", 16)

    class Alone:
        """A channel to a host that takes no second one."""

        def __init__(self, channel: Any) -> None:
            self._channel = channel

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self._channel, attribute)

        def more(self, count: int, **how: bool) -> NoReturn:
            raise SiteError(f"no {count} sessions more, {how}")

    run = pair.sync_now(name, transfer=Transfer(parse_method("none"), 5, parse_limit("16M")), wrap=Alone)
    assert "no more than 1 lane(s)" in " ".join(run.words)
    assert run.result.attempts == 1
    assert pair.same(name) == [run.result.end]


def test_lanes_go_through_a_forced_command(pair: Pair) -> None:
    name = noisy(pair, "forced-lanes", 32)
    keys = pair.lab.ssh.authorized_keys
    saved = keys.read_text()
    keys.write_text(f'command="{SIPHON} worker",restrict {saved}')
    try:
        run = pair.sync_now(name, transfer=Transfer(parse_method("none"), 4, parse_limit("16M")), worker="false")
    finally:
        keys.write_text(saved)
    assert lanes_of(run) == 4
    assert pair.same(name) == [run.result.end]


@pytest.mark.parametrize("packing", ["none", "lz4", "zstd:1", "zstd:9", "auto"])
def test_every_packing_carries_a_history(pair: Pair, packing: str) -> None:
    name = pair.new("packed", size=32 * MIB, fill_with=None, order=22)
    chance = random.Random(packing)
    for at in range(0, 24, 3):
        pair.source.write(name, at * MIB, chance.randbytes(64 << 10) * 24)
    pair.source.write(name, 27 * MIB, chance.randbytes(2 * MIB))
    transfer = Transfer(parse_method(packing), 3)
    first = pair.sync_now(name, transfer=transfer)
    if packing not in ("none", "auto"):
        assert first.result.bytes_sent < first.result.bytes_read / 2
    with pair.source.image(name) as image:
        image.discard(3 * MIB, 4 * MIB)
        image.write(chance.randbytes(9000), 12345 * 512)
        image.write(b"same" * 100_000, 20 * MIB)
    second = pair.sync_now(name, transfer=transfer)
    assert pair.same(name) == [first.result.end, second.result.end]


def test_a_limit_holds_over_all_lanes_together(pair: Pair) -> None:
    name = noisy(pair, "limited", 24)
    run = pair.sync_now(name, transfer=Transfer(parse_method("none"), 3, parse_limit("12M")))
    assert run.result.seconds > 24 / 12 * 0.95
    free = pair.sync_now(name, transfer=Transfer(None, None, UNLIMITED))
    assert free.result.state in ("committed", "up-to-date")
    pair.same(name)
