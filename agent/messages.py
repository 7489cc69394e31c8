"""Control messages between controller and worker, and how they are packed (msgpack, by msgspec).

The controller asks and the worker answers, one request at a time, the answer bearing the request's
number. Between `Begin` and `Commit` data frames flow, `Checkpointed` follows them, and the worker
says `Durable` on its own. Either side sends `Heartbeat` when it has nothing else to say.
"""

from __future__ import annotations

import msgspec

from agent.errors import DataError
from agent.model import Checkpoint, ImageIdentity, ImageSpec, Lineage, Origin, Replica, Shape, Step


class Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Base of all messages."""


class Hello(Message, frozen=True):
    """The controller's first request: which run this is, and after how many seconds of silence to give up."""

    run: str
    timeout: float


class Join(Message, frozen=True):
    """A lane's only request: its input belongs to the worker that told its controller of this door. Answered by `Done`."""

    door: str
    secret: str


class Ping(Message, frozen=True):
    """Answered at once by `Pong`: how far away the other side is."""


class Pong(Message, frozen=True):
    """Here."""


class Welcome(Message, frozen=True):
    """The worker's cluster and itself; `trouble` lists what the cluster's health says against writing.

    `door` and `secret` are what a further lane needs to join.
    """

    fsid: str
    host: str
    pid: int
    user: str
    conf: str
    trouble: tuple[str, ...] = ()
    door: str = ""
    secret: str = ""


class Survey(Message, frozen=True):
    """Look at a replica without touching it. Answered by `Seen`."""

    image: ImageSpec
    source: ImageIdentity


class Probe(Message, frozen=True):
    """See that a pool (that of `image`) may be written to; it is as before afterwards. Answered by `Done`."""

    image: ImageSpec


class Open(Message, frozen=True):
    """Take the replica for writing, if it is one of `source`. Answered by `Seen`.

    `discard` says that the user gave up what somebody else changed in it.
    """

    image: ImageSpec
    source: ImageIdentity
    discard: bool = False


class Seen(Message, frozen=True):
    """What the target holds; None where there is no image of that name."""

    replica: Replica | None


class Trash(Message, frozen=True):
    """Move the image of that name and id to the trash. Answered by `Done`."""

    image: ImageSpec
    image_id: str


class Create(Message, frozen=True):
    """Make an empty replica and take it for writing. Answered by `Created`."""

    image: ImageSpec
    shape: Shape
    lineage: Lineage
    metadata: dict[str, str]
    data_pool: str = ""


class Created(Message, frozen=True):
    """The replica as it is now, and the features that this cluster could not give it."""

    replica: Replica
    left_out: tuple[str, ...] = ()


class Begin(Message, frozen=True):
    """Prove the base and begin (or go on with) a step; `discard` gives up foreign changes. Answered by `Begun`."""

    step: Step
    discard: bool = False


class Begun(Message, frozen=True):
    """The worker is ready; everything below the checkpoint is durable already."""

    checkpoint: Checkpoint


class Checkpointed(Message, frozen=True):
    """Said after the frames of a segment: what the step's checkpoint is once they are durable."""

    segment: int
    frames: int
    digest: str
    checkpoint: Checkpoint


class Durable(Message, frozen=True):
    """Everything below the checkpoint is durable, and its digest was right."""

    checkpoint: Checkpoint


class Compare(Message, frozen=True):
    """Which of these extents, each at most some tens of KiB, hold already what they are to hold? Answered by `Compared`.

    `names` are those of agent/sameness.py, one behind the other.
    """

    extents: tuple[tuple[int, int], ...]
    names: bytes


class Compared(Message, frozen=True):
    """A byte for each extent: 1 where it holds that content, durably."""

    equal: bytes


class Commit(Message, frozen=True):
    """Everything was sent: compare with this total and make the snapshot. Answered by `Seen`."""

    checkpoint: Checkpoint
    origin: Origin


class Remove(Message, frozen=True):
    """Remove these of the replica's snapshots, by id. Answered by `Removed`."""

    snapshots: tuple[int, ...]


class Removed(Message, frozen=True):
    """Names that are gone, and names that stay with the reason."""

    names: tuple[str, ...]
    kept: dict[str, str]


class Close(Message, frozen=True):
    """Let go of the replica. Answered by `Done`."""


class Done(Message, frozen=True):
    """The request was carried out."""


class Failure(Message, frozen=True):
    """The request was not carried out; `kind` names a class of agent/errors.py."""

    kind: str
    message: str
    hint: str = ""


class Heartbeat(Message, frozen=True):
    """Still here."""


Any = (
    Hello
    | Join
    | Ping
    | Pong
    | Welcome
    | Survey
    | Probe
    | Open
    | Seen
    | Trash
    | Create
    | Created
    | Begin
    | Begun
    | Checkpointed
    | Durable
    | Compare
    | Compared
    | Commit
    | Remove
    | Removed
    | Close
    | Done
    | Failure
    | Heartbeat
)
_DECODER = msgspec.msgpack.Decoder(Any)
_ENCODER = msgspec.msgpack.Encoder()


def pack(message: Message) -> bytes:
    """Return a message's bytes."""
    return _ENCODER.encode(message)


def unpack(payload: bytes) -> Any:
    """Return the message; DataError if it is none that this version knows."""
    try:
        message: Any = _DECODER.decode(payload)
    except msgspec.MsgspecError as error:
        raise DataError(f"a message arrived that cannot be read: {error}") from error
    return message
