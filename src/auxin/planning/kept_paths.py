"""What a user wants left alone, by the paths of layers or parts."""

from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import BeforeValidator

from auxin.errors import PlanError
from auxin.words.paths import encloses

KeptPaths = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
"""Dotted paths, or a single one; `*` stands for any one part."""


def is_kept(path: str, kept: Sequence[str]) -> bool:
    """Whether what lies at `path` is or lies below what one of `kept` names."""
    return bool(path) and any(encloses(pattern, path) for pattern in kept)


def refuse_unknown(kept: Sequence[str], may_go: Iterable[str]) -> None:
    """PlanError when one of `kept` names none of the paths of what may go."""
    known = [path for path in may_go if path]
    for pattern in kept:
        if not any(is_kept(path, [pattern]) for path in known):
            raise PlanError(
                f"keep: {pattern!r} names nothing that could go. Give the path of a layer or a part, such as "
                f"{known[0] if known else '(none here)'}, * for any one part of it."
            )
