"""What a run looks like: a live line on a terminal, plain lines elsewhere, JSON lines for programs.

Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import defaultdict
from typing import TextIO

import msgspec
from rich.console import Console
from rich.live import Live
from rich.text import Text

from agent import events as e

_PLAIN_EVERY = 5.0  # seconds between progress lines where there is no terminal


def amount(count: float) -> str:
    """Return bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """Return seconds for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


class JsonLines:
    """One JSON object a line on standard output."""

    def __init__(self, out: TextIO, *, verbose: bool) -> None:
        self._out = out
        self._verbose = verbose

    def emit(self, event: e.Event) -> None:
        """Write the event's line."""
        if isinstance(event, e.Decision) and not self._verbose:
            return
        with contextlib.suppress(BrokenPipeError):  # whoever read it has had enough; the work goes on
            self._out.write(msgspec.json.encode(event).decode() + "\n")
            self._out.flush()

    def close(self) -> None:
        """Nothing is left to draw."""


class People:
    """Words for a person; `quiet` leaves warnings, errors and nothing else. Of `many` images the plans are left out."""

    def __init__(self, *, quiet: bool, verbose: bool, many: bool = False) -> None:
        self._quiet = quiet
        self._verbose = verbose
        self._many = many
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._last_line = time.monotonic()
        self._trouble: dict[str, str] = {}
        self._rates: dict[str, _Rate] = defaultdict(_Rate)
        self._running: dict[str, str] = {}

    def emit(self, event: e.Event) -> None:
        """Show the event, or not."""
        with contextlib.suppress(BrokenPipeError):
            self._show(event)

    def _show(self, event: e.Event) -> None:
        match event:
            case e.Progress():
                self._progress(event)
            case e.Plan():
                self._plan(event)
            case e.Retry():
                why = self._trouble[event.image] = event.error.splitlines()[0]
                self._line(f"{_whose(event)}attempt {event.attempt} failed: {why}; the next one in {event.wait:.1f} s")
            case e.Warned():
                self._line(f"warning: {_whose(event)}{event.message}", always=True)
            case e.Decision() if self._verbose:
                self._line(f"+ {_whose(event)}{event.message}")
            case e.Result() | e.Summary():
                self._over(event)
                self._print(_result(event) if isinstance(event, e.Result) else _summary(event))
            case e.Error():
                self._over(event)
                print(f"rbd-siphon: {_whose(event)}{event.message}", file=sys.stderr, flush=True)
                if event.hint:
                    print(f"  → {event.hint}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stop drawing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, text: str) -> None:
        if not self._quiet:
            print(text, file=sys.stdout, flush=True)

    def _over(self, event: e.Event) -> None:
        """Forget a run that has ended, and make room for its last line."""
        for known in (self._trouble, self._rates, self._running):
            known.pop(event.image, None)
        self.close()

    def _line(self, text: str, *, always: bool = False) -> None:
        if always or not self._quiet:
            self._console.print(Text(text))

    def _plan(self, plan: e.Plan) -> None:
        if plan.dry_run:
            self.close()
            self._print(_rehearsal(plan))
            return
        if self._many and not self._verbose:
            return
        what = ", ".join(f"{step.base or '(nothing)'} → {step.end}" for step in plan.steps)
        self._line(f"{plan.image} → {plan.target}: {what}")

    def _progress(self, progress: e.Progress) -> None:
        if self._quiet:
            return
        text = f"{_whose(progress)}{self._describe(progress)}"
        if self._console.is_terminal:
            self._running[progress.image] = text
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False, transient=True)
                self._live.start()
            self._live.update(Text("\n".join(self._running.values())), refresh=True)
        elif (now := time.monotonic()) - self._last_line >= _PLAIN_EVERY:
            self._last_line = now
            self._line(text)

    def _describe(self, progress: e.Progress) -> str:
        rate = self._rates[progress.image].of(progress)
        parts = [
            f"step {progress.step} of {progress.steps}",
            f"{amount(progress.done)} of {amount(progress.known)}",
            f"{amount(rate)}/s",
        ]
        if rate > 0 and progress.known > progress.done:
            parts.append(f"ETA {duration((progress.known - progress.done) / rate)}")
        parts.append(f"{progress.base or '(nothing)'} → {progress.end}")
        if progress.attempt > 1:
            parts.append(f"attempt {progress.attempt} (the last one: {self._trouble.get(progress.image, '')})")
        return " · ".join(parts)


class _Rate:
    """Bytes a second over the last few seconds."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def of(self, progress: e.Progress) -> float:
        if self._seen and (progress.seconds < self._seen[-1][0] or progress.done < self._seen[-1][1]):
            self._seen.clear()
        self._seen.append((progress.seconds, progress.done))
        self._seen = [each for each in self._seen if progress.seconds - each[0] <= 5.0]
        (first, before), (last, now) = self._seen[0], self._seen[-1]
        return (now - before) / (last - first) if last > first else 0.0


def _whose(event: e.Event) -> str:
    return f"{event.image}: " if event.image else ""


def _summary(summary: e.Summary) -> str:
    failed = f", {summary.failed} failed" if summary.failed else ""
    idle = summary.images - summary.committed - summary.failed
    return (
        f"{summary.images} image(s): {summary.committed} committed, {idle} up to date{failed}; "
        f"read {amount(summary.bytes_read)}, sent {amount(summary.bytes_sent)} in {duration(summary.seconds)}"
    )


def _result(result: e.Result) -> str:
    where = f"{result.image} → {result.target}"
    if result.state == "planned":
        return f"{where}: nothing was written (dry run)"
    if result.state == "up-to-date":
        return f"{where}: up to date at {result.end} ({duration(result.seconds)})"
    resumed = f", resumed at {amount(result.resumed_from)}" if result.resumed_from else ""
    tries = f", {result.attempts} attempts" if result.attempts > 1 else ""
    skipped = f", {amount(result.bytes_skipped)} were there already" if result.bytes_skipped else ""
    return (
        f"{where}: committed {result.end} (from {result.base or 'nothing'}): read {amount(result.bytes_read)}, "
        f"sent {amount(result.bytes_sent)} in {duration(result.seconds)}{skipped}{resumed}{tries}"
    )


def _rehearsal(plan: e.Plan) -> str:
    lines = [f"{plan.image} → {plan.target} would take {len(plan.steps)} step(s):"]
    for number, step in enumerate(plan.steps, 1):
        lines.append(
            f"  {number}. {step.base or '(nothing)'} → {step.end}: {step.extents} extent(s), {amount(step.bytes or 0)} to read"
        )
    lines += [f"  creates  {each}" for each in plan.creates]
    lines += [f"  removes  {each}" for each in plan.removes]
    return "\n".join(lines)
