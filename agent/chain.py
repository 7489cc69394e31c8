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
from typing import TypeVar

import msgspec

from agent.errors import DataError, NotFoundError, UsageError
from agent.manifest import Point
from agent.model import ImageIdentity, Value

V = TypeVar("V")

#: Version of the documents in an archive.
FORM = 1


class Part(Value, frozen=True):
    """One file of a point: a zstd frame. `bytes` and `digest` (xxh3-128) are of the file, `plain` of what is packed in it."""

    name: str
    bytes: int
    digest: str
    plain: int


class Parts(Value, frozen=True):
    """Some of a point's parts, with so many `before` them, and what all of these hold together.

    `stored` is what they take, `until` the offset of the image up to which they hold what changed,
    `whole` that they are the diff to its end; `records`, `data` and `zeros` are counted as in an `Entry`.
    """

    parts: tuple[Part, ...] = ()
    before: int = 0
    stored: int = 0
    until: int = 0
    records: int = 0
    data: int = 0
    zeros: int = 0
    whole: bool = False


class Entry(Value, frozen=True):
    """A point of an archive: the diff `base` → `end` of an image, cut into `parts` files that take `stored` bytes.

    They are named, in order, in `lists` files beside them.

    All parts, unpacked one after the other, are a diff of version 1 with so many `records`, bytes of
    `data` and of `zeros`.
    """

    source: ImageIdentity
    image: str
    base: Point | None
    end: Point
    size: int
    made_at: str
    tool: str
    parts: int = 0
    lists: int = 0
    stored: int = 0
    records: int = 0
    data: int = 0
    zeros: int = 0
    replaces: tuple[str, ...] = ()
    form: int = FORM

    @property
    def name(self) -> str:
        """Return the folder's name, which sorts by age and tells full from increment."""
        kind = f"from-{self.base.snapshot.id:012d}" if self.base is not None else "full"
        return f"{self.end.snapshot.id:012d}-{kind}"


def list_name(number: int) -> str:
    """Return the name of a point's list of parts, counted from 0."""
    return f"parts-{number:06d}.json"


def is_list(name: str) -> bool:
    """Tell whether a file of that name lists parts."""
    return re.fullmatch(r"parts-\d{6}\.json", name) is not None


def is_point(folder: str) -> bool:
    """Tell whether a folder of that name is a point: what else lies there is none of ours."""
    return re.fullmatch(r"\d{12}-(full|from-\d{12})", folder) is not None


def packed(document: Entry | Parts) -> bytes:
    """Return the document's bytes."""
    return msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"


def parsed(document: bytes, where: str) -> Entry:
    """Return the entry in `document`; DataError if it is damaged, UsageError if a later version wrote it."""
    entry = _decoded(document, Entry, where)
    if entry.form > FORM:
        raise UsageError(f"{where} was written by a later version of rbd-siphon ({entry.tool})", hint="upgrade rbd-siphon here")
    return entry


def parsed_parts(document: bytes, where: str) -> Parts:
    """Return the list in `document`; DataError if it is damaged."""
    return _decoded(document, Parts, where)


def _decoded(document: bytes, kind: type[V], where: str) -> V:
    try:
        return msgspec.json.decode(document, type=kind)
    except msgspec.MsgspecError as error:
        raise DataError(f"{where} is damaged: {error}") from error


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


def snapshot_names(points: Sequence[Entry]) -> list[str]:
    """Return what the points' snapshots are called in one image: of those of one name, all but the last get their id behind it."""
    names = [each.end.snapshot.name for each in points]
    return [
        f"{name}-{each.end.snapshot.id}" if name in names[place + 1 :] else name
        for place, (name, each) in enumerate(zip(names, points, strict=True))
    ]
