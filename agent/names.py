"""The names that the agent gives: snapshots of its own, metadata keys, objects. Pure.

A snapshot that the agent takes is called `siphon-<UTC time>-<target tag><unique>`; the tag tells
for which replica it was taken, so that two targets of one image never prune each other's.
"""

from __future__ import annotations

import hashlib
import re
from datetime import datetime

from agent.model import ImageSpec

#: Everything the agent writes into image metadata starts so, and is never carried to a replica.
METADATA_PREFIX = "siphon."
LINEAGE_KEY = METADATA_PREFIX + "lineage"
MARK_KEY = METADATA_PREFIX + "step"
ORIGIN_PREFIX = METADATA_PREFIX + "origin."
DIFF_KEY = METADATA_PREFIX + "diff"
PEER_PREFIX = METADATA_PREFIX + "peer."

#: The RADOS object by which `config check` sees that it may write.
PROBE_OBJECT = "rbd_siphon.check"

#: How the names of images begin that are still being made.
CREATING, IMPORTING = "siphon-creating-", "siphon-importing-"

_OWN = re.compile(r"siphon-(?P<time>\d{8}T\d{6}Z)-(?P<tag>[0-9a-f]{6})[0-9a-f]{4}")
_PARTIAL = re.compile(r"siphon-committing-[0-9a-f]{16}")


def tag(fsid: str, replica: ImageSpec) -> str:
    """Return six hexadecimal digits that stand for one replica (its cluster and place)."""
    return hashlib.blake2s(f"{fsid}/{replica}".encode()).hexdigest()[:6]


def snapshot_name(now: datetime, replica_tag: str, unique: int) -> str:
    """Name a snapshot taken at `now` (UTC) for the replica of that tag; `unique` has 16 bits."""
    return f"siphon-{now:%Y%m%dT%H%M%SZ}-{replica_tag}{unique & 0xFFFF:04x}"


def is_own(name: str, replica_tag: str) -> bool:
    """Tell whether the agent took the snapshot of this name for the replica of that tag."""
    match = _OWN.fullmatch(name)
    return match is not None and match["tag"] == replica_tag and _time(match["time"]) is not None


def taken_at(name: str) -> datetime:
    """Return when the agent took the snapshot of this name, which is one of its own (UTC)."""
    match = _OWN.fullmatch(name)
    taken = _time(match["time"]) if match is not None else None
    assert taken is not None, f"{name} is no snapshot of ours"
    return taken


def _time(text: str) -> datetime | None:
    try:
        return datetime.strptime(text, "%Y%m%dT%H%M%S%z")
    except ValueError:
        return None  # a hand made it


def committing_name(nonce: int) -> str:
    """Name the snapshot that a step makes before its origin is recorded; `nonce` has 64 bits."""
    return f"siphon-committing-{nonce & (1 << 64) - 1:016x}"


def is_committing(name: str) -> bool:
    """Tell whether a snapshot's name is one that only an unfinished commit leaves."""
    return _PARTIAL.fullmatch(name) is not None


def creating_prefix(replica: str, image_id: str) -> str:
    """Return how a replica's name begins until it carries its lineage; the same for every attempt at this replica."""
    return CREATING + hashlib.blake2s(f"{replica}/{image_id}".encode()).hexdigest()[:16] + "-"


def is_unfinished(name: str) -> bool:
    """Tell whether an image's name is one that only a replica or an import bears that is still being made."""
    return name.startswith((CREATING, IMPORTING))


def origin_key(snapshot_id: int) -> str:
    """Return the metadata key that holds the origin of the replica's snapshot of that id."""
    return f"{ORIGIN_PREFIX}{snapshot_id}"


def guard_object(image_id: str) -> str:
    """Return the RADOS object that holds the guard of the image of that id."""
    return f"rbd_siphon.{image_id}"


def diff_object(image_id: str) -> str:
    """Return the RADOS object that says how far a diff has come into the image of that id."""
    return f"rbd_siphon.{image_id}.diff"
