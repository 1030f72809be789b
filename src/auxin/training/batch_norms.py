"""Batch norms of a model that several processes train: their statistics are of the samples that all of them have in a
pass, as those of one process that has all of these.

The mean and then the mean square about it are added up over the processes, and so are their gradients on the way back.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from auxin.training.ranks import Ranks


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Those of `model`, by their paths."""
    return {path: module for path, module in model.named_modules() if isinstance(module, _BatchNorm)}


@contextlib.contextmanager
def normed_together(model: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Within the context batch norms in training mode look at the samples of all processes, each of which runs the
    model as often, and on one sample at least each time."""
    found = batch_norms(model).values() if ranks.several else ()
    for module in found:
        module.forward = partial(_normed, module, ranks)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in found:
            del module.forward


def _normed(norm: _BatchNorm, ranks: Ranks, x: Tensor) -> Tensor:
    """As `norm` of the samples of all, (samples, channels, ...), for those of this process."""
    if not norm.training:
        return type(norm).forward(norm, x)
    values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    over = [dim for dim in range(values.dim()) if dim != 1]
    shape = [1, -1, *[1] * (values.dim() - 2)]
    count = values.new_tensor([values.numel() / values.shape[1]])
    sums = _Sum.apply(torch.cat([values.sum(over), count]), ranks)
    mean, count = sums[:-1] / sums[-1], sums[-1].detach()
    centred = values - mean.view(shape)
    variance = _Sum.apply(centred.square().sum(over), ranks) / count
    _note(norm, mean.detach(), variance.detach() * count / (count - 1))
    found = centred * (variance + norm.eps).rsqrt().view(shape)
    if norm.weight is not None:
        found = found * norm.weight.view(shape)
    if norm.bias is not None:
        found = found + norm.bias.view(shape)
    return found.to(x.dtype)


def _note(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Take a batch's mean and unbiased variance into the running ones, where `norm` has such."""
    if norm.running_mean is None or norm.running_var is None:
        return
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean), share)
    norm.running_var.lerp_(variance.to(norm.running_var), share)


class _Sum(torch.autograd.Function):
    """The sum of what the processes have, which each goes on from in its own way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        total = x.clone()
        ranks.add_up(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        ctx.ranks.add_up(total)
        return total, None
