"""How a command that does one thing ends: an error's words and exit code, a signal, or nothing to say."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from agent.cli.running import Stopped, leave
from agent.errors import SiphonError
from agent.files import flush_output


def carry_out(work: Callable[[], None]) -> NoReturn:
    """Do `work`, tell its error on standard error, and end the process with the exit code that stands for it."""
    code = 0
    try:
        work()
        flush_output()
    except SiphonError as error:
        code = error.exit_code
        say(str(error))
        if error.hint:
            print(f"  → {error.hint}", file=sys.stderr, flush=True)
    except OSError as error:
        code = 1
        where = f"{error.filename}: " if error.filename else ""
        say("whoever read our output has gone" if isinstance(error, BrokenPipeError) else f"{where}{error.strerror}")
    except Stopped as stopped:
        code = 128 + stopped.number
        say(f"{stopped}; the same command again is right")
    except KeyboardInterrupt:
        code = 130
    leave(code)


def say(text: str) -> None:
    """Tell a person something, on standard error."""
    print(f"rbd-siphon: {text}", file=sys.stderr, flush=True)
