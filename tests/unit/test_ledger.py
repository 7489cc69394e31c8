"""The worker's account: checkpoints move in order, and only over what is whole, durable and right."""

from __future__ import annotations

import random

import pytest

from agent.errors import DataError
from agent.ledger import Ledger
from agent.model import Checkpoint


def checkpoints(*segments: list[int]) -> list[tuple[int, str, Checkpoint]]:
    """Return what the controller announces for segments of frames with these checksums."""
    told, frames, digest = [], 0, 0
    for number, sums in enumerate(segments, 1):
        frames, digest = frames + len(sums), digest + sum(sums)
        told.append((len(sums), f"{sum(sums):032x}", Checkpoint(number * 10, number, frames, f"{digest:032x}")))
    return told


def test_any_order_of_frames_and_announcements_settles_the_same() -> None:
    segments = [[1, 2, 3], [4], [], [5, 6]]
    told = checkpoints(*segments)
    for seed in range(200):
        chance = random.Random(seed)
        ledger = Ledger(Checkpoint())
        happenings = [("tell", number, 0) for number in range(4)]
        happenings += [("frame", number, value) for number, values in enumerate(segments) for value in values]
        chance.shuffle(happenings)
        waiting: list[int] = []
        reached = [0]
        for kind, number, value in happenings:
            if kind == "tell":
                ledger.announced(number, *told[number])
            else:
                ledger.arrived(number, value)
                waiting.append(number)
            if waiting and chance.random() < 0.5:
                ledger.durable(waiting.pop(chance.randrange(len(waiting))))
            reached.append(ledger.checkpoint.segments)
        for number in waiting:
            ledger.durable(number)
        assert reached == sorted(reached)
        assert ledger.complete(told[-1][2])


def test_a_missing_frame_holds_the_checkpoint() -> None:
    told = checkpoints([1, 2], [3])
    ledger = Ledger(Checkpoint())
    ledger.arrived(0, 1)
    ledger.durable(0)
    ledger.arrived(1, 3)
    ledger.durable(1)
    assert not ledger.announced(0, *told[0])
    assert not ledger.announced(1, *told[1])
    assert not ledger.complete(told[1][2])
    assert ledger.checkpoint == Checkpoint()


def test_what_is_not_durable_holds_the_checkpoint() -> None:
    told = checkpoints([1])
    ledger = Ledger(Checkpoint())
    ledger.arrived(0, 1)
    assert not ledger.announced(0, *told[0])
    assert ledger.durable(0)
    assert ledger.checkpoint == told[0][2]


def test_a_wrong_digest_is_found() -> None:
    ledger = Ledger(Checkpoint())
    ledger.arrived(0, 1)
    with pytest.raises(DataError, match="does not add up"):
        ledger.announced(0, *checkpoints([2])[0])


def test_a_frame_too_many_is_found() -> None:
    ledger = Ledger(Checkpoint())
    ledger.arrived(0, 1)
    ledger.arrived(0, 0)
    with pytest.raises(DataError, match="has 2 frames, 1 were sent"):
        ledger.announced(0, *checkpoints([1])[0])
    ledger = Ledger(Checkpoint())
    ledger.announced(0, *checkpoints([])[0])
    with pytest.raises(DataError, match="is complete"):
        ledger.arrived(0, 1)


def test_it_goes_on_from_a_checkpoint() -> None:
    told = checkpoints([7], [8])
    ledger = Ledger(told[0][2])
    ledger.arrived(1, 8)
    ledger.durable(1)
    ledger.announced(1, *told[1])
    assert ledger.complete(told[1][2])


def test_a_total_that_differs_is_found() -> None:
    ledger = Ledger(Checkpoint())
    with pytest.raises(DataError, match="does not add up"):
        ledger.complete(Checkpoint(digest="1" * 32))
