"""A target with nothing but Ceph's own tools: the contract holds, only going on in mid-step does not."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import rbd

from agent import events as e
from agent import rbdsite, rbdtool, stock
from agent.errors import ConflictError, DataError, LinkError, LockedError, SiphonError
from agent.plan import Accept
from agent.rbdsite import RbdImage
from support import MIB, Pair, Run, fill, unique

#: A link slow enough that an interruption meets a step in the middle: 24 MiB take three seconds.
SLOW = 8e6


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait less for whoever is not going to leave."""
    monkeypatch.setattr(stock, "_LEAVES_SOON", 1.5)
    monkeypatch.setattr(rbdsite, "_NOTE_LATE", 1.5)


def big(pair: Pair, stem: str) -> str:
    name = pair.new(stem, fill_with=None)
    with pair.source.image(name) as image:
        image.write(random.Random(stem).randbytes(24 * MIB), 0)
    return name


def sync(pair: Pair, name: str, snapshot: str = "", **options: Any) -> Run:
    return pair.sync_now(name, snapshot, stock=True, **options)


async def interrupted(pair: Pair, name: str, after: int, **options: Any) -> None:
    async with pair.relay(cut_after=after) as (_, config):
        with pytest.raises(LinkError):
            await pair.sync(name, config=config, attempts=1, stock=True, **options)


def imports() -> list[int]:
    """Return the processes of `rbd import-diff` on this machine, and the scripts they run in."""
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = each.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0] in (b"rbd", b"sh") and any(b"import-diff" in each for each in words):
            found.append(int(each.parent.name))
    return found


def is_rbd(pid: int) -> bool:
    return Path(f"/proc/{pid}/comm").read_text().strip() == "rbd"


def test_it_copies_increments_discards_and_sizes_and_says_what_it_cannot_do(pair: Pair) -> None:
    name = pair.new("stock")
    first = sync(pair, name)
    assert first.result.base is None
    assert any("rolled back and sent again" in each.message for each in first.of(e.Warned))
    with pair.source.image(name) as image:
        image.discard(2 * MIB, 3 * MIB)
        image.resize(40 * MIB)
        image.write(b"tail" * 1000, 39 * MIB)
    second = sync(pair, name)
    assert second.result.base == first.result.end
    with pair.source.image(name) as image:
        image.resize(20 * MIB)
    pair.sync_now(name)  # a worker goes on where the stock tools stopped, and they where it did
    assert len(pair.same(name)) == 3
    assert sync(pair, name, keep=1).result.removed
    assert len(pair.same(name)) == 1


def test_names_may_hold_spaces_quotes_dollars_and_unicode(pair: Pair) -> None:
    name = pair.source.create(unique("a b'c\"d$(false)`e;ü–"))
    fill(pair.source, name, 1)
    with pair.source.image(name) as image:
        image.metadata_set("-v ü'\"", "- $(false) 'x' \"ü\"\n")
    snapshot = "-über 'all' \"$HOME\" \\"
    pair.source.snap(name, snapshot)
    assert sync(pair, name, snapshot).result.end == snapshot
    assert pair.same(name) == [snapshot]
    assert pair.target.metadata(name)["-v ü'\""] == "- $(false) 'x' \"ü\"\n"


def test_a_namespace_striping_and_other_objects_arrive(pair: Pair) -> None:
    name = pair.new("stock-striped", size=16 * MIB, order=18, stripe_unit=64 << 10, stripe_count=4)
    io = pair.target.ioctx()
    if "stock" not in rbd.RBD().namespace_list(io):
        rbd.RBD().namespace_create(io, "stock")
    to = f"dr-site:vms-dr/stock/{name}"
    sync(pair, name, to=to)
    fill(pair.source, name, 3)
    end = sync(pair, name, to=to).result.end
    assert pair.target.digest(name, end, namespace="stock") == pair.source.digest(name, end)
    with pair.target.image(name, namespace="stock") as image:
        assert (image.stripe_unit(), image.stripe_count(), image.stat()["order"]) == (64 << 10, 4, 18)


@pytest.mark.parametrize("after", [6000, 23 * MIB])
def test_a_link_cut_anywhere_costs_one_more_attempt(pair: Pair, after: int) -> None:
    name = big(pair, "stock-cut")

    async def go() -> Run:
        async with pair.relay(cut_after=after) as (_, config):
            return await pair.sync(name, config=config, stock=True)

    run = asyncio.run(go())
    assert run.result.state == "committed"
    assert run.result.attempts == 2
    assert len(pair.same(name)) == 1


def test_an_interrupted_increment_is_rolled_back_before_another_step(pair: Pair) -> None:
    name = big(pair, "stock-back")
    sync(pair, name)
    with pair.source.image(name) as image:
        image.write(random.Random(2).randbytes(16 * MIB), 8 * MIB)
    asyncio.run(interrupted(pair, name, 9 * MIB))
    with pair.source.image(name) as image:
        image.discard(8 * MIB, 16 * MIB)
    run = sync(pair, name)
    assert run.result.state == "committed"
    pair.same(name)


def test_an_import_that_is_killed_is_rolled_back(pair: Pair) -> None:
    name = big(pair, "stock-kill")

    async def go() -> Run:
        async with pair.relay(rate=SLOW) as (_, config):
            task = asyncio.create_task(pair.sync(name, config=config, attempts=1, stock=True))
            while not imports():  # noqa: ASYNC110  # other processes are no event of this loop
                await asyncio.sleep(0.05)
            await asyncio.sleep(1.5)
            for pid in imports():
                if is_rbd(pid):
                    os.kill(pid, signal.SIGKILL)
            with pytest.raises(SiphonError):
                await task
        return await pair.sync(name, stock=True)

    assert asyncio.run(go()).result.state == "committed"
    pair.same(name)


def test_a_stranger_that_wrote_after_an_interruption_is_not_rolled_back_unasked(pair: Pair) -> None:
    name = big(pair, "stock-stranger")
    asyncio.run(interrupted(pair, name, 9 * MIB))
    while imports():
        pass
    pair.target.write(name, 5 * MIB, b"by hand")
    kept = pair.target.digest(name)
    with pytest.raises(ConflictError, match="somebody else changed") as refused:
        sync(pair, name)
    assert "--rollback" in refused.value.hint
    assert pair.target.digest(name) == kept
    sync(pair, name, accept=Accept.ROLLBACK)
    pair.same(name)


def test_a_stranger_that_comes_and_goes_while_data_flow_is_noticed(pair: Pair) -> None:
    name = big(pair, "stock-guest")

    async def go() -> None:
        async with pair.relay(rate=SLOW / 2) as (_, config):
            task = asyncio.create_task(pair.sync(name, config=config, stock=True))
            while not imports():  # noqa: ASYNC110  # other processes are no event of this loop
                await asyncio.sleep(0.05)
            await asyncio.sleep(3)
            await asyncio.to_thread(pair.target.write, name, 23 * MIB, b"by a guest")
            with pytest.raises(LockedError, match="opened by another client while it was being written"):
                await task

    asyncio.run(go())
    assert pair.target.snapshots(name) == []


def test_a_stranger_between_two_of_our_commands_is_noticed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    name = pair.new("stock-between")
    sync(pair, name)
    fill(pair.source, name, 8)
    original = RbdImage.set_metadata

    def late(self: RbdImage, key: str, value: str) -> None:
        monkeypatch.undo()
        pair.target.write(name, 0, b"by a guest")
        original(self, key, value)

    monkeypatch.setattr(RbdImage, "set_metadata", late)
    with pytest.raises(LockedError, match="took the image's lock"):
        sync(pair, name)
    assert len(pair.target.snapshots(name)) == 1
    with pytest.raises(ConflictError):
        sync(pair, name)


def test_a_host_that_died_in_a_rollback_is_no_stranger(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    name = big(pair, "stock-died")
    sync(pair, name)
    with pair.source.image(name) as image:
        image.write(random.Random(2).randbytes(16 * MIB), 8 * MIB)
    asyncio.run(interrupted(pair, name, 9 * MIB))
    original = rbdtool.changing

    def dying(tool: rbdtool.Tool, at: Any, trace: str, lease: str, command: list[str]) -> list[str]:
        if "rollback" in command:
            monkeypatch.undo()
            # What is left is the note that says a command is at work.
            command = ["sh", "-c", "kill -9 $PPID"]
        return original(tool, at, trace, lease, command)

    monkeypatch.setattr(rbdtool, "changing", dying)
    with pytest.raises(LinkError):
        sync(pair, name, attempts=1)
    assert sync(pair, name).result.state == "committed"
    pair.same(name)


def test_a_slow_link_keeps_its_lease(pair: Pair) -> None:
    name = pair.new("stock-slow", fill_with=None)
    pair.source.write(name, 0, random.Random(1).randbytes(3 * MIB))

    async def go() -> Run:
        async with pair.relay(rate=400e3) as (_, config):
            return await pair.sync(name, config=config, stock=True, timeout=6.0, attempts=1)

    assert asyncio.run(go()).result.state == "committed"
    pair.same(name)


def test_an_import_that_takes_nothing_is_given_up(pair: Pair) -> None:
    name = big(pair, "stock-stuck")

    async def go() -> None:
        async with pair.relay(rate=SLOW) as (_, config):
            task = asyncio.create_task(pair.sync(name, config=config, stock=True, timeout=4.0, attempts=1))
            while not imports():  # noqa: ASYNC110  # other processes are no event of this loop
                await asyncio.sleep(0.05)
            await asyncio.sleep(1.5)
            stuck = [pid for pid in imports() if is_rbd(pid)]
            for pid in stuck:
                os.kill(pid, signal.SIGSTOP)
            try:
                async with asyncio.timeout(15):
                    with pytest.raises(LinkError):
                        await task
            finally:
                for pid in stuck:
                    os.kill(pid, signal.SIGCONT)

    asyncio.run(go())
    assert sync(pair, name).result.state == "committed"
    pair.same(name)


def test_touched_foreign_and_baseless_replicas_are_refused(pair: Pair) -> None:
    name = pair.new("stock-conflict")
    end = sync(pair, name).end
    pair.target.write(name, 7 * MIB, b"by hand")
    with pytest.raises(ConflictError, match="differs from its last committed snapshot"):
        sync(pair, name)
    sync(pair, name, accept=Accept.ROLLBACK)
    assert len(pair.same(name)) == 2
    pair.source.unsnap(name, end)
    pair.source.unsnap(name, pair.source.snapshots(name)[-1])
    with pytest.raises(ConflictError, match="none of the replica's snapshots"):
        sync(pair, name)
    foreign = pair.new("stock-foreign")
    pair.target.create(foreign)
    with pytest.raises(ConflictError, match="is no replica"):
        sync(pair, foreign)
    sync(pair, foreign, accept=Accept.RECREATE)
    pair.same(foreign)


def test_two_runs_at_once_do_not_meet_in_one_image(pair: Pair) -> None:
    name = big(pair, "stock-two")

    async def go() -> Run:
        async with pair.relay(rate=SLOW / 6) as (_, config):
            task = asyncio.create_task(pair.sync(name, config=config, stock=True))
            while not imports():  # noqa: ASYNC110  # other processes are no event of this loop
                await asyncio.sleep(0.05)
            for stock in (True, False):
                with pytest.raises(LockedError):
                    await pair.sync(name, stock=stock)
            return await task

    assert asyncio.run(go()).result.attempts == 1
    pair.same(name)


def test_an_image_that_somebody_has_open_is_left_alone(pair: Pair) -> None:
    name = pair.new("stock-open")
    sync(pair, name)
    with pair.target.image(name), pytest.raises(LockedError, match="open for writing by another client"):
        sync(pair, name)
    sync(pair, name)
    pair.same(name)


def test_what_did_not_arrive_as_it_was_sent_gets_no_snapshot(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    name = pair.new("stock-wrong")
    sync(pair, name)
    fill(pair.source, name, 4)
    original = rbdtool.importing

    def spoiled(*words: Any) -> list[str]:
        shell, option, script = original(*words)
        return [shell, option, script.replace("| b2sum", "| { cat; echo more; } | b2sum")]

    monkeypatch.setattr(rbdtool, "importing", spoiled)
    with pytest.raises(DataError, match="not what was sent"):
        sync(pair, name, attempts=1)
    assert len(pair.target.snapshots(name)) == 1
    monkeypatch.undo()
    sync(pair, name)
    pair.same(name)


@pytest.mark.parametrize(("at", "when"), [("take_snapshot", "after"), ("set_metadata", "after")])
def test_a_commit_broken_off_anywhere_is_finished(pair: Pair, monkeypatch: pytest.MonkeyPatch, at: str, when: str) -> None:
    name = pair.new("stock-commit")
    sync(pair, name)
    fill(pair.source, name, 5)
    original = getattr(RbdImage, at)

    def broken(self: RbdImage, *words: str) -> None:
        if at == "set_metadata" and "siphon.origin" not in words[0]:
            original(self, *words)
            return
        monkeypatch.undo()
        if when == "after":
            original(self, *words)
        raise LinkError("broken off here")

    monkeypatch.setattr(RbdImage, at, broken)
    with pytest.raises(LinkError, match="broken off here"):
        sync(pair, name, attempts=1)
    monkeypatch.undo()
    sync(pair, name)
    pair.same(name)
    assert not [each for each in pair.target.snapshots(name) if "committing" in each]


def test_a_dry_run_writes_nothing(pair: Pair) -> None:
    name = pair.new("stock-dry")
    plan = sync(pair, name, dry_run=True).of(e.Plan)[0]
    assert plan.creates
    assert name not in pair.target.names()
    sync(pair, name)
    fill(pair.source, name, 6)
    before = pair.target.metadata(name), pair.target.snapshots(name), pair.source.snapshots(name)
    plan = sync(pair, name, dry_run=True).of(e.Plan)[0]
    assert plan.steps[0].bytes
    assert before == (pair.target.metadata(name), pair.target.snapshots(name), pair.source.snapshots(name))


def test_a_random_history_with_random_cuts_ends_true(pair: Pair) -> None:
    chance = random.Random(1)
    name = pair.new("stock-history")

    async def go() -> None:
        for turn in range(2):
            fill(pair.source, name, chance.randrange(1 << 30), spans=4)
            with pair.source.image(name) as image:
                image.discard(chance.randrange(16) * MIB, 2 * MIB)
                image.resize(chance.randrange(24, 40) * MIB)
            async with pair.relay(cut_after=chance.randrange(1, 4 * MIB)) as (_, config):
                with_cut = pair.sync(name, config=config, stock=True, keep=9)
                await with_cut
            assert len(pair.source.snapshots(name)) >= turn

    asyncio.run(go())
    pair.same(name)
