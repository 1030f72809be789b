"""Locks of files and folders. They end with the process that holds them, however it ends.

They are those of `flock`. The package filelock would not do: where a file system keeps none it gives up, or makes files
that outlive a killed process; it locks no folders, and does not say who holds what.
"""

import contextlib
import fcntl
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path

from auxin.errors import TrainingError, reason

LOCK_FILE = ".lock"


def take(descriptor: int, wait: bool) -> bool:
    """Hold an open file or folder until `release`.

    Args:
        descriptor: of the file or folder.
        wait: whether to wait for who holds it.

    Returns:
        Whether it is held; False: another process, or another part of this one, holds it.

    Raises:
        OSError: its file system keeps no locks.
    """
    _opened.add(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # some network file systems say the latter
        return False
    return True


def release(descriptor: int) -> None:
    """Close what `take` was asked to hold, whether it is held or not."""
    # A forked process has closed it already, and may have something else under the number.
    if descriptor in _opened:
        _opened.discard(descriptor)
        os.close(descriptor)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder: two processes that work in one would mix, or remove, each other's checkpoints.

    Raises:
        TrainingError: another process holds it; the message names it.
    """
    with _holding(folder / LOCK_FILE, wait=False):
        yield


@contextlib.contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Hold the file `path`, which is made where it is missing, when whoever holds it has done with it."""
    with _holding(path, wait=True):
        yield


@contextlib.contextmanager
def _holding(path: Path, wait: bool) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            if not take(descriptor, wait):
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
                raise TrainingError(
                    f"{path.parent} is in use: {holder} works in it. Wait for it or choose another folder."
                )
        except OSError as error:
            _warn_of(descriptor, path.parent, error)
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        yield
    finally:
        release(descriptor)


def _warn_of(descriptor: int, folder: Path, error: OSError) -> None:
    """Say once of every file system that it keeps no locks."""
    device = os.fstat(descriptor).st_dev
    if device not in _without_locks:
        _without_locks.add(device)
        warnings.warn(
            f"The file system of {folder} keeps no locks ({reason(error)}), so that nothing keeps a second process out "
            "of a folder that this one works in. Start one at a time there.",
            stacklevel=1,
        )


_opened: set[int] = set()
_without_locks: set[int] = set()


def _let_go() -> None:
    """A forked process, such as one that reads batches, must hold nothing for its parent, which may be killed: a lock
    is freed when nobody has the file open any more."""
    while _opened:
        os.close(_opened.pop())


os.register_at_fork(after_in_child=_let_go)
