"""Keeping freed buffers for the next ones, where the C library lets us.

Data move through buffers of megabytes that live for milliseconds. glibc gives each back to the kernel
and gets it anew, page by page: a fifth of the time of an `import-diff` from a pipe went there (1.8 s
to 1.5 s for 620 MiB, both on two busy cores).
"""

from __future__ import annotations

import ctypes

#: mallopt(3): from which size on a block is mapped by itself, how much is kept when freed, how much is taken at a time,
#: and how many heaps there are: with one for each thread, each keeps what it freed for itself.
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD, _ARENA_MAX = -3, -1, -2, -8
_LARGEST, _KEPT, _STEP = 32 << 20, 128 << 20, 16 << 20


def keep_freed() -> None:
    """Tell the C library, if it is one that can be told."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, size in ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, _KEPT), (_TOP_PAD, _STEP), (_ARENA_MAX, 1)):
            mallopt(option, size)
