"""Diff files and exports beside the real `rbd`: each takes what the other writes, over random images and histories."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import rbd

from agent.cluster import Cluster, Image
from agent.difffile import DiffFile
from agent.errors import SiphonError
from agent.files import Reading
from agent.importing import DiffImport, Imported, Options
from agent.model import ImageSpec
from agent.restoring import unfinished_prefix
from agent.settings import ClusterSettings
from support import MIB, SIPHON, Pair, command, unique

SHAPES: dict[str, dict[str, Any]] = {
    "usual": {"order": 20},
    "4 KiB objects": {"order": 12, "size": 2 * MIB},
    "32 MiB objects": {"order": 25, "size": 72 * MIB},
    "striped": {"order": 20, "stripe_unit": 64 << 10, "stripe_count": 3, "features": 63},
    "no object map": {"order": 20, "features": 1},
}
POINTS = ("a", "b", "c")


def history(pair: Pair, seed: int, *, clone: bool = False, **shape: Any) -> str:
    """Make an image with snapshots a, b and c, and something after the last: writes, discards, zeros, resizes."""
    chance = random.Random(seed)
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


def ours(*words: str, check: bool = True) -> str:
    done = command(*words)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def far(pair: Pair) -> list[str]:
    """Words that lead to the target cluster."""
    return ["--conf", str(pair.lab.target.conf)]


def same(pair: Pair, name: str, copy: str, points: tuple[str, ...] = POINTS) -> None:
    for point in points:
        assert pair.target.digest(copy, point or None) == pair.source.digest(name, point or None), point


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


@pytest.mark.parametrize("shape", ["usual", "striped", "4 KiB objects"])
def test_a_merged_diff_is_worth_both_and_what_rbd_merges(pair: Pair, far: list[str], tmp_path: Path, shape: str) -> None:
    name = history(pair, 4, **SHAPES[shape])
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


@pytest.mark.parametrize("shape", ["usual", "striped", "no object map"])
def test_exports_and_imports_in_both_formats_and_both_ways(pair: Pair, far: list[str], tmp_path: Path, shape: str) -> None:
    name = history(pair, 5, **SHAPES[shape])
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


class Chain:
    """Diffs of one image, and an image at the target that stands at the first point."""

    def __init__(self, pair: Pair, folder: Path, far: list[str], *words: str) -> None:
        self.name = pair.new("chain", size=8 * MIB, fill_with=1)
        self.files = {}
        base: list[str] = []
        for number, point in enumerate(POINTS):
            for at, length in ((number, 600_000), (number + 3, 9000), (number + 4, 50_000)):
                pair.source.write(self.name, at * MIB, random.Random(number).randbytes(length))
            pair.source.snap(self.name, point)
            self.files[point] = str(folder / point)
            ours("export-diff", f"vms/{self.name}@{point}", self.files[point], *base, *words)
            base = ["--from-snap", point]
        self.copy = pair.target.create(unique("chain"), 8 * MIB)
        self.spec = f"vms-dr/{self.copy}"
        ours("import-diff", self.files["a"], self.spec, *far)


def test_an_import_that_does_not_fit_is_refused_and_unchecked_does_as_rbd(pair: Pair, far: list[str], tmp_path: Path) -> None:
    chain = Chain(pair, tmp_path, far)
    missing = command("import-diff", chain.files["c"], chain.spec, *far)
    assert missing.returncode == 2
    assert "there is no snapshot" in missing.stderr
    again = command("import-diff", chain.files["a"], chain.spec, *far)
    assert again.returncode == 3
    assert "exists already" in again.stderr
    before = pair.target.digest(chain.copy)
    pair.target.write(chain.copy, 0, b"somebody else's")
    touched = command("import-diff", chain.files["b"], chain.spec, *far)
    assert touched.returncode == 3
    assert f"differs from a: up to" in touched.stderr  # noqa: F541
    assert f"rbd snap rollback {chain.spec}@a" in touched.stderr
    pair.lab.target.rbd("snap", "rollback", "--no-progress", f"{chain.spec}@a")
    assert pair.target.digest(chain.copy) == before
    ours("import-diff", chain.files["b"], chain.spec, *far)
    pair.target.snap(chain.copy, "newer")
    newer = command("import-diff", chain.files["c"], chain.spec, *far)
    assert newer.returncode == 3
    assert "has a newer snapshot, newer" in newer.stderr
    ours("import-diff", chain.files["c"], chain.spec, "--unchecked", *far)
    same(pair, chain.name, chain.copy)


def test_a_full_diff_lands_on_an_empty_image_only(pair: Pair, far: list[str], tmp_path: Path) -> None:
    chain = Chain(pair, tmp_path, far)
    other = pair.target.create(unique("full"), 8 * MIB)
    pair.target.write(other, 5 * MIB, b"stale")
    done = command("import-diff", chain.files["a"], f"vms-dr/{other}", *far)
    assert done.returncode == 3
    assert "is not empty" in done.stderr
    assert pair.target.snapshots(other) == []


def test_a_shrink_and_a_replica_are_refused_unless_allowed(pair: Pair, far: list[str], tmp_path: Path) -> None:
    chain = Chain(pair, tmp_path, far)
    with pair.source.image(chain.name) as image:
        image.resize(5 * MIB)
        image.create_snap("small")
    file = str(tmp_path / "small")
    for point in ("b", "c"):
        ours("import-diff", chain.files[point], chain.spec, *far)
    ours("export-diff", f"vms/{chain.name}@small", file, "--from-snap", "c")
    refused = command("import-diff", file, chain.spec, *far)
    assert refused.returncode == 3
    assert "--allow-shrink" in refused.stderr
    ours("import-diff", file, chain.spec, "--allow-shrink", *far)
    same(pair, chain.name, chain.copy, ("c", "small"))
    pair.sync_now(chain.name, "small")
    replica = command("import-diff", file, f"vms-dr/{chain.name}", *far)
    assert replica.returncode == 3
    assert "is a replica" in replica.stderr


def test_an_import_killed_in_the_middle_goes_on_and_another_diff_does_not(pair: Pair, far: list[str], tmp_path: Path) -> None:
    name = pair.new("resumed", size=512 * MIB, fill_with=None, order=22)
    with pair.source.image(name) as image:
        for at in range(0, 512, 16):
            image.write(random.Random(at).randbytes(16 * MIB), at * MIB)
    pair.source.snap(name, "a")
    file, other = tmp_path / "a", tmp_path / "other"
    ours("export-diff", f"vms/{name}@a", str(file))
    damaged = bytearray(file.read_bytes())
    damaged[100 * MIB] ^= 1
    other.write_bytes(damaged)
    copy = pair.target.create(unique("resumed"), 512 * MIB, order=22)
    running = subprocess.Popen([SIPHON, "import-diff", str(file), f"vms-dr/{copy}", *far])
    deadline = time.monotonic() + 60
    while '"durable":' not in pair.target.metadata(copy).get("siphon.diff", ""):
        assert time.monotonic() < deadline, "no checkpoint was written"
        assert running.poll() is None, "the import was over before it could be killed"
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert pair.target.snapshots(copy) == []
    refused = command("import-diff", str(other), f"vms-dr/{copy}", *far)
    assert refused.returncode == 3, refused.stderr
    assert "is in the middle of another diff" in refused.stderr
    done = command("import-diff", str(file), f"vms-dr/{copy}", *far)
    assert done.returncode == 0, done.stderr
    assert "going on at byte" in done.stderr
    same(pair, name, copy, ("a",))
    assert not pair.target.metadata(copy)


def test_a_truncated_diff_makes_no_snapshot_and_the_whole_one_goes_on(pair: Pair, far: list[str], tmp_path: Path) -> None:
    chain = Chain(pair, tmp_path, far)
    whole = Path(chain.files["b"]).read_bytes()
    cut = tmp_path / "cut"
    for length in (20, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        done = command("import-diff", str(cut), chain.spec, *far)
        assert done.returncode == 2, done.stderr
        assert "truncated" in done.stderr
        assert pair.target.snapshots(chain.copy) == ["a"]
    ours("import-diff", chain.files["b"], chain.spec, *far)
    same(pair, chain.name, chain.copy, ("a", "b"))


def test_a_raw_file_that_a_damaged_pipe_spoilt_stays_spoilt(pair: Pair, far: list[str], tmp_path: Path) -> None:
    chain, raw = Chain(pair, tmp_path, far, "--sidecar"), str(tmp_path / "disk.raw")
    ours("import-diff", chain.files["a"], "--to-file", raw)
    good = Path(chain.files["b"]).read_bytes()
    manifest = ["--manifest", f"{chain.files['b']}.json"]
    damaged = bytearray(good)
    damaged[len(good) - 100] ^= 1
    words = [SIPHON, "import-diff", "-", "--to-file", raw, *manifest]
    spoilt = subprocess.run(words, input=bytes(damaged), capture_output=True, check=False)
    assert spoilt.returncode == 6, spoilt.stderr
    again = subprocess.run(words, input=good, capture_output=True, check=False)
    assert again.returncode == 3, again.stderr
    assert command("import-diff", chain.files["b"], "--to-file", raw).returncode == 3


def test_a_manifest_tells_snapshots_of_one_name_apart_and_finds_every_flipped_bit(
    pair: Pair, far: list[str], tmp_path: Path
) -> None:
    chain = Chain(pair, tmp_path, far, "--sidecar")
    file, whole = Path(chain.files["b"]), Path(chain.files["b"]).read_bytes()
    chance = random.Random(8)
    for _ in range(6):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        done = command("import-diff", str(file), chain.spec, *far)
        assert done.returncode == 6, done.stderr
        assert command("inspect", str(file)).returncode == 6
    file.write_bytes(whole)
    assert f"made of vms/{chain.name}" in ours("inspect", str(file))
    # The same names, remade at the source: another identity.
    pair.source.unsnap(chain.name, "c")
    pair.source.unsnap(chain.name, "b")
    pair.source.unsnap(chain.name, "a")
    for point in ("a", "b"):
        pair.source.snap(chain.name, point)
    remade = str(tmp_path / "remade")
    ours("export-diff", f"vms/{chain.name}@b", remade, "--from-snap", "a", "--sidecar")
    done = command("import-diff", remade, chain.spec, *far)
    assert done.returncode == 3, done.stderr
    assert "is a copy of snapshot id" in done.stderr
    ours("import-diff", str(file), chain.spec, *far)
    assert "is there already" in command("import-diff", str(file), chain.spec, *far).stderr


def test_inspect_says_what_a_file_holds_and_where_it_breaks_off(pair: Pair, far: list[str], tmp_path: Path) -> None:
    import hashlib
    import json

    chain = Chain(pair, tmp_path, far)
    found = json.loads(ours("inspect", chain.files["b"], "--json", "--digest", "sha256"))
    assert found["kind"] == "diff"
    assert found["digest"]["sha256"] == hashlib.sha256(Path(chain.files["b"]).read_bytes()).hexdigest()
    one = found["diffs"][0]
    assert (one["base"], one["end"], one["size"], one["complete"]) == ("a", "b", 8 * MIB, True)
    listed = [line.split() for line in ours("inspect", chain.files["b"], "--extents").splitlines()[:-1] if line[0].isdigit()]
    assert sum(int(length) for _, length, kind in listed if kind == "data") == one["data"]
    Path(chain.files["b"]).write_bytes(Path(chain.files["b"]).read_bytes()[:1000])
    broken = command("inspect", chain.files["b"])
    assert broken.returncode == 6
    assert "ends at byte 1000 within the data record" in broken.stderr


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


def test_a_chain_replayed_onto_a_raw_file_is_the_image(pair: Pair, far: list[str], tmp_path: Path) -> None:
    chain, raw = Chain(pair, tmp_path, far), tmp_path / "disk.raw"
    out_of_turn = command("import-diff", chain.files["b"], "--to-file", str(raw))
    assert out_of_turn.returncode == 3
    for point in POINTS:
        ours("import-diff", chain.files[point], "--to-file", str(raw))
        with pair.source.image(chain.name, point) as image:
            assert raw.read_bytes() == image.read(0, image.size())
    repeated = command("import-diff", chain.files["b"], "--to-file", str(raw))
    assert repeated.returncode == 3
    assert "stands at c" in repeated.stderr
    raw.unlink()
    pair.source.snap(chain.name, "d")
    ours("export-diff", f"vms/{chain.name}@d", str(tmp_path / "d"), "--from-snap", "c")
    gone = command("import-diff", str(tmp_path / "d"), "--to-file", str(raw))
    assert gone.returncode == 3
    assert "is not there" in gone.stderr
    assert not raw.exists()


async def imported(pair: Pair, copy: str, file: Path) -> Imported:
    """Import a diff in this process."""
    with (
        Cluster(ClusterSettings(conf=str(pair.lab.target.conf), user="siphon"), 30) as cluster,
        Reading(str(file)).open() as source,
    ):
        job = DiffImport(cluster, cluster.pool("vms-dr"), ImageSpec("vms-dr", copy), None, Options(), print)
        return await job.run(DiffFile(source))


@pytest.mark.parametrize("good", [0, 1])
def test_an_import_that_fails_before_anything_is_durable_starts_anew_with_the_same_stream_only(
    pair: Pair, far: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: int
) -> None:
    chain = Chain(pair, tmp_path, far)
    write, calls = Image.write, []

    async def failing(self: Image, offset: int, data: bytes) -> None:
        calls.append(offset)
        if len(calls) > good:
            raise SiphonError("the disk is on fire")
        await write(self, offset, data)

    monkeypatch.setattr(Image, "write", failing)
    with pytest.raises(SiphonError, match="on fire"):
        asyncio.run(imported(pair, chain.copy, Path(chain.files["b"])))
    monkeypatch.undo()
    assert pair.target.snapshots(chain.copy) == ["a"]
    # The same points, another content: what the failed run wrote is in no diff of theirs.
    other = bytearray(Path(chain.files["b"]).read_bytes())
    other[-5000] ^= 1
    (tmp_path / "other").write_bytes(other)
    refused = command("import-diff", str(tmp_path / "other"), chain.spec, *far)
    assert refused.returncode == 3, refused.stderr
    ours("import-diff", chain.files["b"], chain.spec, *far)
    same(pair, chain.name, chain.copy, ("a", "b"))


def test_an_import_that_fails_while_it_commits_is_finished_by_the_same_stream_only(
    pair: Pair, far: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain(pair, tmp_path, far)

    def failing(self: Image, key: str) -> None:
        raise SiphonError(f"{key} of {self.spec} cannot be removed")

    monkeypatch.setattr(Image, "remove_metadata", failing)
    with pytest.raises(SiphonError, match="cannot be removed"):
        asyncio.run(imported(pair, chain.copy, Path(chain.files["b"])))
    monkeypatch.undo()
    other = bytearray(Path(chain.files["b"]).read_bytes())
    other[-5000] ^= 1
    (tmp_path / "other").write_bytes(other)
    assert command("import-diff", str(tmp_path / "other"), chain.spec, *far).returncode == 3
    ours("import-diff", chain.files["b"], chain.spec, *far)
    assert "siphon.diff" not in pair.target.metadata(chain.copy)
    same(pair, chain.name, chain.copy, ("a", "b"))


def test_unchecked_refuses_what_rbd_refuses_before_it_writes(pair: Pair, far: list[str], tmp_path: Path) -> None:
    chain = Chain(pair, tmp_path, far)
    for point in ("b", "c"):
        ours("import-diff", chain.files[point], chain.spec, "--unchecked", *far)
    again = command("import-diff", chain.files["b"], chain.spec, "--unchecked", *far)
    assert again.returncode == 3
    assert pair.target.digest(chain.copy) == pair.source.digest(chain.name, "c")


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
