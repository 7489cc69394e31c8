"""The lab's clusters for every test that needs them; `deploy/lab up` starts them if nobody has."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT / "deploy"), str(PROJECT / "tests")]

from lablib.lab import Lab  # noqa: E402  # found only after the path is set

if TYPE_CHECKING:
    from support import Pair


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Both clusters and the SSH server, with this process's environment set as `deploy/lab env` says.

    Snapshots wait for the monitor's next round, a second by default: that wait is shortened here.
    """
    from dataclasses import replace

    lab = Lab.here()
    # The worker at the far end must be the one under test, whichever environment that is in.
    lab = replace(lab, venv=Path(sys.prefix))
    lab.up()
    lab.ssh.down()
    lab.ssh.up(lab.far_environment)
    for cluster in (lab.source, lab.target):
        cluster.ceph("config", "set", "mon", "paxos_propose_interval", "0.05")
    saved = dict(os.environ)
    os.environ.update(lab.environment)
    yield lab
    os.environ.clear()
    os.environ.update(saved)


@pytest.fixture(scope="session")
def pair(lab: Lab) -> Iterator[Pair]:
    """Both sites, through Ceph's own bindings and through the agent."""
    from support import Pair, Site  # needs rados, which unit tests do without

    source, target = Site(lab.source, "vms"), Site(lab.target, "vms-dr")
    pair = Pair(lab, source, target)
    yield pair
    pair.sweep()
    source.close()
    target.close()


@pytest.fixture
def far(pair: Pair) -> list[str]:
    """Words that lead to the target cluster."""
    return ["--conf", str(pair.lab.target.conf)]
