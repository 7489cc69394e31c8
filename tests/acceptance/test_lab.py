"""`deploy/lab` as people use it, and what it does when the machine is not as it left it."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lablib import setup
from lablib.bench import run_bench
from lablib.ceph import Cluster
from lablib.say import LabError
from support import MIB, Pair, command, unique

TOOL = str(Path(__file__).resolve().parents[2] / "deploy" / "lab")


def test_env_is_what_a_shell_needs_to_use_both_clusters(pair: Pair) -> None:
    name = pair.new("shell")
    pair.sync_now(name)
    # dash, not bash: what a person types must not hang on a shell's aliases.
    words = f'eval "$({TOOL} env)"; rbd ls vms; rbd-target ls vms-dr; command -v rbd-siphon'
    clean = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "SIPHON_LAB": str(pair.lab.home)}
    done = subprocess.run(["sh", "-ec", words], env=clean, capture_output=True, text=True, check=True)
    assert done.stdout.split().count(name) == 2
    assert done.stdout.rstrip().endswith("/rbd-siphon")


def test_status_says_what_runs_and_says_it_with_its_exit_code(pair: Pair) -> None:
    assert all(pair.lab.target.running().values())
    done = subprocess.run([TOOL, "status"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert len(re.findall(r"running, pid \d+", done.stdout)) == 7


def test_relay_is_a_link_that_can_be_cut(pair: Pair) -> None:
    name = pair.new("relayed", size=64 * MIB)
    words = [TOOL, "relay", "--delay-ms", "20", "--cut-after", str(MIB)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as relay:
        assert relay.stdout is not None
        said = relay.stdout.readline() + relay.stdout.readline()
        config = re.search(r"RBD_SIPHON_SSH_CONFIG=(\S+)", said)
        assert config is not None, said
        cut = command("sync", f"vms/{name}", pair.place(name), "--attempts", "1", env={"RBD_SIPHON_SSH_CONFIG": config[1]})
        assert cut.returncode == 4
        assert "broke" in cut.stderr
        again = command("sync", f"vms/{name}", pair.place(name), env={"RBD_SIPHON_SSH_CONFIG": config[1]})
        assert again.returncode == 0, again.stderr
        relay.send_signal(signal.SIGINT)
    pair.same(name)


@pytest.fixture(scope="module")
def spare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A third cluster, whose daemons may be treated badly."""
    cluster = Cluster("spare", tmp_path_factory.mktemp("lab") / "spare")
    cluster.up(("p",))
    yield cluster
    cluster.down()


def test_a_killed_daemon_is_started_again(spare: Cluster) -> None:
    for kind in ("mon", "osd"):
        pid = spare.running()[kind]
        assert pid is not None, kind
        death = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        select.select([death], [], [])
        os.close(death)
    spare.up(("p",))
    spare.rbd("create", "--size", "8M", f"p/{unique('again')}")
    assert all(spare.running().values())


def test_a_cluster_whose_ports_were_taken_meanwhile_moves_and_keeps_its_images(spare: Cluster) -> None:
    image = unique("kept")
    spare.rbd("create", "--size", "8M", f"p/{image}")
    spare.down()
    assert not any(spare.running().values())
    port = re.search(r"mon host = \[v2:127.0.0.1:(\d+)", spare.conf.read_text())
    assert port is not None
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stranger.bind(("127.0.0.1", int(port[1])))
        stranger.listen()
        spare.up(("p",))
        assert image in spare.rbd("ls", "p").split()


def test_a_quick_bench_runs_and_finds_every_replica_equal(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bench(pair.lab, 1, quick=True, thin=False, only="*") == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 9, "a heading, and a row a case"
    assert sum("equal" in row for row in rows) >= 7


def test_without_root_the_lab_says_what_is_missing_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch, lab: object) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    monkeypatch.setattr(setup, "PACKAGES", ("ceph-common", "no-such-package"))
    with pytest.raises(LabError) as caught:
        setup.ready(lab)  # type: ignore[arg-type]  # it never gets as far as using it
    assert "needs root" in str(caught.value)
    assert "no-such-package" in str(caught.value)
    assert "ceph-common" not in str(caught.value)
    assert "sudo deploy/lab" in str(caught.value)


def test_on_another_system_the_lab_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "PACKAGES", ("no-such-package",))
    monkeypatch.setattr(shutil, "which", lambda name, **_: None if name == "apt-get" else f"/usr/bin/{name}")
    with pytest.raises(LabError) as caught:
        setup.packages()
    assert "no-such-package" in str(caught.value)
    assert "no apt-get" in str(caught.value)
