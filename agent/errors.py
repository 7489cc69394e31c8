"""Every error a user can meet: one tree, classified once, each class with its exit code.

`transient` says whether the same attempt may succeed a moment later; the controller retries those
and nothing else. `hint` is what to type or look at next. What is not in this tree is a bug.

    SiphonError            1
    ├── UsageError         2   what was typed or configured cannot be meant
    │   └── NotFoundError  2   a cluster, pool, namespace, image or snapshot that is not there
    ├── ConflictError      3   writing would destroy what the agent did not make
    ├── SiteError          4   a site refused us: keys, host keys, permissions, versions, a full pool
    │   └── LinkError      4   (transient) a site cannot be reached, or stopped answering
    ├── LockedError        5   another run, or somebody else, holds the image
    └── DataError          6   (transient) what arrived is not what was sent
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class SiphonError(Exception):
    """Something failed; `str()` says what and where, `hint` what to do about it."""

    exit_code: ClassVar[int] = 1
    transient: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(SiphonError):
    """What was typed or configured cannot be meant."""

    exit_code = 2


class NotFoundError(UsageError):
    """A cluster, pool, namespace, image or snapshot is not there."""


class ConflictError(SiphonError):
    """Going on would destroy something that the agent did not make."""

    exit_code = 3


class SiteError(SiphonError):
    """A site refused us, and will again: keys, permissions, versions, space."""

    exit_code = 4


class LinkError(SiteError):
    """A site cannot be reached or stopped answering."""

    transient = True


class LockedError(SiphonError):
    """Another run of ours, or another client, holds the image."""

    exit_code = 5


class DataError(SiphonError):
    """A checksum or a digest did not match: what arrived is not what was sent."""

    exit_code = 6
    transient = True


_CLASSES = {
    cls.__name__: cls
    for cls in (
        SiphonError,
        UsageError,
        NotFoundError,
        ConflictError,
        SiteError,
        LinkError,
        LockedError,
        DataError,
    )
}


def rebuilt(kind: str, message: str, hint: str) -> SiphonError:
    """Return the error that the other side named `kind`; an unknown kind is a plain SiphonError."""
    return _CLASSES.get(kind, SiphonError)(message, hint=hint)


@contextmanager
def ungrouped() -> Iterator[None]:
    """Raise the first of our errors where a task group raises a group of them; other groups pass."""
    try:
        yield
    except BaseExceptionGroup as group:
        ours, others = group.split(SiphonError)
        if ours is None or others is not None:
            raise
        raise _first(ours) from None


def _first(group: BaseExceptionGroup[SiphonError]) -> SiphonError:
    one = group.exceptions[0]
    return _first(one) if isinstance(one, BaseExceptionGroup) else one
