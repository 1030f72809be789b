"""Eager attention, for a while: the implementation that computes attention maps and can give them."""

import contextlib
from collections.abc import Iterator

from transformers import PreTrainedConfig, PreTrainedModel

EAGER = "eager"
"""The one implementation of attention that has maps to give."""


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
