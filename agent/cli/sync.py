"""`rbd-siphon sync`: one image now, or all of a pool that match."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from agent import events as e
from agent.cli.options import (
    BwLimit,
    ChecksumSkip,
    Compress,
    Conf,
    Id,
    Identity,
    Keyring,
    KnownHosts,
    Lanes,
    Name,
    SshConfig,
    SshPort,
    TargetConf,
    TargetId,
    TargetKeyring,
    TargetName,
    Worker,
    WorkerCommand,
    WorkerKind,
)
from agent.cli.running import Stopped, leave, run
from agent.errors import SiphonError, UsageError
from agent.plan import Accept
from agent.retention import Keep
from agent.settings import ClusterSettings
from agent.spec import parse_pool, parse_source, parse_target
from agent.weigh import parse_lanes


def sync(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="pool/image or pool/namespace/image, or a snapshot of it: …@snapshot (else one is taken now); pool/ or "
            "pool/namespace/ for all its images.",
        ),
    ],
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="user@host:port:pool/namespace/image; all but host: may be left out and is then as at the source.",
        ),
    ],
    include: Annotated[
        list[str] | None, typer.Option("--include", metavar="GLOB", help="With POOL/: only images whose names match; repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="GLOB", help="With POOL/: no images whose names match; repeatable.")
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, max=64, help="With POOL/: how many images may send data at a time.")] = 4,
    keep: Annotated[int, typer.Option(min=1, help="How many of the agent's own snapshots stay on either side.")] = 3,
    intermediate: Annotated[bool, typer.Option("--intermediate", help="Carry the snapshots between base and end too.")] = False,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Give up what was changed at the target since the last common snapshot.")
    ] = False,
    recreate: Annotated[
        bool,
        typer.Option("--recreate", help="Move an image that is no replica, or has no base, to the target's trash and copy anew."),
    ] = False,
    data_pool: Annotated[str, typer.Option(help="Data pool of a replica that is created.")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", help="Tell what would be done; nothing is written on either side.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line on standard output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Warnings and errors only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Every remote command and decision.")] = False,
    timeout: Annotated[
        float, typer.Option(min=1, max=86_400, help="Seconds after which a silent site or cluster is given up.")
    ] = 60.0,
    attempts: Annotated[int, typer.Option(min=1, help="Attempts in a row that may fail without progress.")] = 6,
    checksum_skip: ChecksumSkip = False,
    compress: Compress = "auto",
    lanes: Lanes = "auto",
    bwlimit: BwLimit = "0",
    conf: Conf = "",
    cluster: Name = "",
    user: Id = "",
    keyring: Keyring = "",
    target_conf: TargetConf = "",
    target_cluster: TargetName = "",
    target_id: TargetId = "",
    target_keyring: TargetKeyring = "",
    ssh_port: SshPort = 0,
    identity: Identity = "",
    known_hosts: KnownHosts = "",
    ssh_config: SshConfig = "",
    worker: Worker = WorkerKind.SIPHON,
    worker_command: WorkerCommand = "rbd-siphon worker",
) -> None:
    """Make replicas at the target, or bring them up to date: of one image, or of all of a pool that match."""
    # Deferred: a worker is started for each run at the far end, and needs neither SSH nor a console.
    from agent.cli.console import JsonLines, People
    from agent.cli.syncing import Selection, Way, sync_one, sync_pool
    from agent.compression import parse_method
    from agent.errand import Request
    from agent.pace import parse_limit
    from agent.remote import SshSettings
    from agent.session import Transfer

    observer = JsonLines(sys.stdout, verbose=verbose) if json else People(quiet=quiet, verbose=verbose, many=source.endswith("/"))

    def request(image: str) -> Request:
        from_spec = parse_source(image)
        return Request(
            source=from_spec,
            target=parse_target(target, from_spec.image),
            cluster=ClusterSettings(conf, cluster, user, keyring).completed(os.environ),
            keep=Keep(last=keep),
            intermediate=intermediate,
            checksum_skip=checksum_skip,
            accept=Accept.ROLLBACK if rollback else Accept.RECREATE if recreate else Accept.NOTHING,
            data_pool=data_pool,
            dry_run=dry_run,
            timeout=timeout,
            attempts=attempts,
        )

    try:
        whole = parse_pool(source)
        stock = worker is WorkerKind.RBD
        _refuse(
            (
                rollback and recreate,
                "--rollback and --recreate exclude each other",
                "--rollback keeps the replica, --recreate does not",
            ),
            (stock and (checksum_skip or compress not in ("auto", "none") or lanes not in ("auto", "1")), *_ONE_STREAM),
            (whole is None and bool(include or exclude), "--include and --exclude choose among a pool's images", "write pool/"),
        )
        way = Way(
            ssh=SshSettings(ssh_port, identity, known_hosts, ssh_config),
            cluster=ClusterSettings(target_conf, target_cluster, target_id, target_keyring),
            command=worker_command,
            timeout=timeout,
            transfer=Transfer(parse_method(compress), parse_lanes(lanes), parse_limit(bwlimit)),
            stock=stock,
        )
        if whole is None:
            code = run(sync_one(request(source), way, observer))
        else:
            code = run(sync_pool(Selection(*whole, include or (), exclude or (), parallel), request, way, observer))
    except SiphonError as error:
        observer.emit(e.Error(code=error.exit_code, message=str(error), hint=error.hint))
        code = error.exit_code
    except Stopped as stopped:
        code = 128 + stopped.number
        observer.emit(e.Error(code=code, message=str(stopped), hint="the same command goes on where this one stopped"))
    observer.close()
    # A thread that waits for a cluster which does not answer must not keep a finished command alive.
    leave(code)


_ONE_STREAM = (
    "Ceph's own tools take one uncompressed stream",
    "leave --compress, --lanes and --checksum-skip out, or do without --worker rbd",
)


def _refuse(*cases: tuple[bool, str, str]) -> None:
    for wrong, message, hint in cases:
        if wrong:
            raise UsageError(message, hint=hint)
