"""Errors a user can cause. Each carries one message that names the field, the value received and the mend."""

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

LONGEST_VALUE = 100
"""Characters of a value in a message: what is longer would bury what is said about it."""
MOST_NAMES = 24
"""Names that a message lists, where it does not know a near one."""


class AuxinError(Exception):
    """Base class: the command line prints its message without a traceback and exits with `exit_code`."""

    exit_code = 1


class ConfigError(AuxinError, ValueError):
    """A setting, a config or a recipe is wrong."""

    exit_code = 2


class PlanError(AuxinError, ValueError):
    """A plan does not fit the model it is applied to, or asks for the impossible."""

    exit_code = 2


class OtherModelError(PlanError):
    """A plan was made for another model, or another file of it, than what it is applied to; the message says so."""


class DataError(AuxinError, ValueError):
    """Text, a corpus or a tokenizer can't be used as asked."""

    exit_code = 2


class CheckpointError(AuxinError, RuntimeError):
    """A checkpoint is missing, incomplete, unsafe or of another model."""


class PromiseError(AuxinError, RuntimeError):
    """An edit that promised to preserve the function did not; the model was left untouched."""


class TrainingError(AuxinError, RuntimeError):
    """Training stopped because it can't go on; the last checkpoint is usable."""


@contextmanager
def placed(where: str) -> Iterator[None]:
    """Within the context, the message of an AuxinError begins with `where`."""
    try:
        yield
    except AuxinError as error:
        error.args = (f"{where}{error}", *error.args[1:])
        raise


def shown(value: Any, quoted: bool = True) -> str:
    """`value` for a message: cut where it is long, and with nothing in it that a terminal would not show.

    Args:
        value: anything that was received.
        quoted: text stands in quotes; else only where it holds what would not be seen.
    """
    try:
        text = value if isinstance(value, str) and not quoted and value.isprintable() else _written(value)
    except ValueError:  # of whole numbers, Python writes 4,300 digits at most
        return "a number of more digits than can be written"
    if len(text) <= LONGEST_VALUE:
        return text
    return f"{text[: LONGEST_VALUE - 20]} ... ({len(text):,} characters)"


def _written(value: Any) -> str:
    """`value` as Python writes it, but null, true and false as YAML and JSON do, where most values come from."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if type(value) is dict:
        return "{" + ", ".join(f"{_written(key)}: {_written(inner)}" for key, inner in value.items()) + "}"
    if type(value) is list:
        return "[" + ", ".join(map(_written, value)) + "]"
    return repr(value)


def reason(error: Exception) -> str:
    """Why something can't be read or written, without the number of the error and the path, which the message has."""
    if isinstance(error, OSError):
        return _REASONS.get(error.errno or 0) or error.strerror or str(error)
    return str(error)


_REASONS = {
    errno.ENOENT: "there is no such file or folder",
    errno.EISDIR: "it is a folder",
    errno.ENOTDIR: "a folder of its path is a file",
}
"""In the words of whoever gave the path, what the system says in its own."""


def first_line(error: BaseException) -> str:
    """The first line of what an error of another package says, or its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def listed(names: Iterable[Any], whole: bool = False) -> str:
    """The first of some names for a message, and how many more there are.

    Args:
        names: the names.
        whole: long ones are not cut, such as paths, which nobody could then give.
    """
    told = list(map(str, names))
    rest = f" and {len(told) - MOST_NAMES:,} more" if len(told) > MOST_NAMES else ""
    return ", ".join(name if whole else shown(name, quoted=False) for name in told[:MOST_NAMES]) + rest


def near_name(name: Any, known: Iterable[str]) -> str:
    """The hint at the name of `known` that is nearest to `name`, behind a space; empty where none is near."""
    # Longer words take long to compare, and nothing that anybody meant.
    near = get_close_matches(str(name)[:LONGEST_VALUE], sorted(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that `name` is no known `kind`, with the nearest names; with the list where it is short, or none is near."""
    names = sorted(known)
    if not names:
        return f"Unknown {kind} {shown(name)}: there is none."
    near = get_close_matches(name[:LONGEST_VALUE], names, n=3)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    if near and len(names) > MOST_NAMES:
        return f"Unknown {kind} {shown(name)}.{hint}"
    return f"Unknown {kind} {shown(name)}.{hint} Known: {listed(names)}."
