"""Daemons known by their pid file: is it ours, is it alive, end it.

A pid is trusted only while its command line still names a path of the lab's, so that a stale
file after a reboot never points at somebody else's process.
"""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path


def pid_of(pid_file: Path, mark: str) -> int | None:
    """Return the pid in `pid_file` if that process runs and its command line holds `mark`."""
    try:
        pid = int(pid_file.read_text().strip())
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (OSError, ValueError):
        return None
    return pid if mark in command else None


def end(pid: int, *, grace: float = 10.0) -> None:
    """Ask process `pid` to stop, wait up to `grace` seconds, then kill it, and see it gone."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                signal.pidfd_send_signal(handle, number)
            except ProcessLookupError:
                return
            if select.select([handle], [], [], grace)[0]:
                return
    finally:
        os.close(handle)
