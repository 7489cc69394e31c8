"""The demo: the main job on real input, step by step, each result compared byte for byte."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from .ceph import Cluster
from .lab import Lab
from .relay import Relay
from .say import LabError, note, run, step

MIB = 1 << 20
IMAGE = "vms/web-1"
REPLICA = "vms-dr/web-1"
#: Where the ext4 image's files come from: real ones that every Debian has, about 500 MiB at most.
ROOTS = ("/usr/bin", "/usr/lib/python3", "/usr/lib/x86_64-linux-gnu", "/usr/share/doc", "/usr/share/locale", "/usr/sbin")
FILL = 480 * MIB


@dataclass
class Row:
    """A line of the table that the demo ends with."""

    name: str
    read: int
    sent: int
    seconds: float
    verdict: str


def run_demo(lab: Lab) -> int:
    """Show the main job; return 0 if every comparison came out equal."""
    _fresh(lab)
    rows = [_first(lab), _increment(lab), *_interrupted(lab)]
    _table(rows)
    good = all(row.verdict.startswith(("equal", "cut")) for row in rows)
    _play_on(lab)
    return 0 if good else 1


def _fresh(lab: Lab) -> None:
    """Put the source image back to its beginning and remove an earlier demo's replica."""
    disk = ext4_image(lab)
    for cluster, image in ((lab.source, IMAGE), (lab.target, REPLICA)):
        pool, name = image.split("/")
        if name in cluster.rbd("ls", pool).split():
            note(f"removing {image} of an earlier demo from the {cluster.name} cluster")
            cluster.rbd("snap", "purge", image)
            cluster.rbd("rm", image)
    step(f"rbd import {disk.name} {IMAGE}")
    lab.source.rbd("import", str(disk), IMAGE)


def ext4_image(lab: Lab) -> Path:
    """Return an ext4 image of 2 GiB filled with files of this machine, made once."""
    disk = lab.home / "disk.ext4"
    if disk.exists():
        return disk
    step("an ext4 image of 2 GiB, filled with files of this machine (mkfs.ext4 -d)")
    folder, total = lab.home / "files", 0
    shutil.rmtree(folder, ignore_errors=True)
    for root in ROOTS:
        for path, _, names in os.walk(root):
            for name in sorted(names):
                file = Path(path) / name
                if file.is_symlink() or not file.is_file() or total > FILL:
                    continue
                total += file.stat().st_size
                copy = folder / file.relative_to("/")
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
    partial = disk.with_suffix(".part")
    with partial.open("wb") as image:
        image.truncate(2048 * MIB)
    run(["/sbin/mkfs.ext4", "-q", "-F", "-d", str(folder), str(partial)], timeout=300)
    shutil.rmtree(folder)
    partial.rename(disk)
    note(f"{total / MIB:.0f} MiB of files")
    return disk


def _first(lab: Lab) -> Row:
    step(f"first sync: rbd-siphon sync {IMAGE} root@dr-site:{REPLICA}")
    result = sync(lab)
    return _row("first copy", result, lab)


def _increment(lab: Lab) -> Row:
    step("changing the source: overwrites, discards, a resize")
    chance = random.Random(1)  # noqa: S311  # not a secret
    lab.source.rbd("resize", "--size", "2200M", IMAGE)
    patch(lab, IMAGE, [(chance.randrange(0, 500 * MIB), chance.randbytes(64 << 10)) for _ in range(200)])
    patch(lab, IMAGE, [(2100 * MIB, chance.randbytes(8 * MIB)), (100 * MIB, None)])
    step("second sync, an increment")
    return _row("increment", sync(lab), lab)


def _interrupted(lab: Lab) -> list[Row]:
    step("writing 96 MiB more, and syncing over a link that is cut after 60 MiB")
    chance = random.Random(2)  # noqa: S311
    patch(lab, IMAGE, [(at * MIB, chance.randbytes(4 * MIB)) for at in range(1000, 1096, 4)])
    began = time.monotonic()
    cut, sent = asyncio.run(_cut(lab, 60 * MIB))
    note(cut["message"] if cut["type"] == "error" else "the link held; nothing was cut")
    verdict = "cut, as asked" if cut["type"] == "error" else "NOT CUT"
    rows = [Row("cut in mid-transfer", 0, sent, time.monotonic() - began, verdict)]
    step("the same command again")
    result = sync(lab)
    if result["resumed_from"] is not None:
        note(f"it went on at {result['resumed_from'] / MIB:.0f} MiB of the image and sent {result['bytes_sent'] / MIB:.1f} MiB")
    row = _row("run again", result, lab)
    if result["bytes_sent"] > 60 * MIB:
        row.verdict = "SENT TOO MUCH AGAIN"
    return [*rows, row]


async def _cut(lab: Lab, after: int) -> tuple[dict[str, str], int]:
    relay = Relay(lab.ssh.port, cut_after=after)
    config = lab.ssh.write_client_config(lab.home / "demo-relay.config", await relay.start())
    try:
        last = await asyncio.to_thread(_sync, lab, "--attempts", "1", "--ssh-config", str(config))
    finally:
        await relay.stop()
    return last, relay.sent


def sync(lab: Lab, *words: str) -> dict[str, int]:
    """Run `rbd-siphon sync` and return its result; LabError if it failed."""
    last = _sync(lab, *words)
    if last["type"] != "result":
        raise LabError(f"the sync failed: {last['message']}\n  {last['hint']}")
    return last  # type: ignore[return-value]  # the fields used are numbers


def _sync(lab: Lab, *words: str) -> dict[str, str]:
    command = [str(lab.venv / "bin" / "rbd-siphon"), "sync", IMAGE, f"root@dr-site:{REPLICA}", "--json", *words]
    done = subprocess.run(command, env={**os.environ, **lab.environment}, capture_output=True, text=True, check=False)
    if not done.stdout:
        raise LabError(f"rbd-siphon said nothing: {done.stderr}")
    last: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return last


def patch(lab: Lab, image: str, changes: list[tuple[int, bytes | None]]) -> None:
    """Write (or, for None, discard 64 MiB) at offsets of a source image, through Ceph's own binding."""
    work = lab.home / "patch.bin"
    plan = []
    with work.open("wb") as blob:
        for offset, data in changes:
            plan.append((offset, None if data is None else (blob.tell(), len(data))))
            blob.write(data or b"")
    code = (
        "import json, rados, rbd, sys\n"
        "pool, name = sys.argv[1].split('/')\n"
        "blob = open(sys.argv[2], 'rb').read()\n"
        "with rados.Rados(conffile=rados.Rados.DEFAULT_CONF_FILES, rados_id='siphon') as cluster, \\\n"
        "        cluster.open_ioctx(pool) as io, rbd.Image(io, name) as image:\n"
        "    for offset, place in json.load(sys.stdin):\n"
        "        if place is None: image.discard(offset, 64 << 20)\n"
        "        else: image.write(blob[place[0]:place[0] + place[1]], offset)\n"
    )
    run(["/usr/bin/python3", "-c", code, image, str(work)], env=lab.source.environment, stdin=json.dumps(plan).encode())
    work.unlink()


def _row(name: str, result: dict[str, int], lab: Lab) -> Row:
    return Row(name, result["bytes_read"], result["bytes_sent"], result["seconds"], compare(lab, IMAGE, REPLICA))


def compare(lab: Lab, image: str, replica: str) -> str:
    """Compare SHA-256 of every snapshot of the replica with the source's of that name, by `rbd export`."""
    names = [each["name"] for each in json.loads(lab.target.rbd("snap", "ls", replica, "--format", "json"))]
    for name in names:
        ours, theirs = _sha256(lab.source, f"{image}@{name}"), _sha256(lab.target, f"{replica}@{name}")
        note(f"{name}: source {ours[:16]}…, target {theirs[:16]}…")
        if ours != theirs:
            return f"DIFFERENT at {name}"
    return f"equal, {len(names)} snapshot(s)"


def _sha256(cluster: Cluster, spec: str) -> str:
    state = hashlib.sha256()
    command = ["rbd", "export", "--no-progress", spec, "-"]
    with subprocess.Popen(command, env={**os.environ, **cluster.environment}, stdout=subprocess.PIPE) as export:
        assert export.stdout is not None
        while data := export.stdout.read(4 * MIB):
            state.update(data)
    if export.returncode:
        raise LabError(f"rbd export {spec} failed")
    return state.hexdigest()


def _table(rows: list[Row]) -> None:
    print()
    print(f"{'step':22}{'read':>12}{'sent':>12}{'seconds':>10}   verdict")
    for row in rows:
        print(f"{row.name:22}{row.read / MIB:>8.1f} MiB{row.sent / MIB:>8.1f} MiB{row.seconds:>10.1f}   {row.verdict}")
    print()


def _play_on(lab: Lab) -> None:
    print("The lab stays up. To play on:")
    print('  eval "$(deploy/lab env)"              # both clusters, the SSH server, the command')
    print(f"  rbd snap ls {IMAGE}; rbd-target snap ls {REPLICA}")
    print(f"  rbd bench --io-type write --io-total 16M {IMAGE}")
    print(f"  rbd-siphon sync {IMAGE} root@dr-site:{REPLICA}")
    print("  deploy/lab relay --delay-ms 100 --rate-mbit 1000    # a long link, in another shell")
    print(f"  deploy/lab down                       # stop everything ({lab.home} stays; --wipe removes it)")
