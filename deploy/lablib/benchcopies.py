"""First copies: on loopback and over simulated links, after a cut, within a limit."""

from __future__ import annotations

import contextlib
import secrets
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from .demo import MIB, compare
from .lab import PROJECT, Lab
from .measure import IMAGE, NOISE, Bench, Case, drop, host, ours, shell
from .ports import free
from .say import LabError, note


def copy_cases(bench: Bench) -> dict[str, Callable[[], Case]]:
    """Return the cases by name."""
    ext4 = partial(_copies, bench, bench.image, f"{IMAGE}@a", f"{bench.image_size}M")
    noise = partial(_copies, bench, bench.noise, f"{NOISE}@a", f"{bench.noise_size}M")
    cases: dict[str, Callable[[], Case]] = {
        "copy": partial(ext4, "first copy, ext4 image, loopback"),
        "noise": partial(noise, f"first copy, incompressible image of {bench.noise_size} MiB, loopback"),
        "cut": partial(_cut, bench),
    }
    if not bench.quick:
        cases |= {
            "far": partial(ext4, "first copy, ext4 image, 100 ms, 1000 Mbit/s", link=(100, 1000)),
            "far-zstd": partial(ext4, "first copy, ext4 image, 100 ms, 1000 Mbit/s", link=(100, 1000), packing="-1"),
            "thin-link": partial(ext4, "first copy, ext4 image, 20 ms, 100 Mbit/s", link=(20, 100), packing="-3 -T0"),
            "limit": partial(_limit, bench),
        }
    return cases


def _copies(
    bench: Bench,
    prepare: Callable[[], None],
    source: str,
    size: str,
    name: str,
    *,
    link: tuple[int, int] = (0, 0),
    packing: str = "",
) -> Case:
    """Copy `source` both ways by turns, over a link of so many ms and Mbit/s; `packing` is what stock pipes through zstd with."""
    case = Case(name + (f" (stock: `zstd {packing}` on both ends)" if packing else ""))
    lab, replica, last = bench.lab, "vms-dr/copy-stock", ""
    prepare()
    with _link(lab, *link) if any(link) else contextlib.nullcontext(lab.ssh.client_config) as config:
        pipe = f"rbd export-diff --no-progress {source} - | {host(config)} rbd import-diff --no-progress - {replica}"
        if packing:
            far = shlex.quote(f"zstd -d -q | rbd import-diff --no-progress - {replica}")
            pipe = f"rbd export-diff --no-progress {source} - | zstd -q {packing} | {host(config)} {far}"
        for _ in range(bench.rounds):
            # Another name each time, since the source remembers its replicas.
            mine = f"vms-dr/copy-{secrets.token_hex(4)}"
            if last:
                drop(lab.target, last)
            case.add("ours", bench.measured(partial(ours, lab, case, [source, f"dr-site:{mine}"], config)))
            last = mine
            drop(lab.target, replica)
            lab.target.rbd("create", "--size", size, replica)
            case.add("stock", bench.measured(partial(shell, lab, pipe)))
            note(f"rbd-siphon {case.ours[-1]:.2f} s, stock {case.stock[-1]:.2f} s")
    case.verdict = compare(lab, source.partition("@")[0], last)
    drop(lab.target, last)
    return case


def _cut(bench: Bench) -> Case:
    case = Case("cut at 90 %, run again: bytes sent the second time")
    lab = bench.lab
    bench.noise()
    drop(lab.target, "vms-dr/copy-cut")
    words = [f"{NOISE}@a", "dr-site:vms-dr/copy-cut", "--attempts", "1", "--compress", "none"]
    size = bench.noise_size * MIB
    with _link(lab, 0, 0, cut_after=size * 9 // 10) as config, contextlib.suppress(LabError):
        ours(lab, case, words, config)
    again = ours(lab, case, words, lab.ssh.client_config)
    share = again["bytes_sent"] / size
    case.verdict = f"{share:.1%} of all; {compare(lab, NOISE, 'vms-dr/copy-cut')}"
    return case


def _limit(bench: Bench) -> Case:
    case = Case("--bwlimit 32M over 10 s: share of the limit that was sent")
    lab = bench.lab
    bench.noise()
    drop(lab.target, "vms-dr/copy-limit")
    result = ours(
        lab,
        case,
        [f"{NOISE}@a", "dr-site:vms-dr/copy-limit", "--bwlimit", "32M", "--lanes", "3", "--compress", "none"],
        lab.ssh.client_config,
    )
    seconds = result["streaming"]
    case.verdict = (
        f"{result['bytes_sent'] / seconds / (32 * MIB):.1%} over {seconds:.1f} s; {compare(lab, NOISE, 'vms-dr/copy-limit')}"
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
