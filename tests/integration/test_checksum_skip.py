"""Blocks that the target has already are not sent, and what is sent still makes the replica the source's equal."""

from __future__ import annotations

import random

import pytest

from agent.errors import LinkError
from agent.session import Transfer
from support import MIB, Pair

RAW = Transfer(None, 1)


def rewritten(pair: Pair, stem: str, size: int = 24) -> str:
    """Make an image with a replica, and write all of it again with the same content."""
    name = pair.new(stem, size=size * MIB, fill_with=None, order=22)
    data = random.Random(stem).randbytes(size * MIB)
    pair.source.write(name, 0, data)
    pair.sync_now(name)
    pair.source.write(name, 0, data)
    return name


def test_what_was_written_again_with_the_same_content_is_not_sent(pair: Pair) -> None:
    name = rewritten(pair, "same")
    run = pair.sync_now(name, checksum_skip=True)
    assert run.result.bytes_read == run.result.bytes_skipped == 24 * MIB
    assert run.result.bytes_sent < 64 << 10
    assert len(pair.same(name)) == 2


def test_what_differs_among_it_is_sent_and_nothing_else(pair: Pair) -> None:
    name = rewritten(pair, "mixed")
    with pair.source.image(name) as image:
        image.write(b"x" * 4096, 5 * MIB + 12288)
        image.write(b"y" * 100, 9 * MIB + 65500)  # over a block's border
        image.discard(16 * MIB, 4 * MIB)
        image.write(bytes(8192), 21 * MIB)
    run = pair.sync_now(name, checksum_skip=True)
    assert run.result.bytes_skipped > 18 * MIB
    assert run.result.bytes_sent < MIB
    assert len(pair.same(name)) == 2


def test_without_the_option_everything_is_sent(pair: Pair) -> None:
    name = rewritten(pair, "all", 8)
    run = pair.sync_now(name)
    assert run.result.bytes_skipped == 0
    assert run.result.bytes_sent > 8 * MIB


def test_a_first_copy_compares_nothing(pair: Pair) -> None:
    name = pair.new("nothing-there")
    run = pair.sync_now(name, checksum_skip=True)
    assert run.result.bytes_skipped == 0
    assert pair.same(name) == [run.result.end]


def test_a_step_that_skips_is_cut_and_goes_on(pair: Pair) -> None:
    import asyncio

    name = rewritten(pair, "skip-cut", 48)
    with pair.source.image(name) as image:
        for at in range(0, 48, 2):
            image.write(random.Random(at).randbytes(MIB), at * MIB)

    async def cut() -> None:
        async with pair.relay(cut_after=9 * MIB) as (_, config):
            await pair.sync(name, config=config, checksum_skip=True, attempts=1, transfer=RAW)

    with pytest.raises(LinkError):
        asyncio.run(cut())
    run = pair.sync_now(name, checksum_skip=True, transfer=RAW)
    assert run.result.resumed_from
    assert run.result.bytes_sent < 20 * MIB
    assert len(pair.same(name)) == 2
