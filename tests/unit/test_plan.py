"""The planner: two sides in, steps or a named conflict out."""

from __future__ import annotations

from typing import Any

import pytest

from agent.errors import ConflictError
from agent.model import ImageIdentity, ImageSpec, Lineage, Mark, Origin, Replica, ReplicaSnapshot, Snapshot, Source, Step
from agent.plan import Accept, Ground, ground, newest_common, steps

WHO = ImageIdentity("fsid-a", "image-1")
S1, S2, S3, S4 = (Snapshot(number, f"s{number}", 100) for number in (1, 2, 3, 4))


def source(*snapshots: Snapshot) -> Source:
    return Source(ImageSpec("vms", "web"), WHO, 100, snapshots)


def replica(*copies: Snapshot, head: Any = "clean", mark: Step | None = None, who: ImageIdentity | None = WHO) -> Replica:
    return Replica(
        spec=ImageSpec("dr", "web"),
        image_id="copy",
        size=100,
        lineage=Lineage(who, "vms/web", "") if who else None,
        snapshots=tuple(ReplicaSnapshot(70 + each.id, each.name, each.size, Origin(WHO, each)) for each in copies),
        head=head,
        mark=Mark(mark, "siphon-committing-0", "") if mark else None,
    )


def way(src: Source, rep: Replica | None, end: Snapshot, *, intermediate: bool = False) -> list[tuple[str | None, str]]:
    planned = steps(src, rep, ground(src, rep, Accept.NOTHING), end, intermediate=intermediate)
    return [(each.base.name if each.base else None, each.end.name) for each in planned]


def test_no_replica_is_a_first_copy() -> None:
    assert ground(source(S1), None, Accept.NOTHING) == Ground(create=True)
    assert way(source(S1), None, S1) == [(None, "s1")]


def test_the_newest_common_snapshot_is_the_base() -> None:
    assert way(source(S1, S2, S3), replica(S1, S2), S3) == [("s2", "s3")]


def test_common_means_identity_and_size_not_name() -> None:
    renamed = Snapshot(2, "other", 100)
    assert newest_common(source(S1, renamed), replica(S1, S2)) == renamed
    impostor = Snapshot(9, "s2", 100)
    assert newest_common(source(S1, impostor), replica(S1, S2)) == S1
    assert newest_common(source(S1, Snapshot(2, "s2", 50)), replica(S1, S2)) == S1


def test_what_the_replica_has_needs_no_step() -> None:
    assert way(source(S1, S2), replica(S1, S2), S2) == []
    assert way(source(S1, S2), replica(S1, S2), S1) == []


def test_intermediate_snapshots_come_in_order() -> None:
    assert way(source(S1, S2, S3, S4), replica(S1), S4, intermediate=True) == [("s1", "s2"), ("s2", "s3"), ("s3", "s4")]
    assert way(source(S1, S2), None, S2, intermediate=True) == [(None, "s1"), ("s1", "s2")]


def test_a_pending_step_is_finished_first() -> None:
    pending = replica(S1, head="resumable", mark=Step(S1, S2))
    assert way(source(S1, S2, S3), pending, S3) == [("s1", "s2"), ("s2", "s3")]
    assert way(source(S1, S2, S3), pending, S2) == [("s1", "s2")]


def test_a_pending_step_beyond_the_wanted_end_is_given_up() -> None:
    assert way(source(S1, S2, S3), replica(S1, head="resumable", mark=Step(S1, S3)), S2) == [("s1", "s2")]


def test_a_pending_step_whose_end_or_base_is_gone_is_given_up() -> None:
    assert way(source(S1, S3), replica(S1, head="resumable", mark=Step(S1, S2)), S3) == [("s1", "s3")]
    impostor = Snapshot(7, "s2", 100)
    assert way(source(S1, impostor), replica(S1, head="resumable", mark=Step(S1, S2)), impostor) == [("s1", "s2")]


def test_an_unsure_step_is_given_up() -> None:
    assert ground(source(S1, S2), replica(S1, head="unsure", mark=Step(S1, S2)), Accept.NOTHING) == Ground(base=S1)


@pytest.mark.parametrize("mark", [None, Step(S1, S2)])
def test_a_touched_replica_needs_rollback(mark: Step | None) -> None:
    rep = replica(S1, head="touched", mark=mark)
    for accept in (Accept.NOTHING, Accept.RECREATE):
        with pytest.raises(ConflictError) as refused:
            ground(source(S1, S2), rep, accept)
        assert "--rollback" in refused.value.hint
    assert ground(source(S1, S2), rep, Accept.ROLLBACK) == Ground(base=S1, discard=True)


@pytest.mark.parametrize("who", [None, ImageIdentity("fsid-b", "image-1"), ImageIdentity("fsid-a", "image-2")])
def test_a_stranger_needs_recreate(who: ImageIdentity | None) -> None:
    rep = replica(head="foreign", who=who)
    for accept in (Accept.NOTHING, Accept.ROLLBACK):
        with pytest.raises(ConflictError) as refused:
            ground(source(S1), rep, accept)
        assert "--recreate" in refused.value.hint
    assert ground(source(S1), rep, Accept.RECREATE) == Ground(recreate=True)


def test_a_replica_without_a_common_snapshot_needs_recreate() -> None:
    with pytest.raises(ConflictError, match="exists at the source any more"):
        ground(source(S3), replica(S1, S2), Accept.ROLLBACK)
    assert ground(source(S3), replica(S1, S2), Accept.RECREATE) == Ground(recreate=True)


def test_an_empty_replica_of_ours_is_begun_from_nothing() -> None:
    assert ground(source(S1), replica(), Accept.NOTHING) == Ground()


def test_a_conflict_shows_both_sides() -> None:
    with pytest.raises(ConflictError) as refused:
        ground(source(S1, S2), replica(S1, head="touched"), Accept.NOTHING)
    text = str(refused.value)
    assert "source  vms/web" in text
    assert "s1, s2" in text
    assert "target  dr/web" in text
    assert "last common snapshot: s1" in text
