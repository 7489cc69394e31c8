"""The words of the project as values: images, snapshots, origins, steps. No I/O, no behaviour beyond themselves.

All are msgspec structs, so the same value travels in a frame, lies in image metadata as JSON and
is compared in a test. Sizes and offsets are bytes; times are UTC in ISO 8601.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec

from agent.errors import ConflictError


class Value(msgspec.Struct, frozen=True, forbid_unknown_fields=False, omit_defaults=True):
    """Base of all values: immutable, and readers ignore fields that a later version added."""


class ImageSpec(Value, frozen=True):
    """Where an image lies: `pool[/namespace]/image`."""

    pool: str
    image: str
    namespace: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.pool, self.namespace, self.image) if part)


class ImageIdentity(Value, frozen=True):
    """Which image it is, whatever its name: ids are never used again, names are."""

    fsid: str
    image_id: str


class Snapshot(Value, frozen=True):
    """A snapshot in the user's namespace: `id` is unique in its pool, `size` is the image's size then."""

    id: int
    name: str
    size: int


class Origin(Value, frozen=True):
    """What a replica's snapshot is a copy of."""

    source: ImageIdentity
    snapshot: Snapshot
    committed_at: str = ""


class Step(Value, frozen=True):
    """One move of a replica: from `base` (None: from nothing) to `end`, both the source's snapshots."""

    base: Snapshot | None
    end: Snapshot

    def __str__(self) -> str:
        return f"{self.base.name if self.base else '(nothing)'} → {self.end.name}"


class Checkpoint(Value, frozen=True):
    """How far a step has come: all of it below `until` is durable.

    `segments` and `frames` count what was sent for it, `digest` (32 hexadecimal digits) is the sum
    of the frames' checksums.
    """

    until: int = 0
    segments: int = 0
    frames: int = 0
    digest: str = "0" * 32


class Mark(Value, frozen=True):
    """Written on a replica before a step touches it, removed after its snapshot is committed.

    `ready` turns true once the image stood exactly at the base and has the end's size.
    `snapshot` is the temporary name under which the end is taken, `holder` the RADOS address of the
    stock `rbd` that writes, where there is no worker.
    """

    step: Step
    snapshot: str
    started_at: str
    ready: bool = False
    checkpoint: Checkpoint = Checkpoint()
    holder: str = ""


class Lineage(Value, frozen=True):
    """Of which image a replica is the replica; `spec` is what that image was called at first copy."""

    source: ImageIdentity
    spec: str
    created_at: str


class Hand(Value, frozen=True):
    """A worker as others see it: its RADOS address, its process, and the controller's run that started it."""

    address: str
    host: str
    pid: int
    run: str
    since: str

    def __str__(self) -> str:
        return f"worker {self.pid} on {self.host}, since {self.since} ({self.address})"


class Tenure(Value, frozen=True):
    """A worker's time with the exclusive lock.

    `version` is the RADOS version of the image's header when it had let go of the lock in good order
    (0: it has not, or somebody else had the image open). `trusted` is False from taking an image
    whose content is not proven until that is rolled back.
    """

    hand: Hand
    state: Literal["holding", "releasing", "released"]
    version: int = 0
    trusted: bool = True


class Claim(Value, frozen=True):
    """A worker about to take the lock, and whether it will find the content proven."""

    hand: Hand
    trusted: bool


class Guard(Value, frozen=True):
    """Who may write a replica, kept in a RADOS object beside it; see agent/continuity.py.

    `tenure` is the last worker's that had the lock, `claim` the next one's; `past` are workers before
    them, whose watches may linger for half a minute.
    """

    tenure: Tenure | None = None
    claim: Claim | None = None
    past: tuple[Hand, ...] = ()

    @property
    def hands(self) -> tuple[Hand, ...]:
        """Return every worker that is known here."""
        now = (each.hand for each in (self.tenure, self.claim) if each)
        return (*now, *self.past)


class Shape(Value, frozen=True):
    """How an image is laid out; `features` is RBD's bit mask."""

    size: int
    order: int
    features: int
    stripe_unit: int = 0
    stripe_count: int = 0

    @property
    def period(self) -> int:
        """Return how many bytes a set of objects holds: where a diff may be cut."""
        return max(1, self.stripe_count) << self.order


class ReplicaSnapshot(Value, frozen=True):
    """A snapshot on the target; `origin` is None where the agent did not make it."""

    id: int
    name: str
    size: int
    origin: Origin | None = None


class Replica(Value, frozen=True):
    """What the target holds under the replica's name.

    `head` says how the present content stands:
    `clean`      equal to the newest snapshot with an origin (or empty, where there is none)
    `resumable`  in the middle of `mark`'s step, and nobody else can have written since
    `unsure`     in the middle of `mark`'s step, and it cannot be proven how far
    `touched`    changed by somebody else; `differs` tells how many bytes lie in changed extents
    `foreign`    not examined, since the image is no replica of the source at hand
    """

    spec: ImageSpec
    image_id: str
    size: int
    lineage: Lineage | None
    snapshots: tuple[ReplicaSnapshot, ...]
    head: Literal["clean", "resumable", "unsure", "touched", "foreign"]
    mark: Mark | None = None
    differs: int = 0

    def origins(self) -> dict[int, ReplicaSnapshot]:
        """Map the ids of the source's snapshots to the snapshots here that are their copies."""
        if self.lineage is None:
            return {}
        return {
            each.origin.snapshot.id: each
            for each in self.snapshots
            if each.origin is not None and each.origin.source == self.lineage.source
        }


class Source(Value, frozen=True):
    """What the source holds: the image, its snapshots oldest first, and its present size."""

    spec: ImageSpec
    identity: ImageIdentity
    size: int
    snapshots: tuple[Snapshot, ...]

    def by_id(self, snapshot_id: int) -> Snapshot | None:
        """Return the snapshot of that id, None if it is gone."""
        return next((each for each in self.snapshots if each.id == snapshot_id), None)


def encode(value: Value) -> str:
    """Return `value` as one line of JSON."""
    return msgspec.json.encode(value).decode()


V = TypeVar("V", bound=Value)


def decode(text: str | bytes, kind: type[V], where: str) -> V:
    """Return the value that `encode` wrote; ConflictError, naming `where` it lies, if it cannot be read."""
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.MsgspecError as error:
        raise ConflictError(
            f"what the agent left in {where} cannot be read ({error})",
            hint="was it written by a later version of rbd-siphon, or by hand?",
        ) from error
