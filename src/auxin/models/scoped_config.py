"""Configs for a part of a model: the model's config with some values of its own.

Modules keep the config that they were built with and read it when they run: the attention's implementation, say, which
`set_attn_implementation` changes in the model's config. A part's config is therefore no copy. It reads and writes the
config around it, whatever happens to that later, but for the values that are its own.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


class ScopedConfig:
    """Mixed into a config's class: everything but the config's own values is that of the config around it."""

    def __getattribute__(self, key: str) -> Any:
        own = super().__getattribute__("__dict__")
        if key.startswith("__") or "_around" not in own:
            return super().__getattribute__(key)
        name = super().__getattribute__("attribute_map").get(key, key)
        if name in own["_values"]:
            return own["_values"][name]
        if name in own["_around"].__dict__:
            return getattr(own["_around"], name)
        return super().__getattribute__(key)

    def __setattr__(self, key: str, value: Any) -> None:
        name = super().__getattribute__("attribute_map").get(key, key)
        own = super().__getattribute__("__dict__")
        if name in own["_values"]:
            own["_values"][name] = value
        else:
            setattr(own["_around"], name, value)

    def __delattr__(self, key: str) -> None:
        name = super().__getattribute__("attribute_map").get(key, key)
        own = super().__getattribute__("__dict__")
        if name in own["_values"]:
            del own["_values"][name]
        else:
            delattr(own["_around"], name)

    def __iter__(self) -> Iterator[str]:
        yield from unscoped(self)

    def __reduce__(self) -> Any:
        own = object.__getattribute__(self, "__dict__")
        return scoped_config, (own["_around"], own["_values"])

    def to_dict(self) -> dict[str, Any]:
        """All values, the own ones among them."""
        return unscoped(self).to_dict() | own_values(self)


def scoped_config(config: PreTrainedConfig, values: Mapping[str, Any]) -> PreTrainedConfig:
    """A config that is `config`, also after later changes of it, but for `values`.

    It is a `ScopedConfig` and of the class of `config`; pickling and copying keep what is shared shared.

    Args:
        config: the config around it. Where that is a part's itself, its values are taken over.
        values: by the names that the config has or knows as others' (attribute_map).
    """
    cls = _scoped_class(type(config))
    found = object.__new__(cls)
    names = {cls.attribute_map.get(key, key): value for key, value in values.items()}
    inherited = own_values(config) if isinstance(config, ScopedConfig) else {}
    object.__getattribute__(found, "__dict__").update(_around=unscoped(config), _values=inherited | names)
    return found


def own_values(config: Any) -> dict[str, Any]:
    """The values that a part's config has of its own."""
    return dict(object.__getattribute__(config, "__dict__")["_values"])


def unscoped(config: Any) -> Any:
    """The config around that of a part; anything else as it is."""
    return object.__getattribute__(config, "__dict__")["_around"] if isinstance(config, ScopedConfig) else config


def config_at(model: nn.Module, path: str) -> PreTrainedConfig:
    """The config that the module at `path` was built with: its own, or that of the innermost module around it. Where
    there is no such module, that of what the path leads to."""
    found: Any = getattr(model, "config", None)
    for part in path.split(".") if path else []:
        inner = model._modules.get(part)
        if inner is None:
            break
        model = inner
        config = getattr(model, "config", None)
        found = config if isinstance(config, PreTrainedConfig) else found
    if not isinstance(found, PreTrainedConfig):
        raise TypeError(f"no module around {path} has a config")
    return found


_CLASSES: dict[type[PreTrainedConfig], type[PreTrainedConfig]] = {}


def _scoped_class(cls: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The class of a part's config, one and the same for the configs of one class."""
    if issubclass(cls, ScopedConfig):
        return cls
    if cls in _CLASSES:
        return _CLASSES[cls]

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        raise TypeError("a part's config is made by scoped_config")

    attributes = {"__init__": init, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return _CLASSES.setdefault(cls, type(cls.__name__, (ScopedConfig, cls), attributes))
