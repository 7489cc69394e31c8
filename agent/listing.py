"""What `rbd diff` prints, byte for byte: plain, JSON and XML. Pure.

(Ceph 16.2: src/tools/rbd/action/Diff.cc, src/common/TextTable.cc, src/common/Formatter.cc.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from agent.extents import Extents

Format = Literal["plain", "json", "xml"]
_TITLES = ("Offset", "Length", "Type")


def listing(windows: Iterable[Extents], form: Format, *, pretty: bool) -> Iterator[str]:
    """Yield the text of a list of extents, given window by window."""
    match form:
        case "plain":
            yield from _plain(list(windows))
        case "json":
            yield from _json(windows, pretty=pretty)
        case "xml":
            yield from _xml(windows, pretty=pretty)


def _plain(windows: list[Extents]) -> Iterator[str]:
    """A table as wide as its widest row; nothing at all where there are no rows."""
    wide = [len(title) for title in _TITLES[:2]]
    rows = 0
    for each in windows:
        rows += len(each)
        for offset, length, _ in each:
            wide = [max(wide[0], len(str(offset))), max(wide[1], len(str(length)))]
    if not rows:
        return
    yield f"{_TITLES[0]:{wide[0]}}  {_TITLES[1]:{wide[1]}}  {_TITLES[2]}\n"
    for each in windows:
        for offset, length, exists in each:
            yield f"{offset:<{wide[0]}}  {length:<{wide[1]}}  {'data' if exists else 'zero'}\n"


def _json(windows: Iterable[Extents], *, pretty: bool) -> Iterator[str]:
    first = True
    yield "["
    for each in windows:
        for offset, length, exists in each:
            comma, first = "" if first else ",", False
            word = "true" if exists else "false"
            if pretty:
                rows = f'"offset": {offset},\n        "length": {length},\n        "exists": "{word}"'
                yield f"{comma}\n    {{\n        {rows}\n    }}"
            else:
                yield f'{comma}{{"offset":{offset},"length":{length},"exists":"{word}"}}'
    yield "\n]\n" if pretty and not first else "]\n"


def _xml(windows: Iterable[Extents], *, pretty: bool) -> Iterator[str]:
    yield "<extents>\n" if pretty else "<extents>"
    for each in windows:
        for offset, length, exists in each:
            rows = (("offset", offset), ("length", length), ("exists", "true" if exists else "false"))
            if pretty:
                yield " <extent>\n" + "".join(f"  <{key}>{value}</{key}>\n" for key, value in rows) + " </extent>\n"
            else:
                yield "<extent>" + "".join(f"<{key}>{value}</{key}>" for key, value in rows) + "</extent>"
    yield "</extents>\n\n" if pretty else "</extents>\n"
