"""What the agent did not make is never destroyed: refused with what was found, accepted only when asked."""

from __future__ import annotations

import contextlib
import random

import pytest
import rbd

from agent.errors import ConflictError, LockedError
from agent.plan import Accept
from support import MIB, Pair, fill, unique


def test_a_replica_touched_by_hand_is_refused_and_rolled_back_when_asked(pair: Pair) -> None:
    name = pair.new("touched")
    first = pair.sync_now(name).end
    pair.target.write(name, 7 * MIB, b"by hand")
    mine = pair.target.digest(name)
    with pytest.raises(ConflictError, match="differs from its last committed snapshot") as refused:
        pair.sync_now(name)
    assert f"last common snapshot: {first}" in str(refused.value)
    assert "--rollback" in refused.value.hint
    assert pair.target.digest(name) == mine
    assert pair.source.snapshots(name) == [first]
    pair.sync_now(name, accept=Accept.ROLLBACK)
    assert len(pair.same(name)) == 2


def test_a_replica_resized_by_hand_is_refused(pair: Pair) -> None:
    name = pair.new("resized")
    pair.sync_now(name)
    with pair.target.image(name) as image:
        image.resize(image.size() + MIB)
    with pytest.raises(ConflictError, match="differs"):
        pair.sync_now(name)
    pair.sync_now(name, accept=Accept.ROLLBACK)
    pair.same(name)


def test_a_replica_rolled_back_by_hand_to_its_snapshot_is_as_good_as_new(pair: Pair) -> None:
    name = pair.new("rolled")
    first = pair.sync_now(name).end
    pair.target.write(name, 0, b"by hand")
    with pair.target.image(name) as image:
        image.rollback_to_snap(first)
    pair.sync_now(name)
    assert len(pair.same(name)) == 2


def test_a_target_snapshot_remade_under_the_same_name_is_no_base(pair: Pair) -> None:
    name = pair.new("remade")
    end = pair.sync_now(name).end
    pair.target.unsnap(name, end)
    pair.target.write(name, 0, b"not what it was")
    pair.target.snap(name, end)
    with pytest.raises(ConflictError) as refused:
        pair.sync_now(name)
    assert f"{end} (not ours)" in str(refused.value)
    pair.sync_now(name, accept=Accept.RECREATE)
    pair.same(name)


def test_a_source_remade_under_the_same_name_is_another_image(pair: Pair) -> None:
    name = pair.new("reborn")
    pair.sync_now(name)
    pair.source.remove(name)
    pair.source.create(name)
    fill(pair.source, name, 77)
    with pytest.raises(ConflictError, match="the replica of another image") as refused:
        pair.sync_now(name)
    assert "--recreate" in refused.value.hint
    kept = pair.target.digest(name)
    pair.sync_now(name, accept=Accept.RECREATE)
    pair.same(name)
    io = pair.target.ioctx()
    trashed = [each for each in rbd.RBD().trash_list(io) if each["name"] == name]
    assert len(trashed) == 1
    again = unique("restored")
    rbd.RBD().trash_restore(io, trashed[0]["id"], again)
    assert pair.target.digest(again) == kept


def test_an_image_that_is_not_ours_is_refused_whether_empty_or_not(pair: Pair) -> None:
    """A diff from the beginning onto an image that is not empty leaves its stale blocks behind."""
    name = pair.new("foreign")
    pair.target.create(name)
    with pytest.raises(ConflictError, match="is no replica"):
        pair.sync_now(name)
    fill(pair.target, name, 5)
    mine = pair.target.digest(name)
    with pytest.raises(ConflictError, match="is no replica"):
        pair.sync_now(name, accept=Accept.ROLLBACK)
    assert pair.target.digest(name) == mine
    assert pair.source.snapshots(name) == []
    pair.sync_now(name, accept=Accept.RECREATE)
    pair.same(name)


def test_an_image_in_use_is_not_moved_to_the_trash(pair: Pair) -> None:
    name = pair.new("in-use")
    pair.target.create(name)
    with pair.target.image(name), pytest.raises(LockedError, match="in use"):
        pair.sync_now(name, accept=Accept.RECREATE)
    assert name in pair.target.names()


def test_a_replica_whose_last_common_snapshot_is_gone_at_the_source_is_refused(pair: Pair) -> None:
    name = pair.new("baseless")
    end = pair.sync_now(name).end
    pair.source.unsnap(name, end)
    with pytest.raises(ConflictError, match="exists at the source any more"):
        pair.sync_now(name)
    assert pair.source.snapshots(name) == []
    pair.sync_now(name, accept=Accept.RECREATE)
    pair.same(name)


def test_a_replica_whose_snapshots_are_all_gone_is_refused(pair: Pair) -> None:
    name = pair.new("unsnapped")
    end = pair.sync_now(name).end
    pair.target.unsnap(name, end)
    with pytest.raises(ConflictError, match="no snapshot that tells where it is from"):
        pair.sync_now(name)
    with pytest.raises(ConflictError, match="no snapshot to roll back to"):
        pair.sync_now(name, accept=Accept.ROLLBACK)
    pair.sync_now(name, accept=Accept.RECREATE)
    pair.same(name)


def test_an_older_common_snapshot_serves_where_the_newest_is_gone(pair: Pair) -> None:
    name = pair.new("older-base")
    first = pair.sync_now(name).end
    fill(pair.source, name, 12)
    second = pair.sync_now(name).end
    pair.source.unsnap(name, second)
    with pair.source.image(name) as image:
        image.discard(0, 16 * MIB)
    run = pair.sync_now(name)
    assert run.result.base == first
    assert pair.target.snapshots(name) == [first, second, run.result.end]
    for each in (first, run.result.end):
        assert pair.target.digest(name, each) == pair.source.digest(name, each)


def test_a_name_that_is_taken_at_the_target_is_refused(pair: Pair) -> None:
    name = pair.new("taken")
    pair.sync_now(name)
    pair.source.snap(name, "nightly")
    pair.target.snap(name, "nightly")
    with pytest.raises(ConflictError, match="already has a snapshot named nightly") as refused:
        pair.sync_now(name, "nightly")
    assert "rbd snap rename" in refused.value.hint


def test_a_users_snapshot_on_the_replica_stays_and_hinders_nothing(pair: Pair) -> None:
    name = pair.new("users")
    pair.sync_now(name)
    pair.target.snap(name, "drill")
    pair.sync_now(name)
    assert "drill" in pair.target.snapshots(name)


@pytest.mark.parametrize("place", ["no-such-pool/x", "vms-dr/no-such-namespace/x"])
def test_a_pool_or_namespace_that_is_not_there_is_refused_with_how_to_make_it(pair: Pair, place: str) -> None:
    name = pair.new("nowhere")
    with pytest.raises(ConflictError, match="there is no") as refused:
        pair.sync_now(name, to=f"dr-site:{place}")
    assert "create" in refused.value.hint
    assert pair.source.snapshots(name) == []


def test_rollback_to_a_snapshot_that_is_there_already_is_no_false_success(pair: Pair) -> None:
    name = pair.new("no-step")
    end = pair.sync_now(name).end
    pair.target.write(name, 0, b"by hand")
    with pytest.raises(ConflictError, match="rolling back is part of the next step"):
        pair.sync_now(name, end, accept=Accept.ROLLBACK)


def test_metadata_that_cannot_be_read_is_named(pair: Pair) -> None:
    name = pair.new("garbled")
    pair.sync_now(name)
    with pair.target.image(name) as image:
        image.metadata_set("siphon.lineage", "{")
    with pytest.raises(ConflictError, match=f"the metadata of vms-dr/{name} cannot be read"):
        pair.sync_now(name)


def test_a_dry_run_refuses_as_the_run_would(pair: Pair) -> None:
    name = pair.new("dry-conflict")
    pair.target.create(name)
    with pytest.raises(ConflictError, match="is no replica"):
        pair.sync_now(name, dry_run=True)


def test_what_a_crash_left_of_a_creation_is_in_nobodys_way(pair: Pair) -> None:
    from agent.names import creating_prefix

    name = pair.new("creation")
    with pair.source.image(name) as image:
        leftover = creating_prefix(f"{pair.target.pool}/{name}", image.id()) + "dead"
    pair.target.create(leftover, MIB)
    pair.sync_now(name)
    pair.same(name)
    assert leftover not in pair.target.names()


@pytest.mark.parametrize("point", ["snapshot taken", "origin recorded", "snapshot renamed"])
def test_a_commit_broken_off_anywhere_is_finished_by_the_next_run(pair: Pair, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    """The worker is stood in for by what a crash at that point leaves on the replica."""
    from agent.model import ImageIdentity, Mark, Origin, Snapshot, Step, encode
    from agent.names import origin_key

    name = pair.new("commit")
    end = pair.sync_now(name).end
    fill(pair.source, name, 31)
    before = pair.source.snapshots(name)
    second = pair.sync_now(name).end
    sizes = {}
    with pair.source.image(name) as image:
        for each in image.list_snaps():
            sizes[each["name"]] = Snapshot(each["id"], each["name"], each["size"])
        identity = ImageIdentity(pair.lab.source.ceph("fsid").strip(), image.id())
    step = Step(sizes[end], sizes[second])
    mark = Mark(step=step, snapshot="siphon-committing-" + "ab" * 8, started_at="2026-01-01T00:00:00+00:00", ready=True)
    with pair.target.image(name) as image:
        made = next(each["id"] for each in image.list_snaps() if each["name"] == second)
        image.metadata_set("siphon.step", encode(mark))
        if point != "snapshot renamed":
            image.rename_snap(second, mark.snapshot)
        if point == "snapshot taken":
            image.metadata_remove(origin_key(made))
        else:
            image.metadata_set(origin_key(made), encode(Origin(identity, sizes[second])))
    fill(pair.source, name, 32, spans=2)
    run = pair.sync_now(name)
    assert run.result.base == second
    assert pair.same(name) == [*before, second, run.result.end]
    assert "siphon.step" not in pair.target.metadata(name)


@pytest.mark.parametrize("seed", range(3))
def test_random_histories_with_random_cuts_end_equal(pair: Pair, seed: int) -> None:
    """Writes, discards, zeros, resizes and snapshots at the source; syncs that are cut anywhere."""
    import asyncio

    from agent.errors import LinkError

    chance = random.Random(seed)
    name = pair.new("history", fill_with=seed, size=24 * MIB, order=chance.choice([17, 20, 22]))

    def change() -> None:
        with pair.source.image(name) as image:
            for _ in range(chance.randrange(1, 12)):
                size = image.size()
                offset = chance.randrange(0, size - MIB) // 512 * 512
                length = chance.choice([512, 4096, 70_000, MIB])
                match chance.randrange(6):
                    case 0 | 1 | 2:
                        image.write(chance.randbytes(length), offset)
                    case 3:
                        image.discard(offset, length)
                    case 4:
                        image.write(bytes(length), offset)
                    case 5:
                        image.resize(chance.randrange(4, 40) * MIB + chance.choice([0, 512]))

    async def attempt() -> None:
        async with pair.relay(cut_after=chance.randrange(1000, 12 * MIB), cuts=chance.randrange(3)) as (_, config):
            with contextlib.suppress(LinkError):
                await pair.sync(name, config=config, attempts=chance.choice([1, 4]), intermediate=chance.random() < 0.5, keep=10)

    for turn in range(6):
        change()
        if chance.random() < 0.4:
            pair.source.snap(name, f"user-{turn}")
            change()
        asyncio.run(attempt())
    pair.sync_now(name)
    pair.same(name)
