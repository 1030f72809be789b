"""Layers that the backward pass computes again, so that it need not keep what is within them: activation checkpointing
(Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174)."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from auxin.errors import ConfigError

FLAG, FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"
"""What a layer of transformers goes by."""
RECOMPUTATION_NOTE = "layers were computed again in the backward pass, which is not counted in FLOPs"
"""Of the books."""


def check_recomputable(model: nn.Module) -> None:
    """Refuse a model of which nothing would be computed again, or something else would.

    Raises:
        ConfigError: its layers are none that transformers can compute again, or one has a batch norm, which would take
            each batch into its statistics twice.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)}
    if not layers:
        raise ConfigError(
            f"activation_checkpointing: transformers computes no layer of {type(model).__name__} again. Set it to "
            "false, and micro_batch_size lower."
        )
    for path, module in (found for name, layer in layers.items() for found in layer.named_modules(prefix=name)):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(
                f"activation_checkpointing: {path} is a batch norm, which would take each batch into its statistics "
                "twice. Set it to false."
            )


@contextlib.contextmanager
def recomputed(model: nn.Module, enabled: bool = True, run: Callable[..., Any] | None = None) -> Iterator[None]:
    """Within the context, training passes of `model` keep the inputs of its layers alone, where `enabled`. A layer
    draws the same random numbers the second time, and computes in the same precision; gradients are the same to the
    bit.

    Args:
        model: any; what it had switched on itself stays on.
        enabled: whether anything is done.
        run: what a layer is run by: `run(forward, *arguments)`; None: torch's checkpoint.
    """
    run = run or partial(checkpoint, use_reentrant=False)
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    # A stack that knows of it keeps no cache. transformers' own switch sets what is within layers, too, and T5 then
    # takes another kernel of attention.
    for module in model.modules() if enabled else ():
        if hasattr(module, FLAG) and isinstance(module, GradientCheckpointingLayer | PreTrainedModel):
            own = vars(module)
            before.append((own, {name: own[name] for name in (FLAG, FUNCTION) if name in own}))
            own |= {FLAG: True, FUNCTION: run}
    try:
        yield
    finally:
        for own, values in before:
            for name in (FLAG, FUNCTION):
                own.pop(name, None)
            own |= values
