"""What import-diff proves before it writes, and how it goes on: names, content, manifests, interruptions, raw files."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import rados

from agent.cluster import Cluster, Image
from agent.difffile import DiffFile
from agent.errors import SiphonError
from agent.files import Reading
from agent.importing import DiffImport, Options
from agent.model import ImageSpec
from agent.settings import ClusterSettings
from agent.writes import Imported
from support import MIB, SIPHON, Pair, command, ours, same, unique

POINTS = ("a", "b", "c")


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


def progress(pair: Pair, copy: str) -> str:
    """Return what is recorded of how far a diff has come, "" if nothing is."""
    with pair.target.image(copy) as image:
        name = f"rbd_siphon.{image.id()}.diff"
    try:
        return bytes(pair.target.ioctx().read(name)).decode()
    except rados.ObjectNotFound:
        return ""


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
    damaged[2 * MIB] ^= 1
    other.write_bytes(damaged)
    copy = pair.target.create(unique("resumed"), 512 * MIB, order=22)
    running = subprocess.Popen([SIPHON, "import-diff", str(file), f"vms-dr/{copy}", *far])
    deadline = time.monotonic() + 60
    while '"durable":' not in progress(pair, copy):
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
    assert not progress(pair, copy)


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


def test_a_silent_pipe_does_not_keep_a_refused_import_from_ending(pair: Pair, far: list[str], tmp_path: Path) -> None:
    chain = Chain(pair, tmp_path, far)
    pair.target.write(chain.copy, 0, b"somebody else's")
    words = [SIPHON, "import-diff", "-", chain.spec, *far]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdin is not None
        assert running.stderr is not None
        running.stdin.write(Path(chain.files["b"]).read_bytes()[:20_000])
        running.stdin.flush()  # and nothing more comes
        try:
            assert running.wait(20) == 3
        finally:
            running.kill()
        said = running.stderr.read().decode()
    assert "differs from a" in said
    assert "Traceback" not in said
