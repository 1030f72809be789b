"""AdamW: which parameters decay, and its moments by parameter name."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from auxin.errors import CheckpointError
from auxin.models.pieces import StoredTensors
from auxin.training.settings import TrainingSettings
from auxin.training.strategies import apart

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
    """The optimizer's state as tensors named after the parameters, in pieces where those are; parameters without state
    yet are left out."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter)
        if state:
            for moment in MOMENTS:
                tensors[f"{PREFIX}{moment}.{name}"] = state[moment]
    return tensors


def restore_optimizer(model: nn.Module, optimizer: Optimizer, stored: StoredTensors) -> list[str]:
    """Replace the optimizer's state by tensors that are stored under the names of `optimizer_tensors`; of a model in
    pieces each process reads its own.

    Returns:
        The names of trainable parameters that have no state there and start with fresh moments.

    Raises:
        CheckpointError: a tensor belongs to no parameter of the model or has another shape than its parameter.
    """
    expected = {
        f"{PREFIX}{moment}.{name}": tuple(parameter.shape) if moment != "step" else ()
        for name, parameter in model.named_parameters()
        for moment in MOMENTS
    }
    for key, shape in stored.shapes.items():
        if key.startswith(PREFIX) and shape != expected.get(key):
            wanted = f"has shape {expected[key]}" if key in expected else "does not exist in this model"
            raise CheckpointError(
                f"The optimizer state {key} has shape {shape}, but its parameter {wanted}. Grow the optimizer together "
                "with the model, or train without the old optimizer state."
            )
    optimizer.state.clear()
    fresh: list[str] = []
    found: dict[str, Tensor] = {}
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        names = {moment: f"{PREFIX}{moment}.{name}" for moment in MOMENTS}
        if not stored.shapes.keys() & names.values():
            fresh.append(name)
            continue
        for moment, key in names.items():
            if key not in stored.shapes:
                raise CheckpointError(f"The optimizer state of {name} lacks {moment}. Restore the checkpoint.")
            # AdamW keeps its step counter in float32 and, unless the kernel is fused, on the CPU.
            device = parameter.device if fused else torch.device("cpu")
            counter = torch.zeros((), dtype=torch.float32, device=device)
            found[key] = counter if moment == "step" else torch.zeros_like(parameter, requires_grad=False)
            optimizer.state[parameter][moment] = found[key]
    stored.read_into(found)
    return fresh
