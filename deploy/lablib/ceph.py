"""A one-node Ceph cluster (monitor, manager, OSD) whose files all lie in one folder.

It runs without systemd, listens on loopback only, keeps cephx on and never reads /etc/ceph.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from . import daemons, ports
from .say import LabError, note, run

GIB = 1 << 30
#: Two for the monitor, the rest for what the OSD and the manager bind.
PORTS = 40
CONF = """\
[global]
fsid = {fsid}
cluster = ceph
mon host = [v2:{ip}:{port},v1:{ip}:{port1}]
public addr = {ip}
cluster addr = {ip}
ms bind port min = {bind_min}
ms bind port max = {bind_max}
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {home}/keyring
run dir = {home}/run
pid file = {home}/run/$type.$id.pid
admin socket = {home}/run/$type.$id.$pid.asok
log file = {home}/log/$type.$id.log
crash dir = {home}/crash
mon data = {home}/mon
mgr data = {home}/mgr
osd data = {home}/osd
mon allow pool size one = true
mon allow pool delete = true
mon warn on pool no redundancy = false
mon data avail warn = 1
mon data avail crit = 1
mgr initial modules =
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd class dir = {classes}
osd objectstore = bluestore
osd memory target = 1073741824
bluestore block size = {block}
bluestore block wal size = 0
bluestore block db size = 0

[client]
log file =
admin socket =
"""


def _classes() -> Path:
    """Return where the OSD's classes lie: Debian 13's packages name that folder without its leading slash."""
    return next(Path("/usr/lib").glob("*/rados-classes"), Path("/usr/lib/rados-classes"))


@dataclass(frozen=True)
class Cluster:
    """One cluster of the lab: `name` is its role (source or target), `home` its folder."""

    name: str
    home: Path

    @property
    def conf(self) -> Path:
        return self.home / "ceph.conf"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use this cluster as the least-privileged user client.siphon."""
        return {"CEPH_CONF": str(self.conf), "CEPH_ARGS": "--id siphon"}

    def ceph(self, *words: str, timeout: float = 60) -> str:
        """Run `ceph` as the administrator of this cluster."""
        return run(["ceph", *words], env=self._admin, timeout=timeout)

    def rbd(self, *words: str, stdin: bytes | None = None, timeout: float = 300) -> str:
        """Run `rbd` as the administrator of this cluster."""
        return run(["rbd", *words], env=self._admin, stdin=stdin, timeout=timeout)

    @property
    def _admin(self) -> dict[str, str]:
        return {"CEPH_CONF": str(self.conf), "CEPH_ARGS": ""}

    @property
    def exists(self) -> bool:
        return (self.home / "ready").exists()

    def running(self) -> Mapping[str, int | None]:
        """Return the pid of each daemon, None for one that does not run."""
        return {kind: self._pid(kind) for kind in ("mon", "mgr", "osd")}

    def up(self, pools: tuple[str, ...]) -> None:
        """Make the cluster if need be, start what does not run, and wait until it serves I/O."""
        fresh = not self.exists
        if fresh:
            self._make()
        for kind in ("mon", "mgr", "osd"):
            self.start(kind)
        if fresh:
            for pool in pools:
                self.pool(pool)
            (self.home / "ready").touch()
        self.wait()

    def pool(self, name: str) -> None:
        """Create and initialize a pool for RBD images."""
        self.ceph("osd", "pool", "create", name)
        self.rbd("pool", "init", name)

    def start(self, kind: str) -> None:
        """Start one daemon, unless it runs."""
        if self._pid(kind) is None:
            for socket in (self.home / "run").glob(f"{kind}.*.asok"):
                socket.unlink()
            if kind == "mon" and not all(map(ports.is_free, self._monitor_ports())):
                self._move()
            name = "0" if kind == "osd" else "a"
            run([f"ceph-{kind}", "-i", name, "-c", str(self.conf)], env={"CEPH_ARGS": ""})

    def stop(self, kind: str) -> None:
        """Stop one daemon and see it gone."""
        if (pid := self._pid(kind)) is not None:
            daemons.end(pid)

    def down(self) -> None:
        """Stop every daemon of this cluster."""
        for kind in ("osd", "mgr", "mon"):
            self.stop(kind)

    def pause(self, kind: str) -> None:
        """Freeze one daemon (SIGSTOP): connections stay open, nothing answers."""
        self._signal(kind, "STOP")

    def resume(self, kind: str) -> None:
        """Let a frozen daemon go on."""
        self._signal(kind, "CONT")

    def wait(self, timeout: float = 60) -> None:
        """Wait until the OSD is up and I/O is served."""
        deadline = time.monotonic() + timeout
        while "1 up" not in self._osd_stat():
            if time.monotonic() > deadline:
                raise LabError(f"the {self.name} cluster's OSD does not come up: see {self.home}/log/")
            time.sleep(0.2)

    def _osd_stat(self) -> str:
        try:
            return self.ceph("osd", "stat", "--connect-timeout", "20")
        except LabError:
            return ""

    def _signal(self, kind: str, name: str) -> None:
        if (pid := self._pid(kind)) is None:
            raise LabError(f"the {self.name} cluster's {kind} does not run")
        run(["kill", f"-{name}", str(pid)])

    def _pid(self, kind: str) -> int | None:
        name = "0" if kind == "osd" else "a"
        return daemons.pid_of(self.home / "run" / f"{kind}.{name}.pid", str(self.conf))

    def _make(self) -> None:
        if self.home.exists():
            # An earlier attempt was broken off before the cluster was ever used.
            self.down()
            subprocess.run(["rm", "-rf", str(self.home)], check=True)
        for folder in ("mon", "mgr", "osd", "run", "log", "crash"):
            (self.home / folder).mkdir(parents=True)
        fsid, port = str(uuid.uuid4()), ports.free(PORTS)
        self._configure(fsid, port)
        self._keys()
        self._mkfs(fsid, port)

    def _configure(self, fsid: str, port: int) -> None:
        self.conf.write_text(
            CONF.format(
                classes=_classes(),
                fsid=fsid,
                ip=ports.LOOPBACK,
                port=port,
                port1=port + 1,
                bind_min=port + 2,
                bind_max=port + PORTS - 1,
                home=self.home,
                block=24 * GIB,
            )
        )

    def _monitor_ports(self) -> tuple[int, int]:
        """Return the ports of the monitor as its configuration names them."""
        found = re.search(rf"mon host = \[v2:{ports.LOOPBACK}:(\d+),v1:{ports.LOOPBACK}:(\d+)\]", self.conf.read_text())
        if found is None:
            raise LabError(f"{self.conf} is not the lab's any more; start anew with: deploy/lab down --wipe")
        return int(found[1]), int(found[2])

    def _move(self) -> None:
        """Give the cluster other ports: somebody took the monitor's while it was down."""
        taken, port = self._monitor_ports()[0], ports.free(PORTS)
        note(f"port {taken} was taken while the {self.name} cluster was down; its monitor moves to {port}")
        fsid = re.search(r"fsid = (\S+)", self.conf.read_text())
        assert fsid is not None
        self._configure(fsid[1], port)
        conf, monmap = ["-i", "a", "-c", str(self.conf)], str(self.home / "monmap")
        run(["ceph-mon", *conf, "--extract-monmap", monmap], env={"CEPH_ARGS": ""})
        # monmaptool takes the fsid of whatever configuration it finds, so it is told ours.
        for words in (("--rm", "a"), ("--addv", "a", self._monitor_address(port))):
            run(["monmaptool", "-c", str(self.conf), *words, monmap])
        run(["ceph-mon", *conf, "--inject-monmap", monmap], env={"CEPH_ARGS": ""})

    @staticmethod
    def _monitor_address(port: int) -> str:
        return f"[v2:{ports.LOOPBACK}:{port},v1:{ports.LOOPBACK}:{port + 1}]"

    def _keys(self) -> None:
        ring = self.home / "keyring"
        everything = ("--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *")
        users = {
            "mon.": ("--cap", "mon", "allow *"),
            "client.admin": everything,
            "client.siphon": ("--cap", "mon", "profile rbd", "--cap", "osd", "profile rbd", "--cap", "mgr", "profile rbd"),
            "client.reader": ("--cap", "mon", "profile rbd", "--cap", "osd", "profile rbd-read-only"),
            "mgr.a": ("--cap", "mon", "allow profile mgr", "--cap", "osd", "allow *"),
            "osd.0": ("--cap", "mon", "allow profile osd", "--cap", "mgr", "allow profile osd", "--cap", "osd", "allow *"),
        }
        run(["ceph-authtool", "--create-keyring", str(ring)])
        for user, caps in users.items():
            run(["ceph-authtool", str(ring), "--gen-key", "-n", user, *caps])
        ring.chmod(0o600)

    def _mkfs(self, fsid: str, port: int) -> None:
        conf = ["-c", str(self.conf)]
        quiet = {"CEPH_ARGS": ""}
        monmap = self.home / "monmap"
        run(["monmaptool", "--create", "--clobber", "--fsid", fsid, "--addv", "a", self._monitor_address(port), str(monmap)])
        ring = str(self.home / "keyring")
        run(["ceph-mon", "--mkfs", "-i", "a", *conf, "--monmap", str(monmap), "--keyring", ring], env=quiet)
        self.start("mon")
        osd_uuid = str(uuid.uuid4())
        self.ceph("osd", "new", osd_uuid, "0")
        run(["ceph-osd", "--mkfs", "-i", "0", *conf, "--osd-uuid", osd_uuid, "--keyring", ring], env=quiet)
        self.ceph("osd", "crush", "add", "osd.0", "1.0", "host=lab", "root=default")
        # The monitor made keys of its own for the users it did not find; ours are the ones in the file.
        self.ceph("auth", "import", "-i", ring)
        with contextlib.suppress(LabError):
            self.ceph("config", "set", "global", "mon_warn_on_insecure_global_id_reclaim_allowed", "false")
