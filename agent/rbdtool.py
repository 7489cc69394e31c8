"""Ceph's own command line as words and answers: what is typed at a site that has nothing else. Pure.

Places are given as options (`--image=…`), never as specs, so that no name needs an escape; what
runs in a shell is quoted by shlex. Forms and answers are those of 16.2 (tried), which 18.2 keeps.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from agent.errors import SiteError
from agent.model import ImageSpec, Shape, Snapshot
from agent.names import METADATA_PREFIX, guard_object

V = TypeVar("V")

#: What separates the answers of several commands; JSON of one line never looks so.
_BETWEEN = "--next--"
#: What a note begins with while a command of ours is at work, and how a header's name begins.
_WORKING, _HEADER = "working", "rbd_header."
#: What `changing` ends with where somebody has taken the lock since the last note; no errno that rbd ends with.
TAKEN = 213
#: How the key of an image's metadata begins in the header's omap.
_OMAP_PREFIX = "metadata_"

#: What `rados watch` prints once its watch is registered.
WATCHING = b"press enter"


class Info(msgspec.Struct, frozen=True):
    """`rbd info`: the image's id, size (bytes) and features."""

    id: str
    size: int
    features: list[str]


class _Snap(msgspec.Struct):
    id: int
    name: str
    size: int


class Watcher(msgspec.Struct, frozen=True):
    """A client that has the image open for writing."""

    address: str


class _Status(msgspec.Struct):
    watchers: list[Watcher] = []


class Locker(msgspec.Struct, frozen=True):
    """Who owns the image's lock; `id` and `locker` are how `rbd lock rm` names it."""

    id: str
    locker: str
    address: str


class _Extent(msgspec.Struct):
    length: int
    exists: str = "true"


@dataclass(frozen=True)
class Look:
    """An image as `looking` shows it.

    Snapshots are listed oldest first; `watchers` are the addresses of the clients that have the image
    open for writing, `locker` is who owns librbd's lock, and of the metadata only what is ours is there.
    """

    info: Info
    snapshots: tuple[Snapshot, ...]
    watchers: tuple[str, ...]
    locker: Locker | None
    metadata: dict[str, str]


def looking(tool: Tool, at: ImageSpec, image_id: str) -> list[str]:
    """Return one command that shows an image's size, snapshots, watchers, lock and our metadata.

    `rbd image-meta list` changes the header's time (16.2, tried), so the metadata is read where it lies.
    """
    parts = (
        tool.rbd("info", "--format=json", at=at),
        tool.snap("ls", "--format=json", at=at),
        tool.rbd("status", "--format=json", at=at),
        tool.lock("ls", "--format=json", at=at),
        tool.rados("listomapvals", header_object(image_id), at=at),
    )
    return shell(f" && echo && echo {_BETWEEN} && ".join(shlex.join(each) for each in parts))


def looked(out: bytes) -> Look:
    """Read what `looking` prints."""
    shown, snapshots, status, locks, omap = out.split(f"\n{_BETWEEN}\n".encode(), 4)
    listed = _read(snapshots, list[_Snap], "rbd snap ls")
    return Look(
        info(shown),
        tuple(sorted((Snapshot(each.id, each.name, each.size) for each in listed), key=lambda each: each.id)),
        watchers(status),
        locker(locks),
        _metadata(omap.decode(errors="replace")),
    )


def _metadata(omap: str) -> dict[str, str]:
    """Read our entries from `rados listomapvals` of a header: a key's line, `value (N bytes) :`, and a hexdump."""
    found: dict[str, str] = {}
    lines = iter(omap.splitlines())
    for line in lines:
        if not line.startswith(_OMAP_PREFIX + METADATA_PREFIX):
            continue
        size = int(next(lines).split("(")[1].split()[0])
        value = bytearray()
        while len(value) < size:
            value += bytes.fromhex(next(lines)[10:58])
        found[line.removeprefix(_OMAP_PREFIX)] = value.decode(errors="replace")
    return found


def info(out: bytes) -> Info:
    """Read `rbd info --format=json`."""
    return _read(out, Info, "rbd info")


def changed(out: bytes) -> int:
    """Read `rbd diff --format=json`: how many bytes its extents have together."""
    return sum(each.length for each in _read(out, list[_Extent], "rbd diff"))


def names(out: bytes) -> list[str]:
    """Read `rbd ls --format=json`."""
    return _read(out, list[str], "rbd ls")


def imported(out: bytes) -> tuple[int | None, str]:
    """Read what `importing` prints: rbd's status (None if it is not there) and the digest of what it was fed."""
    status, digest = None, ""
    for words in (line.split() for line in out.decode(errors="replace").splitlines()):
        if words[:1] == ["rbd"]:
            status = int(words[1])
        elif words:
            digest = words[0]
    return status, digest


def _read(out: bytes, kind: type[V], what: str) -> V:
    try:
        return msgspec.json.decode(out, type=kind)
    except msgspec.MsgspecError as error:
        raise SiteError(f"what `{what}` printed at the target cannot be read: {error}") from error


class Tool:
    """The words of commands on one cluster, `options` being how it is named (`--conf`, `--id` …)."""

    def __init__(self, options: Iterable[str]) -> None:
        self._options = tuple(options)

    def rbd(self, *words: str, at: ImageSpec, snapshot: str = "") -> list[str]:
        """Return an rbd command on an image, or on a snapshot of it."""
        place = [f"--pool={at.pool}", f"--image={at.image}"]
        if at.namespace:
            place.append(f"--namespace={at.namespace}")
        if snapshot:
            place.append(f"--snap={snapshot}")
        return ["rbd", *self._options, *words[:1], *place, *words[1:]]

    def image_meta(self, verb: str, *words: str, at: ImageSpec) -> list[str]:
        """Return `rbd image-meta`; what follows the verb may begin with a dash."""
        return self._two("image-meta", verb, at, ["--", *words] if words else ["--format=json"])

    def snap(self, verb: str, *words: str, at: ImageSpec, snapshot: str = "") -> list[str]:
        """Return `rbd snap`."""
        return self._two("snap", verb, at, [*([f"--snap={snapshot}"] if snapshot else []), *words])

    def lock(self, verb: str, *words: str, at: ImageSpec) -> list[str]:
        """Return `rbd lock`."""
        return self._two("lock", verb, at, list(words))

    def trash(self, at: ImageSpec) -> list[str]:
        """Return what moves an image to the trash."""
        return self._two("trash", "mv", at, [])

    def _two(self, group: str, verb: str, at: ImageSpec, words: list[str]) -> list[str]:
        whole = self.rbd(group, *words, at=at)
        whole.insert(whole.index(group) + 1, verb)
        return whole

    def destination(self, to: ImageSpec, snapshot: str = "") -> list[str]:
        """Return the options that name where a rename leads."""
        words = [f"--dest-pool={to.pool}", f"--dest={to.image}"]
        if to.namespace:
            words.append(f"--dest-namespace={to.namespace}")
        return [*words, f"--dest-snap={snapshot}"] if snapshot else words

    def names(self, beside: ImageSpec) -> list[str]:
        """Return what lists the images of a pool or namespace."""
        place = [f"--pool={beside.pool}", *([f"--namespace={beside.namespace}"] if beside.namespace else [])]
        return ["rbd", *self._options, "ls", "--format=json", *place]

    def create(self, at: ImageSpec, shape: Shape, features: Iterable[str], data_pool: str) -> list[str]:
        """Return what makes an empty image."""
        words = [f"--size={shape.size}B", f"--object-size={1 << shape.order}B"]
        words += [f"--image-feature={each}" for each in features]
        if shape.stripe_count > 1:
            words += [f"--stripe-unit={shape.stripe_unit}B", f"--stripe-count={shape.stripe_count}"]
        if data_pool:
            words.append(f"--data-pool={data_pool}")
        return self.rbd("create", *words, at=at)

    def rados(self, *words: str, at: ImageSpec) -> list[str]:
        """Return a rados command where the image lies."""
        place = [f"--pool={at.pool}", *([f"--namespace={at.namespace}"] if at.namespace else [])]
        return ["rados", *self._options, *place, *words]

    def ceph(self, *words: str) -> list[str]:
        """Return a ceph command."""
        return ["ceph", *self._options, *words]


def shell(script: str) -> list[str]:
    """Return the command that runs a POSIX shell script, whatever the user's own shell is."""
    return ["sh", "-c", script]


def changing(tool: Tool, at: ImageSpec, trace: str, lease: str, command: list[str]) -> list[str]:
    """Return what runs `command` if nobody has taken the image's lock since the last note, and notes how it is then.

    Ends with the command's status, or with `TAKEN` before it ran. While the command runs the note says
    so: where the host dies in the middle, the next run knows that it was ours.
    """
    return shell(
        f"{_alone(tool, at, trace, lease)}; {shlex.join(command)}; status=$?; {noting(tool, at, trace, lease)}; exit $status"
    )


def noting(tool: Tool, at: ImageSpec, trace: str, lease: str) -> str:
    """Return a script that notes in the object `lease` when the object `trace` was last changed."""
    return f"{_stat(tool, at, trace)} | {shlex.join(tool.rados('put', lease, '-', at=at))}"


def comparing(tool: Tool, at: ImageSpec, trace: str, lease: str) -> list[str]:
    """Return a command that prints the last note and what it would be now."""
    get = shlex.join(tool.rados("get", lease, "-", at=at))
    return shell(f"{get} 2>/dev/null; echo {_BETWEEN}; {_stat(tool, at, trace)}")


@dataclass(frozen=True)
class Note:
    """What `comparing` prints: whether the lock's traces are as they were noted, and whether a command of ours was at work then."""

    same: bool
    working: bool


def note(out: bytes) -> Note:
    """Read what `comparing` prints."""
    noted, now = (part.splitlines() for part in out.split(f"{_BETWEEN}\n".encode(), 1))
    return Note(bool(noted) and bool(now) and noted[-1] == now[-1], noted[:1] == [_WORKING.encode()])


def trace_object(image_id: str, features: list[str]) -> str:
    """Return the object that changes whenever a client takes the image's lock.

    That is the object map, which does not change when the image is merely opened for writing; and the
    header, which does, where there is no object map (16.2, tried).
    """
    return f"rbd_object_map.{image_id}" if "object-map" in features else header_object(image_id)


def _alone(tool: Tool, at: ImageSpec, trace: str, lease: str) -> str:
    """Return a script that ends with `TAKEN` if the trace is not as it was noted, and notes that a command of ours begins.

    A header is not compared: our own commands change it by opening the image.
    """
    get, put = (shlex.join(tool.rados(verb, lease, "-", at=at)) for verb in ("get", "put"))
    compare = "true" if trace.startswith(_HEADER) else f'{get} 2>/dev/null | grep -qxF "$now"'
    return f'now=$({_stat(tool, at, trace)}); {compare} || exit {TAKEN}; {{ echo {_WORKING}; echo "$now"; }} | {put} || exit'


def _stat(tool: Tool, at: ImageSpec, trace: str) -> str:
    return shlex.join(tool.rados("stat2", trace, at=at))


def disturbing(tool: Tool, at: ImageSpec, image_id: str) -> list[str]:
    """Return a command that prints when the header was last changed, which every opening for writing does, and who has it open."""
    stat = _stat(tool, at, header_object(image_id))
    return shell(f"{stat} && echo {_BETWEEN} && {shlex.join(tool.rbd('status', '--format=json', at=at))}")


def disturbed(out: bytes) -> tuple[bytes, tuple[str, ...]]:
    """Read what `disturbing` prints: the header's time, and the watchers' addresses."""
    header, status = out.split(f"{_BETWEEN}\n".encode(), 1)
    return header, watchers(status)


def watchers(out: bytes) -> tuple[str, ...]:
    """Read the addresses of `rbd status --format=json`."""
    return tuple(each.address for each in _read(out, _Status, "rbd status").watchers)


def locker(out: bytes) -> Locker | None:
    """Read `rbd lock ls --format=json`: librbd's own lock. Those that people take by hand are listed too, under other ids."""
    return next((each for each in _read(out, list[Locker], "rbd lock ls") if each.id.startswith("auto ")), None)


def header_object(image_id: str) -> str:
    """Return the RADOS object that holds an image's header."""
    return f"{_HEADER}{image_id}"


def lease_object(image_id: str) -> str:
    """Return the RADOS object whose watcher is the one run that works on the image; it holds the last proof."""
    return f"{guard_object(image_id)}.rbd"


def keeper(tool: Tool, at: ImageSpec, lease: str, silence: float) -> str:
    """Return a script that watches the object `lease` until its input ends or was silent for `silence` seconds.

    A watch is visible to all and ends with its client; RADOS drops it within half a minute where the host died.
    """
    there, create, watch = (shlex.join(tool.rados(verb, lease, at=at)) for verb in ("stat", "create", "watch"))
    heard = f'while [ -n "$(timeout {silence:.0f} head -c 1)" ]; do :; done'
    return f"{there} >/dev/null 2>&1 || {create} || exit; {{ {heard}; }} | {watch}"


def importing(tool: Tool, at: ImageSpec, trace: str, lease: str) -> list[str]:
    """Return what feeds its input to `rbd import-diff` and to b2sum, prints both results, and notes how the image is then.

    Prints `rbd STATUS` and the digest's line, in either order; ends with `TAKEN` as `changing` does.
    """
    # librbd would note the time of the writes in the header once a minute, and a header that changes is a stranger's sign.
    command = shlex.join(tool.rbd("import-diff", "--no-progress", "--rbd-mtime-update-interval=0", "--path=-", at=at))
    run = f"{{ {command} >&2; echo rbd $? >&4; }}"
    feed = f"{{ {{ tee /dev/fd/3 | {run}; }} 3>&1 | b2sum; }} 4>&1"
    return shell(f"{_alone(tool, at, trace, lease)}; {feed}; {noting(tool, at, trace, lease)}")
