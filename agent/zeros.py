"""Finding runs of zeros in what was read, so that a replica stays as thin as its source. Pure."""

from __future__ import annotations

import numpy as np

#: Runs of zeros shorter than this travel as data; also BlueStore's usual allocation unit, bytes.
ZERO_BLOCK = 4096
_WORDS = ZERO_BLOCK // 8


def runs(offset: int, data: bytes) -> list[tuple[int, int, bool]]:
    """Cut `data`, which lies at `offset` in the image, into runs of (start, end, holds data).

    `start` and `end` count from the beginning of `data`. A run without data covers whole
    ZERO_BLOCKs as aligned in the image, and the zeros of a ragged edge beside them.
    """
    head = min(-offset % ZERO_BLOCK, len(data))
    count = (len(data) - head) // ZERO_BLOCK
    tail = head + count * ZERO_BLOCK
    zero = np.zeros(count + 2, dtype=np.int8)
    if count:
        words = np.frombuffer(data, dtype="<u8", count=count * _WORDS, offset=head).reshape(count, _WORDS)
        # Looking at two words of a block tells nearly all of the blocks that hold data.
        likely = np.flatnonzero((words[:, 0] == 0) & (words[:, -1] == 0))
        if likely.size:
            zero[likely[~words[likely].any(axis=1)] + 1] = 1
    turns = np.flatnonzero(np.diff(zero))
    result: list[tuple[int, int, bool]] = []
    at = 0
    for first, last in zip(turns[::2].tolist(), turns[1::2].tolist(), strict=True):
        start, end = head + first * ZERO_BLOCK, head + last * ZERO_BLOCK
        # A ragged edge joins the zeros beside it where it holds zeros too.
        if first == 0 and not any(data[:head]):
            start = 0
        if end == tail and not any(data[tail:]):
            end = len(data)
        if start > at:
            result.append((at, start, True))
        result.append((start, end, False))
        at = end
    if at < len(data):
        result.append((at, len(data), True))
    return result
