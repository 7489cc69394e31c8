"""Sending one step: pieces into frames, frames into segments, segments into checkpoints."""

from __future__ import annotations

import asyncio

from agent import messages as m
from agent.cluster import Image
from agent.comparing import comparing
from agent.extents import pieces
from agent.model import Checkpoint, Step
from agent.sameness import Thrift
from agent.session import Far
from agent.source import Piece, Tally, reading
from agent.wire import DIGEST_MASK

#: A segment is closed after so many bytes, frames or seconds: what a cut at worst repeats.
_SEGMENT_BYTES = 8 << 20
_SEGMENT_FRAMES = 4096
_SEGMENT_SECONDS = 2.0


async def send_step(session: Far, image: Image, step: Step, start: Checkpoint, tally: Tally, *, skip: bool = False) -> Checkpoint:
    """Send what `step` changes from `start` on, and return the checkpoint that stands for all of it.

    `skip` asks the target which blocks it has already, and does not send those.
    """
    sender = _Sender(session, start)
    async with reading(image, step.base, step.end, start.until, tally) as found:
        if not skip or step.base is None:
            async for piece in found:
                await sender.send(piece)
        else:
            thrift, clock = Thrift(), asyncio.get_running_loop().time
            async with comparing(session, found, thrift) as parts:
                async for piece, known in parts:
                    if known:
                        tally.equal += piece.length
                        sender.passed(piece.offset + piece.length)
                        continue
                    began = clock()
                    await sender.send(piece)
                    if piece.data is not None:  # zeros cost nothing to send, and say nothing of the link
                        thrift.sent(piece.length, clock() - began)
    sender.close(step.end.size)
    return sender.at


class _Sender:
    """Where a step stands: `at` is the checkpoint behind the last closed segment."""

    def __init__(self, session: Far, start: Checkpoint) -> None:
        self.at = start
        self._session = session
        self._open()

    def _open(self) -> None:
        self._frames = self._digest = self._bytes = 0
        self._since = asyncio.get_running_loop().time()

    async def send(self, piece: Piece) -> None:
        """Send a piece, in frames as large as they may be at present."""
        if piece.data is None:
            signed = await self._session.send(self.at.segments, piece.offset, piece.length, None)
            self._sent(signed, piece.offset + piece.length, 0)
            return
        for at, count in pieces(0, piece.length, self._session.grain):
            signed = await self._session.send(self.at.segments, piece.offset + at, count, piece.data[at : at + count])
            self._sent(signed, piece.offset + at + count, count)

    def passed(self, until: int) -> None:
        """Account for what need not be sent: the target has it up to `until`."""
        if asyncio.get_running_loop().time() - self._since > _SEGMENT_SECONDS:
            self.close(until)

    def _sent(self, checksum: int, until: int, weight: int) -> None:
        """Account for a frame, and close the segment if it is due."""
        self._frames += 1
        self._digest = (self._digest + checksum) & DIGEST_MASK
        self._bytes += weight
        late = asyncio.get_running_loop().time() - self._since > _SEGMENT_SECONDS
        if late or self._bytes >= _SEGMENT_BYTES or self._frames >= _SEGMENT_FRAMES:
            self.close(until)

    def close(self, until: int) -> None:
        """Tell the worker what the segment holds, and go on to the next."""
        total = (int(self.at.digest, 16) + self._digest) & DIGEST_MASK
        self.at = Checkpoint(
            until=until, segments=self.at.segments + 1, frames=self.at.frames + self._frames, digest=f"{total:032x}"
        )
        self._session.tell(
            m.Checkpointed(segment=self.at.segments - 1, frames=self._frames, digest=f"{self._digest:032x}", checkpoint=self.at)
        )
        self._open()
