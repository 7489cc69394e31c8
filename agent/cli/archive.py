"""`rbd-siphon archive`: an offsite copy without a second cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from agent.cli.options import Conf, Id, Identity, Keyring, KnownHosts, Name, SshConfig, SshPort, Timeout
from agent.cli.outcome import carry_out, say
from agent.cli.running import run
from agent.errors import DataError, UsageError
from agent.settings import ClusterSettings
from agent.spec import parse_source, parse_store
from agent.threads import blocking

if TYPE_CHECKING:
    from agent.chain import Entry
    from agent.remote import SshSettings
    from agent.store import Store

app = typer.Typer(help="Archives: a full diff and increments in a folder, here or behind SFTP.", no_args_is_help=True)

Dest = Annotated[str, typer.Argument(metavar="DEST", help="A folder, or [user@]host:folder (SFTP).")]
Archived = Annotated[str, typer.Argument(metavar="IMAGE", help="The image's name, as `archive list` shows it.")]
Keep = Annotated[int, typer.Option("--keep", min=1, help="How many of the newest points stay.")]
At = Annotated[str, typer.Option("--at", help="A point's snapshot, or a time (ISO 8601): the last point up to then.")]


@app.command()
def push(
    image: Annotated[str, typer.Argument(metavar="IMAGE[@SNAP]", help="Without @SNAP a snapshot is taken now.")],
    dest: Dest,
    timeout: Timeout = 60.0,
    conf: Conf = "",
    cluster: Name = "",
    user: Id = "",
    keyring: Keyring = "",
    ssh_port: SshPort = 0,
    identity: Identity = "",
    known_hosts: KnownHosts = "",
    ssh_config: SshConfig = "",
) -> None:
    """Add a point: the first is a full one, each one after what changed since. A push that was cut goes on."""
    from agent.archiving import push as add
    from agent.cluster import Cluster

    async def work() -> None:
        spec = parse_source(image)
        settings = ClusterSettings(conf, cluster, user, keyring).completed(os.environ)
        async with _store(dest, _ssh(ssh_port, identity, known_hosts, ssh_config), timeout) as store:
            connected = await blocking(Cluster, settings, timeout)
            try:
                pool = await blocking(connected.pool, spec.image.pool, spec.image.namespace)
                made = await add(store, connected, pool, spec, say)
            finally:
                await blocking(connected.close)
        if made is None:
            print(f"{spec.image}: the archive is up to date")
        else:
            since = made.base.snapshot.name if made.base else "nothing"
            print(f"{spec.image}: pushed {made.end.snapshot.name} (from {since}): {made.stored} bytes in {made.parts} part(s)")

    carry_out(lambda: run(work()))


@app.command("list")
def list_(
    dest: Dest,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a point.")] = False,
    timeout: Timeout = 60.0,
    ssh_port: SshPort = 0,
    identity: Identity = "",
    known_hosts: KnownHosts = "",
    ssh_config: SshConfig = "",
) -> None:
    """Show images and their points, with sizes, times and ages."""
    from agent.archive import Archive

    async def work() -> None:
        damaged: list[str] = []
        async with _store(dest, _ssh(ssh_port, identity, known_hosts, ssh_config), timeout) as store:
            for name in await store.names(""):
                try:
                    chains = await Archive(store, name).chains()
                except DataError as error:
                    print(f"{name}: {error}", file=sys.stderr)
                    damaged.append(name)
                    continue
                for each in (each for chain in chains for each in chain):
                    _show(name, each, json=json)
        if damaged:
            raise DataError(f"{len(damaged)} of the archives in {dest} cannot be listed: {', '.join(damaged)}")

    carry_out(lambda: run(work()))


def _show(archive: str, entry: Entry, *, json: bool) -> None:
    age = (datetime.now(UTC) - datetime.fromisoformat(entry.end.taken_at)).total_seconds()
    if json:
        row = {"archive": archive, "entry": entry, "stored": entry.stored, "age": round(age)}
        sys.stdout.write(msgspec.json.encode(row).decode() + "\n")
    else:
        since = f"from {entry.base.snapshot.name}" if entry.base else "full"
        taken = f"taken {entry.end.taken_at}, {age / 3600:.1f} h ago"
        print(f"{archive}  {entry.end.snapshot.name}  {since}  {entry.stored} bytes  {taken}")


@app.command()
def verify(
    image: Archived,
    dest: Dest,
    timeout: Timeout = 60.0,
    ssh_port: SshPort = 0,
    identity: Identity = "",
    known_hosts: KnownHosts = "",
    ssh_config: SshConfig = "",
) -> None:
    """Read every point whole and compare it with what was written; exit code 6 if one is damaged."""
    from agent.archive import Archive

    async def work() -> None:
        async with _store(dest, _ssh(ssh_port, identity, known_hosts, ssh_config), timeout) as store:
            archive = await Archive.named(store, image)
            for chain in await archive.chains():
                for each in chain:
                    await archive.verify(each)
                    print(f"{archive.folder}: {each.end.snapshot.name} is whole")

    carry_out(lambda: run(work()))


@app.command()
def compact(
    image: Archived,
    dest: Dest,
    keep: Keep = 7,
    timeout: Timeout = 60.0,
    ssh_port: SshPort = 0,
    identity: Identity = "",
    known_hosts: KnownHosts = "",
    ssh_config: SshConfig = "",
) -> None:
    """Merge the oldest increments into the full, so that the newest points stay."""
    _thin_out(image, dest, keep, _ssh(ssh_port, identity, known_hosts, ssh_config), timeout, old_chains=False)


@app.command()
def prune(
    image: Archived,
    dest: Dest,
    keep: Keep = 7,
    timeout: Timeout = 60.0,
    ssh_port: SshPort = 0,
    identity: Identity = "",
    known_hosts: KnownHosts = "",
    ssh_config: SshConfig = "",
) -> None:
    """Keep the newest points and no others: as compact, and chains older than those are removed."""
    _thin_out(image, dest, keep, _ssh(ssh_port, identity, known_hosts, ssh_config), timeout, old_chains=True)


@app.command()
def restore(
    image: Archived,
    dest: Dest,
    to: Annotated[str, typer.Argument(metavar="IMAGE|FILE", help="A new image (pool/image), or with --to-file a raw file.")],
    at: At = "",
    to_file: Annotated[bool, typer.Option("--to-file", help="Write a raw file.")] = False,
    snapshots: Annotated[bool, typer.Option("--snapshots", help="Make every point up to there a snapshot of the image.")] = False,
    data_pool: Annotated[str, typer.Option(help="Data pool of the image.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace a raw file that exists.")] = False,
    timeout: Timeout = 60.0,
    conf: Conf = "",
    cluster: Name = "",
    user: Id = "",
    keyring: Keyring = "",
    ssh_port: SshPort = 0,
    identity: Identity = "",
    known_hosts: KnownHosts = "",
    ssh_config: SshConfig = "",
) -> None:
    """Bring a point back: as a new image, or as a raw file that needs no Ceph."""
    from agent.archive import Archive
    from agent.archiving import restore_file, restore_image
    from agent.chain import up_to
    from agent.cluster import Cluster
    from agent.files import whole
    from agent.restoring import Layout

    async def work() -> None:
        if to_file and snapshots:
            raise UsageError("a raw file has no snapshots", hint="leave --snapshots out, or restore to an image")
        async with _store(dest, _ssh(ssh_port, identity, known_hosts, ssh_config), timeout) as store:
            archive = await Archive.named(store, image)
            points = up_to(await archive.chains(), at)
            if to_file:
                with whole(to, force=force) as out:
                    await restore_file(archive, points, out)
            else:
                spec = parse_source(to)
                connected = await blocking(Cluster, ClusterSettings(conf, cluster, user, keyring).completed(os.environ), timeout)
                try:
                    pool = await blocking(connected.pool, spec.image.pool, spec.image.namespace)
                    await restore_image(archive, points, pool, spec.image, Layout(0, data_pool), all_points=snapshots)
                finally:
                    await blocking(connected.close)
        say(f"restored {points[-1].end.snapshot.name}, taken {points[-1].end.taken_at}, to {to}")

    carry_out(lambda: run(work()))


def _thin_out(image: str, dest: str, keep: int, ssh: SshSettings, timeout: float, *, old_chains: bool) -> None:
    from agent.archive import Archive

    async def work() -> None:
        async with _store(dest, ssh, timeout) as store:
            archive = await Archive.named(store, image)
            async with archive.locked():
                await archive.fold(keep, say)
                left = keep
                for chain in reversed(await archive.chains()) if old_chains else ():
                    if left <= 0:
                        await archive.drop(chain)
                    left -= len(chain)

    carry_out(lambda: run(work()))


def _ssh(port: int, identity: str, known_hosts: str, config: str) -> SshSettings:
    from agent.remote import SshSettings

    return SshSettings(port, identity, known_hosts, config)


@asynccontextmanager
async def _store(dest: str, ssh: SshSettings, timeout: float) -> AsyncIterator[Store]:
    from agent.remote import sftp_folder
    from agent.store import Folder

    place = parse_store(dest)
    if place.host is None:
        yield Folder(place.folder)
    else:
        async with sftp_folder(place.host, place.folder, ssh, timeout) as store:
            yield store
