"""Dotted paths of modules and parameters, in which `*` stands for any one part."""

import re
from functools import cache


@cache
def path_pattern(path: str, before: str = "", after: str = "") -> re.Pattern[str]:
    """The regular expression that matches the names which `path` means.

    Args:
        path: a dotted path; `*` stands for any one part.
        before: regular expression of what may stand before it.
        after: regular expression of what may follow it.
    """
    return re.compile(before + re.escape(path).replace(r"\*", r"[^.]+") + after)
