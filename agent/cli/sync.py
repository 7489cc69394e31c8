"""`rbd-siphon sync`: one image, now."""

from __future__ import annotations

import os
import shlex
import sys
from functools import partial
from typing import Annotated

import typer

from agent import events as e
from agent.cli.options import (
    BwLimit,
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
from agent.settings import ClusterSettings
from agent.spec import parse_source, parse_target
from agent.weigh import MOST_LANES


def sync(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="pool/image or pool/namespace/image, or a snapshot of it: …@snapshot (else one is taken now)."
        ),
    ],
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="user@host:port:pool/namespace/image; all but host: may be left out and is then as at the source.",
        ),
    ],
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
    """Make IMAGE's replica at the target, or bring it up to date."""
    # Deferred: a worker is started for each run at the far end, and needs neither SSH nor a console.
    from agent.cli.console import JsonLines, People
    from agent.compression import RAW, parse_method
    from agent.controller import Sync
    from agent.errand import Request
    from agent.pace import parse_limit
    from agent.remote import SshSettings, shell, worker_channel
    from agent.session import Transfer, dial_worker
    from agent.stock import dial_stock

    observer = JsonLines(sys.stdout, verbose=verbose) if json else People(quiet=quiet, verbose=verbose)
    try:
        if rollback and recreate:
            raise UsageError(
                "--rollback and --recreate exclude each other", hint="--rollback keeps the replica, --recreate does not"
            )
        from_spec = parse_source(source)
        to_spec = parse_target(target, from_spec.image)
        request = Request(
            source=from_spec,
            target=to_spec,
            cluster=ClusterSettings(conf, cluster, user, keyring).completed(os.environ),
            keep=keep,
            intermediate=intermediate,
            accept=Accept.ROLLBACK if rollback else Accept.RECREATE if recreate else Accept.NOTHING,
            data_pool=data_pool,
            dry_run=dry_run,
            timeout=timeout,
            attempts=attempts,
        )
        ssh = SshSettings(ssh_port, identity, known_hosts, ssh_config)
        far = ClusterSettings(target_conf, target_cluster, target_id, target_keyring)

        transfer = Transfer(parse_method(compress), _lanes(lanes), parse_limit(bwlimit))
        if worker is WorkerKind.RBD and (transfer.method not in (None, RAW) or transfer.lanes not in (None, 1)):
            raise UsageError(
                "Ceph's own tools take one uncompressed stream", hint="leave --compress and --lanes out, or do without --worker rbd"
            )

        def decide(text: str) -> None:
            observer.emit(e.Decision(message=text))

        if worker is WorkerKind.RBD:
            dial = dial_stock(partial(shell, to_spec, ssh, timeout, decide), far, timeout, transfer.limit)
        else:
            command = " ".join([worker_command, shlex.join([*far.words(), "--timeout", f"{timeout:g}"])])
            dial = dial_worker(partial(worker_channel, to_spec, ssh, command, timeout, decide), timeout, transfer, decide)
        observer.emit(run(Sync(request, dial, observer).run()))
        code = 0
    except SiphonError as error:
        observer.emit(e.Error(code=error.exit_code, message=str(error), hint=error.hint))
        code = error.exit_code
    except Stopped as stopped:
        code = 128 + stopped.number
        observer.emit(e.Error(code=code, message=str(stopped), hint="the same command goes on where this one stopped"))
    observer.close()
    # A thread that waits for a cluster which does not answer must not keep a finished command alive.
    leave(code)


def _lanes(text: str) -> int | None:
    if text == "auto":
        return None
    if text.isdecimal() and 1 <= int(text) <= MOST_LANES:
        return int(text)
    raise UsageError(f"there cannot be {text!r} lanes", hint=f"--lanes auto, or a number from 1 to {MOST_LANES}")
