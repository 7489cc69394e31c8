"""Talking to the person at the terminal, and running commands on their behalf."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence


class LabError(Exception):
    """Something the lab cannot do; the text says what is missing and what to type next."""


def step(text: str) -> None:
    """Announce what is about to happen."""
    print(f"==> {text}", flush=True)


def note(text: str) -> None:
    """Add a detail below the current step."""
    print(f"    {text}", flush=True)


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    timeout: float = 300,
) -> str:
    """Run `command` and return its standard output; LabError with its last words if it fails."""
    done = subprocess.run(
        list(command),
        env={**os.environ, **(env or {})},
        input=stdin if stdin is not None else b"",
        capture_output=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        words = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()[-8:]
        raise LabError(f"{shlex.join(command)} exited with {done.returncode}:\n  " + "\n  ".join(words))
    return done.stdout.decode(errors="replace")


def warn(text: str) -> None:
    """Say something that deserves attention, on stderr."""
    print(f"lab: {text}", file=sys.stderr, flush=True)
