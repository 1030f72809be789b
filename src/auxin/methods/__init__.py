"""Published techniques, one module each: settings and a function that returns a plan.

A method of this package is a module below this one with a module-level `METHOD` (or `METHODS`, a tuple). A method of
another package is an entry point in the group "auxin.methods" whose object is a `Method`.
"""

import importlib
import pkgutil
import re
import warnings
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points

from auxin.edits.method import Method
from auxin.errors import ConfigError, unknown_name

GROUP = "auxin.methods"
"""The entry points' group."""


def methods() -> dict[str, Method]:
    """Every method that is installed, by name, in the order of the names.

    A method of another package that can't be loaded is left out with one warning that names the package.
    """
    found = {method.name: method for method in _built_in()}
    owners = dict.fromkeys(found, "auxin")
    for entry in entry_points(group=GROUP):
        package = entry.dist.name if entry.dist is not None else entry.value.partition(":")[0]
        try:
            loaded = _load(entry)
            if loaded.name in found:
                raise TypeError(f"{owners[loaded.name]} has a method of that name already; rename one of them")
        except Exception as error:
            # Another package's fault must not take the methods that work with it.
            warnings.warn(
                f"The method {entry.name!r} of the package {package} was left out: {type(error).__name__}: {error}. "
                f"Mend or uninstall {package}.",
                stacklevel=2,
            )
        else:
            found[loaded.name], owners[loaded.name] = loaded, package
    return dict(sorted(found.items()))


def method(name: str) -> Method:
    """The method called `name`; ConfigError with the nearest names when there is none."""
    known = methods()
    if name not in known:
        raise ConfigError(unknown_name("method", name, known))
    return known[name]


def _built_in() -> Iterator[Method]:
    for info in pkgutil.walk_packages(__path__, f"{__name__}."):
        if not info.ispkg:
            module = importlib.import_module(info.name)
            yield from getattr(module, "METHODS", ())
            if hasattr(module, "METHOD"):
                yield module.METHOD


def _load(entry: EntryPoint) -> Method:
    loaded = entry.load()
    if not isinstance(loaded, Method):
        raise TypeError(f"{entry.value} is a {type(loaded).__name__}, not an auxin.edits.method.Method")
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", loaded.name):
        raise TypeError(f"{loaded.name!r} is no method's name: use lower case letters, digits and hyphens")
    return loaded
