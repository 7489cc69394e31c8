"""The transfer over simulated links, of many images, and after a cut: rbd-siphon and the stock pipes by turns."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from .demo import MIB, compare, patch
from .lab import PROJECT, Lab
from .measure import Case, drop, measured, ours, shell
from .ports import free
from .say import LabError, note, step

IMAGE, NOISE = "vms/bench", "vms/noise"
FLEET = "bench-fleet"


def link_cases(lab: Lab, rounds: int, *, quick: bool) -> list[Case]:
    """Run the cases; `quick` makes them small."""
    cases = [_noise(lab, rounds, 64 if quick else 512)]
    cases.append(_cut(lab))
    cases.append(_fleet(lab, rounds, 4 if quick else 100))
    if not quick:
        cases.append(_far(lab, rounds, 100, 1000, ""))
        cases.append(_far(lab, rounds, 100, 1000, "-1"))
        cases.append(_far(lab, 1, 20, 100, "-3 -T0"))
        cases.append(_limit(lab))
    return cases


def _noise(lab: Lab, rounds: int, size: int) -> Case:
    case = Case(f"first copy, incompressible image of {size} MiB, loopback")
    step(case.name)
    drop(lab.source, NOISE)
    lab.source.rbd("create", "--size", f"{size}M", NOISE)
    for at in range(0, size, 16):
        patch(lab, NOISE, [(at * MIB, os.urandom(16 * MIB))])
    lab.source.rbd("snap", "create", f"{NOISE}@a")
    _pairs(lab, case, rounds, f"{NOISE}@a", f"{size}M", lab.ssh.client_config, "")
    case.verdict = compare(lab, NOISE, "vms-dr/link-ours")
    return case


def _far(lab: Lab, rounds: int, delay: int, rate: int, packing: str) -> Case:
    stock = f" (stock: `zstd {packing}` on both ends)" if packing else ""
    case = Case(f"first copy, ext4 image, {delay} ms, {rate} Mbit/s{stock}")
    step(case.name)
    with _link(lab, delay, rate) as config:
        _pairs(lab, case, rounds, f"{IMAGE}@a", "2G", config, packing)
    names = [each["name"] for each in json.loads(lab.source.rbd("snap", "ls", IMAGE, "--format", "json"))]
    case.verdict = compare(lab, IMAGE, "vms-dr/link-ours") if "a" in names else "DIFFERENT"
    return case


def _pairs(lab: Lab, case: Case, rounds: int, source: str, size: str, config: Path, packing: str) -> None:
    host = f"ssh -F {shlex.quote(str(config))} dr-site"
    replica = "vms-dr/link-stock"
    pipe = f"rbd export-diff --no-progress {source} - | {host} rbd import-diff --no-progress - {replica}"
    if packing:
        far = shlex.quote(f"zstd -d -q | rbd import-diff --no-progress - {replica}")
        pipe = f"rbd export-diff --no-progress {source} - | zstd -q {packing} | {host} {far}"
    for _ in range(rounds):
        drop(lab.target, "vms-dr/link-ours")
        case.add("ours", measured(lab, partial(ours, lab, case, [source, "dr-site:vms-dr/link-ours"], config)))
        drop(lab.target, replica)
        lab.target.rbd("create", "--size", size, replica)
        case.add("stock", measured(lab, partial(shell, lab, pipe)))
        note(f"rbd-siphon {case.ours[-1]:.2f} s, stock {case.stock[-1]:.2f} s")


def _cut(lab: Lab) -> Case:
    case = Case("cut at 90 %, run again: bytes sent the second time")
    step(case.name)
    drop(lab.target, "vms-dr/link-cut")
    words = [f"{NOISE}@a", "dr-site:vms-dr/link-cut", "--attempts", "1", "--compress", "none"]
    size = int(json.loads(lab.source.rbd("info", NOISE, "--format", "json"))["size"])
    with _link(lab, 0, 0, cut_after=size * 9 // 10) as config, contextlib.suppress(LabError):
        ours(lab, case, words, config)
    again = ours(lab, case, words, lab.ssh.client_config)
    share = again["bytes_sent"] / size
    case.verdict = f"{share:.1%} of all; {compare(lab, NOISE, 'vms-dr/link-cut')}"
    return case


def _fleet(lab: Lab, rounds: int, count: int) -> Case:
    case = Case(f"{count} images of 1 GiB with small increments (stock: a shell loop)")
    step(case.name)
    names = [f"{FLEET}-{number:03d}" for number in range(count)]
    for name in names:
        for cluster, pool in ((lab.source, "vms"), (lab.target, "vms-dr")):
            drop(cluster, f"{pool}/{name}")
        drop(lab.target, f"vms-dr/stock-{name}")
        lab.source.rbd("create", "--size", "1G", f"vms/{name}")
        lab.target.rbd("create", "--size", "1G", f"vms-dr/stock-{name}")
    words = ["vms/", "dr-site:vms-dr", "--include", f"{FLEET}-*"]
    ours(lab, case, words, lab.ssh.client_config)
    host = f"ssh -F {shlex.quote(str(lab.ssh.client_config))} dr-site"
    before = ""
    for number in range(1 + min(rounds, 2)):
        for at, name in enumerate(names):
            patch(lab, f"vms/{name}", [((at * 37 + number * 101 + block * 997) * 4096, os.urandom(4096)) for block in range(8)])
        loop = "; ".join(
            f"rbd snap create --no-progress vms/{name}@s{number} && rbd export-diff --no-progress {before} "
            f"vms/{name}@s{number} - | {host} rbd import-diff --no-progress - vms-dr/stock-{name}"
            for name in names
        )
        mine, theirs = (
            measured(lab, partial(ours, lab, case, words, lab.ssh.client_config)),
            measured(lab, partial(shell, lab, loop)),
        )
        if before:  # the first round is the stock loop's first copy
            case.add("ours", mine)
            case.add("stock", theirs)
            note(f"rbd-siphon {case.ours[-1]:.2f} s, stock {case.stock[-1]:.2f} s")
        before = f"--from-snap s{number}"
    wrong = [name for name in names[:: max(1, count // 5)] if not compare(lab, f"vms/{name}", f"vms-dr/{name}").startswith("equal")]
    case.verdict = f"DIFFERENT: {', '.join(wrong)}" if wrong else "equal"
    return case


def _limit(lab: Lab) -> Case:
    case = Case("--bwlimit 32M over 10 s: share of the limit that was sent")
    step(case.name)
    drop(lab.target, "vms-dr/link-limit")
    result = ours(
        lab,
        case,
        [f"{NOISE}@a", "dr-site:vms-dr/link-limit", "--bwlimit", "32M", "--lanes", "3", "--compress", "none"],
        lab.ssh.client_config,
    )
    seconds = result["streaming"]
    case.verdict = (
        f"{result['bytes_sent'] / seconds / (32 * MIB):.1%} over {seconds:.1f} s; {compare(lab, NOISE, 'vms-dr/link-limit')}"
    )
    return case


@contextmanager
def _link(lab: Lab, delay: int, rate: int, cut_after: int = 0) -> Iterator[Path]:
    """Run a relay in a process of its own, and yield the SSH configuration that goes through it."""
    port = free(1)
    words = [sys.executable, str(PROJECT / "deploy" / "lab"), "relay", "--port", str(port)]
    words += ["--delay-ms", str(delay), "--rate-mbit", str(rate)]
    words += ["--cut-after", str(cut_after)] if cut_after else []
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as relay:
        try:
            assert relay.stdout is not None
            if not relay.stdout.readline():
                raise LabError("the relay did not start")
            yield lab.home / f"relay-{port}.config"
        finally:
            relay.terminate()
