"""rbd-siphon and the stock pipeline side by side: rounds by turns in one run, ratios, memory.

Ratios are the figures to keep: seconds move with the machine. Every case compares the replica's
bytes with the source's afterwards.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from .benchdiffs import diff_cases
from .benchlinks import link_cases
from .ceph import Cluster
from .demo import MIB, compare, ext4_image, patch
from .lab import Lab
from .measure import Case, drop, measured, ours, shell, timed
from .say import note, run, step
from .setup import PYTHON

TIB = 1 << 40


def run_bench(lab: Lab, rounds: int, *, quick: bool, thin: bool) -> int:
    """Run the cases, print the table and write `bench.json`; return 1 if a replica differed.

    `thin` says whether to run those of the thin image, which take stock rbd minutes.
    """
    for cluster in (lab.source, lab.target):
        # The tests shorten this to save time; figures are taken with Ceph's default.
        cluster.ceph("config", "rm", "mon", "paxos_propose_interval")
    rounds = 1 if quick else rounds
    cases = [_first_copy(lab, rounds)]
    cases += [_increment(lab, rounds)]
    if thin:
        cases += [_thin(lab, (1 if quick else 10) * TIB, 20 if quick else 500, stock=not quick)]
    cases += link_cases(lab, rounds, quick=quick)
    cases += diff_cases(lab, rounds, thin=thin and not quick)
    _print(cases)
    out = lab.home / "bench.json"
    about = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "machine": platform.platform(), "cores": os.cpu_count()}
    about["ceph"] = run(["rbd", "--version"]).split()[2]
    rows = [{**asdict(case), "ratio": case.ratio, "cpu_ratio": case.cpu_ratio} for case in cases]
    out.write_text(json.dumps({**about, "cases": rows}, indent=1))
    note(f"written to {out}")
    return 1 if any("DIFFERENT" in case.verdict for case in cases) else 0


def _first_copy(lab: Lab, rounds: int) -> Case:
    case = Case("first copy, ext4 image, loopback")
    step(case.name)
    image = "vms/bench"
    drop(lab.source, image)
    lab.source.rbd("import", str(ext4_image(lab)), image)
    lab.source.rbd("snap", "create", f"{image}@a")
    for _ in range(rounds):
        for side in ("ours", "stock"):
            replica = f"vms-dr/bench-{side}"
            drop(lab.target, replica)
            if side == "ours":
                case.add("ours", measured(lab, lambda: _ours(lab, case, f"{image}@a", "vms-dr/bench-ours")))
            else:
                lab.target.rbd("create", "--size", "2G", replica)
                case.add("stock", measured(lab, lambda: _stock(lab, f"{image}@a", "", "vms-dr/bench-stock")))
        note(f"rbd-siphon {case.ours[-1]:.2f} s, stock {case.stock[-1]:.2f} s")
    case.verdict = compare(lab, image, "vms-dr/bench-ours")
    return case


def _increment(lab: Lab, rounds: int) -> Case:
    case = Case("increment of 256 random 4 KiB writes")
    step(case.name)
    image = "vms/bench"
    before = "a"
    for number in range(rounds):
        patch(lab, image, [(((7919 * at + number * 97) % 500_000) * 4096, os.urandom(4096)) for at in range(256)])
        now = f"i{number}"
        lab.source.rbd("snap", "create", f"{image}@{now}")
        case.ours.append(timed(partial(_ours, lab, case, f"{image}@{now}", "vms-dr/bench-ours")))
        case.stock.append(timed(partial(_stock, lab, f"{image}@{now}", before, "vms-dr/bench-stock")))
        note(f"rbd-siphon {case.ours[-1]:.2f} s, stock {case.stock[-1]:.2f} s")
        before = now
    case.verdict = compare(lab, image, "vms-dr/bench-ours")
    return case


def _thin(lab: Lab, size: int, changes: int, *, stock: bool) -> Case:
    case = Case(f"thin {size // TIB} TiB image, {changes} changes")
    step(case.name)
    image, replica = "vms/thin", "vms-dr/thin-ours"
    drop(lab.source, image)
    drop(lab.target, replica)
    lab.source.rbd("create", "--size", f"{size // TIB}T", image)
    stride = size // changes // MIB * MIB
    patch(lab, image, [(at * stride, os.urandom(4096)) for at in range(changes)])
    lab.source.rbd("snap", "create", f"{image}@a")
    _ours(lab, case, f"{image}@a", replica)
    patch(lab, image, [(at * stride + 8 * MIB, os.urandom(4096)) for at in range(changes)])
    lab.source.rbd("snap", "create", f"{image}@b")
    case.ours.append(timed(lambda: _ours(lab, case, f"{image}@b", replica)))
    if stock:
        note(f"rbd-siphon {case.ours[-1]:.2f} s; now rbd export-diff alone")
        command = f"rbd export-diff --no-progress --from-snap a {image}@b - >/dev/null"
        case.stock.append(timed(lambda: shell(lab, command)))
    # Ten tebibytes cannot be exported: what is allocated is compared instead, byte by byte.
    mine, theirs = _content(lab.source, f"{image}@b"), _content(lab.target, f"{replica}@b")
    case.verdict = f"equal ({mine[:8]}…)" if mine == theirs else "DIFFERENT"
    return case


def _content(cluster: Cluster, snapshot: str) -> str:
    return run([PYTHON, str(Path(__file__).with_name("content.py")), snapshot], env=cluster.environment).strip()


def _ours(lab: Lab, case: Case, source: str, replica: str) -> None:
    ours(lab, case, [source, f"dr-site:{replica}"], lab.ssh.client_config)


def _stock(lab: Lab, source: str, base: str, replica: str) -> None:
    since = f"--from-snap {shlex.quote(base)} " if base else ""
    ssh = f"ssh -F {shlex.quote(str(lab.ssh.client_config))} dr-site"
    shell(lab, f"rbd export-diff --no-progress {since}{source} - | {ssh} rbd import-diff --no-progress - {replica}")


def _print(cases: list[Case]) -> None:
    print()
    print("| case | rbd-siphon, s | stock rbd, s | ratio | CPU | controller, MB | worker, MB | replica |")
    print("|---|---|---|---|---|---|---|---|")
    for case in cases:
        cpu = f"{case.cpu_ratio:.2f}×" if case.cpu_ratio else "–"
        mine, stock = (_median(values) for values in (case.ours, case.stock))
        ratio = f"{case.ratio:.2f}×" if case.ratio else "–"
        print(
            f"| {case.name} | {mine} | {stock} | {ratio} | {cpu} "
            f"| {case.controller / 1e6:.0f} | {case.worker / 1e6:.0f} | {case.verdict} |"
        )
    print()


def _median(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"
