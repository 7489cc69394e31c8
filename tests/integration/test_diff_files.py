"""Diff files and exports beside the real `rbd`: each takes what the other writes, over random images and histories."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import rbd

from agent.cluster import Cluster
from agent.files import Reading
from agent.model import ImageSpec
from agent.restoring import Layout, import_image, unfinished_prefix
from agent.settings import ClusterSettings
from support import MIB, SIPHON, Pair, command, ours, same, unique

SHAPES: dict[str, dict[str, Any]] = {
    "usual": {"order": 20},
    "4 KiB objects": {"order": 12, "size": 2 * MIB},
    "32 MiB objects": {"order": 25, "size": 72 * MIB},
    "striped": {"order": 20, "stripe_unit": 64 << 10, "stripe_count": 3, "features": 63},
    "no object map": {"order": 20, "features": 1},
}
POINTS = ("a", "b", "c")
#: Other histories for a long run: for seed in $(seq 100); do RBD_SIPHON_SEED=$seed pytest …; done
SEED = int(os.environ.get("RBD_SIPHON_SEED", "0"))


def history(pair: Pair, seed: int, *, clone: bool = False, **shape: Any) -> str:
    """Make an image with snapshots a, b and c, and something after the last: writes, discards, zeros, resizes."""
    chance = random.Random(1000 * SEED + seed)
    size = shape.pop("size", 12 * MIB)
    if clone:
        parent = pair.new("parent", size=size, order=20)
        pair.source.snap(parent, "base")
        with pair.source.image(parent) as image:
            image.protect_snap("base")
        name = unique("clone")
        ioctx = pair.source.ioctx()
        rbd.RBD().clone(ioctx, parent, "base", ioctx, name, features=61)
    else:
        name = pair.new("history", fill_with=None, size=size, **shape)
    for point in (*POINTS, ""):
        with pair.source.image(name) as image:
            image.resize(max(MIB, size + chance.randrange(-4, 5) * (128 << 10)))
            end = image.size()
            for _ in range(chance.randrange(1, 6)):
                length = chance.choice([512, 4096, 9000, 300_000])
                image.write(chance.randbytes(length), chance.randrange(0, end - length) // 512 * 512)
            image.discard(chance.randrange(0, end // 2) // 4096 * 4096, min(end // 4, 3 * MIB))
            image.write(bytes(32 << 10), chance.randrange(0, end - 65536) // 4096 * 4096)
            if point:
                image.create_snap(point)
    return name


def rbd_source(*words: str) -> bytes:
    return subprocess.run(["rbd", *words], capture_output=True, check=True).stdout


@pytest.mark.parametrize("shape", SHAPES)
def test_diff_prints_what_rbd_prints(pair: Pair, shape: str) -> None:
    name = history(pair, 1, **SHAPES[shape])
    for words in (
        [f"vms/{name}@c", "--from-snap", "a"],
        [f"vms/{name}@b", "--format", "json"],
        [f"vms/{name}", "--from-snap", "b", "--format", "xml", "--pretty-format"],
        [f"vms/{name}@c", "--from-snap", "b", "--whole-object", "--format", "json", "--pretty-format"],
        [f"vms/{name}@c", "--from-snap", "c", "--format", "xml"],
        [f"vms/{name}@c", "--from-snap", "c"],
    ):
        assert ours("diff", *words) == rbd_source("diff", *words).decode(), words


def test_diff_of_a_clone_prints_what_rbd_prints(pair: Pair) -> None:
    name = history(pair, 2, clone=True)
    for words in ([f"vms/{name}@c", "--from-snap", "a"], [f"vms/{name}@b"], [f"vms/{name}", "--whole-object"]):
        assert ours("diff", *words) == rbd_source("diff", *words).decode(), words


@pytest.mark.parametrize("shape", [*SHAPES, "clone"])
def test_each_takes_the_diffs_that_the_other_writes(pair: Pair, far: list[str], tmp_path: Path, shape: str) -> None:
    name = history(pair, 3, clone=True) if shape == "clone" else history(pair, 3, **SHAPES[shape])
    with pair.source.image(name, "a") as image:
        size = image.size()
    by_rbd, by_us = pair.target.create(unique("by-rbd"), size), pair.target.create(unique("by-us"), size)
    base: list[str] = []
    for point in (*POINTS, ""):
        spec = f"vms/{name}@{point}" if point else f"vms/{name}"
        mine, theirs = tmp_path / f"mine-{point}", tmp_path / f"theirs-{point}"
        ours("export-diff", spec, str(mine), *base)
        rbd_source("export-diff", "--no-progress", spec, str(theirs), *base)
        pair.lab.target.rbd("import-diff", "--no-progress", str(mine), f"vms-dr/{by_rbd}")
        ours("import-diff", str(theirs), f"vms-dr/{by_us}", "--allow-shrink", *far)
        base = ["--from-snap", point]
    same(pair, name, by_rbd, (*POINTS, ""))
    same(pair, name, by_us, (*POINTS, ""))
    assert not [key for key in pair.target.metadata(by_us) if key.startswith("siphon.")]


@pytest.mark.parametrize("shape", [*SHAPES, "clone"])
def test_a_merged_diff_is_worth_both_and_what_rbd_merges(pair: Pair, far: list[str], tmp_path: Path, shape: str) -> None:
    name = history(pair, 4, clone=True) if shape == "clone" else history(pair, 4, **SHAPES[shape])
    with pair.source.image(name, "a") as image:
        size = image.size()
    files = []
    for base, end in zip(("", *POINTS), POINTS, strict=False):
        path = tmp_path / end
        ours("export-diff", f"vms/{name}@{end}", str(path), *(["--from-snap", base] if base else []))
        files.append(str(path))
    merged = str(tmp_path / "merged")
    ours("merge-diff", *files, merged)
    copy = pair.target.create(unique("merged"), size)
    ours("import-diff", merged, f"vms-dr/{copy}", "--allow-shrink", *far)
    same(pair, name, copy, ("c",))
    if shape != "striped":  # which rbd refuses to merge, since it is out of order
        pairwise, theirs = str(tmp_path / "two"), str(tmp_path / "theirs")
        ours("merge-diff", *files[1:], pairwise)
        rbd_source("merge-diff", "--no-progress", *files[1:], theirs)
        results = []
        for file in (pairwise, theirs):
            two = pair.target.create(unique("two"), size)
            pair.lab.target.rbd("import-diff", "--no-progress", files[0], f"vms-dr/{two}")
            pair.lab.target.rbd("import-diff", "--no-progress", file, f"vms-dr/{two}")
            results.append(pair.target.digest(two, "c"))
        assert results == [pair.source.digest(name, "c")] * 2


@pytest.mark.parametrize("shape", [*SHAPES, "clone"])
def test_exports_and_imports_in_both_formats_and_both_ways(pair: Pair, far: list[str], tmp_path: Path, shape: str) -> None:
    name = history(pair, 5, clone=True) if shape == "clone" else history(pair, 5, **SHAPES[shape])
    with pair.source.image(name) as image:
        image.protect_snap("b")
        image.metadata_set("key one", "wert ü")
    for form in ("1", "2"):
        mine, theirs = tmp_path / f"mine{form}", tmp_path / f"theirs{form}"
        ours("export", f"vms/{name}", str(mine), "--export-format", form)
        rbd_source("export", "--no-progress", "--export-format", form, f"vms/{name}", str(theirs))
        if form == "1":
            assert mine.read_bytes() == theirs.read_bytes()
        by_rbd, by_us = unique("by-rbd"), unique("by-us")
        pair.lab.target.rbd("import", "--no-progress", "--export-format", form, str(mine), f"vms-dr/{by_rbd}")
        with theirs.open("rb") as stream:
            words = [SIPHON, "import", "-", f"vms-dr/{by_us}", *far]
            subprocess.run(words, stdin=stream, capture_output=True, check=True)
        points = ("", *POINTS) if form == "2" else ("",)
        for copy in (by_rbd, by_us):
            same(pair, name, copy, points)
            if form == "2":
                assert pair.target.snapshots(copy) == list(POINTS)
                assert pair.target.metadata(copy)["key one"] == "wert ü"
                with pair.target.image(copy) as image:
                    assert image.is_protected_snap("b")
                    assert not image.is_protected_snap("a")
    with pair.target.image(by_us) as image, pair.source.image(name) as source:
        assert (image.stat()["order"], image.stripe_count()) == (source.stat()["order"], source.stripe_count())


def test_a_feature_that_an_import_leaves_out_is_told(pair: Pair, far: list[str], tmp_path: Path) -> None:
    name, copy = history(pair, 8, order=20, features=1 | 4 | 64), unique("journaled")
    rbd_source("export", "--no-progress", "--export-format", "2", f"vms/{name}", str(tmp_path / "image"))
    done = command("import", str(tmp_path / "image"), f"vms-dr/{copy}", *far)
    assert done.returncode == 0, done.stderr
    assert "does not get these features of the image that was exported: journaling" in done.stderr
    same(pair, name, copy)


def test_an_import_is_as_thin_as_what_was_exported(pair: Pair, tmp_path: Path) -> None:
    name, copy = pair.new("thin", size=64 * MIB, fill_with=None, order=22), unique("thin")
    pair.source.write(name, 3 * MIB, b"x" * 4096)  # of which rbd's export makes a record of 3 MiB
    pair.source.snap(name, "a")
    file = tmp_path / "image"
    rbd_source("export", "--no-progress", "--export-format", "2", f"vms/{name}", str(file))
    assert file.stat().st_size > 3 * MIB

    async def imported() -> int:
        with (
            Cluster(ClusterSettings(conf=str(pair.lab.target.conf), user="siphon"), 30) as cluster,
            Reading(str(file)).open() as source,
        ):
            made = await import_image(cluster.pool("vms-dr"), ImageSpec("vms-dr", copy), source, 2, Layout(), print)
            return made.written

    assert asyncio.run(imported()) == 4096
    same(pair, name, copy, ("a", ""))


def test_a_snapshot_can_be_exported_with_those_before_it(pair: Pair, far: list[str], tmp_path: Path) -> None:
    name, copy = history(pair, 6), unique("at-b")
    ours("export", f"vms/{name}@b", str(tmp_path / "b"), "--export-format", "2")
    ours("import", str(tmp_path / "b"), f"vms-dr/{copy}", *far)
    assert pair.target.snapshots(copy) == ["a"]
    same(pair, name, copy, ("a",))
    assert pair.target.digest(copy) == pair.source.digest(name, "b")


def test_the_wrong_kind_of_file_is_recognized_and_nothing_is_made(pair: Pair, far: list[str], tmp_path: Path) -> None:
    name, copy = history(pair, 7), unique("wrong")
    diff, image, raw = (str(tmp_path / each) for each in ("diff", "image", "raw"))
    ours("export-diff", f"vms/{name}@a", diff)
    ours("export", f"vms/{name}", image, "--export-format", "2")
    ours("export", f"vms/{name}", raw)
    for words, said in (
        (["import", diff, f"vms-dr/{copy}"], "is a diff"),
        (["import", image, f"vms-dr/{copy}", "--export-format", "1"], "is an image of format 2"),
        (["import", raw, f"vms-dr/{copy}", "--export-format", "2"], "no banner"),
        (["import-diff", image, f"vms-dr/{copy}"], "not an rbd diff"),
        (["merge-diff", diff, image, str(tmp_path / "out")], "not an rbd diff"),
    ):
        done = command(*words, *(far if words[0] != "merge-diff" else []))
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    Path(image).write_bytes(Path(image).read_bytes()[:-100])
    assert command("import", image, f"vms-dr/{copy}", *far).returncode == 2
    prefix = unfinished_prefix(ImageSpec("vms-dr", copy))
    assert not [each for each in pair.target.names() if each == copy or each.startswith(prefix)]


def test_a_broken_pipe_is_a_failure_and_an_existing_file_is_kept(pair: Pair, tmp_path: Path) -> None:
    name = pair.new("pipe", size=32 * MIB)
    for verb in ("export", "export-diff"):
        line = f"set -o pipefail; {SIPHON} {verb} vms/{name} - | head -c 100 >/dev/null"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
        assert done.returncode == 1, done.stderr
        assert "not complete" in done.stderr
        assert "Traceback" not in done.stderr
        kept = tmp_path / verb
        kept.write_text("kept")
        assert command(verb, f"vms/{name}", str(kept)).returncode == 2
        assert kept.read_text() == "kept"
        ours(verb, f"vms/{name}", str(kept), "--force")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["export", "export-diff"]


def test_what_the_agent_knew_of_a_replica_is_not_carried_into_another_image(pair: Pair, far: list[str], tmp_path: Path) -> None:
    name = pair.new("carried")
    pair.sync_now(name)
    with pair.target.image(name) as image:
        image.metadata_set("kept", "yes")
    pair.lab.target.rbd("export", "--no-progress", "--export-format", "2", f"vms-dr/{name}", str(tmp_path / "replica"))
    copy = unique("carried")
    ours("import", str(tmp_path / "replica"), f"vms-dr/{copy}", *far)
    assert pair.target.metadata(copy) == {"kept": "yes"}


def test_what_a_killed_import_left_is_removed_by_the_next(pair: Pair, far: list[str], tmp_path: Path) -> None:
    copy, other = unique("killed"), unique("other")
    mine, theirs = (unfinished_prefix(ImageSpec("vms-dr", each)) + "00000000" for each in (copy, other))
    for each in (mine, theirs):
        pair.target.create(each)
        pair.target.snap(each, "half")
    (tmp_path / "raw").write_bytes(random.Random(1).randbytes(8 * MIB))
    ours("import", str(tmp_path / "raw"), f"vms-dr/{copy}", *far)
    left = pair.target.names()
    assert mine not in left
    assert theirs in left
    pair.target.remove(theirs)


def test_an_import_stopped_by_a_signal_leaves_no_image(pair: Pair, far: list[str]) -> None:
    copy = unique("stopped")
    spec = ImageSpec("vms-dr", copy)
    running = subprocess.Popen([SIPHON, "import", "-", f"vms-dr/{copy}", *far], stdin=subprocess.PIPE)
    assert running.stdin is not None
    running.stdin.write(bytes(MIB) + random.Random(1).randbytes(8 * MIB))
    running.stdin.flush()
    deadline = time.monotonic() + 20
    while not any(each.startswith(unfinished_prefix(spec)) for each in pair.target.names()):
        assert time.monotonic() < deadline, "the import never began"
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    running.stdin.close()
    assert running.wait(10) == 128 + signal.SIGTERM
    assert not any(each == copy or each.startswith(unfinished_prefix(spec)) for each in pair.target.names())
