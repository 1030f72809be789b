"""Names of a package that are imported when they are first used, so that the package itself is imported in a blink."""

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any


def on_first_use(
    package: str, homes: Mapping[str, Iterable[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` (PEP 562) of a package that offers what its modules define.

    Type checkers know nothing of it: the package imports the same names under `TYPE_CHECKING`, and calls this where
    that is false, or every misspelt name would count as one that there is.

    Args:
        package: its `__name__`.
        homes: the names that it offers, by the modules that define them.
    """
    home_of = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])
        found = getattr(import_module(home_of[name]), name)
        # A module of the package that bears the name stands there once it is imported, and stays.
        return vars(sys.modules[package]).setdefault(name, found)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home_of})

    return get, names
