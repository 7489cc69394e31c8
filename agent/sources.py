"""The two points between which an image is read: its snapshots found by name, its cluster opened and closed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from agent.cluster import Cluster, Image, Pool
from agent.errors import NotFoundError, UsageError
from agent.model import Snapshot
from agent.settings import ClusterSettings
from agent.spec import SourceSpec
from agent.threads import blocking


@dataclass(frozen=True)
class Between:
    """An image open for reading, from `base` (None: its creation) to `end` (None: its present content)."""

    fsid: str
    pool: Pool
    image: Image
    base: Snapshot | None
    end: Snapshot | None


@asynccontextmanager
async def between(spec: SourceSpec, base: str, settings: ClusterSettings, timeout: float) -> AsyncIterator[Between]:
    """Open the image and find its snapshots; NotFoundError or UsageError where that cannot be."""
    cluster = await blocking(Cluster, settings, timeout)
    try:
        pool = await blocking(cluster.pool, spec.image.pool, spec.image.namespace)
        image = await blocking(pool.open, spec.image.image)
        try:
            there = await blocking(image.snapshots)
            start, end = (_named(spec, there, name) if name else None for name in (base, spec.snapshot))
            if start is not None and end is not None and start.id > end.id:
                raise UsageError(f"{start.name} is newer than {end.name}: a diff leads from the older to the newer")
            yield Between(cluster.fsid, pool, image, start, end)
        finally:
            await blocking(image.close)
    finally:
        await blocking(cluster.close)


def _named(spec: SourceSpec, there: tuple[Snapshot, ...], name: str) -> Snapshot:
    for each in there:
        if each.name == name:
            return each
    names = ", ".join(each.name for each in there) or "none"
    raise NotFoundError(f"there is no snapshot {spec.image}@{name}", hint=f"its snapshots: {names}")
