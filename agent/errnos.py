"""What the error numbers mean that Ceph answers with: each becomes one of agent/errors.py. Pure."""

from __future__ import annotations

import errno
import os

from agent.errors import LinkError, LockedError, NotFoundError, SiphonError, SiteError

_CAPS_HINT = "the user needs: mon 'profile rbd' osd 'profile rbd pool=POOL' (see the README, Ceph capabilities)"
_LINK_ERRNOS = (errno.ETIMEDOUT, errno.ENOTCONN, errno.EIO)


def error_from(code: int, doing: str) -> SiphonError:
    """Return the error that stands for errno `code` met while `doing`."""
    words = f"{doing}: {os.strerror(code)}"
    if code == errno.ENOENT:
        return NotFoundError(f"{doing}: it is not there")
    if code in (errno.EPERM, errno.EACCES):
        return SiteError(f"{doing}: permission denied", hint=_CAPS_HINT)
    if code in (errno.ENOSPC, errno.EDQUOT):
        return SiteError(f"{doing}: the pool is full", hint="make room or raise the quota, then run the same command again")
    if code == errno.EROFS:
        return LockedError(f"{doing}: another client holds the image's exclusive lock")
    if code == errno.ESHUTDOWN:
        return LockedError(f"{doing}: fenced, another run has taken over the image")
    if code == errno.EBUSY:
        return LockedError(f"{doing}: the image or snapshot is in use")
    if code in _LINK_ERRNOS:
        return LinkError(f"{doing}: the cluster does not answer ({os.strerror(code)})")
    return SiphonError(words)
