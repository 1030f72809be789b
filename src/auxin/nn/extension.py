"""Modules that go on being what they are and do something more.

A brick that has to see what goes into and comes out of a layer could be put around it. Every path below would then have
one part more, and whatever knows the layer by its path or its class (anatomies, PEFT, output capturing, sharding
policies, checkpoints) would have to be told. An extended module keeps its class (as a subclass of the same name), its
parameters, their names and its place.
"""

from typing import Any, TypeVar, cast

from torch import nn

Mixin = TypeVar("Mixin", bound=nn.Module)


def extended(module: nn.Module, mixin: type[Mixin], **attributes: Any) -> Mixin:
    """A module like `module`, with the same parameters, buffers and children, that is a `mixin` too.

    Args:
        module: stays as it is; hooks on it are not taken over. If it is a `mixin` already, the result is one once.
        mixin: a class whose `forward` calls `super().forward`; its constructor is not run.
        attributes: set on the result.
    """
    cls = extended_class(mixin, type(module))
    new = cls.__new__(cls)
    nn.Module.__init__(new)
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers", "_modules"):
            value = dict(value)
        elif "_hooks" in name:
            continue
        vars(new)[name] = value
    vars(new).update(attributes)
    return cast(Mixin, new)


_CLASSES: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def extended_class(mixin: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """The class of a `base` that is a `mixin` too; one and the same for the same two, so that types can be compared."""
    if issubclass(base, mixin):
        return base
    if (mixin, base) in _CLASSES:
        return _CLASSES[mixin, base]

    def reduce(self: nn.Module) -> Any:
        # No module holds the class under its name; without this, a whole model could not be pickled.
        return _blank, (mixin, base), self.__dict__

    # The name is the base's: device maps and sharding policies find layers by it.
    made = type(base.__name__, (mixin, base), {"__module__": mixin.__module__, "__reduce__": reduce})
    return _CLASSES.setdefault((mixin, base), made)


def _blank(mixin: type[nn.Module], base: type[nn.Module]) -> nn.Module:
    cls = extended_class(mixin, base)
    return cls.__new__(cls)
