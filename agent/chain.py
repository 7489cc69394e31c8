"""An archive's points and how they hang together in chains. Pure.

A point is a diff with its identity: a full one begins a chain, each increment begins where another
point ends. A new chain begins where the source has lost the snapshot that the last one ended at. A
merged point names those that it replaces: they may go, and after a merge that was broken off behind
its last step, they are still there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime

import msgspec

from agent.errors import DataError, NotFoundError, UsageError
from agent.manifest import Point
from agent.model import ImageIdentity, Value

#: Version of the documents in an archive.
FORM = 1


class Part(Value, frozen=True):
    """One file of a point: a zstd frame. `bytes` and `digest` (xxh3-128) are of the file, `plain` of what is packed in it."""

    name: str
    bytes: int
    digest: str
    plain: int


class Entry(Value, frozen=True):
    """A point of an archive: the diff `base` → `end` of an image, cut into parts.

    All parts, unpacked one after the other, are a diff of version 1. While a point is being
    written, `until` says up to which offset of the image its parts hold what changed.
    """

    source: ImageIdentity
    image: str
    base: Point | None
    end: Point
    size: int
    parts: tuple[Part, ...]
    made_at: str
    tool: str
    records: int = 0
    data: int = 0
    zeros: int = 0
    until: int = 0
    replaces: tuple[str, ...] = ()
    form: int = FORM

    @property
    def name(self) -> str:
        """Return the folder's name, which sorts by age and tells full from increment."""
        kind = f"from-{self.base.snapshot.id:012d}" if self.base is not None else "full"
        return f"{self.end.snapshot.id:012d}-{kind}"

    @property
    def stored(self) -> int:
        """Return how many bytes it takes."""
        return sum(part.bytes for part in self.parts)


def is_point(folder: str) -> bool:
    """Tell whether a folder of that name is a point: what else lies there is none of ours."""
    return re.fullmatch(r"\d{12}-(full|from-\d{12})", folder) is not None


def packed(entry: Entry) -> bytes:
    """Return the entry's document."""
    return msgspec.json.format(msgspec.json.encode(entry), indent=1) + b"\n"


def parsed(document: bytes, where: str) -> Entry:
    """Return the entry in `document`; DataError if it is damaged, UsageError if a later version wrote it."""
    try:
        entry = msgspec.json.decode(document, type=Entry)
    except msgspec.MsgspecError as error:
        raise DataError(f"{where} is damaged: {error}") from error
    if entry.form > FORM:
        raise UsageError(f"{where} was written by a later version of rbd-siphon ({entry.tool})", hint="upgrade rbd-siphon here")
    return entry


def chains_of(entries: Sequence[Entry]) -> tuple[list[list[Entry]], list[str]]:
    """Return the chains, the newest last, and the names of points that were replaced; DataError where one lost its base."""
    replaced = {name for each in entries for name in each.replaces}
    live = {each.end.snapshot.id: each for each in entries if each.name not in replaced}
    following = {each.base.snapshot.id: each for each in live.values() if each.base is not None}
    chains = []
    for full in (each for each in live.values() if each.base is None):
        chain = [full]
        while (after := following.pop(chain[-1].end.snapshot.id, None)) is not None:
            chain.append(after)
        chains.append(chain)
    if following:
        lost = next(iter(following.values()))
        raise DataError(
            f"the archive of {lost.image} is broken: the point {lost.end.snapshot.name} has lost the one it begins at",
            hint="a folder of it is missing: bring that back, or move the archive away and push anew",
        )
    return sorted(chains, key=lambda chain: chain[-1].end.snapshot.id), sorted(replaced & {each.name for each in entries})


def up_to(chains: Sequence[list[Entry]], wanted: str) -> list[Entry]:
    """Return the points to apply, in order, for the snapshot of that name or the last one at or before that time (ISO 8601).

    An empty string is the newest. NotFoundError, with the points there are, if there is none.
    """
    when = _time(wanted)
    for chain in reversed(chains):
        for index in range(len(chain) - 1, -1, -1):
            end = chain[index].end
            taken = _time(end.taken_at)
            if wanted in ("", end.snapshot.name) or (when is not None and taken is not None and taken <= when):
                return chain[: index + 1]
    points = ", ".join(f"{each.end.snapshot.name} ({each.end.taken_at})" for chain in chains for each in chain)
    raise NotFoundError(f"the archive holds no point {wanted}", hint=f"its points: {points or 'none'}")


def _time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        return None


def to_fold(chain: Sequence[Entry], keep: int) -> list[Entry]:
    """Return the oldest points of a chain, to be merged into one so that the newest `keep` (at least one) stay; or none."""
    keep = max(1, keep)
    return list(chain[: len(chain) - keep + 1]) if len(chain) > keep else []
