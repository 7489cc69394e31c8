"""Whatever interrupts a sync, the same command again ends where one clean run would have ended."""

from __future__ import annotations

import asyncio
import random
import re
import signal
import time
from collections import Counter
from typing import Any

import pytest

from agent import events as e
from agent.cluster import Image
from agent.compression import parse_method
from agent.errors import ConflictError, DataError, LinkError, LockedError, SiphonError
from agent.plan import Accept
from agent.session import Transfer
from support import MIB, Pair, Run, fill, kill_workers, worker_pids

#: A link slow enough that an interruption meets a step in the middle: 24 MiB take three seconds.
SLOW = 8e6


def big(pair: Pair, stem: str) -> str:
    """Make a source image with 24 MiB of random data, every byte of which must travel."""
    name = pair.new(stem, fill_with=None)
    with pair.source.image(name) as image:
        image.write(random.Random(stem).randbytes(24 * MIB), 0)
    return name


async def interrupted(pair: Pair, name: str, after: int, snapshot: str = "", **options: Any) -> None:
    """Run a sync that is cut for good after so many bytes."""
    async with pair.relay(cut_after=after) as (_, config):
        with pytest.raises(LinkError):
            await pair.sync(name, snapshot, config=config, attempts=1, **options)


async def gone(seconds: float = 8.0) -> None:
    """Wait until no worker is left."""
    async with asyncio.timeout(seconds):
        while worker_pids():  # noqa: ASYNC110  # the end of other processes is no event of this loop
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("after", [1, 1500, 4000, 6000, 8000, 100_000, 3 * MIB, 9 * MIB + 777, 17 * MIB, 24 * MIB])
def test_a_link_cut_anywhere_costs_one_more_attempt(pair: Pair, after: int) -> None:
    name = big(pair, "cut")

    async def go() -> Run:
        async with pair.relay(cut_after=after) as (relay, config):
            run = await pair.sync(name, config=config)
            assert relay.cuts == 0
            return run

    run = asyncio.run(go())
    assert run.result.state == "committed"
    assert run.result.attempts == 2
    assert len(run.of(e.Retry)) == 1
    assert len(pair.same(name)) == 1
    assert len(pair.source.snapshots(name)) == 1


@pytest.mark.parametrize("back", [60, 250, 500, 900])
def test_acknowledgements_cut_near_the_end_cost_one_more_attempt(pair: Pair, back: int) -> None:
    name = pair.new("ack", fill_with=5)

    async def go() -> Run:
        async with pair.relay(cut_downstream=True) as (relay, config):
            await pair.sync(name, config=config)
            total = relay.sent
        fill(pair.source, name, 6)
        async with pair.relay(cut_downstream=True, cut_after=total - back) as (_, config):
            return await pair.sync(name, config=config)

    run = asyncio.run(go())
    assert run.result.state in ("committed", "up-to-date")
    assert len(pair.same(name)) == 2


class LosesAcknowledgement:
    """A channel that breaks once the commit was carried out, before its answer is read."""

    def __init__(self, channel: Any, committed: Any) -> None:
        self._channel = channel
        self._committed = committed
        self._asked = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def write(self, data: bytes | memoryview) -> None:
        self._asked = self._asked or b"\xa6Commit" in bytes(data)
        self._channel.write(data)

    async def receive(self) -> bytes:
        data: bytes = await self._channel.receive()
        if self._asked:
            while not self._committed():
                data = await self._channel.receive()
            return b""
        return data


def test_a_commit_whose_acknowledgement_is_lost_shows_as_up_to_date(pair: Pair) -> None:
    name = big(pair, "lost")
    lost = []

    def committed() -> bool:
        return any(each.startswith("siphon-2") for each in pair.target.snapshots(name))

    def losing(channel: Any) -> Any:
        lost.append(channel)
        return LosesAcknowledgement(channel, committed) if len(lost) == 1 else channel

    run = pair.sync_now(name, wrap=losing)
    assert len(lost) == 2
    assert run.result.state == "up-to-date"
    assert run.result.attempts == 2
    assert run.result.bytes_read == 24 * MIB
    assert pair.same(name) == [run.result.end]


def test_a_second_run_sends_only_the_rest(pair: Pair) -> None:
    name = big(pair, "rest")

    async def go() -> Run:
        await interrupted(pair, name, 18 * MIB)
        await gone()
        return await pair.sync(name)

    run = asyncio.run(go())
    assert run.result.state == "committed"
    assert run.result.resumed_from is not None
    assert run.result.resumed_from >= 8 * MIB
    assert run.result.bytes_sent <= 24 * MIB - run.result.resumed_from + 64 * 1024
    assert pair.same(name) == [run.result.end]


def test_after_a_finished_step_a_changed_source_is_sent_too(pair: Pair) -> None:
    name = big(pair, "both")

    async def go() -> Run:
        await interrupted(pair, name, 12 * MIB)
        pair.source.write(name, 30 * MIB, b"after the cut" * 100)
        return await pair.sync(name)

    run = asyncio.run(go())
    assert run.result.steps == 2
    names = pair.same(name)
    assert len(names) == 2
    assert pair.target.digest(name) == pair.source.digest(name)


def test_no_image_is_closed_under_a_look_inside_it(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    under_way = Counter[int]()
    wrong: list[int] = []
    look, close = Image.diff, Image.close

    def slow_look(self: Image, *where: Any, **how: Any) -> Any:
        under_way[id(self)] += 1
        try:
            time.sleep(0.005)  # long enough that a careless close would meet it
            return look(self, *where, **how)
        finally:
            under_way[id(self)] -= 1

    def watched_close(self: Image) -> None:
        wrong.append(under_way[id(self)])
        close(self)

    # Every second object alone: neighbours are looked into at once.
    name = big(pair, "looks")
    pair.sync_now(name)
    with pair.source.image(name) as image:
        for at in range(0, 24, 2):
            image.write(random.Random(at).randbytes(64 << 10), at * MIB)
    monkeypatch.setattr(Image, "diff", slow_look)
    monkeypatch.setattr(Image, "close", watched_close)

    async def go() -> Run:
        await interrupted(pair, name, 700_000)
        with pair.source.image(name) as image:
            for at in range(0, 24, 2):
                image.write(b"after the cut", at * MIB)
        return await pair.sync(name)

    run = asyncio.run(go())
    assert run.result.steps == 2
    assert len(wrong) > 4
    assert not any(wrong), "images were closed while they were looked into"
    pair.same(name)


def test_an_interrupted_run_leaves_no_process_and_no_lock(pair: Pair) -> None:
    name = big(pair, "clean")

    async def go() -> None:
        await interrupted(pair, name, 10 * MIB)
        await gone()

    asyncio.run(go())
    assert pair.target.lock_owner(name) == ""
    assert not list(pair.target.snapshots(name))


def test_a_killed_worker_is_fenced_and_the_run_goes_on_within_five_seconds(pair: Pair) -> None:
    name = big(pair, "kill")

    async def go() -> tuple[Run, float]:
        async with pair.relay(rate=SLOW) as (_, config):
            task = asyncio.create_task(pair.sync(name, config=config))
            await asyncio.sleep(2.0)
            assert kill_workers() == 1
            killed = time.monotonic()
            return await task, killed

    run, killed = asyncio.run(go())
    assert run.result.attempts == 2
    assert any("fencing" in each for each in run.words)
    assert pair.same(name) == [run.result.end]
    moving = [
        at
        for at, each in zip(run.times, run.events, strict=True)
        if isinstance(each, e.Progress) and each.attempt == 2 and each.done
    ]
    assert min(moving) - killed < 5


@pytest.mark.parametrize("seed", range(5))
def test_workers_killed_at_random_moments(pair: Pair, seed: int) -> None:
    name = big(pair, "random-kill")
    chance = random.Random(seed)

    async def go() -> Run:
        async with pair.relay(rate=SLOW * 2) as (_, config):
            task = asyncio.create_task(pair.sync(name, config=config))
            for _ in range(2):
                await asyncio.sleep(chance.uniform(0.2, 2.5))
                kill_workers()
            return await task

    run = asyncio.run(go())
    assert run.result.state in ("committed", "up-to-date")
    assert pair.same(name) == [run.result.end]


def test_a_worker_that_is_cut_off_is_fenced_by_the_next_attempt(pair: Pair) -> None:
    name = big(pair, "frozen")

    async def go() -> Run:
        async with pair.relay(rate=SLOW) as (_, config):
            task = asyncio.create_task(pair.sync(name, config=config, timeout=3))
            await asyncio.sleep(2.0)
            frozen = worker_pids()
            kill_workers(signal.SIGSTOP)
            run = await task
            assert set(frozen) & set(worker_pids())
            kill_workers(signal.SIGCONT)  # what it still writes must not reach the image
            await asyncio.sleep(1)
            return run

    run = asyncio.run(go())
    assert run.result.attempts == 2
    assert pair.same(name) == [run.result.end]
    story = list(zip(run.times, run.events, strict=True))
    failed = next(at for at, each in story if isinstance(each, e.Retry))
    moving = next(at for at, each in story if isinstance(each, e.Progress) and each.attempt == 2 and each.done)
    assert moving - failed < 5
    asyncio.run(gone())


def test_neither_side_hangs_on_a_dead_link(pair: Pair) -> None:
    name = big(pair, "dead")

    async def go() -> None:
        async with pair.relay(rate=SLOW) as (relay, config):
            task = asyncio.create_task(pair.sync(name, config=config, timeout=2, attempts=1))
            await asyncio.sleep(1.5)
            relay.held = True
            began = time.monotonic()
            with pytest.raises(LinkError, match="silent for 2 s"):
                await task
            assert time.monotonic() - began < 7
            await gone()

    asyncio.run(go())
    assert pair.target.lock_owner(name) == ""
    pair.sync_now(name)
    pair.same(name)


@pytest.mark.parametrize(("pause", "timeout"), [(3.0, 60.0), (9.0, 3.0)], ids=["within the limit", "beyond it"])
def test_a_target_osd_that_stops_for_a_while_is_waited_for_or_retried(pair: Pair, pause: float, timeout: float) -> None:
    name = big(pair, "osd")

    async def go() -> Run:
        async with pair.relay(rate=SLOW) as (_, config):
            task = asyncio.create_task(pair.sync(name, config=config, timeout=timeout))
            await asyncio.sleep(1.5)
            pair.lab.target.pause("osd")
            try:
                await asyncio.sleep(pause)
            finally:
                pair.lab.target.resume("osd")
            return await task

    run = asyncio.run(go())
    assert (run.result.attempts == 1) == (timeout > pause)
    assert pair.same(name) == [run.result.end]


def test_a_target_osd_that_is_restarted_is_waited_for(pair: Pair) -> None:
    name = big(pair, "osd-restart")

    async def go() -> Run:
        async with pair.relay(rate=SLOW) as (_, config):
            task = asyncio.create_task(pair.sync(name, config=config))
            await asyncio.sleep(1.5)
            await asyncio.to_thread(pair.lab.target.stop, "osd")
            await asyncio.sleep(1)
            await asyncio.to_thread(pair.lab.target.start, "osd")
            await asyncio.to_thread(pair.lab.target.wait)
            return await task

    run = asyncio.run(go())
    assert pair.same(name) == [run.result.end]


def test_an_end_removed_while_interrupted_leaves_nothing_behind(pair: Pair) -> None:
    """What was a hole at A, data at B and a hole again at C is in no diff from A to C."""
    name = pair.new("corruption", fill_with=None)
    pair.source.write(name, 0, b"a" * MIB)
    pair.sync_now(name)
    with pair.source.image(name) as image:
        image.write(random.Random(1).randbytes(20 * MIB), 4 * MIB)
    pair.source.snap(name, "B")
    asyncio.run(interrupted(pair, name, 12 * MIB, "B"))
    pair.source.unsnap(name, "B")
    with pair.source.image(name) as image:
        image.discard(4 * MIB, 20 * MIB)
    run = pair.sync_now(name)
    assert run.result.steps == 1
    assert len(pair.same(name)) == 2


def test_a_first_copy_whose_end_was_removed_starts_from_nothing(pair: Pair) -> None:
    name = big(pair, "restart")
    pair.source.snap(name, "B")
    asyncio.run(interrupted(pair, name, 12 * MIB, "B"))
    pair.source.unsnap(name, "B")
    with pair.source.image(name) as image:
        image.discard(0, 24 * MIB)
    pair.sync_now(name)
    pair.same(name)


def test_an_interrupted_shrink_is_rolled_back_with_its_step(pair: Pair) -> None:
    name = big(pair, "shrink")
    pair.sync_now(name)
    with pair.source.image(name) as image:
        image.resize(26 * MIB)
        image.write(random.Random(2).randbytes(20 * MIB), 0)
    pair.source.snap(name, "small")
    asyncio.run(interrupted(pair, name, 12 * MIB, "small"))
    pair.source.unsnap(name, "small")
    with pair.source.image(name) as image:
        image.resize(32 * MIB)
    pair.sync_now(name)
    pair.same(name)


def test_the_end_removed_while_it_is_being_sent_commits_nothing(pair: Pair) -> None:
    name = pair.new("vanish", size=96 * MIB, fill_with=None)
    pair.source.write(name, 0, random.Random(7).randbytes(96 * MIB))  # more than may be read ahead
    pair.source.snap(name, "going")

    async def go() -> None:
        async with pair.relay(rate=3 * SLOW) as (_, config):
            task = asyncio.create_task(pair.sync(name, "going", config=config))
            await asyncio.sleep(1.5)
            await asyncio.to_thread(pair.source.unsnap, name, "going")
            with pytest.raises(SiphonError, match="removed while it was being sent"):
                await task

    asyncio.run(go())
    assert pair.target.snapshots(name) == []


def test_content_touched_by_hand_in_the_middle_of_a_step_is_refused(pair: Pair) -> None:
    name = big(pair, "touched-mid")
    asyncio.run(interrupted(pair, name, 18 * MIB))
    asyncio.run(gone())
    pair.target.write(name, MIB, b"by hand")
    for _ in range(2):
        # Refusing must not make it look as if the content were known the second time.
        with pytest.raises(ConflictError, match="somebody else changed the image"):
            pair.sync_now(name)
    run = pair.sync_now(name, accept=Accept.ROLLBACK)
    assert run.result.resumed_from is None
    pair.same(name)


def test_an_unfinished_replica_that_somebody_has_open_is_not_resumed(pair: Pair) -> None:
    name = big(pair, "open")
    asyncio.run(interrupted(pair, name, 18 * MIB))
    asyncio.run(gone())
    with pair.target.image(name), pytest.raises(LockedError, match="open for writing by another client"):
        pair.sync_now(name)
    assert pair.sync_now(name).result.resumed_from is not None
    pair.same(name)


def test_a_crash_while_letting_go_is_rolled_back_not_guessed(pair: Pair) -> None:
    import msgspec

    from agent.model import Guard, encode

    name = big(pair, "unsure")
    asyncio.run(interrupted(pair, name, 18 * MIB))
    asyncio.run(gone())
    io = pair.target.ioctx()
    with pair.target.image(name) as image:
        key = f"rbd_siphon.{image.id()}"
    guard = msgspec.json.decode(io.read(key), type=Guard)
    assert guard.tenure is not None
    assert guard.tenure.state == "released"
    leaving = msgspec.structs.replace(guard.tenure, state="releasing", version=0)
    io.write_full(key, encode(msgspec.structs.replace(guard, tenure=leaving)).encode())
    run = pair.sync_now(name)
    assert run.result.resumed_from is None
    pair.same(name)


def test_a_second_run_is_told_who_is_at_work_and_leaves_nothing(pair: Pair) -> None:
    name = big(pair, "second")

    async def go() -> Run:
        async with pair.relay(rate=SLOW / 3) as (_, config):
            task = asyncio.create_task(pair.sync(name, config=config))
            await asyncio.sleep(1.5)
            before = pair.source.snapshots(name)
            with pytest.raises(LockedError, match=r"another run: worker \d+ on "):
                await pair.sync(name)
            assert pair.source.snapshots(name) == before
            return await task

    run = asyncio.run(go())
    assert run.result.attempts == 1
    assert pair.same(name) == [run.result.end]


def test_a_strangers_lock_is_respected(pair: Pair) -> None:
    import rbd

    name = pair.new("stranger")
    pair.sync_now(name)
    with pair.target.image(name) as image:
        image.lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE)
        with pytest.raises(LockedError, match=pair.target.address):
            pair.sync_now(name)
        image.write(b"still mine", 0)


@pytest.mark.parametrize("packing", ["none", "zstd:1", "lz4"])
def test_a_damaged_frame_is_found_and_the_step_repeated(pair: Pair, monkeypatch: pytest.MonkeyPatch, packing: str) -> None:
    from agent.lanes import Lanes

    name = pair.new("damage", size=24 * MIB, fill_with=None, order=22)
    pair.source.write(name, 0, random.Random(3).randbytes(1 * MIB) * 24)  # it shrinks
    original = Lanes.put
    sent = 0

    async def damaging(self: Lanes, head: bytes, payload: bytes | memoryview) -> None:
        nonlocal sent
        sent += 1
        await original(self, head, bytes(payload[:-1]) + bytes((payload[-1] ^ 1,)) if sent == 5 else payload)

    monkeypatch.setattr(Lanes, "put", damaging)
    run = pair.sync_now(name, transfer=Transfer(parse_method(packing)))
    assert run.result.attempts == 2
    assert re.search("damaged|cannot be unpacked|gives another length", run.of(e.Retry)[0].error)
    assert pair.same(name) == [run.result.end]


def test_a_frame_that_is_lost_between_reader_and_wire_is_no_commit(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from agent.session import Strand
    from agent.wire import Kind, checksum

    name = big(pair, "dropped")
    original = Strand.send

    async def dropping(self: Strand, segment: int, offset: int, length: int, data: memoryview | None) -> int:
        if offset == 2 * MIB and data is not None:
            return checksum(Kind.DATA, self._step, segment, offset, 14, b"something else")
        return await original(self, segment, offset, length, data)

    monkeypatch.setattr(Strand, "send", dropping)
    with pytest.raises((DataError, LinkError)):
        pair.sync_now(name, attempts=2, timeout=4)
    assert pair.target.snapshots(name) == []
