"""Dotted paths of modules and parameters, in which `*` stands for any one part."""

import re
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import takewhile


def dotted(*paths: str) -> str:
    """One path after the other; "" is the place itself and adds nothing."""
    return ".".join(filter(None, paths))


@cache
def path_pattern(path: str, before: str = "", after: str = "") -> re.Pattern[str]:
    """The regular expression that matches the names which `path` means.

    Args:
        path: a dotted path; `*` stands for any one part.
        before: regular expression of what may stand before it.
        after: regular expression of what may follow it.
    """
    return re.compile(before + re.escape(path).replace(r"\*", r"[^.]+") + after)


def encloses(scope: str, path: str) -> bool:
    """Whether `path`, which may be a pattern itself, is or lies below what `scope` means; "" means everything."""
    return not scope or path_pattern(scope, after=r"(\..*)?").fullmatch(path) is not None


def innermost(path: str, scopes: Iterable[str]) -> str:
    """The innermost of `scopes` that enclose `path`: the one with the most parts, with the fewest `*` among those."""
    around = [scope for scope in scopes if encloses(scope, path)]
    return max(around, key=lambda scope: (len(scope.split(".")) if scope else 0, -scope.count("*")))


def shared_parts(one: Sequence[str], other: Sequence[str]) -> int:
    """How many parts two paths, given in parts, have in common from the beginning on."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))
