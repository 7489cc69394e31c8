"""A dry run: find out what a sync would do, and write nothing on either side."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import aclosing
from datetime import UTC, datetime

from agent import events as e
from agent import messages as m
from agent.cluster import Pool
from agent.errand import Home, Request, named
from agent.model import Replica, Snapshot, Source, Step
from agent.names import snapshot_name, tag
from agent.plan import Ground, ground, steps
from agent.retention import expendable
from agent.session import Far
from agent.source import Tally, changed, fast, observe
from agent.threads import blocking


async def rehearse(session: Far, welcome: m.Welcome, request: Request, home: Home) -> e.Plan:
    """Return the plan, measured; ConflictError where the run would be refused."""
    spec, replica_tag = request.source.image, tag(welcome.fsid, request.target.image)
    source = await blocking(observe, home.pool, spec, home.cluster.fsid)
    seen = await session.ask(m.Survey(image=request.target.image, source=source.identity), m.Seen)
    where = ground(source, seen.replica, request.accept)
    newest = max((each.id for each in source.snapshots), default=0)
    present = Snapshot(newest + 1, snapshot_name(datetime.now(UTC), replica_tag, 0), source.size)
    end = named(source, request.source.snapshot) if request.snapshot_named else present
    way = steps(source, seen.replica, where, end, intermediate=request.intermediate)
    planned = []
    for step in way:
        tally = await _measure(home.pool, request, step, live=step.end is present)
        base = step.base.name if step.base else None
        planned.append(e.PlannedStep(base=base, end=step.end.name, extents=tally.extents, bytes=tally.known))
    return e.Plan(
        image=str(spec),
        target=str(request.target),
        dry_run=True,
        end=end.name,
        steps=tuple(planned),
        creates=tuple(_creates(request, where, way, present)),
        removes=tuple(_removes(request, where, source, seen.replica, way, replica_tag)),
    )


async def _measure(pool: Pool, request: Request, step: Step, *, live: bool) -> Tally:
    """Find out what a step would read; `live`: its end is the image's present content."""
    tally = Tally()
    image = await blocking(pool.open, request.source.image.image)
    try:
        trusted = await blocking(fast, image, step.base, None if live else step.end)
        async with aclosing(changed(image, step.base, 0, step.end.size, tally, trusted=trusted)) as found:
            async for extents in found:
                tally.extents += len(extents)
    finally:
        await blocking(image.close)
    return tally


def _creates(request: Request, where: Ground, way: tuple[Step, ...], present: Snapshot) -> Iterable[str]:
    if where.create or where.recreate:
        yield f"target: image {request.target.image}"
    if any(each.end is present for each in way):
        yield f"source: snapshot {request.source.image}@{present.name}"
    for each in way:
        yield f"target: snapshot {request.target.image}@{each.end.name}"


def _removes(
    request: Request, where: Ground, source: Source, replica: Replica | None, way: tuple[Step, ...], replica_tag: str
) -> Iterable[str]:
    if where.recreate and replica is not None:
        yield f"target: image {replica.spec} (to the trash)"
    if request.snapshot_named:
        return
    copies = [] if where.recreate or replica is None else list(replica.origins().values())
    sides = (("target", [Snapshot(each.id, each.name, each.size) for each in copies]), ("source", list(source.snapshots)))
    for side, there in sides:
        last = max((each.id for each in there), default=0)
        ends = [each.end for each in way if each.end not in there]
        after = there + [Snapshot(last + place, each.name, each.size) for place, each in enumerate(ends, 1)]
        for each in expendable(after, replica_tag=replica_tag, keep=request.keep, pinned=()):
            yield f"{side}: snapshot {each.name}"
