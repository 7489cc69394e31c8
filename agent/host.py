"""How busy this host's processors are."""

from __future__ import annotations

from pathlib import Path


class Idle:
    """Tells the share of the processors' time that was idle since it was asked last."""

    def __init__(self) -> None:
        self._before = _times()

    def share(self) -> float:
        """Return a number between 0 and 1; 1 where the kernel does not tell."""
        now = _times()
        total, idle = (after - before for after, before in zip(now, self._before, strict=True))
        self._before = now
        return idle / total if total > 0 else 1.0


def _times() -> tuple[int, int]:
    """Return all ticks and the idle ones (proc(5), /proc/stat: idle and iowait are the fourth and fifth)."""
    try:
        words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
    except OSError:
        return 0, 0
    ticks = [int(word) for word in words[1:9]]
    return sum(ticks), ticks[3] + ticks[4]
