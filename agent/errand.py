"""What the user asked for, and the source site opened to do it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from agent.cluster import Cluster, Pool
from agent.errors import NotFoundError, SiphonError
from agent.model import Snapshot, Source
from agent.names import is_unfinished
from agent.plan import Accept
from agent.release import is_confirmed
from agent.retention import Keep
from agent.settings import ClusterSettings
from agent.source import observe
from agent.spec import SourceSpec, TargetSpec


@dataclass(frozen=True)
class Request:
    """What the user asked for. `attempts` bounds the attempts in a row that bring nothing new."""

    source: SourceSpec
    target: TargetSpec
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    keep: Keep = field(default_factory=Keep)
    intermediate: bool = False
    checksum_skip: bool = False
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
    """The source site, opened; `first` says that the target is not known to have a copy of the image."""

    cluster: Cluster
    pool: Pool
    first: bool = False


def open_source(request: Request) -> Home:
    """Connect to the source's cluster and see that the image is there (blocks)."""
    spec = request.source.image
    home = open_pool(request.cluster, request.timeout, spec.pool, spec.namespace)
    try:
        observe(home.pool, spec, home.cluster.fsid)
        return replace(home, first=not is_confirmed(home.pool, spec, str(request.target)))
    except SiphonError:
        home.cluster.close()
        raise


def open_pool(settings: ClusterSettings, timeout: float, pool: str, namespace: str) -> Home:
    """Connect to the source's cluster and open a pool of it (blocks)."""
    cluster = Cluster(settings, timeout)
    try:
        return Home(cluster, cluster.pool(pool, namespace))
    except SiphonError:
        cluster.close()
        raise


def selected(names: Iterable[str], include: Collection[str], exclude: Collection[str]) -> list[str]:
    """Return the images to sync, sorted: those that match a glob of `include` (all, without one) and none of `exclude`.

    What the agent is still making is never among them.
    """
    return sorted(
        name
        for name in names
        if (not include or any(fnmatchcase(name, glob) for glob in include))
        and not any(fnmatchcase(name, glob) for glob in exclude)
        and not is_unfinished(name)
    )


def named(source: Source, name: str) -> Snapshot:
    """Return the source's snapshot of that name; NotFoundError with those there are."""
    for each in source.snapshots:
        if each.name == name:
            return each
    there = ", ".join(each.name for each in source.snapshots) or "none"
    raise NotFoundError(f"there is no snapshot {source.spec}@{name}", hint=f"its snapshots: {there}")
