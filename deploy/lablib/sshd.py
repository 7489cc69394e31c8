"""An OpenSSH server for the lab: its own keys, its own configuration, loopback only.

It plays the target site: a command that arrives over SSH runs with the target cluster's
configuration, and with the project's virtual environment first on its PATH.
"""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from . import daemons, ports
from .say import LabError, note, run

SSHD = "/usr/sbin/sshd"
#: sshd refuses to start without it; distributions make it at boot.
PRIVILEGE_SEPARATION = Path("/run/sshd")
CONFIG = """\
Port {port}
ListenAddress {ip}
HostKey {home}/host_key
PidFile {home}/sshd.pid
AuthorizedKeysFile {home}/authorized_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
UseDNS no
PrintMotd no
PermitUserEnvironment no
LogLevel ERROR
Subsystem sftp internal-sftp
SetEnv {environment}
"""
CLIENT = """\
Host {host}
    HostName {ip}
    Port {port}
    User root
    IdentityFile {home}/user_key
    IdentitiesOnly yes
    UserKnownHostsFile {home}/known_hosts
    StrictHostKeyChecking yes
"""


@dataclass(frozen=True)
class Server:
    """The lab's SSH server; `host` is the alias that the client configuration gives it."""

    home: Path
    host: str = "dr-site"

    @property
    def client_config(self) -> Path:
        return self.home / "config"

    @property
    def authorized_keys(self) -> Path:
        return self.home / "authorized_keys"

    @property
    def port(self) -> int:
        return int((self.home / "port").read_text())

    @property
    def public_key(self) -> str:
        return (self.home / "user_key.pub").read_text().strip()

    def pid(self) -> int | None:
        return daemons.pid_of(self.home / "sshd.pid", SSHD)

    def up(self, environment: Mapping[str, str]) -> None:
        """Make keys and configuration if need be, and start the server unless it runs.

        `environment` is what a session on this host gets (the target cluster, PATH).
        """
        if self.pid() is not None:
            return
        self.home.mkdir(parents=True, exist_ok=True)
        if not PRIVILEGE_SEPARATION.is_dir():
            note(f"making {PRIVILEGE_SEPARATION}, which sshd asks for")
            PRIVILEGE_SEPARATION.mkdir(mode=0o755)
        for name in ("host_key", "user_key"):
            if not (self.home / name).exists():
                run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"lab {name}", "-f", str(self.home / name)])
        if not (self.home / "port").exists() or not ports.is_free(self.port):
            (self.home / "port").write_text(str(ports.free(1)))
        self._configure(environment)
        run([SSHD, "-f", str(self.home / "sshd_config"), "-E", str(self.home / "sshd.log")])
        self._wait()

    def down(self) -> None:
        """Stop the server; sessions that are open end with their connections."""
        if (pid := self.pid()) is not None:
            daemons.end(pid)

    def write_client_config(self, path: Path, port: int) -> Path:
        """Write a client configuration that reaches this server through another port (a relay's)."""
        host_key = (self.home / "host_key.pub").read_text().split()
        known = path.with_suffix(".known_hosts")
        known.write_text(f"[{ports.LOOPBACK}]:{port} {host_key[0]} {host_key[1]}\n")
        text = CLIENT.format(host=self.host, ip=ports.LOOPBACK, port=port, home=self.home)
        path.write_text(text.replace(str(self.home / "known_hosts"), str(known)))
        return path

    def _configure(self, environment: Mapping[str, str]) -> None:
        # A home of its own: a user's ~/.bashrc would run before every command, and may do anything.
        theirs = self.home / "home"
        theirs.mkdir(exist_ok=True)
        words = " ".join(f'"{key}={value}"' for key, value in {**environment, "HOME": str(theirs)}.items())
        config = CONFIG.format(port=self.port, ip=ports.LOOPBACK, home=self.home, environment=words)
        (self.home / "sshd_config").write_text(config)
        self.authorized_keys.write_text(self.public_key + "\n")
        host_key = (self.home / "host_key.pub").read_text().split()
        (self.home / "known_hosts").write_text(f"[{ports.LOOPBACK}]:{self.port} {host_key[0]} {host_key[1]}\n")
        self.client_config.write_text(CLIENT.format(host=self.host, ip=ports.LOOPBACK, port=self.port, home=self.home))
        (self.home / "user_key").chmod(0o600)

    def _wait(self, timeout: float = 10) -> None:
        deadline = time.monotonic() + timeout
        while True:
            try:
                socket.create_connection((ports.LOOPBACK, self.port), timeout=1).close()
            except OSError as error:
                if time.monotonic() > deadline:
                    raise LabError(f"sshd does not answer: see {self.home}/sshd.log") from error
                time.sleep(0.05)
            else:
                return


def missing() -> bool:
    """Tell whether OpenSSH's server is not installed."""
    return shutil.which("sshd", path="/usr/sbin:/usr/bin") is None
