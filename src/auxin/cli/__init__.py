"""The command line: reads arguments, calls the library, prints what it returns.

The library is imported inside the commands: torch and transformers take seconds that `--help` need not wait for.
"""

from auxin.cli import analysing, checkpoints, editing, running, shrinking
from auxin.cli.app import app, main

__all__ = ["analysing", "app", "checkpoints", "editing", "main", "running", "shrinking"]
