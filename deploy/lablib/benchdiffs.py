"""The diff verbs beside those of `rbd`, on the images that the other cases have made."""

from __future__ import annotations

import shlex
from collections.abc import Callable

from .lab import Lab
from .measure import Case, drop, shell, timed
from .say import note, run, step

IMAGE, THIN = "vms/bench", "vms/thin"


def diff_cases(lab: Lab, rounds: int, *, thin: bool) -> list[Case]:
    """Run the cases; `thin` says whether the thin image is one that takes stock rbd minutes."""
    cases = []
    if thin:
        words = f"--from-snap a {THIN}@b"
        cases.append(_beside(lab, f"diff {words}", "diff of the thin image", 1, "| sha256sum"))
        cases.append(_beside(lab, f"export-diff {words} -", "export-diff of the thin image", 1, "| wc -c"))
    cases.append(_beside(lab, f"export-diff {IMAGE}@a -", "export-diff, ext4 image, to a pipe", rounds, "| wc -c"))
    cases.append(_import(lab, rounds))
    cases.append(_merge(lab, rounds))
    return cases


def _beside(lab: Lab, words: str, name: str, rounds: int, into: str) -> Case:
    case = Case(name)
    step(name)
    out: dict[str, str] = {}

    def one(program: str) -> None:
        out[program] = run(["bash", "-o", "pipefail", "-c", f"{program} {words} {into}"], env=lab.environment, timeout=600)

    for _ in range(rounds):
        case.ours.append(timed(lambda: one("rbd-siphon")))
        case.stock.append(timed(lambda: one("rbd --no-progress" if "export" in words else "rbd")))
        note(f"rbd-siphon {case.ours[-1]:.2f} s, stock {case.stock[-1]:.2f} s")
    if "sha256sum" in into:
        case.verdict = "equal output" if len(set(out.values())) == 1 else "DIFFERENT output"
    return case


def _import(lab: Lab, rounds: int) -> Case:
    case = Case("import-diff, ext4 image, from a pipe")
    step(case.name)
    file = lab.home / "bench.diff"
    shell(lab, f"rbd export-diff --no-progress {IMAGE}@a - > {shlex.quote(str(file))}")
    target = f"--conf {shlex.quote(str(lab.target.conf))}"

    def into(program: str, replica: str) -> Callable[[], None]:
        return lambda: shell(lab, f"cat {shlex.quote(str(file))} | {program} {target} - {replica}")

    for _ in range(rounds):
        for program, replica, seconds in (
            ("rbd-siphon import-diff", "vms-dr/diff-ours", case.ours),
            ("rbd import-diff --no-progress", "vms-dr/diff-stock", case.stock),
        ):
            drop(lab.target, replica)
            lab.target.rbd("create", "--size", "2G", replica)
            seconds.append(timed(into(program, replica)))
        note(f"rbd-siphon {case.ours[-1]:.2f} s, stock {case.stock[-1]:.2f} s")
    sums = {run(["bash", "-c", f"rbd export --no-progress {where} - | sha256sum"], env=env) for where, env in (
        (f"{IMAGE}@a", lab.environment), ("vms-dr/diff-ours@a", {**lab.environment, **lab.target.environment}),
    )}  # fmt: skip
    case.verdict = "equal, 1 snapshot(s)" if len(sums) == 1 else "DIFFERENT"
    return case


def _merge(lab: Lab, rounds: int) -> Case:
    case = Case("merge-diff, ext4 image and an increment")
    step(case.name)
    first, second, out = (shlex.quote(str(lab.home / name)) for name in ("bench.diff", "bench-2.diff", "bench-out.diff"))
    shell(lab, f"rbd export-diff --no-progress --from-snap a {IMAGE}@i0 - > {second}")
    for _ in range(rounds):
        for program, seconds in (("rbd-siphon merge-diff --force", case.ours), ("rbd merge-diff --no-progress", case.stock)):
            shell(lab, f"rm -f {out}; sync")
            seconds.append(timed(lambda program=program: shell(lab, f"{program} {first} {second} - | cat > {out}")))  # type: ignore[misc]  # bound now
        note(f"rbd-siphon {case.ours[-1]:.2f} s, stock {case.stock[-1]:.2f} s")
    size = (lab.home / "bench.diff").stat().st_size
    case.verdict = f"{size / min(case.ours) / 1e6:.0f} MB/s at best"
    shell(lab, f"rm -f {first} {second} {out}")
    return case
