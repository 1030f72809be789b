"""Published techniques, one module each: settings and a function that returns a plan.

The package can be called, and then lists them as `methods` does: that is `auxin.methods()`.

A method of this package is a module below this one with a module-level `METHOD` (or `METHODS`, a tuple). A method of
another package is an entry point in the group "auxin.methods" whose object is a `Method`.
"""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from auxin.planning.method import Method
from auxin.words.registry import Registry


def methods() -> dict[str, Method]:
    """Every method that is installed, by name, in the order of the names.

    A method of another package that can't be loaded is left out with one warning that names the package.
    """
    return _METHODS.all()


def method(name: str) -> Method:
    """The method called `name`; ConfigError with the nearest names when there is none."""
    return _METHODS.find(name)


def _methods_in(loaded: Any) -> Iterator[tuple[str, Method]]:
    if isinstance(loaded, ModuleType):
        found = (*getattr(loaded, "METHODS", ()), *((loaded.METHOD,) if hasattr(loaded, "METHOD") else ()))
    else:
        found = (loaded,)
    for item in found:
        if not isinstance(item, Method):
            raise TypeError(f"{item!r} is a {type(item).__name__}, not an auxin.planning.method.Method")
        yield item.name, item


_METHODS = Registry("method", __name__, _methods_in)


class _Callable(ModuleType):
    """A package that is called for what it lists. Importing it puts it where `auxin.methods` is looked up, so that no
    function can be there."""

    def __call__(self) -> dict[str, Method]:
        """See `methods`."""
        return methods()


sys.modules[__name__].__class__ = _Callable
