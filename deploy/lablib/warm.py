"""One conversation that stays: a sync for each line of standard input, its summary on standard output.

A program of its own, run by the environment under test: warm.py TARGET, then a line POOL/IMAGE[@SNAPSHOT] each.
"""

from __future__ import annotations

import asyncio
import os
import sys

import msgspec

from agent import events as e
from agent.cli.syncing import Way
from agent.errand import Home, Request, open_pool
from agent.fleet import Switchboard, sync_all
from agent.remote import SshSettings
from agent.session import Transfer
from agent.settings import ClusterSettings
from agent.spec import parse_source, parse_target


class _Silent:
    def emit(self, event: e.Event) -> None:
        """Tell of what went wrong only."""
        if isinstance(event, e.Error | e.Warned | e.Retry):
            print(event, file=sys.stderr)


async def main(target: str) -> None:
    """Sync what standard input names, one after the other."""
    settings = ClusterSettings().completed(os.environ)
    ssh = SshSettings(config=os.environ["RBD_SIPHON_SSH_CONFIG"])
    way = Way(ssh, ClusterSettings(), "rbd-siphon worker", 60.0, Transfer(), stock=False)
    loop = asyncio.get_running_loop()
    homes: dict[str, Home] = {}
    board = Switchboard(
        way.connect(parse_target(target, parse_source("any/any").image), _ignore), way.timeout, way.transfer, _ignore
    )
    async with board.open() as dial:
        while line := (await loop.run_in_executor(None, sys.stdin.readline)).strip():
            source = parse_source(line)
            pool = source.image.pool
            if pool not in homes:
                homes[pool] = open_pool(settings, way.timeout, pool, "")
            request = Request(source=source, target=parse_target(target, source.image), cluster=settings)
            summary = await sync_all([request], homes[pool], dial, _Silent(), 1)
            print(msgspec.json.encode(summary).decode(), flush=True)


def _ignore(_: str) -> None:
    pass


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
