"""When a step may go on where it stopped, when it must be rolled back, and when somebody else was there."""

from __future__ import annotations

from typing import Any

import pytest

from agent.continuity import Standing, hand_of, standing
from agent.model import Guard, Hand

ME, DEAD = (Hand(address, "host", 1, "run", "") for address in ("me", "dead"))


def guard(state: Any, **more: Any) -> Guard:
    return Guard(holder=ME, state=state, **more)


@pytest.mark.parametrize(
    ("owner", "left", "version", "expected"),
    [
        ("me", guard("holding"), 5, Standing.RESUMABLE),
        ("me", guard("taking"), 5, Standing.RESUMABLE),
        ("dead", guard("taking", replaced=DEAD), 5, Standing.RESUMABLE),
        ("", guard("released", version=5), 5, Standing.RESUMABLE),
        ("", guard("taking", version=5), 5, Standing.RESUMABLE),
        ("", guard("taking", replaced=DEAD), 5, Standing.UNSURE),
        ("", guard("releasing"), 5, Standing.UNSURE),
        ("me", guard("holding", trusted=False), 5, Standing.UNSURE),
        ("", guard("released", version=5, trusted=False), 5, Standing.UNSURE),
        ("", guard("released", version=5), 6, Standing.TOUCHED),
        ("", guard("released", version=5, trusted=False), 6, Standing.TOUCHED),
        ("", guard("taking", version=5), 6, Standing.TOUCHED),
        ("", guard("released"), 5, Standing.TOUCHED),
        ("", guard("holding"), 5, Standing.TOUCHED),
        ("stranger", guard("holding"), 5, Standing.TOUCHED),
        ("stranger", guard("released", version=5), 5, Standing.TOUCHED),
        ("", None, 5, Standing.TOUCHED),
        ("me", None, 5, Standing.TOUCHED),
    ],
)
def test_standing(owner: str, left: Guard | None, version: int, expected: Standing) -> None:
    assert standing(owner, left, version) is expected


def test_a_lock_is_ours_by_its_owner() -> None:
    assert hand_of("dead", guard("taking", replaced=DEAD)) == DEAD
    assert hand_of("stranger", guard("taking", replaced=DEAD)) is None
    assert hand_of("me", None) is None
