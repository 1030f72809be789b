"""The bricks that an edit may put into a model, by name."""

from collections.abc import Callable
from importlib import import_module, metadata
from pkgutil import iter_modules
from typing import TypeVar

from torch import nn

import auxin.nn
from auxin.errors import PlanError, unknown_name

GROUP = "auxin.bricks"
"""Entry points of this group name modules of other packages that define bricks."""

_BRICKS: dict[str, type[nn.Module]] = {}
Brick = TypeVar("Brick", bound=type[nn.Module])


def brick(name: str) -> Callable[[Brick], Brick]:
    """Class decorator: register the class under `name`.

    A brick that replaces a module has a class method `replacing(module, **settings)`, which builds it for that module
    (also on the meta device, where modules have shapes and no values). A brick that wraps one is called as
    `Class(inner, **settings)` and keeps the wrapped module as its attribute `inner`. A brick with non-persistent
    buffers has a method `reset_buffers()` that fills them from its settings, in the type that its parameters ask for.
    """

    def register(cls: Brick) -> Brick:
        _BRICKS[name] = cls
        return cls

    return register


def find_brick(name: str) -> type[nn.Module]:
    """The brick called `name`; PlanError when there is none."""
    if name not in _BRICKS:
        # A model that names a brick is rebuilt also where nothing else was imported.
        for module in iter_modules(auxin.nn.__path__, "auxin.nn."):
            import_module(module.name)
        for point in metadata.entry_points(group=GROUP):
            point.load()
    if name not in _BRICKS:
        raise PlanError(unknown_name("brick", name, _BRICKS) + " Install the package that provides it.")
    return _BRICKS[name]
