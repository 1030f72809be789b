"""Eager attention, for a while: the implementation that computes attention maps and can give them."""

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

EAGER = "eager"
"""The one implementation of attention that has maps to give."""
_ASKS = "output_attentions"


@contextlib.contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, the model's attention computes its maps; afterwards every part of it, towers that had one of
    their own too, is implemented as before."""
    before = [(config, config._attn_implementation) for config in _configs(model)]
    try:
        model.set_attn_implementation(EAGER)
        yield
    finally:
        # From the outside in: what is set in a config is set in those within it.
        for config, implementation in before:
            config._attn_implementation = implementation


@contextlib.contextmanager
def asked_for_maps(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context, those of `modules` that can be asked for their attention's map are: older ones give it only
    then, and some are not eager if they aren't asked."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            if _ASKS in inspect.signature(module.forward).parameters:
                stack.callback(module.register_forward_pre_hook(_ask, with_kwargs=True).remove)
        yield


def _ask(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
    bound = inspect.signature(module.forward).bind(*arguments, **named)
    bound.arguments[_ASKS] = True
    return bound.args, bound.kwargs


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every config of the model's parts, those within another one behind it."""
    found: dict[int, PreTrainedConfig] = {}

    def add(config: PreTrainedConfig) -> None:
        if id(config) not in found:
            found[id(config)] = config
            for name in config.sub_configs:
                if (within := getattr(config, name, None)) is not None:
                    add(within)

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            add(module.config)
    return list(found.values())
