"""Finding runs of zeros in what was read, so that a replica stays as thin as its source. Pure.

Blocks are compared in place by `bytes.startswith`: 20 µs a MiB of data, 35 µs a MiB of zeros. numpy
does data in 6 µs, but takes 50 ms of every start to import.
"""

from __future__ import annotations

#: Runs of zeros shorter than this travel as data; also BlueStore's usual allocation unit, bytes.
ZERO_BLOCK = 4096
_ZEROS = bytes(ZERO_BLOCK)


def runs(offset: int, data: bytes) -> list[tuple[int, int, bool]]:
    """Cut `data`, which lies at `offset` in the image, into runs of (start, end, holds data).

    `start` and `end` count from the beginning of `data`. A run without data covers whole
    ZERO_BLOCKs as aligned in the image, and the zeros of a ragged edge beside them.
    """
    is_zero = data.startswith
    head = min(-offset % ZERO_BLOCK, len(data))
    tail = head + (len(data) - head) // ZERO_BLOCK * ZERO_BLOCK
    result: list[tuple[int, int, bool]] = []
    at = end = 0
    for block in range(head, tail, ZERO_BLOCK):
        if block < end or not is_zero(_ZEROS, block):
            continue
        start, end = block, block + ZERO_BLOCK
        while end < tail and is_zero(_ZEROS, end):
            end += ZERO_BLOCK
        # A ragged edge joins the zeros beside it where it holds zeros too.
        if block == head and not any(data[:head]):
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
