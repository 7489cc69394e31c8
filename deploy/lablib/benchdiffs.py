"""The diff verbs beside those of `rbd`, on the images that the other cases have made."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from .demo import MIB, patch
from .measure import IMAGE, Bench, Case, drop, shell
from .say import note, run

THIN = "vms/thin"


def diff_cases(bench: Bench, *, thin: bool) -> dict[str, Callable[[], Case]]:
    """Return the cases by name; `thin` asks for those of the thin image, which must have been made by its own case."""
    cases: dict[str, Callable[[], Case]] = {
        "export-diff": partial(_beside, bench, f"export-diff {IMAGE}@a -", "export-diff, ext4 image, to a pipe", "| wc -c"),
        "import-diff": partial(_import, bench),
        "merge-diff": partial(_merge, bench),
    }
    if thin and not bench.quick:
        once, words = replace(bench, rounds=1), f"--from-snap a {THIN}@b"
        cases["thin-diff"] = partial(_beside, once, f"diff {words}", "diff of the thin image", "| sha256sum")
        cases["thin-export"] = partial(_beside, once, f"export-diff {words} -", "export-diff of the thin image", "| wc -c")
    return cases


def _beside(bench: Bench, words: str, name: str, into: str) -> Case:
    case = Case(name)
    lab = bench.lab
    if IMAGE in words:
        bench.image()
    out: dict[str, str] = {}

    def one(program: str) -> None:
        out[program] = run(["bash", "-o", "pipefail", "-c", f"{program} {words} {into}"], env=lab.environment, timeout=600)

    for _ in range(bench.rounds):
        case.ours.append(bench.timed(lambda: one("rbd-siphon")))
        case.stock.append(bench.timed(lambda: one("rbd --no-progress" if "export" in words else "rbd")))
        note(f"rbd-siphon {case.ours[-1]:.2f} s, stock {case.stock[-1]:.2f} s")
    if "sha256sum" in into:
        case.verdict = "equal output" if len(set(out.values())) == 1 else "DIFFERENT output"
    return case


def _import(bench: Bench) -> Case:
    case = Case("import-diff, ext4 image, from a pipe")
    lab = bench.lab
    bench.image()
    file = lab.home / "bench.diff"
    shell(lab, f"rbd export-diff --no-progress {IMAGE}@a - > {shlex.quote(str(file))}")
    target = f"--conf {shlex.quote(str(lab.target.conf))}"

    def into(program: str, replica: str) -> Callable[[], None]:
        return lambda: shell(lab, f"cat {shlex.quote(str(file))} | {program} {target} - {replica}")

    for _ in range(bench.rounds):
        for program, replica, seconds in (
            ("rbd-siphon import-diff", "vms-dr/diff-ours", case.ours),
            ("rbd import-diff --no-progress", "vms-dr/diff-stock", case.stock),
        ):
            drop(lab.target, replica)
            lab.target.rbd("create", "--size", f"{bench.image_size}M", replica)
            seconds.append(bench.timed(into(program, replica)))
        note(f"rbd-siphon {case.ours[-1]:.2f} s, stock {case.stock[-1]:.2f} s")
    sums = {run(["bash", "-c", f"rbd export --no-progress {where} - | sha256sum"], env=env) for where, env in (
        (f"{IMAGE}@a", lab.environment), ("vms-dr/diff-ours@a", {**lab.environment, **lab.target.environment}),
    )}  # fmt: skip
    case.verdict = "equal, 1 snapshot(s)" if len(sums) == 1 else "DIFFERENT"
    return case


def _merge(bench: Bench) -> Case:
    case = Case("merge-diff, ext4 image and an increment")
    lab = bench.lab
    bench.image()
    patch(lab, IMAGE, [(at * bench.image_size // 256 * MIB, os.urandom(4096)) for at in range(256)])
    lab.source.rbd("snap", "create", f"{IMAGE}@merge")
    first, second, out = (shlex.quote(str(lab.home / name)) for name in ("bench.diff", "bench-2.diff", "bench-out.diff"))
    shell(lab, f"rbd export-diff --no-progress {IMAGE}@a - > {first}")
    shell(lab, f"rbd export-diff --no-progress --from-snap a {IMAGE}@merge - > {second}")
    for _ in range(bench.rounds):
        for program, seconds in (("rbd-siphon merge-diff --force", case.ours), ("rbd merge-diff --no-progress", case.stock)):
            shell(lab, f"rm -f {out}; sync")
            seconds.append(bench.timed(lambda program=program: shell(lab, f"{program} {first} {second} - | cat > {out}")))  # type: ignore[misc]  # bound now
        note(f"rbd-siphon {case.ours[-1]:.2f} s, stock {case.stock[-1]:.2f} s")
    size = (lab.home / "bench.diff").stat().st_size
    case.verdict = f"{size / min(case.ours) / 1e6:.0f} MB/s at best"
    shell(lab, f"rm -f {first} {second} {out}")
    return case
