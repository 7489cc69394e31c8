"""Where an archive lies: a folder here. Small files, each of which appears whole or not at all.

(A folder behind SFTP has the same methods: agent/remote.py.)
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Protocol

from agent.errors import NotFoundError, SiphonError
from agent.files import sync_folder, whole
from agent.threads import blocking


class Store(Protocol):
    """A folder tree; names are paths relative to it, with slashes."""

    place: str

    async def names(self, folder: str) -> list[str]:
        """Return what lies in a folder, sorted; nothing if there is no such folder."""

    async def read(self, name: str) -> bytes:
        """Return a file's content; NotFoundError if there is none."""

    async def write(self, name: str, data: bytes) -> None:
        """Write a file: temporary name, fsync, rename. Folders on the way are made."""

    async def rename(self, name: str, new: str) -> None:
        """Give a folder another name, at once."""

    async def remove(self, folder: str) -> None:
        """Remove a folder and what is in it, if it is there."""


class Folder:
    """An archive in a local folder."""

    def __init__(self, path: str) -> None:
        self.place = path
        self._root = Path(path)

    async def names(self, folder: str) -> list[str]:
        """Return what lies in a folder, sorted."""
        path = self._root / folder
        return await blocking(lambda: sorted(each.name for each in path.iterdir()) if path.is_dir() else [])

    async def read(self, name: str) -> bytes:
        """Return a file's content; NotFoundError if there is none."""
        try:
            return await blocking((self._root / name).read_bytes)
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
