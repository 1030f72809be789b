"""Writing so that a reader, also one after a crash, sees the old content or the whole new one."""

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from auxin.errors import AuxinError, CheckpointError, ConfigError, reason, shown
from auxin.locks import release, take

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{32}\.tmp")


def cache_folder(kind: str) -> Path:
    """The folder of results of one kind that are kept for the next time: the environment's AUXIN_CACHE, else `auxin` in
    the user's cache folder (XDG_CACHE_HOME, or ~/.cache), and in it `kind`."""
    given = os.environ.get("AUXIN_CACHE")
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(given) if given else user / "auxin") / kind


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


def existing_folder(path: str | Path, wanted: str, mark: str, error: type[AuxinError] = CheckpointError) -> Path:
    """`path`, a folder that is there.

    Args:
        path: what was given.
        wanted: what it is to be: "the folder of a checkpoint".
        mark: a file that such a folder has: where a file in one was given, the message names the folder.
        error: what is raised.

    Raises:
        CheckpointError, or `error`: it is a file, or is not there.
    """
    folder = Path(path)
    if os.path.isdir(folder):  # says no where pathlib raises: of a name that is too long
        return folder
    name = shown(str(folder), quoted=False)
    if not os.path.isfile(folder):
        raise error(f"{name} does not exist. Give {wanted}.")
    meant = f": {folder.parent}" if (folder.parent / mark).is_file() else ""
    raise error(f"{name} is a file and no folder. Give {wanted}{meant}.")


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
    with temporary_folder(path) as temporary:
        yield temporary
        flush_tree(temporary)
        os.replace(temporary, path)
        flush(path.parent)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """An empty sibling of `path`, which vanishes with the body unless that has renamed it.

    It is locked while the body runs, and a lock ends with its process, so that whoever comes next can tell what a dead
    one left: leftovers of the same name are removed first.

    Raises:
        ConfigError: it can't be made.
    """
    sweep(path.parent, path.name)
    while True:
        temporary = _temporary_name(path)
        make_folder(temporary, path)
        lock = _lock(temporary, wait=True)
        if temporary.exists():
            break
        _release(lock)  # somebody who swept came before the lock and took it for a leftover
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _release(lock)


def sweep(parent: Path, name: str | None = None) -> None:
    """Remove what dead processes left unfinished in the folder `parent`: the temporary folders that nobody holds.

    Args:
        parent: the folder.
        name: of what was to be written; None: whatever it was.
    """
    for folder in parent.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(folder.name)
        if match is None or name not in (None, match["name"]) or not folder.is_dir() or folder.is_symlink():
            continue
        lock = _lock(folder, wait=False)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            _release(lock)


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it is there, so that at no time half of it is seen under its name; of a link the link."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        doomed = _temporary_name(folder)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def _lock(folder: Path, wait: bool) -> int | None:
    """Hold a folder: what `_release` takes; None where it is gone, where another holds it, or where the file system
    has no such locks, so that nothing is known."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    with suppress(OSError):
        if take(descriptor, wait):
            return descriptor
    release(descriptor)
    return None


def _release(lock: int | None) -> None:
    if lock is not None:
        release(lock)


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
