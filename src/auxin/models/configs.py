"""Values of configs by dotted names, where a config holds others: "text_config.num_hidden_layers".

Models of several parts (an image's encoder and a language model, an encoder and a decoder) have a config for each, all
held by one. A dotted name leads through the configs to the value.
"""

import copy
import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from auxin.errors import ConfigError, PlanError, shown
from auxin.foreign import refuse_setting
from auxin.models.head_dims import HEAD_DIM, reads_unlisted_head_dim
from auxin.models.scoped_config import unscoped
from auxin.words.paths import dotted

MOST_LAYERS = 1024
"""Of a stack. The deepest that was published has 500 (DeepNet, arXiv 2203.00555)."""
_COUNTED = {
    re.compile(r"(n|num)_(\w*_)?(layers?|blocks)|(encoder|decoder)_layers|depth"): MOST_LAYERS,
    re.compile(r"(n|num)_(\w*_)?experts"): 4096,
    re.compile(r"num_labels"): 1_000_000,
}
"""Values for each of which a config, or a model without weights, makes something; and the most that takes a moment."""


def refuse_endless(values: Mapping[str, Any]) -> None:
    """ConfigError when a config of these values, or its model on the meta device, would take for ever to be made."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            refuse_endless(value)
        for counted, most in _COUNTED.items():
            if isinstance(value, int) and value > most and counted.fullmatch(str(name)):
                raise ConfigError(
                    f"{name} = {shown(value)}: so many take long to build, even without weights, and nothing is "
                    f"known of models of more than {most:,}. Ask for that many at most."
                )


def config_parts(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """`config` and all configs in it by the dotted names that lead there; its own is ""."""
    found = {"": config}
    for name, part in vars(config).items():
        if isinstance(part, PreTrainedConfig) and not name.startswith("_"):
            found |= {dotted(name, rest): inner for rest, inner in config_parts(part).items()}
    return found


def config_holding(config: PreTrainedConfig, key: str) -> tuple[PreTrainedConfig, str]:
    """The config that holds the value called `key`, and the value's name in it. A config may not say a head dimension
    that its models would read all the same.

    Raises:
        PlanError: there is no such config, or it has no such value.
    """
    *path, name = key.split(".")
    for number, part in enumerate(path):
        inner = getattr(config, part, None)
        if not isinstance(inner, PreTrainedConfig):
            known = ", ".join(filter(None, config_parts(config))) or "none"
            raise PlanError(
                f"{type(config).__name__} has no config {'.'.join(path[: number + 1])!r} within; it has {known}"
            )
        config = inner
    if not hasattr(config, name) and not (name == HEAD_DIM and reads_unlisted_head_dim(config)):
        raise PlanError(f"{type(config).__name__} has no value {name!r}")
    return config, name


def config_value(config: PreTrainedConfig, key: str) -> Any:
    """The value called `key`, None where it could be said and is not; PlanError where there is none."""
    holder, name = config_holding(config, key)
    return getattr(holder, name, None)


def edited_config(config: PreTrainedConfig, values: Mapping[str, Any]) -> PreTrainedConfig:
    """A new config of the same type with `values`, by dotted names, changed. Every config is made by its own class. A
    head dimension that the class does not list is no longer said where its value is None.

    Raises:
        PlanError: a value does not exist, its config refuses it, or it is none to set (`auxin.foreign`).
    """
    refuse_setting(values)
    for key in values:
        config_holding(config, key)
    own = {key: copy.deepcopy(value) for key, value in values.items() if "." not in key}
    inner: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        part, _, name = key.partition(".")
        if name:
            inner.setdefault(part, {})[name] = value
    for part, changes in inner.items():
        own[part] = edited_config(getattr(config, part), changes).to_dict()
    values = {**config.to_dict(), **own}
    if values.get(HEAD_DIM, 0) is None and reads_unlisted_head_dim(config):
        del values[HEAD_DIM]
    try:
        return type(config).from_dict(values)
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:  # no torch.float99
        raise PlanError(f"the config refuses it: {error.__cause__ or error}") from error


def config_path(model: PreTrainedModel, path: str) -> str:
    """The dotted name, in the model's config, of the config that the module at `path` was built with; "" where that is
    the model's own, or a copy that was made of it (T5's encoder and decoder have one each)."""
    known = {id(config): name for name, config in config_parts(unscoped(model.config)).items()}
    found, module = "", model
    for part in path.split("."):
        child = module._modules.get(part)
        if child is None:
            break
        module = child  # type: ignore[assignment]
        found = known.get(id(unscoped(getattr(module, "config", None))), found)
    return found
