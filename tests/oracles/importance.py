"""Importance of units by masks that are written into the weights, one sample at a time, in float64.

A mask of a unit multiplies the column of the output matrix that reads the unit, or, of the residual stream, everything
in the weights that writes a dimension of it. The model is called with masked weights, and torch differentiates its loss
by the mask. No activation is looked at.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

Masked = Callable[[Mapping[str, Tensor], Tensor], dict[str, Tensor]]
"""From all weights and a mask to the weights that the mask changes."""


def slopes(model: Any, row: Mapping[str, Tensor], units: int, masked: Masked) -> Tensor:
    """dL/dm at m = 1 of one sample, (units,): L is the model's loss on the sample alone."""
    weights = {name: tensor.detach() for name, tensor in model.named_parameters(remove_duplicate=False)}
    mask = torch.ones(units, dtype=torch.float64, requires_grad=True)
    sample = {name: tensor[None] for name, tensor in row.items()}
    loss = functional_call(model, masked(weights, mask), (), sample, tie_weights=False).loss
    (slope,) = torch.autograd.grad(loss, mask)
    return slope


def columns(*names: str, entries: int = 1, axis: int = -1) -> Masked:
    """Units of `entries` columns each of some matrices, along the last axis or, of a Conv1D, the first one."""

    def masked(weights: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        each = mask.repeat_interleave(entries)
        return {name: (weights[name].movedim(axis, -1) * each).movedim(-1, axis) for name in names}

    return masked


def rows(*names: str, entries: int = 1) -> Masked:
    """Units of `entries` rows each of some matrices, and entries of biases."""
    return columns(*names, entries=entries, axis=0)


def both(*parts: Masked) -> Masked:
    """Several of these by one mask, of different weights."""
    return lambda weights, mask: {name: tensor for part in parts for name, tensor in part(weights, mask).items()}


def given_to(model: Any, path: str, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The arguments that the module at `path` gets, in the one call of it."""
    kept: list[tuple[Tensor, ...]] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, given: kept.append(given))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    (found,) = kept
    return found


def entering(model: Any, path: str, batch: Mapping[str, Tensor]) -> Tensor:
    """What enters the module at `path`, (samples, tokens, entries)."""
    return given_to(model, path, batch)[0]


def entering_experts(model: Any, path: str, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of the experts at `path`, gated ones with SiLU and no biases, what enters their output matrices, (samples,
    tokens, experts, units), and what they give, (samples, tokens, experts, width): both times the router's weight, and
    0 where an expert isn't chosen. One token and one expert after the other."""
    experts, (hidden, index, weights) = model.get_submodule(path), given_to(model, path, batch)
    into, out = experts.gate_up_proj.detach(), experts.down_proj.detach()
    count, width, units = out.shape
    inner, output = hidden.new_zeros(len(hidden), count, units), hidden.new_zeros(len(hidden), count, width)
    for token, x in enumerate(hidden):
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            gate, up = into[expert, :units] @ x, into[expert, units:] @ x
            inner[token, expert] = weight * gate / (1 + torch.exp(-gate)) * up
            output[token, expert] = out[expert] @ inner[token, expert]
    samples = len(next(iter(batch.values())))
    return inner.unflatten(0, (samples, -1)), output.unflatten(0, (samples, -1))


def moments(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Of (samples, tokens, ...) the mean square and the variance over all tokens, (...)."""
    flat = inputs.flatten(0, 1)
    return (flat**2).mean(0), flat.var(0, unbiased=False)
