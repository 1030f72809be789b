"""SHA-256 sums of a folder's files, in the folder: what was written is told from what has become of it.

The file is of the common format, so that `sha256sum -c SHA256SUMS` checks it too.
"""

import hashlib
import re
from functools import lru_cache
from pathlib import Path

from auxin.errors import CheckpointError, reason
from auxin.files import write_text

SUMS_FILE = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def write_sums(folder: Path) -> None:
    """Write the sums of all files in `folder` and below, in place of those that are there."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SUMS_FILE)
    write_text(folder / SUMS_FILE, "".join(f"{_sum(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths))


def has_sums(folder: Path) -> bool:
    """Whether `folder` says what its files must be."""
    return (folder / SUMS_FILE).is_file()


def damage(folder: Path) -> str | None:
    """What of `folder` is not as it was when its sums were written, by name; None: nothing, or it has no sums.

    Files that came later are nobody's business. All others are read, so this takes as long as reading the folder; once
    in a process, as long as their sizes and times stay: many runs open one corpus, and stages one checkpoint.
    """
    return ", ".join(f"{name} {state}" for name, state in _wrong(folder)) or None


def refuse_damaged_tensors(folder: Path) -> str | None:
    """`damage`, for a checkpoint that somebody brings: its texts may have been changed on purpose.

    Raises:
        CheckpointError: a file of tensors is not as it was written, or is gone.
    """
    wrong = damage(folder)
    if any(name.endswith(".safetensors") for name, _ in _wrong(folder)):
        raise CheckpointError(
            f"{folder} is damaged: {wrong}. Restore it from a copy, or, where this was done on purpose, remove its "
            f"{SUMS_FILE}."
        )
    return wrong


def _wrong(folder: Path) -> tuple[tuple[str, str], ...]:
    """Files of `folder` that are not as they were written, and what is wrong with each."""
    if not folder.is_dir():
        return (("it", "is missing"),)
    if not has_sums(folder):
        return ()
    states = ((path, path.lstat()) for path in sorted(folder.rglob("*")))
    return _compared(folder, tuple((path, state.st_size, state.st_mtime_ns) for path, state in states))


@lru_cache(maxsize=1024)
def _compared(folder: Path, stamps: tuple[tuple[Path, int, int], ...]) -> tuple[tuple[str, str], ...]:
    path = folder / SUMS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return ((SUMS_FILE, f"can't be read ({reason(error)})"),)
    expected = [_LINE.fullmatch(line) for line in lines]
    if not lines or None in expected:
        return ((SUMS_FILE, "holds lines that are no sums"),)
    states = ((match[2], _state(folder / match[2], match[1])) for match in expected if match)
    return tuple((name, state) for name, state in states if state)


def _state(path: Path, expected: str) -> str:
    """What is wrong with a file; empty: nothing."""
    try:
        if path.exists() and not path.is_file():
            return "is no file"
        return "" if _sum(path) == expected else f"differs from its sum in {SUMS_FILE}"
    except FileNotFoundError:
        return f"is missing (it is named in {SUMS_FILE})"
    except OSError as error:
        return f"can't be read ({reason(error)})"


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
