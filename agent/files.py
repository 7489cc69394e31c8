"""Files that appear whole or not at all, and standard input and output by the name `-`. Blocking."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from agent.errors import NotFoundError, SiphonError, UsageError

STDIO = "-"
#: Bytes read at a time: an object of the usual size.
CHUNK = 4 << 20
_PIPE = 1 << 20
#: How much is read ahead of what was asked for, bytes.
_AHEAD = 64 << 10


class Reading:
    """A file, or standard input, read from its beginning to its end."""

    def __init__(self, name: str) -> None:
        """Open `name`; NotFoundError or UsageError if that cannot be."""
        self.name = "standard input" if name == STDIO else name
        try:
            self._fd = os.dup(0) if name == STDIO else os.open(name, os.O_RDONLY | os.O_CLOEXEC)
            found = os.fstat(self._fd)
            # Standard input may be a file, but where in it we stand is the shell's business.
            self.regular, self.size = stat.S_ISREG(found.st_mode) and name != STDIO, found.st_size
            with contextlib.suppress(OSError):  # no pipe
                fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, _PIPE)
        except FileNotFoundError:
            raise NotFoundError(f"there is no file {name}") from None
        except OSError as error:
            raise UsageError(f"{name} cannot be read: {error.strerror}") from error
        if stat.S_ISDIR(found.st_mode):
            os.close(self._fd)
            raise UsageError(f"{name} is a folder")
        self._pipe = open(self._fd, "rb", _AHEAD, closefd=False)  # noqa: SIM115  # closed with the descriptor

    def read(self, count: int = CHUNK) -> bytes:
        """Return the next `count` bytes, fewer only at the end."""
        try:
            # A pipe gives what is in it, which is less than anybody wants; Python's reader collects it in place.
            return os.read(self._fd, count) if self.regular else self._pipe.read(count)
        except OSError as error:
            raise SiphonError(f"{self.name} cannot be read: {error.strerror}") from error

    def read_at(self, position: int, count: int) -> bytes:
        """Return bytes of a regular file from `position` on, at most `count`."""
        return os.pread(self._fd, count, position)

    def rewind(self, to: int = 0) -> None:
        """Go on reading at byte `to` of a regular file."""
        os.lseek(self._fd, to, os.SEEK_SET)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)

    @contextmanager
    def open(self) -> Iterator[Reading]:
        """Close it when the block ends."""
        try:
            yield self
        finally:
            self.close()


class Writing:
    """A file being written, or standard output."""

    def __init__(self, fd: int, name: str, *, holes: bool) -> None:
        self.name = name
        self.written = 0
        self._fd = fd
        self._holes = holes

    def write(self, *parts: bytes | memoryview) -> None:
        """Write all of `parts`; SiphonError if the disk is full or nobody reads the pipe any more."""
        try:
            for part in parts:
                view = memoryview(part)
                while view:
                    count = os.write(self._fd, view)
                    self.written += count
                    view = view[count:]
        except BrokenPipeError:
            raise SiphonError(
                "whoever read our output has gone: it is not complete", hint="see what the next command in the pipe said"
            ) from None
        except OSError as error:
            raise SiphonError(f"{self.name} cannot be written: {error.strerror}", hint="nothing of it was left behind") from error

    def skip(self, count: int) -> None:
        """Write `count` zeros: a hole where the file can have one."""
        if self._holes:
            os.lseek(self._fd, count, os.SEEK_CUR)
            self.written += count
            return
        zeros = bytes(min(count, CHUNK))
        while count:
            self.write(memoryview(zeros)[: min(count, CHUNK)])
            count -= min(count, CHUNK)

    def finish(self) -> None:
        """Give a file its length where it ends in a hole, and see it on the disk."""
        if self._holes:
            os.ftruncate(self._fd, self.written)
            os.fsync(self._fd)


@contextmanager
def whole(name: str, *, force: bool = False) -> Iterator[Writing]:
    """Write the file `name` under a temporary name, and give it its own once the block ended well.

    UsageError if it exists, unless `force` replaces it.
    """
    if name == STDIO:
        yield Writing(1, "standard output", holes=False)
        return
    path = Path(name)
    refuse_existing(path, force=force)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UsageError(f"{name} cannot be written: {error.strerror}") from error
    try:
        writing = Writing(fd, name, holes=True)
        yield writing
        writing.finish()
        refuse_existing(path, force=force)
        temporary.rename(path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    finally:
        os.close(fd)


def refuse_existing(path: Path, *, force: bool) -> None:
    """UsageError if something has that name, unless `force`; something that is no file is never replaced."""
    if path.exists() and (not force or not path.is_file()):
        raise UsageError(f"{path} exists", hint="--force replaces a file" if path.is_file() else "it is no file")


def sync_folder(folder: Path) -> None:
    """See the names in a folder on the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def flush_output() -> None:
    """See that what was printed has reached whoever reads it."""
    try:
        if sys.stdout is not None:  # closed by whoever started us
            sys.stdout.flush()
    except BrokenPipeError:
        raise SiphonError("whoever read our output has gone: it is not complete") from None


def digest_of(source: Reading) -> tuple[str, int]:
    """Return the xxh3-128 (32 hexadecimal digits) and the length of a regular file, which is then read from its beginning."""
    state, count = xxhash.xxh3_128(), 0
    while data := source.read(CHUNK):
        state.update(data)
        count += len(data)
    source.rewind()
    return state.hexdigest(), count
