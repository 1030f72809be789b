"""Building a module of a model anew, by its own class and from its own config, some of whose values are changed.

Constructors of transformers' modules take the config and a few things beside it: the layer's number, T5's
has_relative_attention_bias, GPT-2's intermediate_size. What they were given is looked for in the module that they made,
and is right only when it makes the same module again.
"""

import copy
import inspect
import json
from collections.abc import Iterator, Mapping
from itertools import islice, product
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from auxin.errors import PlanError
from auxin.foreign import refuse_setting
from auxin.models.loading import REFUSALS, fill_buffers
from auxin.models.scoped_config import config_at, scoped_config, unscoped

PLAIN = (bool, int, float, str, tuple, list, dict, type(None))
UNTOLD = ("training", "name_or_path", "all_tied_weights_keys")
"""Attributes that say nothing about how a module was built."""
ATTEMPTS = 64


class Builder:
    """Builds the module at `path` of a skeleton anew.

    Args:
        model: on the meta device.
        path: of a module that is as its class made it.

    Raises:
        PlanError: its class takes no config, or no arguments are found with which it makes this module.
    """

    def __init__(self, model: PreTrainedModel, path: str) -> None:
        self.model, self.path = model, path
        self.old = model.get_submodule(path)
        self.config = config_at(model, path)
        every = list(inspect.signature(type(self.old).__init__).parameters.values())[1:]
        self._parameters = {p.name: p for p in every if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        if "config" not in self._parameters:
            raise PlanError(
                f"{path} is a {type(self.old).__name__}, which is not built from a config. Name the module that holds "
                "it"
            )
        self.arguments = self._found_arguments()

    def value(self, name: str) -> Any:
        """What the config or the constructor's argument called `name` is now; PlanError when there is neither."""
        if name in self.arguments:
            return self.arguments[name]
        if not hasattr(self.config, name):
            known = ", ".join(self.arguments)
            raise PlanError(
                f"{type(self.config).__name__} has no value {name!r}"
                + (f", and {type(self.old).__name__} is given no such argument (but {known})" if known else "")
            )
        return getattr(self.config, name)

    def build(self, values: Mapping[str, Any]) -> nn.Module:
        """The module with `values` of the config, or of the constructor's arguments, changed.

        Raises:
            PlanError: a value does not exist, is of the wrong type or none to set, or the class makes nothing of them.
        """
        refuse_setting(values)
        for name in values:
            self.value(name)
        told = {name: value for name, value in values.items() if name not in self.arguments}
        _check_types(self.config, told)
        config = scoped_config(self.config, told) if told else self.config
        arguments = {name: values.get(name, value) for name, value in self.arguments.items()}
        try:
            new = self._made(config, arguments)
        except REFUSALS as error:
            raise PlanError(f"{self.path}: no {type(self.old).__name__} can be built with {values}: {error}") from error
        if told and "config" not in vars(new):
            new.config = config  # type: ignore[assignment] # for whoever asks later what it was built with
        return new

    def _made(self, config: PreTrainedConfig, arguments: Mapping[str, Any]) -> nn.Module:
        with torch.device("meta"):
            new = type(self.old)(config=config, **arguments)
        types = {name: tensor.dtype for name, tensor in self.old.named_parameters()}
        for name, tensor in new.named_parameters():
            # While a checkpoint is loaded, the modules have the type that its weights will have.
            if tensor.dtype != types.get(name, tensor.dtype):
                tensor.data = tensor.data.to(types[name])
        # In a skeleton they are real; while a checkpoint is loaded nothing is yet, and transformers fills them later.
        if any(not buffer.is_meta for buffer in self.old.buffers()):
            fill_buffers(self.model, self.path, new)
        return new

    def _found_arguments(self) -> dict[str, Any]:
        """The arguments beside the config with which the class makes the module that there is."""
        names = [name for name in self._parameters if name != "config"]
        wanted = likeness(self.old, alone=True)
        for choice in islice(product(*(self._candidates(name) for name in names)), ATTEMPTS):
            arguments = dict(zip(names, choice, strict=True))
            try:
                if likeness(self._made(self.config, arguments), alone=True) == wanted:
                    return arguments
            except REFUSALS:
                continue
        raise PlanError(
            f"{self.path} can't be built anew: {type(self.old).__name__}, called with the config and what its "
            f"attributes say of {', '.join(names) or 'nothing else'}, makes another module than the one there. Name "
            "the layer that holds it, or a module in it"
        )

    def _candidates(self, name: str) -> list[Any]:
        """What an argument may have been: the attribute of this name, of the module or of one in it, or the default (or
        the other truth value); without all of these a size of its tensors."""
        told = [vars(module)[name] for module in self.old.modules() if name in vars(module)]
        default = self._parameters[name].default
        found = told if default is inspect.Parameter.empty else [*told, default]
        found += [not default] if isinstance(default, bool) else []
        if not found:
            found = [size for parameter in self.old.parameters() for size in parameter.shape]
        return [value for place, value in enumerate(found) if value not in found[:place]]


def likeness(module: nn.Module, alone: bool = False) -> dict[str, Any]:
    """What can be seen of how `module` was built: the classes in it, plain attributes, shapes and ties. Modules of
    equal outlines compute the same from the same tensors, but for what they read from their config when they run.

    Args:
        module: on any device.
        alone: leave out what a model does to its modules once they are built: ties, and the values of buffers outside
            of checkpoints, which are otherwise a part of it where they are real.
    """
    return dict(_seen(module, alone))


def first_difference(one: nn.Module, other: nn.Module) -> str | None:
    """The first place, in words, in which two modules are not alike, as `likeness` sees them; None where they are.
    Tuples and lists, and the numbers and words that are keys of tables, are the same in what is read from a file."""
    seen, found = likeness(one), likeness(other)
    for key in (*seen, *(key for key in found if key not in seen)):
        was, now = seen.get(key), found.get(key)
        if was != now and json.dumps(was, default=str) != json.dumps(now, default=str):
            return f"{key.lstrip('.') or 'the model'} is {in_words(now)} instead of {in_words(was)}"
    return None


def in_words(value: Any) -> str:
    """What `likeness` sees in one place, for messages."""
    if isinstance(value, type):
        return value.__name__
    return f"of shape {list(value[0])}" if isinstance(value, tuple) and len(value) == 3 else repr(value)


def _seen(module: nn.Module, alone: bool) -> Iterator[tuple[str, Any]]:
    first: dict[int, str] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        yield path, type(part)
        for key, value in vars(part).items():
            if (
                not key.startswith("_")
                and key not in UNTOLD
                and (isinstance(value, PLAIN) or inspect.isfunction(value))
            ):
                yield f"{path}.{key}", value
        for key, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is None:
                yield f"{path}.{key}", None
                continue
            shown = not alone and not tensor.is_meta and key in part._non_persistent_buffers_set
            tied = None if alone else first.setdefault(id(tensor), f"{path}.{key}")
            yield f"{path}.{key}", (tuple(tensor.shape), tied, tensor.tolist() if shown else None)


def _check_types(config: PreTrainedConfig, values: dict[str, Any]) -> None:
    """PlanError when a value is of no type that the config takes for it."""
    scratch = copy.deepcopy(unscoped(config))
    for name, value in values.items():
        try:
            setattr(scratch, name, value)
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise PlanError(f"the config refuses {name} = {value!r}: {error.__cause__ or error}") from error
