"""One process at a time in a run's folder."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

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
        yield
