"""Archives: what is pushed comes back byte for byte, from a folder and over SFTP, whatever was cut on the way."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import random
import subprocess
import time
from pathlib import Path

import pytest

from agent import archive as archives
from agent.archive import Archive
from agent.archiving import push
from agent.cluster import Cluster
from agent.errors import SiphonError
from agent.settings import ClusterSettings
from agent.spec import parse_source
from agent.store import Folder
from support import MIB, Pair, command, unique


def ours(*words: str) -> str:
    done = command("archive", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def changed(pair: Pair, name: str, seed: int) -> None:
    chance = random.Random(seed)
    with pair.source.image(name) as image:
        image.resize(MIB * chance.randrange(6, 12))
        for _ in range(4):
            length = chance.choice([512, 9000, 700_000])
            image.write(chance.randbytes(length), chance.randrange(0, image.size() - length) // 512 * 512)
        image.discard(chance.randrange(0, 4) * MIB, MIB)


def pushed(pair: Pair, dest: str, points: int) -> tuple[str, list[str]]:
    """Push an image several times; return its name and its points."""
    name = pair.new("archived", size=8 * MIB, fill_with=1)
    names = []
    for number in range(points):
        changed(pair, name, number)
        pair.source.snap(name, f"p{number}")
        ours("push", f"vms/{name}@p{number}", dest)
        names.append(f"p{number}")
    return name, names


def restored(pair: Pair, name: str, dest: str, points: list[str], folder: Path) -> None:
    """See that every point comes back, as an image, as its snapshots and as a raw file."""
    far = ["--conf", str(pair.lab.target.conf)]
    for point in points:
        raw = folder / f"{unique('raw')}"
        ours("restore", name, dest, str(raw), "--to-file", "--at", point)
        with pair.source.image(name, point) as image:
            assert raw.read_bytes() == image.read(0, image.size()), point
    whole, history = unique("whole"), unique("history")
    ours("restore", name, dest, f"vms-dr/{whole}", *far)
    assert pair.target.digest(whole) == pair.source.digest(name, points[-1])
    ours("restore", name, dest, f"vms-dr/{history}", "--snapshots", *far)
    assert pair.target.snapshots(history) == points
    for point in points:
        assert pair.target.digest(history, point) == pair.source.digest(name, point)


@pytest.mark.parametrize("where", ["folder", "sftp"])
def test_every_point_comes_back_before_and_after_compaction(pair: Pair, tmp_path: Path, where: str) -> None:
    dest = str(tmp_path / "archive") if where == "folder" else f"dr-site:{tmp_path / 'archive'}"
    name, points = pushed(pair, dest, 4)
    ours("verify", name, dest)
    restored(pair, name, dest, points, tmp_path)
    ours("compact", name, dest, "--keep", "2")
    ours("verify", name, dest)
    restored(pair, name, dest, points[-2:], tmp_path)
    listed = [json.loads(line) for line in ours("list", dest, "--json").splitlines()]
    assert [each["entry"]["end"]["snapshot"]["name"] for each in listed] == points[-2:]
    assert all(each["stored"] > 0 for each in listed)


def test_what_else_lies_in_the_folder_is_in_nobodys_way(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "archive" / "lost+found" / "x").mkdir(parents=True)
    (tmp_path / "archive" / "README.txt").write_text("ours")
    name, _ = pushed(pair, str(tmp_path / "archive"), 1)
    (next(tmp_path.glob(f"archive/{name}.*")) / "notes").mkdir()
    assert len(ours("list", str(tmp_path / "archive")).splitlines()) == 1
    ours("verify", name, str(tmp_path / "archive"))


def test_pushes_of_ones_own_snapshots_follow_each_other_and_clean_up(pair: Pair, tmp_path: Path) -> None:
    dest, name = str(tmp_path / "archive"), pair.new("own")
    for seed in range(3):
        changed(pair, name, seed)
        ours("push", f"vms/{name}", dest)
    assert len(pair.source.snapshots(name)) == 1
    assert len(ours("list", dest).splitlines()) == 3
    assert "full" in ours("list", dest).splitlines()[0]
    raw = tmp_path / "raw"
    ours("restore", name, dest, str(raw), "--to-file")
    with pair.source.image(name) as image:
        assert raw.read_bytes() == image.read(0, image.size())
    # A sync of the same image minds its own snapshots, and the archive's stays.
    pair.sync_now(name)
    assert len(pair.source.snapshots(name)) == 2
    changed(pair, name, 9)
    assert "(from siphon-" in ours("push", f"vms/{name}", dest)


def test_the_parts_unpack_without_this_program(pair: Pair, tmp_path: Path) -> None:
    dest = str(tmp_path / "archive")
    name, _ = pushed(pair, dest, 2)
    with pair.source.image(name, "p0") as image:
        copy = pair.target.create(unique("by-hand"), image.size())
    for folder in sorted(tmp_path.glob("archive/*/[0-9]*")):
        line = f"cat {folder}/*.zst | zstd -dc | rbd --conf {pair.lab.target.conf} import-diff --no-progress - vms-dr/{copy}"
        subprocess.run(["bash", "-eo", "pipefail", "-c", line], check=True, capture_output=True)
    for point in ("p0", "p1"):
        assert pair.target.digest(copy, point) == pair.source.digest(name, point)


class Breaks(Folder):
    """A folder that fails at the n-th change."""

    def __init__(self, path: str, after: int) -> None:
        super().__init__(path)
        self.left = after
        self.written: list[str] = []

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise SiphonError("the link is gone")

    async def write(self, name: str, data: bytes) -> None:
        self._count()
        self.written.append(name)
        await super().write(name, data)

    async def rename(self, name: str, new: str) -> None:
        self._count()
        await super().rename(name, new)

    async def remove(self, folder: str) -> None:
        self._count()
        await super().remove(folder)


def push_through(store: Folder, spec: str) -> None:
    async def go() -> None:
        with Cluster(ClusterSettings(conf="", user="siphon").completed(os.environ), 30) as cluster:
            await push(store, cluster, cluster.pool("vms"), parse_source(spec), print)

    asyncio.run(go())


def test_a_push_cut_anywhere_leaves_the_chain_and_goes_on_without_what_arrived(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "PART", MIB)
    monkeypatch.setattr(archives, "LISTED", 2)
    dest = str(tmp_path / "archive")
    name, _ = pushed(pair, dest, 1)
    with pair.source.image(name) as image:
        image.resize(8 * MIB)
        image.write(random.Random(5).randbytes(8 * MIB), 0)
    pair.source.snap(name, "p1")
    written: list[str] = []
    for after in range(1, 40):
        store = Breaks(dest, after)
        try:
            push_through(store, f"vms/{name}@p1")
        except SiphonError:
            written += store.written
            assert ours("verify", name, dest).count("is whole") == 1
        else:
            written += store.written
            break
    else:
        pytest.fail("the push never came to its end")
    parts = [each for each in written if each.endswith(".zst")]
    assert len(set(parts)) == 4  # what is read at a time makes a part here
    assert len(parts) - len(set(parts)) <= 2  # one that was written while its entry was not, now and then
    restored(pair, name, dest, ["p0", "p1"], tmp_path)


@pytest.mark.parametrize("where", ["folder", "sftp"])
def test_two_commands_on_one_archive_exclude_each_other(pair: Pair, tmp_path: Path, where: str) -> None:
    root = tmp_path / "archive"
    dest = str(root) if where == "folder" else f"dr-site:{root}"
    name, _ = pushed(pair, dest, 3)
    lock = next(root.glob(f"{name}.*")) / ".lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        pair.source.snap(name, "later")
        for words in (["push", f"vms/{name}@later", dest], ["compact", name, dest, "--keep", "1"]):
            done = command("archive", *words)
            assert done.returncode == 5, done.stderr
            assert "another command is at work" in done.stderr
    if where == "sftp":
        os.utime(lock, (time.time() - 3600,) * 2)  # whoever made it was cut off long ago
    ours("push", f"vms/{name}@later", dest)
    assert ours("verify", name, dest).count("is whole") == 4
    assert where == "folder" or not lock.exists()


def test_two_archives_of_one_image_keep_a_base_each(pair: Pair, tmp_path: Path) -> None:
    name = pair.new("twice")
    places = [tmp_path / "disk", tmp_path / "other"]
    for _ in range(2):
        for place in places:
            # Two disks that are mounted by turns at the same place.
            place.mkdir(exist_ok=True)
            place.rename(tmp_path / "mnt")
            changed(pair, name, 1)
            ours("push", f"vms/{name}", str(tmp_path / "mnt"))
            (tmp_path / "mnt").rename(place)
    for place in places:
        assert [line.split()[2] for line in ours("list", str(place)).splitlines()] == ["full", "from"]
    assert len(pair.source.snapshots(name)) == 2


def test_a_compaction_cut_anywhere_never_leaves_less_than_a_chain(pair: Pair, tmp_path: Path) -> None:
    dest = str(tmp_path / "archive")
    name, points = pushed(pair, dest, 4)

    async def compact(store: Folder) -> None:
        await (await Archive.named(store, name)).fold(2, print)

    for after in range(40):
        try:
            asyncio.run(compact(Breaks(dest, after)))
        except SiphonError:
            for point in points[-2:]:
                raw = tmp_path / unique("raw")
                ours("restore", name, dest, str(raw), "--to-file", "--at", point)
                with pair.source.image(name, point) as image:
                    assert raw.read_bytes() == image.read(0, image.size())
        else:
            break
    assert len(ours("list", dest).splitlines()) == 2
    ours("verify", name, dest)


def test_every_flipped_bit_and_every_missing_part_is_found(pair: Pair, tmp_path: Path) -> None:
    dest = str(tmp_path / "archive")
    name, _ = pushed(pair, dest, 2)
    chance = random.Random(3)
    for part in sorted(tmp_path.glob("archive/*/*/*.zst")):
        whole = part.read_bytes()
        for _ in range(2):
            damaged = bytearray(whole)
            damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
            part.write_bytes(damaged)
            assert command("archive", "verify", name, dest).returncode == 6
            assert command("archive", "restore", name, dest, str(tmp_path / "no"), "--to-file").returncode == 6
            assert not (tmp_path / "no").exists()
        part.unlink()
        assert command("archive", "restore", name, dest, str(tmp_path / "no"), "--to-file").returncode == 6
        assert command("archive", "verify", name, dest).returncode == 6
        part.write_bytes(whole)
    ours("verify", name, dest)


def test_a_damaged_archive_does_not_hide_the_others(pair: Pair, tmp_path: Path) -> None:
    dest = str(tmp_path / "archive")
    bad, good = (pushed(pair, dest, 1)[0] for _ in range(2))
    next(tmp_path.glob(f"archive/{bad}.*/*/entry.json")).write_text("{")
    done = command("archive", "list", dest)
    assert done.returncode == 6
    assert bad in done.stderr
    assert [line.split(".")[0] for line in done.stdout.splitlines()] == [good]


def test_points_of_one_name_become_snapshots_of_two(pair: Pair, tmp_path: Path) -> None:
    dest, name = str(tmp_path / "archive"), pair.new("nightly", size=8 * MIB)
    digests = []
    for seed in range(2):
        changed(pair, name, seed)
        with pair.source.image(name) as image:
            for each in [each["name"] for each in image.list_snaps() if each["name"] == "nightly"]:
                image.rename_snap(each, "older")
        pair.source.snap(name, "nightly")
        digests.append(pair.source.digest(name, "nightly"))
        ours("push", f"vms/{name}@nightly", dest)
    copy = unique("nightlies")
    ours("restore", name, dest, f"vms-dr/{copy}", "--snapshots", "--conf", str(pair.lab.target.conf))
    older, newer = pair.target.snapshots(copy)
    assert newer == "nightly"
    assert older.startswith("nightly-")
    assert [pair.target.digest(copy, older), pair.target.digest(copy, newer)] == digests


def test_a_lost_base_begins_a_new_chain_and_prune_drops_the_old(pair: Pair, tmp_path: Path) -> None:
    dest = str(tmp_path / "archive")
    name, _ = pushed(pair, dest, 2)
    pair.source.unsnap(name, "p1")
    changed(pair, name, 7)
    pair.source.snap(name, "p2")
    done = command("archive", "push", f"vms/{name}@p2", dest)
    assert done.returncode == 0
    assert "the source has lost p1" in done.stderr
    older = command("archive", "push", f"vms/{name}@p0", dest)
    assert older.returncode == 3
    ours("restore", name, dest, str(tmp_path / "p0"), "--to-file", "--at", "p0")
    ours("prune", name, dest, "--keep", "1")
    assert [line.split()[1] for line in ours("list", dest).splitlines()] == ["p2"]
    restored(pair, name, dest, ["p2"], tmp_path)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["verify", "nothing", "{dest}"], 2, "holds no archive of nothing"),
        (["push", "vms/absent", "{dest}"], 2, "there is no image"),
        (["push", "vms/x", "dr-site:"], 2, "no place for an archive"),
        (["restore", "nothing", "{dest}", "vms/x"], 2, "holds no archive"),
        (["list", "127.0.0.1:99999:/x"], 2, "no place for an archive"),
        (["list", "no-such-host.invalid:/x"], 4, "no-such-host.invalid"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(pair: Pair, tmp_path: Path, words: list[str], code: int, said: str) -> None:
    assert pair.lab.ssh.pid()
    done = command("archive", *[word.format(dest=tmp_path) for word in words])
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
