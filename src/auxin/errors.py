"""Errors a user can cause. Each carries one message that names the field, the value received and the mend."""

from collections.abc import Iterable
from difflib import get_close_matches


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


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that `name` is no known `kind`, with the nearest names and the whole list."""
    names = sorted(known)
    near = get_close_matches(name, names, n=3)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return f"Unknown {kind} {name!r}.{hint} Known: {', '.join(names)}."
