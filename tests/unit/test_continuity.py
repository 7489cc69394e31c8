"""When a step may go on where it stopped, when it must be rolled back, and when somebody else was there."""

from __future__ import annotations

from typing import Any

import pytest

from agent.continuity import Standing, hand_of, standing
from agent.model import Claim, Guard, Hand, Tenure

ME, NEXT, DEAD = (Hand(address, "host", 1, "run", "") for address in ("me", "next", "dead"))


def guard(state: Any, *, claim: bool | None = None, **more: Any) -> Guard:
    """Return a guard of mine in that state, and with a claim of the next worker, trusted or not."""
    return Guard(Tenure(ME, state, **more), None if claim is None else Claim(NEXT, claim), (DEAD,))


@pytest.mark.parametrize(
    ("owner", "left", "version", "expected"),
    [
        ("me", guard("holding"), 5, Standing.RESUMABLE),
        ("me", guard("holding", claim=False), 5, Standing.RESUMABLE),
        ("next", guard("holding", claim=True), 5, Standing.RESUMABLE),
        ("next", guard("released", version=4, claim=True), 5, Standing.RESUMABLE),
        ("next", Guard(claim=Claim(NEXT, trusted=True)), 5, Standing.RESUMABLE),
        ("", guard("released", version=5), 5, Standing.RESUMABLE),
        ("", guard("released", version=5, claim=True), 5, Standing.RESUMABLE),
        ("", guard("released", version=5, claim=False), 5, Standing.RESUMABLE),
        ("", guard("releasing"), 5, Standing.UNSURE),
        ("me", guard("holding", trusted=False), 5, Standing.UNSURE),
        ("next", guard("holding", claim=False), 5, Standing.UNSURE),
        ("dead", guard("holding"), 5, Standing.UNSURE),
        ("", guard("released", version=5, trusted=False), 5, Standing.UNSURE),
        ("", guard("released", version=5), 6, Standing.TOUCHED),
        ("", guard("released", version=5, trusted=False), 6, Standing.TOUCHED),
        ("", guard("released", version=5, claim=True), 6, Standing.TOUCHED),
        ("", guard("released"), 5, Standing.TOUCHED),
        ("", guard("holding"), 5, Standing.TOUCHED),
        ("", Guard(claim=Claim(NEXT, trusted=True)), 5, Standing.TOUCHED),
        ("stranger", guard("holding"), 5, Standing.TOUCHED),
        ("stranger", guard("released", version=5), 5, Standing.TOUCHED),
        ("", None, 5, Standing.TOUCHED),
        ("me", None, 5, Standing.TOUCHED),
    ],
)
def test_standing(owner: str, left: Guard | None, version: int, expected: Standing) -> None:
    assert standing(owner, left, version) is expected


def test_a_lock_is_ours_by_its_owner() -> None:
    assert hand_of("dead", guard("holding")) == DEAD
    assert hand_of("next", guard("holding", claim=True)) == NEXT
    assert hand_of("stranger", guard("holding", claim=True)) is None
    assert hand_of("me", None) is None
