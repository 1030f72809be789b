"""One process at a time in a run's folder."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from auxin.errors import TrainingError


@contextlib.contextmanager
def exclusive(output_dir: Path) -> Iterator[None]:
    """Hold the run's folder: two processes that train into one would mix their checkpoints. Freed also by a kill."""
    with (output_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingError(
                f"{output_dir} is in use: another process trains into it. Wait for it or choose another folder."
            ) from error
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
