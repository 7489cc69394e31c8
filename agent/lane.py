"""A lane's process at the far end: hands its input over to the worker that owns the image, and waits."""

from __future__ import annotations

import asyncio

from agent.door import hand_over
from agent.errors import SiteError
from agent.messages import Done, Failure, Join
from agent.stdio import Stdio


async def serve_lane(stdio: Stdio, tag: int, request: Join) -> int:
    """Join the worker that `request` names, and return the exit code once it is done with this lane."""
    try:
        keeper = await hand_over(stdio.reading, request.door, request.secret)
    except SiteError as error:
        stdio.send(Failure(type(error).__name__, str(error), error.hint), tag)
        return error.exit_code
    stdio.send(Done(), tag)
    with keeper:
        # Ended by the worker's closing of its end, or by its death.
        await asyncio.get_running_loop().sock_recv(keeper, 1)
    return 0
