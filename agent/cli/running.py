"""Running a command's coroutine: signals stop it in good order, and the process ends in time whatever hangs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn, TypeVar

from agent.memory import keep_freed

T = TypeVar("T")

#: How many blocking calls may be under way: most of them wait for a cluster, many images' at once.
_THREADS = 128
#: How long stopping in good order may take before the process ends at once, seconds.
GRACE = 4.0


class Stopped(Exception):  # noqa: N818  # a signal is no error
    """A signal ended the run; `number` is which."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def run(work: Coroutine[object, object, T]) -> T:
    """Run `work` to its end; Stopped if SIGINT or SIGTERM ended it. A second signal ends the process."""
    keep_freed()
    return asyncio.run(_supervised(work))


async def _supervised(work: Coroutine[object, object, T]) -> T:
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(_THREADS, "blocking"))
    task = loop.create_task(work)
    received: list[int] = []

    def stop(number: int) -> None:
        if received:
            leave(128 + number)
        received.append(number)
        task.cancel()
        # A call into a cluster that does not answer cannot be taken back.
        loop.call_later(GRACE, leave, 128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        return await task
    except asyncio.CancelledError:
        if received:
            raise Stopped(received[0]) from None
        raise
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def leave(code: int) -> NoReturn:
    """End the process now, leaving what hangs behind."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):  # whoever read it is gone, or it was never open
            stream.flush()
    os._exit(code)
