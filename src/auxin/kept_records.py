"""Records in a folder: what took long is found again under what it is about, whole or not at all."""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from auxin.errors import reason
from auxin.files import write_text
from auxin.locks import LOCK_FILE, in_turn

SUM = "sha256"
"""The field of a record that has the SHA-256 of the others."""
SUBJECT = "subject"
"""The field that says what a record is about."""


def digest(values: Any) -> str:
    """Hex SHA-256 of plain values, whatever the order of their names."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def find(path: Path, subject: Any) -> dict[str, Any] | None:
    """The record at `path`, its sum left out; None where there is none, where it is damaged, or about something else.

    Args:
        path: of its file.
        subject: what it is about, plain values.
    """
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        # The whole subject is compared, so that a file of another name, or of half its content, is no hit.
        return values if values.pop(SUM) == digest(values) and values[SUBJECT] == subject else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def keep(path: Path, values: dict[str, Any], what: str) -> None:
    """Write a record. A folder that can't be written to is a warning: what is to be kept isn't lost.

    Args:
        path: of its file, in a folder that there is.
        values: plain; the field "subject" says what they are about.
        what: what is kept, and was or were, for the warning.
    """
    try:
        write_text(path, json.dumps({**values, SUM: digest(values)}, indent=1) + "\n")
    except OSError as error:
        warnings.warn(
            f"{what} not kept in {path.parent}: {reason(error)}. Set AUXIN_CACHE to a folder that can be written to.",
            stacklevel=3,
        )


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within the context, no other process works with the records in `folder`, which is made if it can be: what can't
    be written is said when it is to be kept."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(in_turn(folder / LOCK_FILE))
        yield
