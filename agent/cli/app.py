"""The command `rbd-siphon`: its verbs, and how an error becomes an exit code."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Annotated

import typer

from agent import __version__

EPILOG = (
    "Exit codes: 0 done or up to date · 1 unexpected failure · 2 usage or configuration · 3 conflict, refused to write · "
    "4 target unreachable or refused us · 5 locked, another run is at work · 6 data check failed · 7 behind its objective. "
    "Ended by a signal: 128 + its number."
)

#: Where each verb lies, in the order of the help.
VERBS = {
    "sync": "agent.cli.sync:sync",
    "diff": "agent.cli.diffs:diff",
    "export-diff": "agent.cli.diffs:export_diff",
    "import-diff": "agent.cli.diffs:import_diff",
    "merge-diff": "agent.cli.diffs:merge_diff",
    "inspect": "agent.cli.images:inspect",
    "export": "agent.cli.images:export",
    "import": "agent.cli.images:import_",
    "archive": "agent.cli.archive:app",
    "config": "agent.cli.config:app",
    "worker": "agent.cli.worker:worker",
}


def build(verbs: Iterable[str]) -> typer.Typer:
    """Return the command with these verbs; each that is left out makes the start some milliseconds shorter."""
    app = typer.Typer(
        name="rbd-siphon",
        help="Replicate Ceph RBD images between two clusters that share nothing but an SSH port.",
        epilog=EPILOG,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        callback=top,
    )
    for verb in verbs:
        module, _, name = VERBS[verb].partition(":")
        found = getattr(import_module(module), name)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=verb, epilog=EPILOG)
        else:
            app.command(verb, epilog=EPILOG)(found)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rbd-siphon {__version__}")
        raise typer.Exit


def top(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Replicate Ceph RBD images between two clusters that share nothing but an SSH port."""


def main() -> None:
    """Run the command line."""
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    sys.exit(build([verb] if verb in VERBS else VERBS)())
