"""Trying what a configuration names: clusters, pools, SSH, the worker, and what the users there may do.

Every trouble is found, not only the first: each site and pool is tried for itself. What is written is one small object in
each pool, and it is removed again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from agent import messages as m
from agent.cluster import Cluster
from agent.config import Config, Job
from agent.errand import selected
from agent.errors import SiphonError
from agent.model import ImageSpec
from agent.session import Dial, Far
from agent.settings import ClusterSettings
from agent.threads import blocking


@dataclass(frozen=True)
class Finding:
    """What was tried, and the trouble with it: None for none, a `warning` where all would work."""

    what: str
    trouble: SiphonError | None = None
    warning: str = ""


async def check(config: Config, settings: ClusterSettings, dials: dict[str, Dial], timeout: float) -> AsyncIterator[Finding]:
    """Yield what was found at the source, then at each target (`dials` reaches them)."""
    fsid = ""
    try:
        cluster = await blocking(Cluster, settings, timeout)
    except SiphonError as error:
        yield Finding("source cluster", error)
    else:
        try:
            fsid = cluster.fsid
            yield Finding(f"source cluster {fsid} as {cluster.user}")
            for job in config.job:
                yield await _source_pool(cluster, job)
        finally:
            await blocking(cluster.close)
    for name, dial in dials.items():
        async for finding in _target(name, dial, config, fsid):
            yield finding


async def _source_pool(cluster: Cluster, job: Job) -> Finding:
    what = f'job "{job.name}": source {job.source}'
    try:
        pool = await blocking(cluster.pool, *job.place)
        await blocking(pool.probe)
        found = selected(await blocking(pool.images), job.include, job.exclude)
    except SiphonError as error:
        return Finding(what, error)
    return Finding(f"{what}, {len(found)} image(s) match", warning="" if found else "no image matches: nothing would be replicated")


async def _target(name: str, dial: Dial, config: Config, fsid: str) -> AsyncIterator[Finding]:
    jobs = [each for each in config.job if each.target == name]
    try:
        async with dial(_ignore) as far:
            welcome = await far.hello("check")
            same = welcome.fsid == fsid
            yield Finding(
                f"target {name}: {welcome.host}, cluster {welcome.fsid} as {welcome.user}",
                warning="; ".join((*welcome.trouble, *(["it is the source's own cluster"] if same else []))),
            )
            for job in jobs:
                yield await _target_pool(far, job)
            await far.ask(m.Close(), m.Done)
    except SiphonError as error:
        yield Finding(f"target {name}", error)


async def _target_pool(far: Far, job: Job) -> Finding:
    pool, namespace = job.destination
    what = f'job "{job.name}": target {job.target}, pool {"/".join(part for part in (pool, namespace) if part)}'
    try:
        await far.ask(m.Probe(image=ImageSpec(pool=pool, image="", namespace=namespace)), m.Done)
    except SiphonError as error:
        return Finding(what, error)
    return Finding(what)


def _ignore(_: str) -> None:
    """Warnings of a conversation that only looks are of no use."""
