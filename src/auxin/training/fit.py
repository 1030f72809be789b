"""Whether a model can be trained at all, and on what it is to learn."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from auxin.errors import CheckpointError, ConfigError
from auxin.models.adapters import has_adapter
from auxin.models.evaluating import about_inference_tensors
from auxin.objectives.objective import Objective
from auxin.training.adapters import check_adapter
from auxin.training.optimizer import optimizer_tensors
from auxin.training.strategies import whole


def check_fit(model: PreTrainedModel, objective: Objective) -> None:
    """Refuse models that would fail later, or worse, not fail.

    Args:
        model: the model.
        objective: what it shall learn, bound to its config and the data.

    Raises:
        ConfigError: what does not fit, and how to make it fit.
    """
    if reason := about_inference_tensors(model):
        raise ConfigError(reason)
    wrong = {str(p.dtype) for p in model.parameters() if p.requires_grad and p.dtype in (torch.float16, torch.bfloat16)}
    if wrong:
        raise ConfigError(
            f"The model's weights are {', '.join(sorted(wrong))}; updates would be lost to rounding. Load it with "
            "dtype=torch.float32; precision='bfloat16' computes in bfloat16 all the same."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("The model has no trainable parameter: requires_grad is False everywhere.")
    if has_adapter(model):
        check_adapter(model)
    objective.check(model)


def refuse_non_finite(model: PreTrainedModel, optimizer: Optimizer | None, origin: str) -> None:
    """Refuse weights and moments that hold NaN or infinities, trained or frozen: no step would make them better.

    Buffers may hold infinities (masks do), but no NaN.

    Args:
        model: the model.
        optimizer: over it; None: its weights alone.
        origin: where they come from, for the message.

    Raises:
        CheckpointError: the first tensor that is not finite, and how many of its values are not.
    """
    tensors = {**dict(_suspects(model)), **({} if optimizer is None else optimizer_tensors(model, optimizer))}
    checked = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.is_meta}
    buffers = {name for name, _ in model.named_buffers()}
    bad = {name: whole(_bad(tensor, name in buffers).any()) for name, tensor in checked.items()}
    # One transfer, whatever the number of tensors.
    flags = torch.stack([flag.to(model.device) for flag in bad.values()]).tolist() if bad else []
    names = [name for name, flag in zip(bad, flags, strict=True) if flag]
    if names:
        first = checked[names[0]]
        count = int(whole(_bad(first, names[0] in buffers).sum()))
        more = f", and of {len(names) - 1} more tensors" if len(names) > 1 else ""
        raise CheckpointError(
            f"{origin}: {count:,} of {first.numel():,} values of {names[0]}{more} are NaN or infinite. Training would "
            "spread them. Start from weights (and moments, or none) that are whole."
        )


def _suspects(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _bad(tensor: Tensor, is_buffer: bool) -> Tensor:
    return torch.isnan(tensor) if is_buffer else ~torch.isfinite(tensor)
