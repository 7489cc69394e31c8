"""How far a diff has come into an image: that one is under way in the image's metadata, how far in a RADOS object beside it.

A word in the metadata changes the image's header, which every client of the image then reads anew;
written for each window of a diff that took a tenth of an import's time. The object costs one small write.
What it says counts only where it bears the same `run` as the metadata: what an earlier diff left is no word of this one.
"""

from __future__ import annotations

import secrets

import msgspec

from agent.cluster import Image, Pool
from agent.merge import Header
from agent.model import Value, decode, encode
from agent.names import DIFF_KEY, diff_object


class DiffMark(Value, frozen=True):
    """A diff that an image is in the middle of.

    `durable` bytes of the stream are on the disks. Nothing behind byte `begun` has been written at
    all, and `digest` is the xxh3-128 of the stream up to there: it is recorded before the first of
    those writes, so a stream with that digest is the one whose data may be in the image, and no
    other is. `whole` turns true when all of it is durable and only the end snapshot is missing.
    """

    header: Header
    run: str = ""
    durable: int = 0
    begun: int = 0
    digest: str = ""
    whole: bool = False


def found_mark(pool: Pool, image_id: str, metadata: dict[str, str], where: str) -> DiffMark | None:
    """Return the mark of an image with that metadata, None if no diff is under way (blocks)."""
    if DIFF_KEY not in metadata:
        return None
    begun = decode(metadata[DIFF_KEY], DiffMark, where)
    raw, version = pool.read_object(diff_object(image_id))
    moved = decode(raw, DiffMark, diff_object(image_id)) if version else begun
    return moved if moved.run == begun.run else begun


def begin_mark(image: Image, header: Header) -> DiffMark:
    """Record that a diff is under way of which nothing is written yet (blocks)."""
    mark = DiffMark(header, secrets.token_hex(8))
    image.set_metadata(DIFF_KEY, encode(mark))
    return mark


def move_mark(pool: Pool, image: Image, mark: DiffMark, durable: int, begun: int, digest: str, *, whole: bool = False) -> None:
    """Record how far the diff of `mark` has come (blocks)."""
    now = msgspec.structs.replace(mark, durable=durable, begun=begun, digest=digest, whole=whole)
    pool.write_object(diff_object(image.id()), encode(now).encode())


def remove_mark(pool: Pool, image: Image) -> None:
    """Record that no diff is under way any more (blocks)."""
    image.remove_metadata(DIFF_KEY)
    pool.remove_object(diff_object(image.id()))
