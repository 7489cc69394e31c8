"""The lab as one object: where its files lie, its two clusters, its SSH server, up and down."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .ceph import Cluster
from .say import step
from .sshd import Server

PROJECT = Path(__file__).resolve().parents[2]
SOURCE_POOLS = ("vms",)
TARGET_POOLS = ("vms-dr", "spare-dr")


@dataclass(frozen=True)
class Lab:
    """Everything below `home`; `venv` is where the project is installed."""

    home: Path
    venv: Path

    @classmethod
    def here(cls) -> Lab:
        """Return the lab of this checkout (SIPHON_LAB names another folder)."""
        home = Path(os.environ.get("SIPHON_LAB") or PROJECT / ".lab").resolve()
        return cls(home, PROJECT / ".venv")

    @property
    def source(self) -> Cluster:
        return Cluster("source", self.home / "source")

    @property
    def target(self) -> Cluster:
        return Cluster("target", self.home / "target")

    @property
    def ssh(self) -> Server:
        return Server(self.home / "ssh")

    def up(self) -> None:
        """Start what does not run; make what does not exist."""
        step(f"two one-node Ceph clusters and an SSH server under {self.home}")
        self.home.mkdir(parents=True, exist_ok=True)
        # One after the other where they are new, so that they never pick the same ports.
        if self.source.exists and self.target.exists:
            with ThreadPoolExecutor(2) as pool:
                jobs = [pool.submit(self.source.up, SOURCE_POOLS), pool.submit(self.target.up, TARGET_POOLS)]
                for job in jobs:
                    job.result()
        else:
            self.source.up(SOURCE_POOLS)
            self.target.up(TARGET_POOLS)
        self.ssh.up(self.far_environment)
        self._tools()

    def _tools(self) -> None:
        """Write `rbd-target`, which is `rbd` on the target cluster: a file, so that it works in any shell."""
        tool = self.home / "bin" / "rbd-target"
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f'#!/bin/sh\nCEPH_ARGS= exec rbd -c {self.target.conf} --id siphon "$@"\n')
        tool.chmod(0o755)

    def down(self) -> None:
        """Stop every process of the lab; its files stay."""
        self.ssh.down()
        self.target.down()
        self.source.down()

    def wipe(self) -> None:
        """Stop everything and remove the lab's files."""
        self.down()
        shutil.rmtree(self.home, ignore_errors=True)

    @property
    def far_environment(self) -> dict[str, str]:
        """What a command finds that arrives at the target site over SSH."""
        return {**self.target.environment, "PATH": self._path("/usr/sbin:/usr/bin:/sbin:/bin")}

    @property
    def environment(self) -> dict[str, str]:
        """What a shell at the source site needs."""
        return {
            **self.source.environment,
            "RBD_SIPHON_SSH_CONFIG": str(self.ssh.client_config),
            "SIPHON_LAB": str(self.home),
            "PATH": f"{self.home / 'bin'}:{self._path(os.environ.get('PATH', '/usr/bin:/bin'))}",
        }

    def _path(self, rest: str) -> str:
        return f"{self.venv / 'bin'}:{rest}"
