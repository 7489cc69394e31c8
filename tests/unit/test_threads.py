"""Blocking calls run to their end, and what they return when nobody waits any more is closed."""

from __future__ import annotations

import asyncio
import threading

import pytest

from agent.threads import blocking


class Opened:
    """Something that must not be lost."""

    closed = False

    def close(self) -> None:
        self.closed = True


def test_what_a_cancelled_call_returns_is_closed() -> None:
    opened, go = Opened(), threading.Event()

    def opening() -> Opened:
        go.wait(5)
        return opened

    async def cancelled() -> None:
        task = asyncio.create_task(blocking(opening))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.sleep(0.01)
        assert not task.done(), "a thread cannot be stopped: it is waited for"
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert opened.closed


def test_a_second_cancellation_does_not_leave_the_call_behind() -> None:
    go, ended = threading.Event(), []

    def working() -> None:
        go.wait(5)
        ended.append(True)

    async def cancelled_twice() -> None:
        task = asyncio.create_task(blocking(working))
        for _ in range(3):
            await asyncio.sleep(0.01)
            task.cancel()
        await asyncio.sleep(0.01)
        assert not task.done()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended

    asyncio.run(cancelled_twice())


def test_what_a_call_returns_or_raises_is_passed_on() -> None:
    opened = Opened()
    assert asyncio.run(blocking(lambda: opened)) is opened
    assert not opened.closed

    def failing() -> None:
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        asyncio.run(blocking(failing))
