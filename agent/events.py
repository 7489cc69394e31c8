"""What a run tells while it goes on: one struct an event, whose JSON is a stable contract.

Each line of `--json` is one of these, `type` naming which; the last is `result` or `error`.
Bytes are bytes, times seconds.
"""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec


class Event(msgspec.Struct, frozen=True, tag_field="type", kw_only=True):
    """Base of all events; `image` is the source's, "" where a run is about one image alone and the event does not name it."""

    image: str = ""


class PlannedStep(msgspec.Struct, frozen=True, kw_only=True):
    """A step of a plan; `extents` and `bytes` are known in a dry run only."""

    base: str | None
    end: str
    extents: int | None = None
    bytes: int | None = None


class Plan(Event, frozen=True, tag="plan"):
    """What the run is about to do; in a dry run, what it would do."""

    image: str
    target: str
    dry_run: bool
    end: str
    steps: tuple[PlannedStep, ...]
    creates: tuple[str, ...] = ()
    removes: tuple[str, ...] = ()


class Progress(Event, frozen=True, tag="progress"):
    """How far step `step` of `steps` is: `done` of `known` bytes read so far, `durable` the offset below which all is safe."""

    step: int
    steps: int
    base: str | None
    end: str
    done: int
    known: int
    sent: int
    durable: int
    attempt: int
    seconds: float


class Retry(Event, frozen=True, tag="retry"):
    """An attempt failed and the next one comes in `wait` seconds."""

    attempt: int
    error: str
    wait: float


class Warned(Event, frozen=True, tag="warning"):
    """Something the user should know; the run goes on."""

    message: str


class Decision(Event, frozen=True, tag="decision"):
    """Something the run decided or ran, told with --verbose only."""

    message: str


class Result(Event, frozen=True, tag="result"):
    """The run is over and the replica holds `end`; `bytes_skipped` were not sent since the target had them (--checksum-skip)."""

    state: Literal["committed", "up-to-date", "planned"]
    image: str
    target: str
    base: str | None
    end: str | None
    bytes_read: int
    bytes_sent: int
    resumed_from: int | None
    attempts: int
    seconds: float
    steps: int = 0
    bytes_skipped: int = 0
    removed: tuple[str, ...] = ()


class Error(Event, frozen=True, tag="error"):
    """The run failed: `code` is the exit code, `hint` what to do."""

    code: int
    message: str
    hint: str


class Summary(Event, frozen=True, tag="summary"):
    """A run about many images is over; `code` is its exit code: that of the failures if they are of one kind, 1 if not."""

    images: int
    committed: int
    failed: int
    code: int
    bytes_read: int
    bytes_sent: int
    seconds: float
    bytes_skipped: int = 0


def about(event: Event, image: str) -> Event:
    """Return the event, told to be about `image`."""
    return msgspec.structs.replace(event, image=image)


class Observer(Protocol):
    """Whoever wants to know."""

    def emit(self, event: Event) -> None:
        """Take an event; must return at once."""
