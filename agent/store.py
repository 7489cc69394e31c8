"""Where an archive lies: a folder here. Small files, each of which appears whole or not at all.

(A folder behind SFTP has the same methods: agent/remote.py.)
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Protocol

from agent.errors import LockedError, NotFoundError, SiphonError
from agent.files import sync_folder, whole
from agent.threads import blocking

#: What lies in an archive's folder while a command is at work on it.
LOCK = ".lock"


class Store(Protocol):
    """A folder tree; names are paths relative to it, with slashes."""

    place: str

    async def names(self, folder: str) -> list[str]:
        """Return what lies in a folder, sorted; nothing if there is no such folder."""

    async def read(self, name: str, at: int = 0, count: int | None = None) -> bytes:
        """Return a file's content, or `count` bytes of it from `at` on; NotFoundError if there is none."""

    async def write(self, name: str, data: bytes) -> None:
        """Write a file: temporary name, fsync, rename. Folders on the way are made."""

    async def rename(self, name: str, new: str) -> None:
        """Give a folder another name, at once."""

    async def remove(self, folder: str) -> None:
        """Remove a folder and what is in it, if it is there."""

    def lock(self, folder: str) -> AbstractAsyncContextManager[None]:
        """Keep others off a folder while the block runs; LockedError if somebody is in it."""


class Folder:
    """An archive in a local folder."""

    def __init__(self, path: str) -> None:
        self.place = path
        self._root = Path(path)

    async def names(self, folder: str) -> list[str]:
        """Return what lies in a folder, sorted."""
        path = self._root / folder
        return await blocking(_names, path)

    async def read(self, name: str, at: int = 0, count: int | None = None) -> bytes:
        """Return a file's content, or a piece of it; NotFoundError if there is none."""
        try:
            return await blocking(_read, self._root / name, at, count)
        except FileNotFoundError:
            raise NotFoundError(f"there is no file {self._root / name}") from None
        except OSError as error:
            raise SiphonError(f"{self._root / name} cannot be read: {error.strerror}") from error

    async def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all."""
        await blocking(self._write, self._root / name, data)

    async def rename(self, name: str, new: str) -> None:
        """Give a folder another name."""
        await blocking(self._rename, self._root / name, self._root / new)

    async def remove(self, folder: str) -> None:
        """Remove a folder and what is in it."""
        await blocking(shutil.rmtree, self._root / folder, ignore_errors=True)

    @asynccontextmanager
    async def lock(self, folder: str) -> AsyncIterator[None]:
        """Keep others off a folder while the block runs, by a lock that ends with this process."""
        path = self._root / folder / LOCK
        fd = await blocking(self._locked, path)
        try:
            yield
        finally:
            os.close(fd)

    @staticmethod
    def _locked(path: Path) -> int:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise SiphonError(f"{path} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise LockedError(f"another command is at work on {path.parent}", hint="wait for it to end") from None
        return fd

    def _write(self, path: Path, data: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SiphonError(f"{path.parent} cannot be made: {error.strerror}") from error
        with whole(str(path), force=True) as out:
            out.write(data)

    def _rename(self, old: Path, new: Path) -> None:
        try:
            old.rename(new)
            sync_folder(new.parent)
        except OSError as error:
            raise SiphonError(f"{old} cannot be renamed to {new}: {error.strerror}") from error


def _read(path: Path, at: int, count: int | None) -> bytes:
    with path.open("rb") as file:
        file.seek(at)
        return file.read(-1 if count is None else count)


def _names(path: Path) -> list[str]:
    try:
        return sorted(each.name for each in path.iterdir())
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []
