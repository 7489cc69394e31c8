"""Options that several commands share, declared once."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

_CLUSTER = "Cluster"
_TARGET = "Target cluster"
_SSH = "SSH"

Conf = Annotated[
    str, typer.Option("--conf", "-c", help="Ceph configuration (default: CEPH_CONF, /etc/ceph).", rich_help_panel=_CLUSTER)
]
Name = Annotated[str, typer.Option("--cluster", help="Cluster name.", rich_help_panel=_CLUSTER)]
Id = Annotated[str, typer.Option("--id", help="Ceph user, without 'client.'.", rich_help_panel=_CLUSTER)]
Keyring = Annotated[str, typer.Option("--keyring", help="Keyring of that user.", rich_help_panel=_CLUSTER)]

TargetConf = Annotated[str, typer.Option("--target-conf", help="As --conf, at the target.", rich_help_panel=_TARGET)]
TargetName = Annotated[str, typer.Option("--target-cluster", help="As --cluster, at the target.", rich_help_panel=_TARGET)]
TargetId = Annotated[str, typer.Option("--target-id", help="As --id, at the target.", rich_help_panel=_TARGET)]
TargetKeyring = Annotated[str, typer.Option("--target-keyring", help="As --keyring, at the target.", rich_help_panel=_TARGET)]

SshPort = Annotated[int, typer.Option("--ssh-port", "-p", min=0, max=65535, help="Port of the SSH server.", rich_help_panel=_SSH)]
Identity = Annotated[str, typer.Option("--identity", "-i", help="Private key to log in with.", rich_help_panel=_SSH)]
KnownHosts = Annotated[str, typer.Option("--known-hosts", help="File of known host keys.", rich_help_panel=_SSH)]
SshConfig = Annotated[
    str,
    typer.Option(
        "--ssh-config",
        "-F",
        envvar="RBD_SIPHON_SSH_CONFIG",
        help="SSH configuration (default: ~/.ssh/config).",
        rich_help_panel=_SSH,
    ),
]


class WorkerKind(Enum):
    """What does the target's part."""

    SIPHON = "siphon"
    RBD = "rbd"


Worker = Annotated[
    WorkerKind,
    typer.Option(
        "--worker",
        help="What does the target's part: rbd-siphon, or nothing but Ceph's own tools (an interrupted step starts over).",
        rich_help_panel=_SSH,
    ),
]
WorkerCommand = Annotated[
    str, typer.Option("--worker-command", help="How the worker is called at the target.", rich_help_panel=_SSH)
]

_TRANSFER = "Transfer"
Lanes = Annotated[
    str,
    typer.Option(
        "--lanes",
        metavar="auto|N",
        help="SSH channels that data go over: auto adds some where the link is long.",
        rich_help_panel=_TRANSFER,
    ),
]
Compress = Annotated[
    str,
    typer.Option(
        "--compress",
        metavar="auto|zstd[:LEVEL]|lz4|none",
        help="auto weighs the link against the processors as it goes.",
        rich_help_panel=_TRANSFER,
    ),
]
ChecksumSkip = Annotated[
    bool,
    typer.Option(
        "--checksum-skip",
        help="Ask the target first which changed blocks it has already, and send the others; for a thin link, and while it pays.",
        rich_help_panel=_TRANSFER,
    ),
]
BwLimit = Annotated[
    str,
    typer.Option(
        "--bwlimit",
        help="Bytes a second, with K, M or G (powers of 1024), 0: no limit; also by the time of day: '08:00-18:00 50M, else 0'.",
        rich_help_panel=_TRANSFER,
    ),
]

Force = Annotated[bool, typer.Option("--force", help="Replace a file that exists.")]
Timeout = Annotated[float, typer.Option(min=1, max=86_400, help="Seconds after which a silent cluster is given up.")]
