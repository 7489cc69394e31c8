"""Increments: of one image cold and warm, of a hundred, of a thin one."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from .ceph import Cluster
from .demo import MIB, compare, patch
from .lab import Lab
from .measure import IMAGE, Bench, Case, drop, host, ours, quick_rounds, shell
from .say import LabError, note, run
from .setup import PYTHON

TIB = 1 << 40
FLEET = "bench-fleet"


def increment_cases(bench: Bench, *, thin: bool) -> dict[str, Callable[[], Case]]:
    """Return the cases by name; `thin` asks for those of the thin image."""
    cases: dict[str, Callable[[], Case]] = {
        "increment": partial(_increment, bench, warm=False),
        "warm": partial(_increment, bench, warm=True),
        "fleet": partial(_fleet, bench, 4 if bench.quick else 100),
    }
    if thin:
        cases["thin"] = partial(_thin, bench, (1 if bench.quick else 10) * TIB, 20 if bench.quick else 500)
    return cases


def _increment(bench: Bench, *, warm: bool) -> Case:
    case = Case("increment of 256 random 4 KiB writes" + (", over a conversation that stays" if warm else ""))
    lab = bench.lab
    bench.image()
    mine, stock = f"vms-dr/step-ours-{warm}", "vms-dr/step-stock"
    for replica in (mine, stock):
        drop(lab.target, replica)
    lab.target.rbd("create", "--size", f"{bench.image_size}M", stock)
    ours(lab, case, [f"{IMAGE}@a", f"dr-site:{mine}"], lab.ssh.client_config)
    shell(lab, f"{_stock(lab, IMAGE + '@a', '', stock)}")
    before = "a"
    with _warm(lab, mine) if warm else _cold(lab, case, mine) as sync:
        for number in range(bench.rounds):
            places = bench.image_size * 240  # 4 KiB blocks, most of the image
            patch(lab, IMAGE, [(((7919 * at + number * 97) % places) * 4096, os.urandom(4096)) for at in range(256)])
            now = f"i{number}-{os.getpid()}-{warm}"
            lab.source.rbd("snap", "create", f"{IMAGE}@{now}")
            case.ours.append(bench.timed(partial(sync, f"{IMAGE}@{now}")))
            case.stock.append(bench.timed(partial(shell, lab, _stock(lab, f"{IMAGE}@{now}", before, stock))))
            note(f"rbd-siphon {case.ours[-1]:.2f} s, stock {case.stock[-1]:.2f} s")
            before = now
    case.verdict = compare(lab, IMAGE, mine)
    return case


@contextmanager
def _cold(lab: Lab, case: Case, replica: str) -> Iterator[Callable[[str], object]]:
    yield lambda source: ours(lab, case, [source, f"dr-site:{replica}"], lab.ssh.client_config)


@contextmanager
def _warm(lab: Lab, replica: str) -> Iterator[Callable[[str], object]]:
    """Yield what syncs a snapshot over a conversation that stays, as that of many images does."""
    words = [str(lab.venv / "bin" / "python"), str(Path(__file__).with_name("warm.py")), f"dr-site:{replica}"]
    environment = {**os.environ, **lab.environment, "RBD_SIPHON_SSH_CONFIG": str(lab.ssh.client_config)}
    with subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        asking, answering = running.stdin, running.stdout

        def sync(source: str) -> None:
            print(source, file=asking, flush=True)
            answer = json.loads(answering.readline() or "{}")
            if answer.get("failed") != 0:
                raise LabError(f"the warm sync failed: {answer}")

        sync(f"{IMAGE}@a")  # up to date; from here on it is warm
        yield sync
        asking.close()


def _stock(lab: Lab, source: str, base: str, replica: str) -> str:
    since = f"--from-snap {base} " if base else ""
    there = f"{host(lab.ssh.client_config)} rbd import-diff --no-progress - {replica}"
    return f"rbd export-diff --no-progress {since}{source} - | {there}"


def _fleet(bench: Bench, count: int) -> Case:
    case = Case(f"{count} images of 1 GiB with small increments (stock: a shell loop)")
    lab = bench.lab
    names = [f"{FLEET}{count}-{number:03d}" for number in range(count)]
    with quick_rounds(bench), ThreadPoolExecutor(16) as threads:
        list(threads.map(partial(_blank, lab), names))
    words = ["vms/", "dr-site:vms-dr", "--include", f"{FLEET}{count}-*"]
    ours(lab, case, words, lab.ssh.client_config)
    before = ""
    for number in range(1 + min(bench.rounds, 3)):
        for at, name in enumerate(names):
            patch(lab, f"vms/{name}", [((at * 37 + number * 101 + block * 997) * 4096, os.urandom(4096)) for block in range(8)])
        loop = "; ".join(
            f"rbd snap create --no-progress vms/{name}@s{number} && "
            + _stock(lab, f"vms/{name}@s{number}", before, f"vms-dr/stock-{name}")
            for name in names
        )
        mine = bench.measured(partial(ours, lab, case, words, lab.ssh.client_config))
        theirs = bench.measured(partial(shell, lab, loop))
        if before:  # the first round is the stock loop's first copy
            case.add("ours", mine)
            case.add("stock", theirs)
            note(f"rbd-siphon {case.ours[-1]:.2f} s, stock {case.stock[-1]:.2f} s")
        before = f"s{number}"
    wrong = [name for name in names[:: max(1, count // 5)] if not compare(lab, f"vms/{name}", f"vms-dr/{name}").startswith("equal")]
    case.verdict = f"DIFFERENT: {', '.join(wrong)}" if wrong else "equal"
    return case


def _blank(lab: Lab, name: str) -> None:
    """Make an empty image at the source, and one for the stock loop at the target."""
    for cluster, image in ((lab.source, f"vms/{name}"), (lab.target, f"vms-dr/{name}"), (lab.target, f"vms-dr/stock-{name}")):
        drop(cluster, image)
        if image != f"vms-dr/{name}":
            cluster.rbd("create", "--size", "1G", image)


def _thin(bench: Bench, size: int, changes: int) -> Case:
    case = Case(f"thin {size // TIB} TiB image, {changes} changes (stock: `rbd export-diff` alone)")
    lab = bench.lab
    image, replica = "vms/thin", "vms-dr/thin-ours"
    drop(lab.source, image)
    drop(lab.target, replica)
    lab.source.rbd("create", "--size", f"{size // TIB}T", image)
    stride = size // changes // MIB * MIB
    patch(lab, image, [(at * stride, os.urandom(4096)) for at in range(changes)])
    lab.source.rbd("snap", "create", f"{image}@a")
    ours(lab, case, [f"{image}@a", f"dr-site:{replica}"], lab.ssh.client_config)
    patch(lab, image, [(at * stride + 8 * MIB, os.urandom(4096)) for at in range(changes)])
    lab.source.rbd("snap", "create", f"{image}@b")
    case.ours.append(bench.timed(partial(ours, lab, case, [f"{image}@b", f"dr-site:{replica}"], lab.ssh.client_config)))
    if not bench.quick:
        note(f"rbd-siphon {case.ours[-1]:.2f} s; now rbd export-diff alone")
        command = f"rbd export-diff --no-progress --from-snap a {image}@b - >/dev/null"
        case.stock.append(bench.timed(partial(shell, lab, command)))
    # Ten tebibytes cannot be exported: what is allocated is compared instead, byte by byte.
    mine, theirs = _content(lab.source, f"{image}@b"), _content(lab.target, f"{replica}@b")
    case.verdict = f"equal ({mine[:8]}…)" if mine == theirs else "DIFFERENT"
    return case


def _content(cluster: Cluster, snapshot: str) -> str:
    return run([PYTHON, str(Path(__file__).with_name("content.py")), snapshot], env=cluster.environment).strip()
