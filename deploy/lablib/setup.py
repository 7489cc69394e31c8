"""What the lab needs on the machine: Debian's packages, and a virtual environment of this project.

rados and rbd are extensions that come with Ceph and import under the distribution's Python only,
so the environment is made from /usr/bin/python3 with system site packages.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from .lab import PROJECT, Lab
from .say import LabError, note, run, step

PYTHON = "/usr/bin/python3"
PACKAGES = (
    "ceph-common",
    "ceph-mgr",
    "ceph-mon",
    "ceph-osd",
    "e2fsprogs",
    "openssh-client",
    "openssh-server",
    "python3-rados",
    "python3-rbd",
    "python3-venv",
    "zstd",
)


def packages() -> None:
    """Install what is missing of PACKAGES, saying first what that is."""
    wanted = missing_packages()
    if not wanted:
        return
    if shutil.which("apt-get") is None:
        raise LabError(
            "the lab needs Debian's packages " + " ".join(PACKAGES) + ", and this system has no apt-get.\n"
            "Use a Debian 12 machine or container, or install the same programs by hand."
        )
    step("installing from Debian's packages: " + ", ".join(wanted))
    # A runlevel of 1 keeps the packages from starting services of their own.
    quiet = {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    run(["apt-get", "update", "-qq"], env=quiet, timeout=600)
    run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *wanted], env=quiet, timeout=1200)


def missing_packages() -> list[str]:
    """Return which of PACKAGES are not installed."""
    if shutil.which("dpkg-query") is None:
        programs = ("ceph-mon", "ceph-mgr", "ceph-osd", "rbd", "sshd", "mkfs.ext4")
        path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
        return [name for name in programs if shutil.which(name, path=path) is None]
    done = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *PACKAGES],
        capture_output=True,
        text=True,
        check=False,
    )
    there = {line.split()[0] for line in done.stdout.splitlines() if line.endswith(" installed")}
    return [name for name in PACKAGES if name not in there]


def virtualenv(lab: Lab, *extras: str) -> None:
    """Make `.venv` and install the project into it with `extras`, unless that is done already."""
    python = lab.venv / "bin" / "python"
    stamp = lab.venv / "lab-installed"
    want = _fingerprint(extras)
    if stamp.exists() and stamp.read_text() == want:
        return
    step(f"installing the project into {lab.venv.name} (from {PYTHON}, with system site packages)")
    if not python.exists():
        run([PYTHON, "-m", "venv", "--system-site-packages", str(lab.venv)])
    what = f"{PROJECT}[{','.join(extras)}]" if extras else str(PROJECT)
    run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-e", what], timeout=900)
    stamp.write_text(want)


def ready(lab: Lab, *extras: str) -> None:
    """Do all the set-up: packages, environment."""
    _require_root()
    packages()
    if not Path("/etc/debian_version").exists():
        note("this is not Debian; the lab is tried on Debian 12 only")
    virtualenv(lab, *extras)


def _require_root() -> None:
    """LabError if the user may not do what the lab does, with all that is missing."""
    if os.geteuid() == 0:
        return
    missing = missing_packages()
    install = f"\nIt would install: {' '.join(missing)}" if missing else ""
    why = "the lab needs root, for an SSH server that lets root@dr-site in and for Debian's packages."
    raise LabError(f"{why}{install}\nTry: sudo deploy/lab demo")


def _fingerprint(extras: tuple[str, ...]) -> str:
    text = (PROJECT / "pyproject.toml").read_bytes() + str(PROJECT).encode() + ",".join(extras).encode()
    return hashlib.sha256(text).hexdigest()
