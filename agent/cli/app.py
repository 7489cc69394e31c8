"""The command `rbd-siphon`: its verbs, and how an error becomes an exit code."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from agent import __version__
from agent.cli import archive, diffs, images, sync, worker

EPILOG = (
    "Exit codes: 0 done or up to date · 1 unexpected failure · 2 usage or configuration · 3 conflict, refused to write · "
    "4 target unreachable or refused us · 5 locked, another run is at work · 6 data check failed · 7 behind its objective. "
    "Ended by a signal: 128 + its number."
)

app = typer.Typer(
    name="rbd-siphon",
    help="Replicate Ceph RBD images between two clusters that share nothing but an SSH port.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("sync", epilog=EPILOG)(sync.sync)
for _name, _verb in (
    ("diff", diffs.diff),
    ("export-diff", diffs.export_diff),
    ("import-diff", diffs.import_diff),
    ("merge-diff", diffs.merge_diff),
    ("inspect", images.inspect),
    ("export", images.export),
    ("import", images.import_),
):
    app.command(_name, epilog=EPILOG)(_verb)
app.add_typer(archive.app, name="archive", epilog=EPILOG)
app.command("worker", epilog=EPILOG)(worker.worker)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rbd-siphon {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Replicate Ceph RBD images between two clusters that share nothing but an SSH port."""


def main() -> None:
    """Run the command line."""
    sys.exit(app())
