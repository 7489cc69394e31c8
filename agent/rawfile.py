"""Diffs replayed onto a raw file, so that a backup is readable without any Ceph. Blocking.

Beside the file lies FILE.siphon, which says at which snapshot the file stands and whether a diff is
half applied. Writes are absolute, so a diff that was interrupted is applied again, the very same one.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from agent.diff import Data, Zero
from agent.difffile import DiffFile
from agent.errors import ConflictError, DataError, SiphonError, UsageError
from agent.files import whole
from agent.manifest import Manifest
from agent.merge import Header
from agent.model import Value, decode, encode
from agent.writes import Imported
from agent.zeros import runs

_CHUNK = 1 << 20


class Place(Value, frozen=True):
    """The snapshot that a raw file holds ("" for none) and its size, bytes; and the diff that is being applied.

    `digest` is that diff's xxh3-128, "" where it came through a pipe and nothing told it.
    """

    snapshot: str = ""
    size: int = 0
    under_way: Header | None = None
    digest: str = ""


def apply(diff: DiffFile, digest: str, file: str, manifest: Manifest | None, *, allow_shrink: bool) -> Imported:
    """Bring a raw file from the diff's start point to its end; ConflictError if it does not stand there.

    `digest` is the diff's xxh3-128 where it is known beforehand, else "".
    """
    path, state, header = Path(file), Path(f"{file}.siphon"), diff.header
    place = decode(state.read_bytes(), Place, str(state)) if state.exists() else Place()
    _fits(path, place, header, digest, allow_shrink=allow_shrink)
    _record(state, Place(place.snapshot, place.size, header, digest))
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise SiphonError(f"{file} cannot be written: {error.strerror}") from error
    try:
        os.ftruncate(fd, header.size)
        written = _write(fd, diff)
        if manifest is not None and (diff.digest, diff.position) != (manifest.digest, manifest.bytes):
            _record(state, Place(place.snapshot, place.size, header))
            raise DataError(
                f"{diff.source.name} is not what its manifest says: {file} is spoilt", hint="make it anew from a full diff"
            )
        os.fsync(fd)
    except OSError as error:
        raise SiphonError(
            f"{file} cannot be written: {error.strerror}", hint="apply the same diff again once there is room"
        ) from error
    finally:
        os.close(fd)
    _record(state, Place(header.end, header.size))
    return Imported("imported", diff.position, written)


def _fits(path: Path, place: Place, header: Header, digest: str, *, allow_shrink: bool) -> None:
    size = path.stat().st_size if path.exists() else None
    if place.under_way is not None:
        begun = f"{place.under_way.base or '(creation)'} → {place.under_way.end or '(present)'}"
        if size is None or place.under_way != header or not digest or place.digest != digest:
            raise ConflictError(
                f"{path} is in the middle of a diff, {begun}, and this is not known to be that one",
                hint=f"apply that very file again, or remove {path} and {path}.siphon and begin with a full diff",
            )
        return
    if not header.base:
        if size:
            raise ConflictError(f"the diff begins at the image's creation, and {path} is not empty", hint="name a new file")
        return
    if header.base != place.snapshot or size != place.size:
        stands = f"stands at {place.snapshot}" if place.snapshot else "stands at no known snapshot"
        found = (
            "is not there" if size is None else stands if size == place.size else f"has {size} bytes and should have {place.size}"
        )
        raise ConflictError(
            f"the diff begins at {header.base}, and {path} {found}", hint="apply diffs in the order of their making"
        )
    if header.size < place.size and not allow_shrink:
        raise ConflictError(
            f"the diff shrinks {path} from {place.size} to {header.size} bytes", hint="--allow-shrink gives up what lies behind"
        )


def _record(state: Path, place: Place) -> None:
    with whole(str(state), force=True) as out:
        out.write(encode(place).encode())


def _write(fd: int, diff: DiffFile) -> int:
    written = 0
    for event in diff.events():
        match event:
            case Data(offset, data):
                if offset + len(data) > diff.header.size:
                    raise UsageError(f"the diff writes at {offset}, behind the image's end at {diff.header.size}")
                for begin, end, holds in runs(offset, bytes(data)):
                    if holds:
                        _put(fd, memoryview(data)[begin:end], offset + begin)
                        written += end - begin
                    else:
                        _zero(fd, offset + begin, offset + end)
            case Zero(offset, length):
                _zero(fd, offset, min(offset + length, diff.header.size))
            case _:
                pass
    return written


def _put(fd: int, data: memoryview, at: int) -> None:
    while data:
        count = os.pwrite(fd, data, at)
        data, at = data[count:], at + count


def _zero(fd: int, start: int, end: int) -> None:
    """Make a range read as zeros: only where the file holds data, so that holes stay."""
    while start < end and (data := _next_data(fd, start)) < end:
        stop = min(end, os.lseek(fd, data, os.SEEK_HOLE), data + _CHUNK)
        _put(fd, memoryview(bytes(stop - data)), data)
        start = stop


def _next_data(fd: int, start: int) -> int:
    try:
        return os.lseek(fd, start, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return 1 << 63  # nothing but a hole is left
        raise
