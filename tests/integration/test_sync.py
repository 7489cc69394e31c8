"""A sync makes a replica and keeps it: first copy, increments, sizes, layouts, retention."""

from __future__ import annotations

import pytest
import rbd

from agent.errors import ConflictError, NotFoundError
from support import MIB, Pair, fill, unique


def test_a_first_copy_is_the_source_byte_for_byte(pair: Pair) -> None:
    name = pair.new("first")
    run = pair.sync_now(name)
    assert run.result.state == "committed"
    assert run.result.base is None
    assert pair.same(name) == [run.result.end]


def test_an_increment_sends_only_what_changed(pair: Pair) -> None:
    name = pair.new("increment")
    pair.sync_now(name)
    pair.source.write(name, 5 * MIB, b"x" * 4096)
    run = pair.sync_now(name)
    assert run.result.bytes_read <= MIB
    assert run.result.bytes_sent < 16 << 10
    assert len(pair.same(name)) == 2


def test_what_the_source_discarded_or_zeroed_is_gone_from_the_replica(pair: Pair) -> None:
    name = pair.new("zero", fill_with=None)
    pair.source.write(name, 0, b"a" * (8 * MIB))
    pair.sync_now(name)
    with pair.source.image(name) as image:
        image.discard(0, 2 * MIB)
        image.write(bytes(2 * MIB), 3 * MIB)
        image.discard(6 * MIB + 4096, 8192)
    pair.sync_now(name)
    pair.same(name)
    assert pair.target.used(name) <= pair.source.used(name)


def test_a_replica_is_as_thin_as_its_source(pair: Pair) -> None:
    name = pair.new("thin", fill_with=None)
    with pair.source.image(name) as image:
        for number in range(16):
            image.write(b"y" * 4096, number * MIB + 500 * 1024)
    pair.sync_now(name)
    pair.same(name)
    assert pair.target.used(name) <= pair.source.used(name)


def test_growth_and_shrink_of_the_source_are_followed(pair: Pair) -> None:
    name = pair.new("resize")
    pair.sync_now(name)
    with pair.source.image(name) as image:
        image.resize(48 * MIB + 4096)
        image.write(b"tail" * 1024, 48 * MIB)
    pair.sync_now(name)
    with pair.source.image(name) as image:
        image.resize(10 * MIB)
    pair.sync_now(name)
    with pair.source.image(name) as image:
        image.resize(20 * MIB)
    pair.sync_now(name)
    assert len(pair.same(name)) == 3


def test_what_was_cut_off_at_a_snapshot_between_and_grew_again_is_zeros(pair: Pair) -> None:
    """The object maps say nothing of it (measured, 16.2): the replica kept the old data."""
    name = pair.new("regrown", size=16 * MIB, fill_with=None)
    pair.source.write(name, 0, b"old" * (5 * MIB))
    pair.sync_now(name)
    with pair.source.image(name) as image:
        image.resize(4 * MIB)
        image.create_snap("small")
        image.resize(16 * MIB)
    pair.sync_now(name)
    assert len(pair.same(name)) == 2


def test_intermediate_carries_the_snapshots_between_in_order(pair: Pair) -> None:
    name = pair.new("between")
    pair.sync_now(name)
    for number in range(3):
        fill(pair.source, name, 50 + number, spans=2)
        pair.source.snap(name, f"user-{number}")
    run = pair.sync_now(name, intermediate=True)
    assert run.result.steps == 4
    assert pair.same(name)[1:4] == ["user-0", "user-1", "user-2"]


def test_a_named_snapshot_is_sent_and_nothing_is_removed(pair: Pair) -> None:
    name = pair.new("named")
    for _ in range(2):
        pair.sync_now(name)
    fill(pair.source, name, 3, spans=1)
    pair.source.snap(name, "nightly")
    before = pair.source.snapshots(name)
    run = pair.sync_now(name, "nightly", keep=1)
    assert run.result.end == "nightly"
    assert pair.source.snapshots(name) == before
    assert pair.same(name) == before
    again = pair.sync_now(name, "nightly")
    assert again.result.state == "up-to-date"


def test_a_snapshot_older_than_the_last_common_one_is_refused(pair: Pair) -> None:
    name = pair.new("older")
    pair.source.snap(name, "early")
    pair.sync_now(name)
    with pytest.raises(ConflictError, match="is older than"):
        pair.sync_now(name, "early")


def test_own_snapshots_beyond_keep_go_on_both_sides_and_the_users_stay(pair: Pair) -> None:
    name = pair.new("keep")
    pair.source.snap(name, "mine")
    ends = [pair.sync_now(name, intermediate=True, keep=2).result.end for _ in range(4)]
    assert pair.source.snapshots(name) == ["mine", *ends[-2:]]
    assert pair.same(name) == ["mine", *ends[-2:]]


def test_two_replicas_of_one_image_never_prune_each_others_base(pair: Pair) -> None:
    name = pair.new("two")
    other = unique("two-other")
    pair.sync_now(name, keep=1)
    for number in range(3):
        fill(pair.source, name, number, spans=1)
        pair.sync_now(name, to=pair.place(other), keep=1)
    run = pair.sync_now(name, keep=1)
    assert run.result.base is not None
    pair.same(name)
    pair.same(name, other)


def test_layout_and_metadata_are_the_sources(pair: Pair) -> None:
    features = 61 | rbd.RBD_FEATURE_STRIPINGV2
    name = pair.new("layout", order=19, features=features, stripe_unit=64 << 10, stripe_count=4)
    with pair.source.image(name) as image:
        image.metadata_set("owner", "tenant-7")
        image.metadata_set("conf_rbd_qos_iops_limit", "1000")
    pair.sync_now(name)
    pair.same(name)
    with pair.source.image(name) as source, pair.target.image(name) as target:
        assert target.stat()["order"] == 19
        assert (target.stripe_unit(), target.stripe_count()) == (64 << 10, 4)
        assert target.features() == source.features()
        kept = {key: value for key, value in target.metadata_list() if not key.startswith("siphon.")}
    assert kept == {"owner": "tenant-7", "conf_rbd_qos_iops_limit": "1000"}


def test_journaling_is_left_out_with_a_warning(pair: Pair) -> None:
    name = pair.new("journal", features=61 | rbd.RBD_FEATURE_JOURNALING)
    from agent import events as e

    run = pair.sync_now(name)
    pair.same(name)
    with pair.target.image(name) as image:
        assert not image.features() & rbd.RBD_FEATURE_JOURNALING
    assert any("journaling" in each.message for each in run.of(e.Warned))


@pytest.mark.parametrize("features", [1, 5], ids=["layering only", "no object map"])
def test_images_without_object_map_are_replicated_all_the_same(pair: Pair, features: int) -> None:
    name = pair.new("plain", features=features)
    pair.sync_now(name)
    fill(pair.source, name, 9, spans=3)
    run = pair.sync_now(name)
    assert run.result.base is not None
    pair.same(name)
    with pair.target.image(name) as image:
        assert image.features() & rbd.RBD_FEATURE_EXCLUSIVE_LOCK


def test_an_invalid_object_map_is_not_believed(pair: Pair) -> None:
    name = pair.new("invalid")
    pair.sync_now(name)
    fill(pair.source, name, 10, spans=3)
    with pair.source.image(name) as image:
        # Turned off and on again, fast-diff knows nothing of the past and says so in its flags.
        image.update_features(rbd.RBD_FEATURE_FAST_DIFF | rbd.RBD_FEATURE_OBJECT_MAP, False)
        image.update_features(rbd.RBD_FEATURE_OBJECT_MAP | rbd.RBD_FEATURE_FAST_DIFF, True)
        assert image.flags()
    pair.sync_now(name)
    pair.same(name)


def test_a_clone_is_replicated_whole(pair: Pair) -> None:
    parent = pair.new("parent")
    pair.source.snap(parent, "golden")
    with pair.source.image(parent) as image:
        image.protect_snap("golden")
    child, io = unique("child"), pair.source.ioctx()
    rbd.RBD().clone(io, parent, "golden", io, child, features=61)
    pair.source.write(child, 3 * MIB, b"child" * 1000)
    pair.sync_now(child)
    pair.same(child)
    pair.source.write(child, 9 * MIB, b"later" * 1000)
    pair.sync_now(child)
    pair.same(child)


def test_namespaces_on_both_sides(pair: Pair) -> None:
    space = unique("ns")
    for site in (pair.source, pair.target):
        rbd.RBD().namespace_create(site.ioctx(), space)
    name = pair.source.create(unique("spaced"), namespace=space)
    with pair.source.image(name, namespace=space) as image:
        image.write(b"in a namespace" * 999, MIB)
    run = pair.sync_now(f"{space}/{name}", to=f"dr-site:{pair.target.pool}/{space}/")
    assert run.result.state == "committed"
    assert pair.source.digest(name, run.result.end, namespace=space) == pair.target.digest(name, run.result.end, namespace=space)


def test_a_data_pool_is_used(pair: Pair) -> None:
    name = pair.new("data-pool")
    pair.sync_now(name, data_pool="spare-dr")
    pair.same(name)
    with pair.target.image(name) as image:
        assert image.features() & rbd.RBD_FEATURE_DATA_POOL


def test_an_empty_image_and_one_of_odd_size(pair: Pair) -> None:
    empty = pair.new("empty", fill_with=None)
    pair.sync_now(empty)
    pair.same(empty)
    odd = pair.new("odd", size=3 * MIB + 12345)
    pair.sync_now(odd)
    pair.same(odd)


def test_a_dry_run_writes_nothing_on_either_side(pair: Pair) -> None:
    from agent import events as e

    name = pair.new("dry")
    run = pair.sync_now(name, dry_run=True)
    plan = run.of(e.Plan)[0]
    assert run.result.state == "planned"
    assert plan.steps[0].bytes > 0
    assert pair.source.snapshots(name) == []
    assert name not in pair.target.names()
    pair.sync_now(name)
    fill(pair.source, name, 4, spans=1)
    source, target = pair.source.metadata(name), pair.target.metadata(name)
    before = pair.source.snapshots(name), pair.target.snapshots(name)
    again = pair.sync_now(name, dry_run=True, keep=1).of(e.Plan)[0]
    assert again.steps[0].base == before[0][0]
    assert 0 < again.steps[0].bytes <= 2 * MIB
    assert again.removes == (f"target: snapshot {before[1][0]}", f"source: snapshot {before[0][0]}")
    assert (pair.source.snapshots(name), pair.target.snapshots(name)) == before
    assert (pair.source.metadata(name), pair.target.metadata(name)) == (source, target)


def test_a_source_that_is_not_there_is_named(pair: Pair) -> None:
    with pytest.raises(NotFoundError, match="there is no image vms/absent"):
        pair.sync_now("absent")
    name = pair.new("nosnap")
    with pytest.raises(NotFoundError, match="there is no snapshot"):
        pair.sync_now(name, "absent")
