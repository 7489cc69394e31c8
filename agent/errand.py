"""What the user asked for, and the source site opened to do it."""

from __future__ import annotations

from dataclasses import dataclass, field

from agent.cluster import Cluster, Pool
from agent.errors import NotFoundError, SiphonError
from agent.model import Snapshot, Source
from agent.plan import Accept
from agent.settings import ClusterSettings
from agent.source import observe
from agent.spec import SourceSpec, TargetSpec


@dataclass(frozen=True)
class Request:
    """What the user asked for. `attempts` bounds the attempts in a row that bring nothing new."""

    source: SourceSpec
    target: TargetSpec
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    keep: int = 3
    intermediate: bool = False
    accept: Accept = Accept.NOTHING
    data_pool: str = ""
    dry_run: bool = False
    timeout: float = 60.0
    attempts: int = 6

    @property
    def snapshot_named(self) -> bool:
        """Whether the user named the snapshot to send: then none is taken and none removed."""
        return bool(self.source.snapshot)


@dataclass(frozen=True)
class Home:
    """The source site, opened."""

    cluster: Cluster
    pool: Pool


def open_source(request: Request) -> Home:
    """Connect to the source's cluster and see that the image is there (blocks)."""
    spec = request.source.image
    cluster = Cluster(request.cluster, request.timeout)
    try:
        pool = cluster.pool(spec.pool, spec.namespace)
        observe(pool, spec, cluster.fsid)
    except SiphonError:
        cluster.close()
        raise
    return Home(cluster, pool)


def named(source: Source, name: str) -> Snapshot:
    """Return the source's snapshot of that name; NotFoundError with those there are."""
    for each in source.snapshots:
        if each.name == name:
            return each
    there = ", ".join(each.name for each in source.snapshots) or "none"
    raise NotFoundError(f"there is no snapshot {source.spec}@{name}", hint=f"its snapshots: {there}")
