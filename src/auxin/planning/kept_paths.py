"""What a user wants left alone, by the paths of layers or parts."""

from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import BeforeValidator, Field

from auxin.errors import PlanError
from auxin.words.paths import encloses

KeptPaths = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
]
"""Dotted paths, or a single one; `*` stands for any one part."""


def is_kept(path: str, kept: Sequence[str]) -> bool:
    """Whether what lies at `path` is or lies below what one of `kept` names."""
    return bool(path) and any(encloses(pattern, path) for pattern in kept)


def refuse_impossible(kept: Sequence[str], may_go: Iterable[str], what: str) -> None:
    """PlanError when one of `kept` names none of the paths of what may go, or all of them are kept.

    Args:
        kept: what is to stay.
        may_go: the paths; those of what goes through the whole model ("") are no matter.
        what: what the paths are of: "a layer".
    """
    known = [path for path in may_go if path]
    if kept and not known:
        raise PlanError("keep: nothing that is to go here is in one layer alone. Leave it out.")
    for pattern in kept:
        if not any(is_kept(path, [pattern]) for path in known):
            raise PlanError(
                f"keep: {pattern!r} names nothing that could go. Give the path of {what}, such as {known[0]}, * for "
                "any one part of it."
            )
    if kept and all(is_kept(path, kept) for path in known):
        raise PlanError(f"keep: all of the {len(known)} that could go are kept. Name fewer.")
