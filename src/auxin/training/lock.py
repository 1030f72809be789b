"""One process at a time in a run's folder."""

import contextlib
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from auxin.errors import TrainingError

LOCK_FILE = ".lock"


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder: two processes that work in one would mix, or remove, each other's checkpoints. Freed also by a
    kill.

    Raises:
        TrainingError: another process holds it; the message names it.
    """
    with (folder / LOCK_FILE).open("a+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise TrainingError(
                f"{folder} is in use: {file.read().strip() or 'another process'} works in it. Wait for it or choose "
                "another folder."
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)


_held: set[IO[str]] = set()


def _let_go() -> None:
    """A forked process, such as one that reads batches, must not hold the folder for its parent, which may be killed:
    the lock is freed when nobody has the file open any more."""
    while _held:
        _held.pop().close()


os.register_at_fork(after_in_child=_let_go)
