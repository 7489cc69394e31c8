"""What to change while a transfer goes: how strongly to pack, and over how many lanes to send. Pure.

Both are judged by the same look at the last moments: how much of the time everything waited for the link,
how much of this host's processors was idle, and how many bytes went out.
"""

from __future__ import annotations

from dataclasses import dataclass

from agent.compression import RAW, Method
from agent.errors import UsageError
from agent.wire import Codec

#: From a link that outruns the processors to one that leaves them idle.
LADDER = (RAW, Method(Codec.LZ4), *(Method(Codec.ZSTD, level) for level in (1, 3, 5, 7, 9)))
#: To a site farther away than this (seconds) blocks are always packed, by zstd:1 at least: such a link is hardly ever
#: faster (at 100 ms and 1 Gbit/s, on two cores, a first copy took 5.8 s so and 7.7 s raw).
_FAR = 0.005
_FAR_RUNG = LADDER.index(Method(Codec.ZSTD, 1))
#: The window that OpenSSH's server gives a channel, bytes; it bounds what one lane has under way.
WINDOW = 2 << 20
#: What lanes are opened for at first, bytes a second, and how many there may be.
_HOPED, MOST_LANES = 125e6, 16
#: From which share of its window on a lane is taken to be bounded by it.
_FULL = 0.6
#: By what a rate must have grown for more lanes to be worth another try.
_GAIN = 1.1


def parse_lanes(text: str) -> int | None:
    """Read a number of lanes; None for `auto`, UsageError for anything else."""
    if text == "auto":
        return None
    if text.isdecimal() and 1 <= int(text) <= MOST_LANES:
        return int(text)
    raise UsageError(f"there cannot be {text!r} lanes", hint=f"auto, or a number from 1 to {MOST_LANES}")


@dataclass(frozen=True, slots=True)
class Look:
    """The last moments: shares of the time between 0 and 1, and bytes sent a second."""

    blocked: float
    idle: float
    rate: float


class Weigher:
    """Chooses the method by which blocks are packed."""

    def __init__(self, fixed: Method | None) -> None:
        """Keep to `fixed`, if there is one."""
        self._fixed = fixed
        self._rung = self._lowest = 0

    @property
    def method(self) -> Method:
        """The method to use now."""
        return self._fixed or LADDER[self._rung]

    def far(self, rtt: float) -> None:
        """Say how far away (seconds, there and back) the other side is."""
        if rtt > _FAR:
            self._lowest = _FAR_RUNG
            self._rung = max(self._rung, _FAR_RUNG)

    def look(self, look: Look) -> None:
        """Pack harder while the link is what everything waits for and processors idle; less hard where they are short."""
        if look.blocked > 0.5 and look.idle > 0.3:
            self._rung = min(self._rung + 1, len(LADDER) - 1)
        elif look.blocked < 0.1 and look.idle < 0.2:
            self._rung = max(self._rung - 1, self._lowest)


class Growth:
    """Chooses how many lanes there are."""

    def __init__(self, fixed: int | None) -> None:
        """Keep to `fixed` lanes, if that is given."""
        self._fixed = fixed
        self._before = 0.0

    @property
    def asked(self) -> bool:
        """Whether the user asked for several lanes: they are opened at once."""
        return self._fixed is not None and self._fixed > 1

    def first(self, rtt: float) -> int:
        """Return how many lanes to have once the first one is full; `rtt` in seconds."""
        if self._fixed is not None:
            return self._fixed
        return max(1, min(MOST_LANES // 2, round(rtt * _HOPED / WINDOW)))

    def look(self, look: Look, lanes: int, rtt: float) -> int:
        """Return how many lanes to have: more as long as the last ones helped, and windows are what bounds them."""
        if self._fixed is not None or look.blocked < 0.5 or lanes >= MOST_LANES:
            return lanes
        bounded = look.rate / lanes * rtt > WINDOW * _FULL
        grown = look.rate > self._before * _GAIN
        if not bounded or not grown:
            return lanes
        self._before = look.rate
        return min(MOST_LANES, lanes + 2)
