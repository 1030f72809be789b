"""Writing so that a reader, also one after a crash, sees the old content or the whole new one."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from auxin.errors import CheckpointError, ConfigError, reason


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` atomically: to a sibling, flushed to the disk, then renamed."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`, for any content."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path, asked: Path | None = None) -> None:
    """Make `folder`, and those above it, where they are not there.

    Args:
        folder: its path.
        asked: the path that the message names; default: `folder`.

    Raises:
        ConfigError: it can't be made: a file is in the way, or the place takes no folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        path = folder if asked is None else asked
        blocking = next((above for above in (path, *path.parents) if above.is_file()), None)
        why = reason(error) if blocking is None else f"{blocking} is a file"
        raise ConfigError(f"The folder {path} can't be made: {why}. Give another one.") from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty sibling of `path` that takes its name, flushed to the disk, when the body succeeds, and vanishes else.

    Raises:
        CheckpointError: `path` is there already and is not an empty folder.
        ConfigError: it can't be made.
    """
    path = path.resolve()  # "." has no name of its own, and a link to a folder can't be replaced by one
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists and is not an empty folder. Remove it or give another one.")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    make_folder(temporary, path)
    try:
        yield temporary
        flush_tree(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def flush_tree(folder: Path) -> None:
    """Force all of a folder to the disk: a rename must not arrive there before what it names."""
    for parent, _, files in os.walk(folder):
        for name in files:
            flush(Path(parent) / name)
        flush(Path(parent))


def flush(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
