"""A limit on the rate: read as it is typed, right by the time of day, even and exact."""

from __future__ import annotations

import asyncio
from datetime import datetime, time

import pytest

from agent.errors import UsageError
from agent.pace import Pacer, Timetable, parse_limit

MIB = 1 << 20


def test_limits_are_read_as_they_are_typed() -> None:
    assert parse_limit("0") == Timetable()
    assert parse_limit("200M") == Timetable(otherwise=200 * MIB)
    assert parse_limit("1.5g").otherwise == 1.5 * (1 << 30)
    assert parse_limit("08:00-18:00 50M, else 0") == Timetable(((time(8), time(18), 50 * MIB),), 0)
    assert parse_limit("22:00-06:00 1G, 06:00-22:00 10M").otherwise == 0
    for wrong in (
        "",
        "fast",
        "-3",
        "08:00-18:00",
        "08:00 50M",
        "25:00-26:00 1M",
        "08:00-09:00 1M, 5M",
        "5M, 08:00-09:00 1M",
    ):
        with pytest.raises(UsageError, match="is no"):
            parse_limit(wrong)


def test_the_time_of_day_decides_also_over_midnight() -> None:
    table = parse_limit("22:00-06:00 0, 12:00-13:00 100M, else 20M")
    assert [table.at(time(hour)) for hour in (21, 22, 23, 0, 5, 6, 12, 13)] == [
        20 * MIB, 0, 0, 0, 0, 20 * MIB, 100 * MIB, 20 * MIB,
    ]  # fmt: skip


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time is the test's: sleeping takes none."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]  # asyncio's own, and stable for years
            self.now = max(self.now, self._scheduled[0]._when)  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def run(pacer: Pacer, pieces: list[int], senders: int) -> list[tuple[float, int]]:
    """Let `senders` tasks send the pieces, and return when each went."""
    loop, gone = Clock(), []

    async def send(queue: list[int]) -> None:
        while queue:
            count = queue.pop()
            await pacer.passing(count)
            gone.append((loop.time(), count))

    async def all_of_them() -> None:
        queue = list(pieces)
        await asyncio.gather(*(send(queue) for _ in range(senders)))

    try:
        loop.run_until_complete(all_of_them())
    finally:
        loop.close()
    return gone


@pytest.mark.parametrize("senders", [1, 5])
def test_over_all_senders_together_the_rate_is_exact_and_even(senders: int) -> None:
    rate = 10 * MIB
    pacer = Pacer(Timetable(otherwise=rate))
    gone = run(pacer, [pacer.grain] * 220, senders)
    sent = sum(count for at, count in gone if at < 10)
    assert abs(sent - 10 * rate) <= pacer.grain
    for second in range(10):
        burst = sum(count for at, count in gone if second <= at < second + 0.25)
        assert burst <= rate / 4 + pacer.grain


def test_a_pause_is_not_made_up_for_by_a_burst() -> None:
    loop, pacer = Clock(), Pacer(Timetable(otherwise=MIB))

    async def pausing() -> float:
        await pacer.passing(64 << 10)
        await asyncio.sleep(100)
        began = loop.time()
        for _ in range(16):
            await pacer.passing(64 << 10)
        return loop.time() - began

    assert loop.run_until_complete(pausing()) == pytest.approx(15 / 16)
    loop.close()


def test_the_limit_changes_with_the_clock_and_pieces_with_the_limit() -> None:
    hour = [12]
    pacer = Pacer(parse_limit("08:00-18:00 2M, else 0"), lambda: datetime(2026, 3, 1, hour[0]))  # noqa: DTZ001  # local
    assert (pacer.rate, pacer.grain) == (2 * MIB, int(2 * MIB * 0.05))
    hour[0] = 20
    assert (pacer.rate, pacer.grain) == (0, 2 * MIB)
    assert run(pacer, [MIB] * 50, 2)[-1][0] == 0
