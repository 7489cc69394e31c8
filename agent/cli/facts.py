"""How `rbd-siphon inspect` shows what it found."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from agent.cli.console import amount
from agent.errors import UsageError
from agent.files import CHUNK, STDIO, Reading
from agent.inspection import DiffFacts, Facts, Inspection
from agent.manifest import Manifest, manifest_name, parsed


def show(source: Reading, file: str, *, as_json: bool, extents: bool, digest: str) -> str:
    """Print what the file holds; return what is wrong with it, "" if nothing."""
    if digest not in ("", "sha256", "xxh3"):
        raise UsageError(f"there is no digest {digest!r}", hint="--digest sha256 or xxh3")
    manifest = _manifest(file)
    told = xxhash.xxh3_128()
    asked: Any = hashlib.sha256() if digest == "sha256" else told
    inspection = Inspection(_print_extent if extents else None)
    while data := source.read(CHUNK):
        told.update(data)
        if asked is not told:
            asked.update(data)
        inspection.feed(data)
    facts = inspection.finish()
    damage = facts.damage
    if manifest is not None and not damage and (told.hexdigest(), facts.bytes) != (manifest.digest, manifest.bytes):
        damage = "it is not what its manifest says: it was changed or cut"
    value = asked.hexdigest() if digest else ""
    if as_json:
        document = {**asdict(facts), "image": facts.image, "damage": damage}
        document |= {"digest": {digest: value}} if digest else {}
        document |= {"manifest": manifest} if manifest is not None else {}
        sys.stdout.write(msgspec.json.encode(document).decode() + "\n")
    else:
        _tell(file, facts, manifest)
        if digest:
            print(f"{digest:10} {value}")
    return damage


def _manifest(file: str) -> Manifest | None:
    path = Path(manifest_name(file))
    return parsed(path.read_bytes(), str(path)) if file != STDIO and path.is_file() else None


def _print_extent(offset: int, length: int, holds: bool) -> None:  # as Inspection calls it
    print(f"{offset} {length} {'data' if holds else 'zero'}")


def _tell(file: str, facts: Facts, manifest: Manifest | None) -> None:
    kinds = {
        "diff": "an RBD diff",
        "image": "an RBD image of format 2",
        "raw": "neither a diff nor an image of format 2 (perhaps raw content)",
        "": "cut before it says what it is",
        "empty": "empty",
    }
    print(f"{file}: {kinds[facts.kind]}, {amount(facts.bytes)}")
    if facts.image is not None:
        print(f"  objects of {amount(1 << facts.image.order)}, {facts.image.diffs - 1} snapshot(s)")
        for key, value in facts.image.metadata.items():
            print(f"  metadata {key} = {value}")
    for each in facts.diffs:
        print(_line(each))
    if manifest is not None:
        print(f"  made of {manifest.image} (image {manifest.source.image_id}, cluster {manifest.source.fsid})")
        for name, point in (("from", manifest.base), ("to", manifest.end)):
            if point is not None:
                print(f"  {name} snapshot {point.snapshot.name}, id {point.snapshot.id}, taken {point.taken_at}")


def _line(diff: DiffFacts) -> str:
    words = [
        f"  {diff.base or '(creation)'} → {diff.end or '(present content)'}",
        f"format {diff.version}",
        f"size {diff.size}",
        f"{diff.records} records, {amount(diff.data)} of data, {amount(diff.zeros)} of zeros",
    ]
    words += ["protected"] if diff.protected else []
    words += [f"{diff.overlaps} overlap"] if diff.overlaps else []
    words += [f"{diff.backwards} out of order"] if diff.backwards else []
    words += [f"{amount(diff.beyond)} behind the image's end"] if diff.beyond else []
    words += [] if diff.complete else ["not complete"]
    return ", ".join(words)
