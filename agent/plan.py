"""What a run will do: source and replica in, steps or a named conflict out. Pure.

`ground` finds where the replica stands and whether it may be written at all; `steps` lays the way
from there to the wanted snapshot. They are two functions because the wanted snapshot is taken only
after the ground is known to be sound, so that a refused run leaves nothing behind.
"""

from __future__ import annotations

from enum import Enum

from agent.errors import ConflictError
from agent.model import Replica, ReplicaSnapshot, Snapshot, Source, Step, Value


class Accept(Enum):
    """What the user allowed to be given up."""

    NOTHING = "nothing"
    ROLLBACK = "rollback"
    RECREATE = "recreate"


class Ground(Value, frozen=True):
    """Where the next step begins.

    `base` is the newest common snapshot (None: from nothing), `pending` a step that was begun and
    can be finished. `create` says that there is no replica yet, `recreate` that what bears its name
    goes to the trash first, `discard` that the user gave up what differs from the base.
    """

    base: Snapshot | None = None
    pending: Step | None = None
    create: bool = False
    recreate: bool = False
    discard: bool = False


def ground(source: Source, replica: Replica | None, accept: Accept) -> Ground:
    """Judge the replica; ConflictError if going on would destroy what the agent did not make."""
    if replica is None:
        return Ground(create=True)
    if replica.lineage is None or replica.lineage.source != source.identity:
        return _anew(source, replica, accept, _stranger(source, replica))
    base = newest_common(source, replica)
    if base is None and replica.origins():
        return _anew(source, replica, accept, "none of the replica's snapshots exists at the source any more")
    if replica.head == "touched":
        if accept is not Accept.ROLLBACK:
            if base is None and replica.mark is None:
                return _anew(source, replica, accept, "the replica holds data, but no snapshot that tells where it is from")
            raise _refusal(source, replica, _how_touched(replica), "--rollback", "gives up what differs and goes on from there")
        if base is None and replica.mark is None:
            return _anew(source, replica, accept, "the replica has no snapshot to roll back to")
        return Ground(base=base, discard=True)
    if replica.head == "resumable" and replica.mark is not None and _lives(source, replica.mark.step):
        return Ground(base=base, pending=replica.mark.step)
    return Ground(base=base)


def steps(source: Source, replica: Replica | None, where: Ground, end: Snapshot, *, intermediate: bool) -> tuple[Step, ...]:
    """Return the steps from `where` to `end`, none if the replica has it already.

    ConflictError if `end` lies before what the replica already has, or its name is taken there.
    """
    kept = None if where.create or where.recreate else replica
    if kept is not None and end.id in kept.origins():
        return ()
    if where.base is not None and end.id < where.base.id:
        raise ConflictError(
            f"snapshot {end.name} is older than {where.base.name}, which the replica already has",
            hint="a replica only moves forward: name a newer snapshot",
        )
    way: list[Step] = []
    at = where.base
    if where.pending is not None and where.pending.end.id <= end.id:
        way.append(where.pending)
        at = where.pending.end
    ends = [end] if at is None or at.id < end.id else []
    if intermediate:
        first = at.id if at is not None else 0
        ends = [each for each in source.snapshots if first < each.id < end.id] + ends
    for each in ends:
        way.append(Step(at, each))
        at = each
    _refuse_taken_names(kept, way)
    return tuple(way)


def newest_common(source: Source, replica: Replica) -> Snapshot | None:
    """Return the newest of the source's snapshots that the replica holds, by identity and size."""
    copies = replica.origins()
    common = [each for each in source.snapshots if each.id in copies and copies[each.id].size == each.size]
    return max(common, key=lambda each: each.id, default=None)


def _lives(source: Source, step: Step) -> bool:
    ends = (step.end,) if step.base is None else (step.base, step.end)
    return all(source.by_id(each.id) == each for each in ends)


def _stranger(source: Source, replica: Replica) -> str:
    if replica.lineage is None:
        return f"an image of that name exists at the target and is no replica of {source.spec}"
    return (
        f"it is the replica of another image: {replica.lineage.spec}, id {replica.lineage.source.image_id} "
        f"in cluster {replica.lineage.source.fsid}"
    )


def _how_touched(replica: Replica) -> str:
    if replica.mark is not None:
        return f"the step {replica.mark.step} was begun and not finished, and somebody else changed the image since"
    return "the replica's present content differs from its last committed snapshot"


def _anew(source: Source, replica: Replica, accept: Accept, why: str) -> Ground:
    if accept is Accept.RECREATE:
        return Ground(recreate=True)
    raise _refusal(source, replica, why, "--recreate", "moves that image to the trash and copies anew")


def _refuse_taken_names(replica: Replica | None, way: list[Step]) -> None:
    if replica is None:
        return
    names = {each.name: each for each in replica.snapshots}
    for step in way:
        taken = names.get(step.end.name)
        if taken is not None:
            raise ConflictError(
                f"the replica {replica.spec} already has a snapshot named {taken.name} (id {taken.id}), "
                f"and it is no copy of the source's (id {step.end.id})",
                hint=f"rename it at the target: rbd snap rename '{replica.spec}@{taken.name}' '{replica.spec}@{taken.name}-old'",
            )


def _refusal(source: Source, replica: Replica, why: str, option: str, effect: str) -> ConflictError:
    return ConflictError(
        f"refusing to write {replica.spec}: {why}\n{report(source, replica)}",
        hint=f"the same command with {option} {effect}",
    )


def report(source: Source, replica: Replica) -> str:
    """Tell in a few lines what either side has, the last common snapshot, and how much differs."""
    base = newest_common(source, replica) if replica.lineage and replica.lineage.source == source.identity else None
    lines = [
        f"  source  {source.spec} (id {source.identity.image_id}, {source.size:,} bytes): {_names(source.snapshots)}",
        f"  target  {replica.spec} (id {replica.image_id}, {replica.size:,} bytes): {_copies(replica.snapshots)}",
        f"  last common snapshot: {base.name if base else 'none'}",
    ]
    if replica.differs:
        lines.append(f"  changed since at the target: {replica.differs:,} bytes")
    return "\n".join(lines)


def _names(snapshots: tuple[Snapshot, ...]) -> str:
    return ", ".join(each.name for each in snapshots) or "no snapshots"


def _copies(snapshots: tuple[ReplicaSnapshot, ...]) -> str:
    return ", ".join(each.name if each.origin else f"{each.name} (not ours)" for each in snapshots) or "no snapshots"
