"""SHA-256 sums of a folder's files, in the folder: what was written is told from what has become of it.

The file is of the common format, so that `sha256sum -c SHA256SUMS` checks it too. That it must be there, and with how
many lines, is told by the state of the training, where there is one.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from auxin.errors import CheckpointError, reason
from auxin.files import write_text

SUMS_FILE = "SHA256SUMS"
STATE = Path("training/state.json")
"""The JSON file in a checkpoint that tells of the sums."""
SUMMED = "summed_files"
"""The field that does."""

_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def write_sums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Write the sums of all files in `folder` and below, in place of those that are there.

    Args:
        folder: the folder.
        known: sums of files that need not be read, by their paths in the folder.
    """
    found = (path for path in folder.rglob("*") if path.is_file() and path != folder / SUMS_FILE)
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(found)}
    _tell(folder, len(paths))
    sums = {name: (known or {}).get(name) or sum_of(path) for name, path in paths.items()}
    write_text(folder / SUMS_FILE, "".join(f"{value}  {name}\n" for name, value in sums.items()))


def sum_of(path: Path) -> str:
    """The SHA-256 sum of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_sums(folder: Path) -> None:
    """Let `folder`, in which files are about to change, have no sums, and nothing that tells of them."""
    (folder / SUMS_FILE).unlink(missing_ok=True)
    if _told(folder):
        _tell(folder, None)


def has_sums(folder: Path) -> bool:
    """Whether `folder` says what its files must be."""
    return (folder / SUMS_FILE).is_file()


def names_without_sums(folder: Path) -> list[str]:
    """Files of a folder that its sums do not name: those that somebody has added."""
    lines = (folder / SUMS_FILE).read_text(encoding="utf-8").splitlines() if has_sums(folder) else []
    known = {line.partition("  ")[2] for line in lines} | {SUMS_FILE}
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name not in known)


def damage(folder: Path) -> str | None:
    """What of `folder` is not as it was when its sums were written, by name; None: nothing, or it never had sums.

    Files that came later are nobody's business. All others are read, so this takes as long as reading the folder; once
    in a process, as long as their sizes and times stay: many runs open one corpus, and stages one checkpoint.
    """
    return _in_words(_wrong(folder))


def refuse_damaged_tensors(folder: Path) -> str | None:
    """`damage`, for a checkpoint that somebody brings: its texts may have been changed on purpose.

    Raises:
        CheckpointError: a file of tensors is not as it was written, or is gone.
    """
    wrong = _wrong(folder)
    if any(name.endswith(".safetensors") for name, _ in wrong):
        raise CheckpointError(
            f"{folder} is damaged: {_in_words(wrong)}. Restore it from a copy, or, where this was done on purpose, "
            f"remove its {SUMS_FILE}."
        )
    return _in_words(wrong)


def _in_words(wrong: tuple[tuple[str, str], ...]) -> str | None:
    return ", ".join(f"{name} {state}" for name, state in wrong) or None


def _wrong(folder: Path) -> tuple[tuple[str, str], ...]:
    """Files of `folder` that are not as they were written, and what is wrong with each."""
    if not folder.is_dir():
        return (("it", "is missing"),)
    told = _told(folder)
    if not has_sums(folder):
        return ((SUMS_FILE, f"is missing (it had {told} lines, as {STATE} says)"),) if told else ()
    states = ((path, path.lstat()) for path in sorted(folder.rglob("*")))
    return _compared(folder, told, tuple((path, state.st_size, state.st_mtime_ns) for path, state in states))


@lru_cache(maxsize=1024)
def _compared(folder: Path, told: int, stamps: tuple[tuple[Path, int, int], ...]) -> tuple[tuple[str, str], ...]:
    path = folder / SUMS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return ((SUMS_FILE, f"can't be read ({reason(error)})"),)
    expected = [_LINE.fullmatch(line) for line in lines]
    if not lines or None in expected:
        return ((SUMS_FILE, "holds lines that are no sums"),)
    if len(lines) < told:
        return ((SUMS_FILE, f"is cut: it has {len(lines)} lines, and had {told}, as {STATE} says"),)
    states = ((match[2], _state(folder / match[2], match[1])) for match in expected if match)
    return tuple((name, state) for name, state in states if state)


def _told(folder: Path) -> int:
    """How many lines the sums of `folder` had; 0: nothing tells of any."""
    found = _read(folder).get(SUMMED)
    return found if isinstance(found, int) else 0


def _tell(folder: Path, number: int | None) -> None:
    """Tell of so many lines, where there is what can tell; None: of none."""
    if state := _read(folder):
        state.pop(SUMMED, None)
        text = json.dumps(state if number is None else {**state, SUMMED: number}, indent=2)
        write_text(folder / STATE, text + "\n")


def _read(folder: Path) -> dict[str, Any]:
    """What lies in the file that tells; empty where there is none, or it holds something else."""
    try:
        found = json.loads((folder / STATE).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _state(path: Path, expected: str) -> str:
    """What is wrong with a file; empty: nothing."""
    try:
        if path.exists() and not path.is_file():
            return "is no file"
        return "" if sum_of(path) == expected else f"differs from its sum in {SUMS_FILE}"
    except FileNotFoundError:
        return f"is missing (it is named in {SUMS_FILE})"
    except OSError as error:
        return f"can't be read ({reason(error)})"
