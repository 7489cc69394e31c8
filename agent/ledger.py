"""The worker's account of a step's frames: which segments are whole, durable and right. Pure.

Frames arrive in any order; a segment is settled when as many frames as the controller sent for it
are durable and their checksums add up to what the controller says. Checkpoints are passed on in
the order of segments, so what lies below one is complete.
"""

from __future__ import annotations

from dataclasses import dataclass

from agent.errors import DataError
from agent.model import Checkpoint
from agent.wire import DIGEST_MASK


@dataclass(slots=True)
class _Segment:
    arrived: int = 0
    durable: int = 0
    digest: int = 0
    expected: int | None = None
    checkpoint: Checkpoint | None = None


class Ledger:
    """Accounts for one step from `start` on."""

    def __init__(self, start: Checkpoint) -> None:
        self.checkpoint = start
        self._segments: dict[int, _Segment] = {}

    def arrived(self, segment: int, checksum: int) -> None:
        """A frame of `segment` arrived; DataError if that segment was settled before."""
        if segment < self.checkpoint.segments:
            raise DataError(f"a frame arrived for segment {segment}, which is complete")
        one = self._segments.setdefault(segment, _Segment())
        one.arrived += 1
        one.digest = (one.digest + checksum) & DIGEST_MASK

    def durable(self, segment: int) -> bool:
        """A frame of `segment` is durable; return whether the checkpoint moved."""
        self._segments[segment].durable += 1
        return self._advance()

    def announced(self, segment: int, frames: int, digest: str, checkpoint: Checkpoint) -> bool:
        """The controller sent `frames` frames for `segment`; return whether the checkpoint moved."""
        one = self._segments.setdefault(segment, _Segment())
        one.expected, one.checkpoint = frames, checkpoint
        if one.arrived == frames and f"{one.digest:032x}" != digest:
            raise DataError(f"segment {segment} does not add up: {one.digest:032x} arrived, {digest} was sent")
        if one.arrived > frames:
            raise DataError(f"segment {segment} has {one.arrived} frames, {frames} were sent")
        return self._advance()

    def complete(self, total: Checkpoint) -> bool:
        """Tell whether everything up to `total` is durable; DataError if it is and does not add up."""
        if self.checkpoint.segments < total.segments:
            return False
        if self.checkpoint != total or self._segments:
            raise DataError(f"the step does not add up: {self.checkpoint} is here, {total} was sent")
        return True

    def _advance(self) -> bool:
        moved = False
        while one := self._segments.get(self.checkpoint.segments):
            if one.checkpoint is None or one.expected != one.durable:
                break
            total = (int(self.checkpoint.digest, 16) + one.digest) & DIGEST_MASK
            if f"{total:032x}" != one.checkpoint.digest or one.checkpoint.segments != self.checkpoint.segments + 1:
                raise DataError(f"segment {self.checkpoint.segments} does not add up to {one.checkpoint}")
            del self._segments[self.checkpoint.segments]
            self.checkpoint = one.checkpoint
            moved = True
        return moved
