"""Judges that are not ours: `rbd export-diff` writes what the codec reads, `rbd import-diff` takes what we read."""

from __future__ import annotations

import asyncio
import random
import subprocess
from typing import Any

import pytest

from agent import diff
from agent.cluster import Cluster
from agent.diff import Data, Decoder, Encoder, Event, FromSnapshot, Size, ToSnapshot, Zero
from agent.model import Snapshot, Step
from agent.settings import ClusterSettings
from agent.source import Tally, reading
from support import MIB, Pair, fill, unique

ENCODER = Encoder()


def exported(pair: Pair, *words: str) -> bytes:
    done = subprocess.run(["rbd", "export-diff", "--no-progress", *words, "-"], capture_output=True, check=True)
    return done.stdout


def decoded(stream: bytes, step: int) -> list[Event]:
    decoder, events = Decoder(), []
    for at in range(0, len(stream), step):
        events += decoder.feed(stream[at : at + step])
    decoder.end()
    return events


def snapshots(pair: Pair, name: str) -> dict[str, Snapshot]:
    with pair.source.image(name) as image:
        return {each["name"]: Snapshot(each["id"], each["name"], each["size"]) for each in image.list_snaps()}


def history(pair: Pair, seed: int, **shape: Any) -> str:
    """Make an image with snapshots a, b and c of random content, a growth and a shrink between."""
    chance = random.Random(seed)
    name = pair.new("oracle", fill_with=seed, size=16 * MIB, **shape)
    for snapshot, size in (("a", 20 * MIB), ("b", 12 * MIB), ("c", 12 * MIB)):
        pair.source.snap(name, snapshot)
        with pair.source.image(name) as image:
            image.resize(size)
            for _ in range(6):
                offset = chance.randrange(0, size - MIB) // 512 * 512
                image.write(chance.randbytes(chance.choice([512, 9000, 300_000])), offset)
            image.discard(chance.randrange(0, 8) * MIB, 2 * MIB)
    return name


@pytest.mark.parametrize("seed", range(3))
def test_what_rbd_exports_is_what_the_codec_reads(pair: Pair, seed: int) -> None:
    name = history(pair, seed)
    stream = exported(pair, "--from-snap", "a", f"vms/{name}@b")
    events = decoded(stream, 10_007)
    assert [each for each in events if isinstance(each, FromSnapshot | ToSnapshot | Size)] == [
        FromSnapshot("a"), ToSnapshot("b"), Size(20 * MIB),
    ]  # fmt: skip
    with pair.source.image(name, "a") as image:
        content = bytearray(image.read(0, 16 * MIB)).ljust(20 * MIB, b"\0")
    for each in events:
        if isinstance(each, Data):
            content[each.offset : each.offset + len(each.data)] = each.data
        elif isinstance(each, Zero):
            content[each.offset : each.offset + each.length] = bytes(each.length)
    with pair.source.image(name, "b") as image:
        assert content == image.read(0, 20 * MIB)


@pytest.mark.parametrize(
    "shape", [{}, {"order": 22}, {"features": 1}, {"stripe_unit": 64 << 10, "stripe_count": 3, "features": 63}]
)
def test_what_we_read_is_what_rbd_imports(pair: Pair, shape: dict[str, int]) -> None:
    name = history(pair, 9, **shape)
    known = snapshots(pair, name)
    copy = unique("imported")
    pair.target.create(copy, 16 * MIB)
    for base, end in ((None, known["a"]), (known["a"], known["b"]), (known["b"], known["c"])):
        stream = asyncio.run(ours(name, Step(base, end)))
        pair.lab.target.rbd("import-diff", "-", f"vms-dr/{copy}", stdin=stream)
        assert pair.target.digest(copy, end.name) == pair.source.digest(name, end.name)


async def ours(name: str, step: Step) -> bytes:
    """Write a step as our reader gives it as a diff."""
    import os

    out = [diff.BANNER_V1]
    if step.base is not None:
        out.append(ENCODER.from_snapshot(step.base.name))
    out += [ENCODER.to_snapshot(step.end.name), ENCODER.size(step.end.size)]
    with Cluster(ClusterSettings().completed(os.environ), 30) as cluster, cluster.pool("vms").open(name) as image:
        async with reading(image, step.base, step.end, 0, Tally()) as pieces:
            async for piece in pieces:
                if piece.data is None:
                    out.append(ENCODER.zero(piece.offset, piece.length))
                else:
                    out += [ENCODER.data_header(piece.offset, piece.length), bytes(piece.data)]
    return b"".join([*out, ENCODER.end])


def test_the_two_step_diff_finds_what_the_exact_one_finds(pair: Pair) -> None:
    name = history(pair, 4)
    fill(pair.source, name, 3, spans=4, length=700)
    known = snapshots(pair, name)
    listed = pair.lab.source.rbd("diff", "--from-snap", "a", f"vms/{name}@c", "--format", "json")
    import json

    exact = {(each["offset"], each["length"], each["exists"] == "true") for each in json.loads(listed)}
    found = asyncio.run(covered(name, Step(known["a"], known["c"])))
    changed = bytearray(12 * MIB)
    for offset, length, _ in exact:
        changed[offset : offset + length] = b"\1" * length
    assert found == changed


async def covered(name: str, step: Step) -> bytearray:
    import os

    seen = bytearray(step.end.size)
    with Cluster(ClusterSettings().completed(os.environ), 30) as cluster, cluster.pool("vms").open(name) as image:
        async with reading(image, step.base, step.end, 0, Tally()) as pieces:
            async for piece in pieces:
                seen[piece.offset : piece.offset + piece.length] = b"\1" * piece.length
    return seen
