"""Turning a model's tree of modules into that of another skeleton, in place and with a way back."""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from transformers import PreTrainedConfig, PreTrainedModel

from auxin.edits.resolution import ResolvedPlan
from auxin.edits.tensor_names import tensor_names
from auxin.models.building import PLAIN
from auxin.models.scoped_config import ScopedConfig, own_values, scoped_config, unscoped
from auxin.models.ties import TIED, UNTIED
from auxin.words.paths import dotted

ABSENT = object()
PER_LAYER = "_heterogeneity_spec"
"""Where a config of transformers keeps the values that single layers have of their own."""


class Undo:
    """What must be done, last first, for everything to be as before."""

    def __init__(self) -> None:
        self._actions: list[Callable[[], Any]] = []

    def add(self, action: Callable[[], Any]) -> None:
        """Remember `action`."""
        self._actions.append(action)

    def set(self, owner: dict[str, Any], key: str, value: Any) -> None:
        """Put `value` into `owner` and remember what was there."""
        old = owner.get(key, ABSENT)
        self.add(lambda: owner.pop(key, None) if old is ABSENT else owner.__setitem__(key, old))
        owner[key] = value

    def remove(self, owner: dict[str, Any], key: str) -> None:
        """Take `key` out of `owner` and remember what it held."""
        value = owner[key]
        self.add(lambda: owner.__setitem__(key, value))
        del owner[key]

    def refill(self, owner: dict[str, Any], values: dict[str, Any]) -> None:
        """Make `owner`, the same dictionary, hold `values` in their order, and remember what was there."""
        old = dict(owner)
        if [(key, id(value)) for key, value in old.items()] == [(key, id(value)) for key, value in values.items()]:
            return

        def put_back() -> None:
            owner.clear()
            owner.update(old)

        self.add(put_back)
        owner.clear()
        owner.update(values)

    def everything(self) -> None:
        """Put everything back."""
        while self._actions:
            self._actions.pop()()


def rebuild_tree(model: PreTrainedModel, resolved: ResolvedPlan, tensors: dict[str, Tensor], undo: Undo) -> None:
    """Give `model` the tree of `resolved.after`, holding `tensors`.

    Modules that live on keep their identity (hooks, flags and whatever else was put on them stay); the plain
    attributes, buffers outside of checkpoints and config values that differ between the two skeletons change. Copies of
    a module start with all that it has.
    """
    _Rebuilding(model, resolved, tensors, undo).do()


class _Rebuilding:
    def __init__(self, model: PreTrainedModel, resolved: ResolvedPlan, tensors: dict[str, Tensor], undo: Undo) -> None:
        self.model, self.resolved, self.undo = model, resolved, undo
        self.before = dict(resolved.before.named_modules(remove_duplicate=False))
        self.old = dict(model.named_modules(remove_duplicate=False))
        self.tensors = {
            alias: tensors[name] for name, aliases in tensor_names(resolved.after).items() for alias in aliases
        }
        self.placed: dict[int, nn.Module] = {}
        self.taken: set[int] = set()
        self.configs: dict[int, PreTrainedConfig] = {}

    def do(self) -> None:
        """Change the tree, then the config."""
        self._change_configs()
        self._tell_ties()
        self._place(self.resolved.after, "")
        for mapping in ("_tied_weights_keys", "all_tied_weights_keys"):
            ties = getattr(self.resolved.after, mapping)
            if getattr(self.model, mapping) != ties:
                self.undo.set(vars(self.model), mapping, copy.copy(ties))

    def _place(self, after: nn.Module, path: str) -> nn.Module:
        """The module that stands at `path` from now on; `after` is the one there in the skeleton."""
        if id(after) in self.placed:
            return self.placed[id(after)]
        old_path = self.resolved.modules.get(path)
        old = None if old_path is None else self.old.get(old_path)
        if path == "" and type(old) is not type(after):
            self._change_class(after)
        children = list(after._modules.items())
        prefix = f"{path}." if path else ""
        if old is None or type_before_parametrizations(old) is not type_before_parametrizations(after):
            module = after
            device = next((tensor.device for tensor in self.tensors.values()), torch.device("cpu"))
            module.training = old.training if old is not None else self.model.training
            self._adopt_config(module)
            # Those that checkpoints hold are placed below.
            buffers = {
                key: value if value is None or f"{prefix}{key}" in self.tensors else value.to(device)
                for key, value in after._buffers.items()
            }
        else:
            module = old if id(old) not in self.taken else _twin(old)
            self.taken.add(id(old))
            before = self.before[str(old_path)]
            self._change_attributes(module, before, after)
            buffers = self._buffers(module, before, after)
        self.placed[id(after)] = module
        new_children = {
            key: None if child is None else self._place(child, dotted(path, key)) for key, child in children
        }
        parameters = {
            key: None if value is None else self.tensors[f"{prefix}{key}"] for key, value in after._parameters.items()
        }
        for key in buffers:
            if f"{prefix}{key}" in self.tensors:
                buffers[key] = self.tensors[f"{prefix}{key}"]
        self.undo.refill(module._modules, new_children)
        self.undo.refill(module._parameters, parameters)
        kept = {} if module is after else dict(module._buffers)
        self.undo.refill(module._buffers, buffers)
        derived = module._non_persistent_buffers_set
        if hasattr(module, "reset_buffers") and any(buffers.get(key) is not kept.get(key) for key in derived):
            # The skeleton's are of its own type, float32 most often, which is too short beside float64 weights.
            cast(Any, module).reset_buffers()
            module._buffers.update({key: buffer for key, buffer in buffers.items() if key not in derived})
        return module

    def _change_class(self, after: nn.Module) -> None:
        """Make the model, which the caller holds, one of the class of `after`."""
        model, old_class = self.model, type(self.model)
        self.undo.add(lambda: setattr(model, "__class__", old_class))
        model.__class__ = type(after)  # type: ignore[assignment]
        for key, value in vars(after).items():
            if key.startswith("_") and isinstance(value, PLAIN) and key not in nn.Module().__dict__:
                self.undo.set(vars(model), key, copy.copy(value))

    def _change_attributes(self, module: nn.Module, before: nn.Module, after: nn.Module) -> None:
        for key, value in vars(after).items():
            if key.startswith("_") or not isinstance(value, PLAIN) or key == "all_tied_weights_keys":
                continue
            if key not in vars(before) or vars(before)[key] != value:
                self.undo.set(vars(module), key, copy.copy(value))
        if module is not self.model:
            self._follow_config(module, vars(before).get("config"), vars(after).get("config"))

    def _buffers(self, module: nn.Module, before: nn.Module, after: nn.Module) -> dict[str, Any]:
        buffers: dict[str, Any] = {}
        for key, new in after._buffers.items():
            old, current = before._buffers.get(key), module._buffers.get(key)
            unchanged = old is not None and new is not None and not new.is_meta and torch.equal(old, new)
            if new is None or current is None or new.is_meta or unchanged:
                buffers[key] = current if key in module._buffers else new
            else:
                buffers[key] = new.to(device=current.device, dtype=current.dtype)
        return buffers

    def _change_configs(self) -> None:
        """The config values that differ; encoder and decoder may have configs of their own."""
        after = dict(self.resolved.after.named_modules(remove_duplicate=False))
        for path, old_path in self.resolved.modules.items():
            new, old = unscoped(getattr(after[path], "config", None)), None
            if old_path is not None:
                old = unscoped(getattr(self.old.get(old_path), "config", None))
            if (
                not isinstance(new, PreTrainedConfig)
                or id(new) in self.configs
                or not isinstance(old, PreTrainedConfig)
            ):
                continue
            if type(new) is not type(old):
                self.configs[id(new)] = self.configs[id(old)] = copy.deepcopy(new)
                if old_path == "":
                    self.undo.set(vars(self.model), "config", self.configs[id(new)])
                continue
            self.configs[id(new)] = old
            was = unscoped(getattr(self.before[str(old_path)], "config", old))
            self._change_values(old, was, new)

    def _tell_ties(self) -> None:
        """Let the config say which parameters are one tensor, where it was told wrongly before."""
        config, after = self.model.config, self.resolved.after.config
        for key in (TIED, UNTIED):
            if hasattr(after, key) and getattr(config, key, None) != getattr(after, key):
                self.undo.set(vars(config), key, copy.copy(getattr(after, key)))
            elif key in vars(config) and not hasattr(after, key):
                self.undo.remove(vars(config), key)

    def _change_values(self, config: PreTrainedConfig, before: PreTrainedConfig, after: PreTrainedConfig) -> None:
        old, new = before.to_dict(), after.to_dict()
        for key in new:
            if key in old and old[key] == new[key]:
                continue
            if key == "per_layer_config":  # which a config keeps in another form
                self.undo.set(vars(config), PER_LAYER, copy.deepcopy(vars(after)[PER_LAYER]))
                continue
            part, value = vars(config).get(key), getattr(after, key)
            if isinstance(part, PreTrainedConfig) and type(part) is type(value):
                self._change_values(part, getattr(before, key), value)  # the modules of that part hold it too
            else:
                # What the config keeps behind a property (a backbone's stages) has an underscore before its name.
                behind = isinstance(getattr(type(config), key, None), property) and f"_{key}" in vars(config)
                self.undo.set(vars(config), f"_{key}" if behind else key, copy.deepcopy(value))
        for key in old.keys() - new.keys():
            key = PER_LAYER if key == "per_layer_config" else key
            if key in vars(config):
                self.undo.remove(vars(config), key)

    def _adopt_config(self, module: nn.Module) -> None:
        """New modules must read the model's config and not the skeleton's."""
        config = vars(module).get("config")
        known = self._known(config)
        if known is not None and config is not known:
            self.undo.set(vars(module), "config", known)

    def _follow_config(self, module: nn.Module, before: Any, after: Any) -> None:
        """A module that lives on gets a config of its own where the new skeleton's has one, or loses it again."""
        if isinstance(after, ScopedConfig):
            if not isinstance(before, ScopedConfig) or own_values(before) != own_values(after):
                self.undo.set(vars(module), "config", self._known(after))
        elif isinstance(before, ScopedConfig) and after is None:
            if "config" in vars(module):  # the copy of a module that lost it already has none
                self.undo.remove(vars(module), "config")
        elif isinstance(before, ScopedConfig):
            self.undo.set(vars(module), "config", self._known(after))

    def _known(self, config: Any) -> PreTrainedConfig | None:
        """The model's config for one of the new skeleton's, a part's for a part's; None for what is none of it."""
        known = self.configs.get(id(config))
        if known is None and isinstance(config, ScopedConfig) and id(unscoped(config)) in self.configs:
            known = self.configs[id(config)] = scoped_config(self.configs[id(unscoped(config))], own_values(config))
        return known


def _twin(module: nn.Module) -> nn.Module:
    """A second module like `module`, hooks included, whose children and tensors can be set apart."""
    twin = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[name] = dict(getattr(module, name))
    for name, value in vars(module).items():
        if name.endswith("_hooks"):
            twin.__dict__[name] = copy.copy(value)
    for key, buffer in twin._buffers.items():
        twin._buffers[key] = None if buffer is None else buffer.clone()
    return twin
