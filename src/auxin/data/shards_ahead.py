"""A process that tokenizes shards before they are needed, beside the one that trains."""

import json
import os
import subprocess
import sys
import warnings
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_PACKAGES = Path(__file__).resolve().parents[2]
"""Where the process finds this package, too."""
_WORK = "from auxin.data.tokenizing_ahead import work; work()"
END = b"null\n"
"""The line that ends it."""
_FAREWELL = 5.0
"""Seconds in which it has ended when it is told to."""


class ShardsAhead:
    """Asks a process of its own for shards. Nothing depends on it: what it has not made is made where it is needed.

    The process is started when it is first asked for something, and ends with `end`, this object, or this process.

    Args:
        directory: of the prepared stream.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._ends: weakref.finalize[..., ShardsAhead] | None = None

    def ask(self, shards: Sequence[int]) -> None:
        """Let it tokenize these shards, in this order, in place of what it was asked for before."""
        line = json.dumps(list(shards)).encode() + b"\n"
        for _ in range(2):
            process = self._running()
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.write(line)
                process.stdin.flush()
                return

    def end(self) -> None:
        """Let the process end, so that nothing is written any more; the next wish starts another one."""
        if self._ends is not None:
            self._ends()
        self._process = self._ends = None

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and (code := self._process.poll()) is not None:
            warnings.warn(
                f"The process that tokenizes ahead for {self._directory} has ended with {code}, and is started again. "
                "Shards are tokenized in the training's own process meanwhile.",
                stacklevel=1,
            )
            self._process = None
        if self._process is None:
            path = os.pathsep.join([str(_PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])])
            self._process = subprocess.Popen(
                [sys.executable, "-c", _WORK, str(self._directory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"},
            )
            self._ends = weakref.finalize(self, _end, self._process, os.getpid())
        return self._process


def _end(process: "subprocess.Popen[bytes]", owner: int) -> None:
    """Let the process end, unless this one is a fork of its owner."""
    if os.getpid() != owner:
        return
    assert process.stdin is not None
    with suppress(OSError, ValueError):
        # Processes that read batches were forked with the pipe open, so that closing it here may not be the end of it.
        process.stdin.write(END)
        process.stdin.close()
    try:
        process.wait(_FAREWELL)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
