"""`rbd-siphon config`: an example to begin with, whether a file is right, and what is in force."""

from __future__ import annotations

import json as json_
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli.options import Force
from agent.cli.outcome import carry_out
from agent.cli.running import run
from agent.config import EXAMPLE, Config, parse_config, shown
from agent.errors import NotFoundError, SiphonError, UsageError

if TYPE_CHECKING:
    from agent.checkup import Finding
    from agent.config import Target
    from agent.session import Dial

app = typer.Typer(help="The loop's configuration: an example, a check, what is in force.", no_args_is_help=True)

File = Annotated[str, typer.Argument(metavar="FILE", help="The configuration, in TOML.")]


@app.command()
def init(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Where to write it, - for standard output.")] = "siphon.toml",
    force: Force = False,
) -> None:
    """Write an example with a comment to every key, to be changed by hand."""
    from agent.files import whole

    def work() -> None:
        with whole(file, force=force) as out:
            out.write(EXAMPLE.encode())
        if file != "-":
            print(f"{file}: change it, then: rbd-siphon config check {file}")

    carry_out(work)


@app.command()
def check(
    file: File,
    offline: Annotated[bool, typer.Option("--offline", help="Only read the file, try nothing that it names.")] = False,
) -> None:
    """See that the file is right, then try what it names: clusters, pools, SSH, the worker, what the users may do."""

    def work() -> None:
        config = _read(file)
        print(f"{file}: {len(config.job)} job(s), {len(config.target)} target(s)")
        if not offline:
            run(_try(config))

    carry_out(work)


@app.command()
def show(
    file: File,
    json: Annotated[bool, typer.Option("--json", help="JSON, with every default and all spans in seconds.")] = False,
) -> None:
    """Print what is in force, defaults included."""

    def work() -> None:
        told = shown(_read(file))
        if json:
            print(json_.dumps(told, indent=1))
            return
        for line in _lines(told, ""):
            print(line)

    carry_out(work)


def _lines(value: object, path: str) -> list[str]:
    if isinstance(value, dict) and value:
        return [line for key, each in value.items() for line in _lines(each, f"{path}.{key}" if path else key)]
    if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        return [line for number, each in enumerate(value, 1) for line in _lines(each, f"{path}[{number}]")]
    return [f"{path} = {json_.dumps(value)}"]


def _read(file: str) -> Config:
    try:
        return parse_config(Path(file).read_text(encoding="utf-8"), file)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no file {file}", hint=f"begin with an example: rbd-siphon config init {file}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is no TOML: {error}") from error


async def _try(config: Config) -> None:
    # Deferred: reading a file needs neither Ceph nor SSH.
    from agent.checkup import check as tried
    from agent.settings import ClusterSettings

    source = config.source
    settings = ClusterSettings(source.conf, source.cluster, source.id, source.keyring).completed(os.environ)
    dials = {name: _dial(target) for name, target in config.target.items()}
    troubles: list[SiphonError] = []
    async for finding in tried(config, settings, dials, _PATIENCE):
        _tell(finding)
        if finding.trouble is not None:
            troubles.append(finding.trouble)
    if troubles:
        first = troubles[0]
        more = f" (and {len(troubles) - 1} more, above)" if len(troubles) > 1 else ""
        raise type(first)(f"{first}{more}", hint=first.hint)


#: How long a site may be silent while it is only tried, seconds.
_PATIENCE = 15.0


def _dial(target: Target) -> Dial:
    from agent.cli.syncing import Way
    from agent.compression import parse_method
    from agent.model import ImageSpec
    from agent.pace import parse_limit
    from agent.remote import SshSettings
    from agent.session import Transfer
    from agent.settings import ClusterSettings
    from agent.spec import TargetSpec
    from agent.weigh import parse_lanes

    way = Way(
        ssh=SshSettings(0, target.identity, target.known_hosts, target.ssh_config or os.environ.get("RBD_SIPHON_SSH_CONFIG", "")),
        cluster=ClusterSettings(target.conf, target.cluster, target.id, target.keyring),
        command=target.worker_command,
        timeout=min(target.timeout, _PATIENCE),
        transfer=Transfer(parse_method(target.compress), parse_lanes(str(target.lanes)), parse_limit(target.bwlimit)),
        stock=target.worker == "rbd",
    )
    return way.dial(TargetSpec(target.host.strip("[]"), ImageSpec("", ""), target.user, target.port), _ignore)


def _tell(finding: Finding) -> None:
    state = "FAILED" if finding.trouble is not None else "warning" if finding.warning else "ok"
    print(f"  {state:8}{finding.what}{': ' + finding.warning if finding.warning else ''}")
    if finding.trouble is not None:
        print(f"          {finding.trouble}")
        if finding.trouble.hint:
            print(f"          → {finding.trouble.hint}")
    sys.stdout.flush()


def _ignore(_: str) -> None:
    """What a trial decides is of no interest."""
