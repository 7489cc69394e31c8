"""`rbd-siphon worker`: the far end of the wire, started over SSH, also as a forced command.

What the client asked for when a forced command is in place (SSH_ORIGINAL_COMMAND) is not looked at:
the target decides what runs.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Annotated

import typer

from agent.cli.options import Conf, Id, Keyring, Name
from agent.cli.running import Stopped, leave, run
from agent.errors import SiphonError
from agent.lane import serve_lane
from agent.messages import Join
from agent.settings import ClusterSettings
from agent.stdio import Stdio


def worker(
    conf: Conf = "",
    cluster: Name = "",
    user: Id = "",
    keyring: Keyring = "",
    timeout: Annotated[
        float, typer.Option(min=1, max=86_400, help="Seconds after which a silent controller or cluster is given up.")
    ] = 60.0,
) -> None:
    """Serve a controller over standard input and output (it is started over SSH, not by hand)."""
    if sys.stdin.isatty():
        typer.echo(
            "rbd-siphon worker is the far end of the wire: `rbd-siphon sync` starts it over SSH.\n"
            'As a forced command in authorized_keys:  command="rbd-siphon worker",restrict ssh-ed25519 AAAA… ',
            err=True,
        )
        raise typer.Exit(2)
    # Frames own the standard output; whatever else prints goes to the diagnostics.
    writing = os.dup(1)
    os.dup2(2, 1)
    settings = ClusterSettings(conf, cluster, user, keyring).completed(os.environ)
    try:
        code = run(_serve(settings, writing, timeout))
    except Stopped as stopped:
        code = 128 + stopped.number
    # Threads inside librbd have no reason to outlive the conversation.
    leave(code)


async def _serve(settings: ClusterSettings, writing: int, timeout: float) -> int:
    stdio = Stdio(0, writing, timeout)
    try:
        first = await stdio.greeted()
    except SiphonError as error:
        _say(f"worker ends: {error}")
        return error.exit_code
    if first is None:
        return 0
    tag, request = first
    if isinstance(request, Join):
        return await serve_lane(stdio, tag, request)
    # Deferred: a lane needs no Ceph, and many of them may start at once.
    from agent.worker import run_worker

    return await run_worker(settings, stdio, first, _say)


def _say(text: str) -> None:
    # Once the connection is gone nobody listens, and that must not keep the worker from ending well.
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
