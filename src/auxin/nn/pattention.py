"""Pattention: attention of the input over learned key and value parameter tokens.

Source: "TokenFormer: Rethinking Transformer Scaling with Tokenized Model Parameters" (arXiv 2410.23168), eq. 4 and 16.
With several groups of tokens, each with a norm and a scale of its own, groups can be appended without touching the
function of the old ones.

Shapes: x (..., in_features), scores A = x K^T and weights S = f(A) (..., n), output S V (..., out_features); n is the
sum of the group sizes.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Self, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from auxin.errors import ConfigError, unknown_name
from auxin.nn.bricks import Brick
from auxin.nn.scores import Gelu, ScoreFunction
from auxin.nn.shared_rows import Processes, local, seen_by_all, summed
from auxin.nn.token_weights import Rule, norm_dtype, token_weights


def pattention(
    x: Tensor,
    key_tokens: Tensor,
    value_tokens: Tensor,
    tau: Tensor,
    group_sizes: Sequence[int],
    score_function: ScoreFunction = "l2_norm_gelu",
    gelu: Gelu = "erf",
    eps: float | Sequence[float] = 1e-6,
) -> Tensor:
    """Sum over groups g of f(A_g) V_g, where A = x K^T: one score GEMM and one value GEMM, however many the groups.

    f by name (for each row and group; norms over the group's tokens, in the scores' type, float32 for 16-bit scores):
      l2_norm_gelu (default)  GELU(tau A_g / (||A_g||_2 + eps))
      gelu_l2_norm            tau G / (||G||_2 + eps), G = GELU(A_g)
      gelu                    GELU(A_g): no norm, no scale; groups are apart in name alone
      linear                  A_g: the layer is linear, a product of two matrices (not in the paper)
      softmax                 tau^2 softmax(A_g)
    A row of zero scores gives zeros under the first two, and the gradient there is the formula's own (its slope at zero
    is tau/eps): large, but finite; under float16, which can't hold it, it is zero.

    In eager mode autograd keeps what it keeps for linear -> GELU -> linear, plus one float per row and group where
    there are norms. There, and under softmax, second derivatives are then refused, with torch's error for functions
    that are differentiable once; forward-mode differentiation and the transforms of torch.func (grad, vmap, jvp, ...)
    are not supported either. Under "gelu" and "linear" all of these work.

    Args:
        x: (..., in_features).
        key_tokens: K (n, in_features), groups contiguous.
        value_tokens: V (n, out_features).
        tau: (number of groups,) float32 or float64, not trained; its values may change without recompilation. Of no
            effect under "gelu" and "linear", like eps.
        group_sizes: tokens of each group; sums to n.
        score_function, gelu: by name; "erf" is the exact GELU, "tanh" its approximation.
        eps: added to the norm, in the norm's precision; one for all groups, or one for each.

    Raises:
        ConfigError: sizes, scales and tensors don't fit each other.
    """
    tokens = sum(group_sizes)
    if key_tokens.shape[0] != tokens or value_tokens.shape[0] != tokens or tau.shape != (len(group_sizes),):
        raise ConfigError(
            f"group_sizes {list(group_sizes)} do not fit keys {tuple(key_tokens.shape)}, values "
            f"{tuple(value_tokens.shape)} and tau {tuple(tau.shape)}; keys and values need one row per token (the sum "
            "of group_sizes), tau one value per group."
        )
    # Compilers may take a number for a variable, which can't be checked; `Pattention` checks its own when it is made.
    checked = eps if torch.compiler.is_compiling() else _checked_eps(eps, tuple(group_sizes))
    rule = Rule(score_function, gelu, checked, tuple(group_sizes))
    scores = F.linear(x.reshape(-1, x.shape[-1]), key_tokens)
    return (token_weights(scores, tau, rule) @ value_tokens).reshape(*x.shape[:-1], value_tokens.shape[1])


class Pattention(Brick):
    """Token-parameter attention: `pattention` with its keys, values and scales.

    Parameters `key_tokens` (n, in_features) and `value_tokens` (n, out_features); non-persistent buffer `tau` (number
    of groups,), a constant of the layer and no parameter. The buffer is float64 in a float64 module and float32 in any
    other, whatever dtype the module is cast to. `initial_tau` holds the values last set as plain numbers: what
    `reset_tau` fills the buffer with, and what belongs into a model's config, since the buffer is not in the state
    dict.

    Args:
        in_features, out_features: widths of input and output.
        group_sizes: parameter tokens of each group, oldest group first.
        tau: scale of each group; default sqrt(group size), with which one group is the published model.
        score_function, gelu, eps: see `pattention`.
        device, dtype: of keys and values (and the device of tau).

    Raises:
        ConfigError: a size or scale is not positive, their counts differ, or a name is unknown.
    """

    tau: Tensor
    processes: Processes | None = None
    """Those that have the other tokens, where this one has a piece of them; see `auxin.nn.shared_rows`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_sizes: Sequence[int],
        tau: Sequence[float] | None = None,
        score_function: ScoreFunction = "l2_norm_gelu",
        gelu: Gelu = "erf",
        eps: float | Sequence[float] = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_settings(group_sizes, score_function, gelu)
        self.in_features, self.out_features, self.group_sizes = in_features, out_features, tuple(group_sizes)
        self.score_function, self.gelu, self.eps = score_function, gelu, _checked_eps(eps, self.group_sizes)
        self.key_tokens = nn.Parameter(torch.empty(sum(group_sizes), in_features, device=device, dtype=dtype))
        self.value_tokens = nn.Parameter(torch.empty(sum(group_sizes), out_features, device=device, dtype=dtype))
        self.register_buffer(
            "tau",
            torch.empty(len(self.group_sizes), dtype=norm_dtype(self.key_tokens.dtype), device=device),
            persistent=False,
        )
        self.set_tau([math.sqrt(size) for size in group_sizes] if tau is None else tau)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.processes is not None:
            return _shared_outputs(x, [self], self.processes)[0]
        return pattention(
            x, self.key_tokens, self.value_tokens, self.tau, self.group_sizes, self.score_function, self.gelu, self.eps
        )

    def set_tau(self, values: Sequence[float]) -> None:
        """Set every group's scale, in place (compiled code sees the new values without recompiling)."""
        self.initial_tau = _checked_tau(values, self.group_sizes)
        self.reset_tau()

    @torch.no_grad()
    def reset_tau(self) -> None:
        """Fill the buffer with the configured scales, as is needed after a meta-device or empty initialisation.

        In place, unless the parameters have got another type than the buffer was made for."""
        dtype = norm_dtype(self.key_tokens.dtype)
        if self.tau.dtype != dtype:
            self.tau = torch.empty_like(self.tau, dtype=dtype)
        self.tau.copy_(torch.tensor(self.initial_tau, dtype=dtype, device="cpu"))

    def reset_buffers(self) -> None:
        """Fill the scales, which no checkpoint holds, from the settings."""
        self.reset_tau()

    def scaled(self, factor: float, plain: Mapping[str, float]) -> dict[str, float]:
        """The result is linear in the values alone. Keys stay as they are: zeros would never wake."""
        return {"value_tokens": factor}

    def overwritten_with(self, other: nn.Module) -> None:
        """The plain numbers: epsilons, and those that the scales were set from, which the buffer may have rounded."""
        self.eps = cast(Pattention, other).eps
        self.set_tau(cast(Pattention, other).initial_tau)

    def shared_rows(self) -> Collection[str]:
        """Keys and values: each process can weigh tokens of its own."""
        if self.score_function == "softmax":
            raise ConfigError(
                "score_function 'softmax' weighs each token by its share among all, for which processes that have some "
                "of them each have no sums. Set strategy: replicated or sharded."
            )
        return ("key_tokens", "value_tokens")

    def share(self, processes: Processes) -> None:
        """From now on keys and values hold the tokens of this process."""
        self.processes = processes

    def sizes_here(self) -> list[int]:
        """Tokens of each group that this process has: groups lie one after the other, and are cut where the rows are.
        So each process has as many tokens as the others, whatever the groups, and a group may lie in a few of them."""
        if self.processes is None:
            return list(self.group_sizes)
        mine = self.processes.rows(sum(self.group_sizes))
        starts = [sum(self.group_sizes[:number]) for number in range(len(self.group_sizes))]
        return [
            max(0, min(start + size, mine.stop) - max(start, mine.start))
            for start, size in zip(starts, self.group_sizes, strict=True)
        ]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Keys N(0, 1/in_features) and values N(0, 1/n), as the JAX reference draws them in its attention layers: with
        one group the output's standard deviation is 0.65. A model that knows its depth overrides this."""
        nn.init.normal_(self.key_tokens, std=self.in_features**-0.5, generator=generator)
        nn.init.normal_(self.value_tokens, std=sum(self.group_sizes) ** -0.5, generator=generator)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, group_sizes={list(self.group_sizes)}, "
            f"tau={[round(value, 4) for value in self.initial_tau]}, score_function={self.score_function}, "
            f"gelu={self.gelu}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.tau
        super()._apply(fn, recurse)
        unfilled = before.is_meta and not self.tau.is_meta  # `to_empty` leaves no values
        if unfilled or before.dtype != norm_dtype(self.key_tokens.dtype):
            self.reset_tau()  # float64 has digits that float32 would not give back
        elif self.tau.dtype != before.dtype:  # a cast must not round the scales
            self.tau = before.to(self.tau.device)
        return self


def outputs_of(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """What each of `layers` gives of the same input. Where processes share their tokens, those of all layers are
    weighed together, so that the processes meet as often as for one of them.

    Args:
        x: (..., in_features).
        layers: Pattention layers, or what stands in their place.
    """
    first = layers[0]
    if (
        isinstance(first, Pattention)
        and first.processes is not None
        and all(isinstance(layer, Pattention) and _weighs_like(layer, first) for layer in layers)
    ):
        return _shared_outputs(x, cast(Sequence[Pattention], layers), first.processes)
    return [layer(x) for layer in layers]


def _weighs_like(layer: Pattention, other: Pattention) -> bool:
    """Whether the scores of both become weights alike, and nobody watches `layer` being called."""
    alike = (layer.processes, layer.score_function, layer.gelu) == (other.processes, other.score_function, other.gelu)
    return alike and not layer._forward_hooks and not layer._forward_pre_hooks


def _shared_outputs(x: Tensor, layers: Sequence[Pattention], processes: Processes) -> list[Tensor]:
    """What `layers` give of `x`, of which `processes` have tokens each: see `auxin.nn.shared_rows`."""
    sizes = [layer.sizes_here() for layer in layers]
    groups = tuple(size for layer in sizes for size in layer)
    each = [[layer.eps] * len(layer.group_sizes) if isinstance(layer.eps, float) else layer.eps for layer in layers]
    eps = _checked_eps([number for numbers in each for number in numbers], groups)
    rule = Rule(layers[0].score_function, layers[0].gelu, eps, groups, processes)
    rows = seen_by_all(x.reshape(-1, x.shape[-1]), processes)
    scores = F.linear(rows, _together([local(layer.key_tokens) for layer in layers]))
    weights = token_weights(scores, _together([layer.tau for layer in layers]), rule)
    parts = weights.split([sum(layer) for layer in sizes], dim=-1) if len(layers) > 1 else [weights]
    outputs = [part @ local(layer.value_tokens) for part, layer in zip(parts, layers, strict=True)]
    if len(layers) == 1:
        return [summed(outputs[0], processes).view(*x.shape[:-1], -1)]
    added = summed(torch.cat([output.flatten() for output in outputs]), processes)
    pieces = added.split([output.numel() for output in outputs])
    return [piece.view(*x.shape[:-1], output.shape[-1]) for piece, output in zip(pieces, outputs, strict=True)]


def _together(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _check_settings(group_sizes: Sequence[int], score_function: str, gelu: str) -> None:
    if not group_sizes or not all(isinstance(size, int) and size > 0 for size in group_sizes):
        raise ConfigError(
            f"group_sizes must be one or more positive integers, got {list(group_sizes)!r}; give the number of tokens "
            "of each group."
        )
    if score_function not in get_args(ScoreFunction):
        raise ConfigError(unknown_name("score_function", score_function, get_args(ScoreFunction)))
    if gelu not in get_args(Gelu):
        raise ConfigError(unknown_name("gelu", gelu, get_args(Gelu)))


def _checked_eps(eps: float | Sequence[float], group_sizes: tuple[int, ...]) -> float | tuple[float, ...]:
    """One number where that is all that is said, or one for every group."""
    numbers = tuple(map(float, eps if isinstance(eps, Sequence) else [eps] * len(group_sizes)))
    if len(numbers) != len(group_sizes):
        raise ConfigError(
            f"eps has {len(numbers)} values {list(numbers)} for {len(group_sizes)} groups of sizes "
            f"{list(group_sizes)}; give one, or one per group."
        )
    if wrong := [number for number in numbers if not (number > 0 and math.isfinite(number))]:
        raise ConfigError(
            f"eps must be a positive number, got {wrong[0]!r}; without it a row of zero scores divides by zero."
        )
    return numbers[0] if len(set(numbers)) == 1 else numbers


def _checked_tau(values: Sequence[float], group_sizes: tuple[int, ...]) -> tuple[float, ...]:
    tau = tuple(float(value) for value in values)
    if len(tau) != len(group_sizes):
        raise ConfigError(
            f"tau has {len(tau)} values {list(tau)} for {len(group_sizes)} groups of sizes {list(group_sizes)}; "
            "give one per group."
        )
    if not all(value > 0 and math.isfinite(value) for value in tau):
        raise ConfigError(
            f"tau must be positive and finite, got {list(tau)}; the usual value is the square root of the group's size."
        )
    return tau
