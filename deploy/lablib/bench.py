"""rbd-siphon and the stock pipeline side by side: rounds by turns in one run, ratios, memory.

Ratios are the figures to keep: seconds move with the machine. Every case compares the replica's
bytes with the source's afterwards.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from fnmatch import fnmatchcase

from .benchcopies import copy_cases
from .benchdiffs import diff_cases
from .benchincrements import increment_cases
from .lab import Lab
from .measure import Bench, Case
from .say import LabError, note, run, step


def run_bench(lab: Lab, rounds: int, *, quick: bool, thin: bool, only: str) -> int:
    """Run the cases whose names match the glob `only`, print the table and write `bench.json`; return 1 if a replica differed.

    `thin` says whether to run those of the thin image, which take stock rbd minutes.
    """
    for cluster in (lab.source, lab.target) if not quick else ():
        # The tests shorten this to save time; figures are taken with Ceph's default.
        cluster.ceph("config", "rm", "mon", "paxos_propose_interval")
    bench = Bench(lab, 1 if quick else rounds, quick=quick)
    cases = copy_cases(bench) | increment_cases(bench, thin=thin) | diff_cases(bench, thin=thin)
    chosen: dict[str, Callable[[], Case]] = {name: case for name, case in cases.items() if fnmatchcase(name, only)}
    if not chosen:
        raise LabError(f"no case matches {only!r}; there are: {', '.join(cases)}")
    results = []
    for name, case in chosen.items():
        step(name)
        results.append(case())
        note(f"{results[-1].name}: {results[-1].verdict}")
    _print(results)
    out = lab.home / "bench.json"
    about = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "machine": platform.platform(), "cores": os.cpu_count()}
    about["ceph"] = run(["rbd", "--version"]).split()[2]
    rows = [{**asdict(case), "ratio": case.ratio, "cpu_ratio": case.cpu_ratio} for case in results]
    out.write_text(json.dumps({**about, "cases": rows}, indent=1))
    note(f"written to {out}")
    return 1 if any("DIFFERENT" in case.verdict for case in results) else 0


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
