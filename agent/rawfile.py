"""Diffs replayed onto a raw file, so that a backup is readable without any Ceph. Blocking.

Beside the file lies FILE.siphon, which says at which snapshot the file stands and whether a diff is
half applied. Writes are absolute, so a diff that was interrupted is simply applied again.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from agent.diff import Data, Zero
from agent.difffile import DiffFile
from agent.errors import ConflictError, DataError, SiphonError
from agent.files import whole
from agent.importing import Imported
from agent.manifest import Manifest
from agent.merge import Header
from agent.model import Value, decode, encode
from agent.zeros import runs

_CHUNK = 1 << 20


class Place(Value, frozen=True):
    """The snapshot that a raw file holds ("" for none), and the diff that is being applied to it."""

    snapshot: str = ""
    under_way: Header | None = None


def apply(diff: DiffFile, file: str, manifest: Manifest | None, *, allow_shrink: bool) -> Imported:
    """Bring a raw file from the diff's start point to its end; ConflictError if it does not stand there."""
    path, state, header = Path(file), Path(f"{file}.siphon"), diff.header
    place = decode(state.read_text(), Place, str(state)) if state.exists() else Place()
    _fits(path, place, header, allow_shrink=allow_shrink)
    _record(state, Place(place.snapshot, header))
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise SiphonError(f"{file} cannot be written: {error.strerror}") from error
    try:
        os.ftruncate(fd, header.size)
        written = _write(fd, diff)
        if manifest is not None and (diff.digest, diff.position) != (manifest.digest, manifest.bytes):
            raise DataError(
                f"{diff.source.name} is not what its manifest says: {file} is not to be used until a good one is applied"
            )
        os.fsync(fd)
    except OSError as error:
        raise SiphonError(
            f"{file} cannot be written: {error.strerror}", hint="apply the same diff again once there is room"
        ) from error
    finally:
        os.close(fd)
    _record(state, Place(header.end))
    return Imported("imported", diff.position, written)


def _fits(path: Path, place: Place, header: Header, *, allow_shrink: bool) -> None:
    if place.under_way is not None:
        if place.under_way != header:
            begun = f"{place.under_way.base or '(creation)'} → {place.under_way.end or '(present)'}"
            raise ConflictError(
                f"{path} is in the middle of the diff {begun}",
                hint="apply that one again first",
            )
        return
    size = path.stat().st_size if path.exists() else 0
    if not header.base and size:
        raise ConflictError(f"the diff begins at the image's creation, and {path} is not empty", hint="name a new file")
    if header.base and header.base != place.snapshot:
        stands = f"stands at {place.snapshot}" if place.snapshot else "stands at no known snapshot"
        raise ConflictError(
            f"the diff begins at {header.base}, and {path} {stands}", hint="apply the diffs in the order they were made"
        )
    if header.size < size and not allow_shrink:
        raise ConflictError(
            f"the diff shrinks {path} from {size} to {header.size} bytes", hint="--allow-shrink gives up what lies behind"
        )


def _record(state: Path, place: Place) -> None:
    with whole(str(state), force=True) as out:
        out.write(encode(place).encode())


def _write(fd: int, diff: DiffFile) -> int:
    written = 0
    for event in diff.events():
        match event:
            case Data(offset, data):
                for begin, end, holds in runs(offset, bytes(data)):
                    if holds:
                        os.pwrite(fd, memoryview(data)[begin:end], offset + begin)
                        written += end - begin
                    else:
                        _zero(fd, offset + begin, offset + end)
            case Zero(offset, length):
                _zero(fd, offset, min(offset + length, diff.header.size))
            case _:
                pass
    return written


def _zero(fd: int, start: int, end: int) -> None:
    """Make a range read as zeros: only where the file holds data, so that holes stay."""
    while start < end and (data := _next_data(fd, start)) < end:
        stop = min(end, os.lseek(fd, data, os.SEEK_HOLE), data + _CHUNK)
        os.pwrite(fd, bytes(stop - data), data)
        start = stop


def _next_data(fd: int, start: int) -> int:
    try:
        return os.lseek(fd, start, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return 1 << 63  # nothing but a hole is left
        raise
