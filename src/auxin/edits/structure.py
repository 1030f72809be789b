"""The structure of a model without its weights: skeletons on the meta device, and what a new config changes in one."""

import copy
import json
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from auxin.errors import PlanError

ABSENT = object()
PLAIN = (bool, int, float, str, tuple, list, dict, type(None))


def config_values(config: PreTrainedConfig) -> dict[str, Any]:
    """The config as JSON values, its type's defaults left out."""
    values = json.loads(config.to_json_string(use_diff=True))
    return {**values, "model_type": config.model_type}


def edited_config(config: PreTrainedConfig, values: dict[str, Any]) -> PreTrainedConfig:
    """A new config of the same type with `values` changed; PlanError when the config refuses them."""
    unknown = [key for key in values if not hasattr(config, key)]
    if unknown:
        raise PlanError(f"{type(config).__name__} has no value {unknown[0]!r}")
    try:
        return type(config).from_dict({**config.to_dict(), **copy.deepcopy(values)})
    except (ValueError, TypeError) as error:
        raise PlanError(f"the config refuses it: {error}") from error


def config_from_values(values: dict[str, Any]) -> PreTrainedConfig:
    """The config that `config_values` describes."""
    rest = {key: value for key, value in values.items() if key != "model_type"}
    return AutoConfig.for_model(values["model_type"], **rest)


class Restructuring:
    """The difference between two configs' skeletons, done to a model in place, and undone.

    Modules keep their identity (hooks, flags and whatever else was put on them stay); only the plain attributes and the
    non-persistent buffers that differ between the skeletons, and the config's values, change.
    """

    def __init__(self, model: PreTrainedModel, before: PreTrainedModel, after: PreTrainedModel) -> None:
        self.model = model
        self._undo: list[tuple[dict[str, Any], str, Any]] = []
        self._before, self._after = before, after

    def do(self) -> None:
        """Change the attributes and buffers of the model's modules and the values of its config."""
        before, after = dict(self._before.named_modules()), dict(self._after.named_modules())
        for name, module in self.model.named_modules():
            self._change_attributes(module, before[name], after[name])
            self._change_buffers(module, before[name], after[name])
        old, new = self._before.config.to_dict(), self._after.config.to_dict()
        for key in new:
            if old.get(key) != new[key]:
                self._set(vars(self.model.config), key, copy.deepcopy(getattr(self._after.config, key)))

    def undo(self) -> None:
        """Put everything back, last change first."""
        while self._undo:
            owner, key, value = self._undo.pop()
            if value is ABSENT:
                del owner[key]
            else:
                owner[key] = value

    def _change_attributes(self, module: nn.Module, before: nn.Module, after: nn.Module) -> None:
        for key, value in vars(after).items():
            if key.startswith("_") or not isinstance(value, PLAIN):
                continue
            if key not in vars(before) or vars(before)[key] != value:
                self._set(vars(module), key, copy.copy(value))

    def _change_buffers(self, module: nn.Module, before: nn.Module, after: nn.Module) -> None:
        for key in after._non_persistent_buffers_set:
            new, old, current = after._buffers[key], before._buffers.get(key), module._buffers.get(key)
            if new is None or current is None or (old is not None and torch.equal(old, new)):
                continue
            self._set(module._buffers, key, new.to(device=current.device, dtype=current.dtype))

    def _set(self, owner: dict[str, Any], key: str, value: Any) -> None:
        self._undo.append((owner, key, owner.get(key, ABSENT)))
        owner[key] = value
