"""However the lock of a replica changes hands, nobody of ours makes the next run believe in a stranger."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from agent import holding
from agent.cluster import Cluster, Pool
from agent.continuity import Standing
from agent.errors import LinkError, LockedError
from agent.holding import Holding, settled_footing, take
from agent.model import Hand
from agent.settings import ClusterSettings
from agent.survey import footing
from support import MIB, Pair, worker_pids


@asynccontextmanager
async def worker(pair: Pair, run: str = "run") -> AsyncIterator[tuple[Pool, Hand]]:
    """Stand in for a worker: a client of the target cluster with an address of its own."""
    with Cluster(ClusterSettings(conf=str(pair.lab.target.conf), user="siphon"), 30) as cluster:
        yield cluster.pool("vms-dr"), Hand(cluster.address, "here", 1, run, "now")


async def unfinished(pair: Pair) -> str:
    """Make a replica in the middle of its first copy, which nobody holds."""
    name = pair.new("hands", fill_with=None)
    with pair.source.image(name) as image:
        image.write(random.Random(1).randbytes(24 * MIB), 0)
    async with pair.relay(cut_after=18 * MIB) as (_, config):
        with pytest.raises(LinkError):
            await pair.sync(name, config=config, attempts=1)
    async with asyncio.timeout(8):
        while worker_pids():  # noqa: ASYNC110  # the end of other processes is no event of this loop
            await asyncio.sleep(0.05)
    return name


def image_id(pool: Pool, name: str) -> str:
    found = pool.image_id(name)
    assert found is not None
    return found


async def taken(pool: Pool, name: str, me: Hand) -> Holding | None:
    found = await settled_footing(pool, pool.spec(name), image_id(pool, name), unfinished=True)
    assert found.standing is Standing.RESUMABLE
    return await take(pool, pool.spec(name), image_id(pool, name), found, me, trusted=True, say=lambda _: None)


@pytest.mark.parametrize("at", ["claim", "_lock", "confirm"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_worker_stopped_anywhere_while_it_takes_the_lock_leaves_a_step_that_goes_on(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, at: str, when: str
) -> None:
    owner: Any = holding if at == "_lock" else Holding
    original = getattr(owner, at)

    async def stopped(*args: Any) -> Any:
        monkeypatch.undo()
        if when == "after":
            await original(*args)
        raise asyncio.CancelledError

    async def go() -> None:
        name = await unfinished(pair)
        async with worker(pair) as (pool, me):
            monkeypatch.setattr(owner, at, stopped)
            with pytest.raises(asyncio.CancelledError):
                await taken(pool, name, me)
            left = footing(pool, pool.spec(name), image_id(pool, name))
        assert left.owner == ""
        assert left.standing is Standing.RESUMABLE
        assert left.guard is not None
        assert left.guard.claim is None
        run = await pair.sync(name)
        assert run.result.resumed_from is not None
        pair.same(name)

    asyncio.run(go())


def test_a_claim_that_was_refused_does_not_hide_how_the_holder_left(pair: Pair) -> None:
    async def go() -> None:
        name = await unfinished(pair)
        async with worker(pair) as (pool, first), worker(pair, "another") as (other, second):
            held = await taken(pool, name, first)
            assert held is not None
            spec = pool.spec(name)
            found = footing(other, spec, image_id(pool, name))
            claiming = Holding(other, other.open(name, writable=True), second, trusted=True)
            assert await claiming.claim(found.guard)
            await held.release(unfinished=True)
            await claiming.withdraw()
            left = footing(pool, spec, image_id(pool, name))
        assert left.guard is not None
        assert left.guard.claim is None
        assert left.standing is Standing.RESUMABLE
        assert (await pair.sync(name)).result.resumed_from is not None
        pair.same(name)

    asyncio.run(go())


def test_a_holder_that_leaves_late_does_not_write_over_its_successor(pair: Pair) -> None:
    async def go() -> None:
        name = await unfinished(pair)
        async with worker(pair) as (pool, first), worker(pair, "another") as (other, second):
            held = await taken(pool, name, first)
            assert held is not None
            held.image.close()  # the lock is free, and the last word not yet written
            found = footing(other, other.spec(name), image_id(pool, name))
            successor = await take(other, other.spec(name), image_id(pool, name), found, second, trusted=False, say=lambda _: None)
            assert successor is not None
            await held._record(state="released", version=found.version)
            now = footing(pool, pool.spec(name), image_id(pool, name))
            assert now.guard is not None
            assert now.guard.tenure is not None
            assert now.guard.tenure.hand == second
            assert now.standing is Standing.UNSURE
            await successor.release(unfinished=True)

    asyncio.run(go())


def test_a_claim_on_what_changed_hands_meanwhile_is_not_made(pair: Pair) -> None:
    async def go() -> None:
        name = await unfinished(pair)
        async with worker(pair) as (pool, first), worker(pair, "another") as (other, second):
            seen = footing(other, other.spec(name), image_id(pool, name))
            held = await taken(pool, name, first)
            assert held is not None
            assert (
                await take(other, other.spec(name), seen_id := image_id(pool, name), seen, second, trusted=True, say=print) is None
            )
            assert footing(pool, pool.spec(name), seen_id).strangers == ()
            await held.release(unfinished=True)
            assert footing(pool, pool.spec(name), seen_id).standing is Standing.RESUMABLE

    asyncio.run(go())


def test_a_living_worker_of_another_run_keeps_its_lock(pair: Pair) -> None:
    async def go() -> None:
        name = await unfinished(pair)
        async with worker(pair) as (pool, first), worker(pair, "another") as (other, second):
            held = await taken(pool, name, first)
            assert held is not None
            found = footing(other, other.spec(name), image_id(pool, name))
            with pytest.raises(LockedError, match="another run"):
                await take(other, other.spec(name), image_id(pool, name), found, second, trusted=True, say=lambda _: None)
            await held.release(unfinished=True)
            assert footing(pool, pool.spec(name), image_id(pool, name)).standing is Standing.RESUMABLE

    asyncio.run(go())


def test_whoever_looks_while_a_worker_leaves_never_takes_it_for_a_stranger(pair: Pair) -> None:
    async def go() -> None:
        name = await unfinished(pair)
        async with worker(pair) as (pool, first), worker(pair, "another") as (other, _):
            spec, identity = pool.spec(name), image_id(pool, name)
            for _ in range(12):
                held = await taken(pool, name, first)
                assert held is not None
                leaving = asyncio.create_task(held.release(unfinished=True))
                while not leaving.done():
                    seen = await asyncio.to_thread(footing, other, spec, identity)
                    assert seen.standing is not Standing.TOUCHED
                await leaving
                found = await settled_footing(other, spec, identity, unfinished=True)
                assert found.standing is Standing.RESUMABLE

    asyncio.run(go())
