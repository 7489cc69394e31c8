"""A limit on bytes a second, over all lanes together, that may change with the time of day."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, time

from agent.errors import UsageError

_RATE = re.compile(r"(\d+(?:\.\d+)?)([KMG]?)", re.IGNORECASE)
_SPAN = re.compile(r"(\d\d):(\d\d)-(\d\d):(\d\d)\s+(\S+)")
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30}
_HINT = "bytes a second with K, M or G (powers of 1024), 0 for no limit: 200M; by the time of day: '08:00-18:00 50M, else 0'"
#: The largest piece, bytes; a limit makes pieces smaller, to this share of a second's bytes but no less than that many.
_GRAIN, _SHARE, _LEAST = 2 << 20, 0.05, 64 << 10


@dataclass(frozen=True)
class Timetable:
    """Limits by the time of day, in order; `otherwise` holds where none does. Bytes a second, 0 for no limit."""

    spans: tuple[tuple[time, time, float], ...] = ()
    otherwise: float = 0.0

    def at(self, now: time) -> float:
        """Return the limit at that time of day; a span may reach over midnight."""
        for begin, end, rate in self.spans:
            if begin <= now < end if begin < end else now >= begin or now < end:
                return rate
        return self.otherwise


UNLIMITED = Timetable()


def parse_limit(text: str) -> Timetable:
    """Read a rate, or spans of the day with a rate each and `else RATE`; UsageError if it is neither."""
    spans: list[tuple[time, time, float]] = []
    otherwise = 0.0
    parts = [part.strip() for part in text.split(",")]
    for number, part in enumerate(parts, 1):
        if match := _SPAN.fullmatch(part):
            try:
                begin, end = time(int(match[1]), int(match[2])), time(int(match[3]) % 24, int(match[4]))
            except ValueError:
                raise UsageError(f"{part!r} is no time of day", hint=_HINT) from None
            spans.append((begin, end, _rate(match[5], text)))
        elif number == len(parts) and (len(parts) == 1 or part.startswith("else ")):
            otherwise = _rate(part.removeprefix("else ").strip(), text)
        else:
            raise UsageError(f"{text!r} is no limit", hint=_HINT)
    return Timetable(tuple(spans), otherwise)


def _rate(text: str, whole: str) -> float:
    match = _RATE.fullmatch(text)
    if match is None:
        raise UsageError(f"{whole!r} is no limit", hint=_HINT)
    return float(match[1]) * (1 << _UNITS[match[2].upper()])


class Pacer:
    """Lets bytes go at the timetable's rate, without bursts: who comes waits until all before it have had their time."""

    def __init__(self, timetable: Timetable, now: Callable[[], datetime] = datetime.now) -> None:
        """Go by the local time of day that `now` tells."""
        self._timetable = timetable
        self._now = now
        self._free_at = 0.0

    @property
    def rate(self) -> float:
        """The limit at this time of day, bytes a second; 0 for none."""
        return self._timetable.at(self._now().time())

    @property
    def grain(self) -> int:
        """How large a piece may be at present for the line to stay even, bytes."""
        rate = self.rate
        return int(max(_LEAST, min(_GRAIN, rate * _SHARE))) if rate else _GRAIN

    async def passing(self, count: int) -> None:
        """Wait until `count` more bytes may go."""
        rate = self.rate
        if not rate:
            return
        at = asyncio.get_running_loop().time()
        start = max(at, self._free_at)
        self._free_at = start + count / rate
        if start > at:
            await asyncio.sleep(start - at)
