"""Model classes that transformers' Auto classes know before the code of the model is imported."""

from importlib import import_module
from typing import Any

from transformers import PreTrainedConfig


class Deferred(type):
    """The metaclass of a stand-in for a model class, whose module is imported when the class is used: when it builds or
    loads a model, when an attribute is asked for, or when something is checked to be an instance of it.

    Made by `deferred`. The module registers the class itself once it is imported, so that the stand-in is met only by
    who looks a class up before any model of it is there. What a stand-in can't be is a subclass of PreTrainedModel: who
    asks for that calls `undeferred` first.
    """

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):  # questions of Python's own, which an empty class answers as well
            raise AttributeError(f"{cls.__name__} has no attribute {name!r}", name=name, obj=cls)
        return getattr(cls._itself(), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._itself()(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls._itself())

    def __subclasscheck__(cls, subclass: type) -> bool:
        return subclass is cls or issubclass(subclass, cls._itself())

    def _itself(cls) -> type:
        found: type = getattr(import_module(cls.__module__), cls.__name__)
        return found


def deferred(module: str, name: str, config_class: type[PreTrainedConfig]) -> Any:
    """A stand-in for the model class `name` of `module`, to be registered with an Auto class.

    Args:
        module: where it is defined; imported on first use.
        name: its name, which is what pipelines look at.
        config_class: its config's class, which Auto classes ask for when it is registered.
    """
    return Deferred(name, (), {"__module__": module, "config_class": config_class})


def undeferred(model_class: Any) -> Any:
    """`model_class`, or what it stands for."""
    return model_class._itself() if isinstance(model_class, Deferred) else model_class
