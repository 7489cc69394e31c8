"""Work that a cancellation must not leave half done: blocking calls, and what has to run to its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def blocking(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `work` in a thread and return its result.

    When cancelled, the thread cannot be stopped: this waits for it before it lets the cancellation
    through, so that nobody closes an image under a call that still uses it. What it returns then, and
    nobody takes, is closed: librbd crashes where an image is collected after its cluster's connection.
    """
    running = asyncio.get_running_loop().run_in_executor(None, partial(work, *args, **kwargs))
    try:
        return await _to_its_end(running)
    except asyncio.CancelledError:
        lost = None if running.cancelled() or running.exception() else running.result()
        if close := getattr(lost, "close", None):
            await asyncio.wait([asyncio.get_running_loop().run_in_executor(None, close)])
        raise


async def unbroken(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end and return its result; a cancellation meanwhile is let through afterwards."""
    return await _to_its_end(asyncio.ensure_future(work))


async def _to_its_end(future: asyncio.Future[T]) -> T:
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):  # a second one changes nothing: the first is let through
                await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # seen: what was cancelled has nobody to tell it to
        raise
