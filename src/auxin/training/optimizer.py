"""AdamW: which parameters decay, and its moments by parameter name."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from auxin.errors import CheckpointError
from auxin.training.settings import TrainingSettings
from auxin.training.strategies import apart, in_pieces_like, whole

PREFIX = "optimizer."
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""AdamW's state of one parameter; a checkpoint names it `optimizer.<moment>.<parameter>`."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split the trainable parameters of `model`, each in exactly one group, into those that decay and those that don't.

    Matrices (two axes or more: embeddings, projections, parameter tokens) decay. Vectors and scalars (norms, biases,
    scales such as tau) and stacked biases do not: they set a scale or an origin, and pulling it to zero fights the
    loss without regularizing it. A tied parameter counts once.
    """
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            bias = name.rpartition(".")[2].endswith("bias")
            (others if parameter.ndim < 2 or bias else decaying).append(parameter)
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, settings: TrainingSettings) -> AdamW:
    """AdamW over all trainable parameters of `model`, with the fused kernel where there is one."""
    groups = [
        {**group, "params": kind}
        for group in parameter_groups(model, settings.weight_decay)
        for kind in apart(cast(list[nn.Parameter], group["params"]))
    ]
    devices = {parameter.device.type for parameter in model.parameters()}
    return AdamW(
        groups,
        lr=settings.learning_rate,
        betas=settings.adam_betas,
        eps=settings.adam_epsilon,
        fused=devices <= {"cpu", "cuda"},
    )


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as tensors named after the parameters; parameters without state yet are left out. Where it
    lies in pieces, all processes call this together, and get whole tensors."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter)
        if state:
            for moment in MOMENTS:
                tensors[f"{PREFIX}{moment}.{name}"] = whole(state[moment])
    return tensors


def restore_optimizer(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> list[str]:
    """Replace the optimizer's state by `tensors` (as `optimizer_tensors` names them).

    Returns:
        The names of trainable parameters that have no state in `tensors` and start with fresh moments.

    Raises:
        CheckpointError: a tensor belongs to no parameter of the model or has another shape than its parameter.
    """
    expected = {
        f"{PREFIX}{moment}.{name}": parameter.shape if moment != "step" else torch.Size()
        for name, parameter in model.named_parameters()
        for moment in MOMENTS
    }
    for key, value in tensors.items():
        if key.startswith(PREFIX) and value.shape != expected.get(key):
            wanted = f"has shape {tuple(expected[key])}" if key in expected else "does not exist in this model"
            raise CheckpointError(
                f"The optimizer state {key} has shape {tuple(value.shape)}, but its parameter {wanted}. Grow the "
                "optimizer together with the model, or train without the old optimizer state."
            )
    optimizer.state.clear()
    fresh: list[str] = []
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        saved = {moment: tensors.get(f"{PREFIX}{moment}.{name}") for moment in MOMENTS}
        if all(tensor is None for tensor in saved.values()):
            fresh.append(name)
            continue
        for moment, tensor in saved.items():
            if tensor is None:
                raise CheckpointError(f"The optimizer state of {name} lacks {moment}. Restore the checkpoint.")
            # AdamW keeps its step counter in float32 and, unless the kernel is fused, on the CPU.
            like = torch.float32 if moment == "step" else parameter.dtype
            device = parameter.device if fused or moment != "step" else torch.device("cpu")
            copied = tensor.to(device=device, dtype=like, copy=True)
            optimizer.state[parameter][moment] = copied if moment == "step" else in_pieces_like(copied, parameter)
    return fresh
