"""The command line: what people type and what they read. One file a command group."""

from agent.cli.app import main

__all__ = ["main"]
