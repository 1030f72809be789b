"""Pattention: attention of the input over learned key and value parameter tokens.

Source: "TokenFormer: Rethinking Transformer Scaling with Tokenized Model Parameters" (arXiv 2410.23168), eq. 4 and 16.
With several groups of tokens, each with a norm and a scale of its own, groups can be appended without touching the
function of the old ones.

Shapes: x (..., in_features), scores A = x K^T and weights S = f(A) (..., n), output S V (..., out_features); n is the
sum of the group sizes.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import FunctionCtx, once_differentiable

from auxin.errors import ConfigError, unknown_name
from auxin.nn.bricks import Brick
from auxin.nn.scores import Gelu, ScoreFunction

# On a CPU the elementwise work goes through blocks of rows that stay in the cache (and are still large enough to be
# shared between threads); elsewhere the blocks only bound the temporaries.
CPU_BLOCK_ELEMENTS_PER_THREAD = 2**18
DEVICE_BLOCK_ELEMENTS = 2**24
# Below this width (a vector register of float32) compiled code gains nothing from looking at rows as pieces.
SMALLEST_PIECE = 16


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
    rule = _Rule(score_function, gelu, checked, tuple(group_sizes))
    scores = F.linear(x.reshape(-1, x.shape[-1]), key_tokens)
    return (_weights(scores, tau, rule) @ value_tokens).reshape(*x.shape[:-1], value_tokens.shape[1])


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
            torch.empty(len(self.group_sizes), dtype=_norm_dtype(self.key_tokens.dtype), device=device),
            persistent=False,
        )
        self.set_tau([math.sqrt(size) for size in group_sizes] if tau is None else tau)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
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
        dtype = _norm_dtype(self.key_tokens.dtype)
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
        if unfilled or before.dtype != _norm_dtype(self.key_tokens.dtype):
            self.reset_tau()  # float64 has digits that float32 would not give back
        elif self.tau.dtype != before.dtype:  # a cast must not round the scales
            self.tau = before.to(self.tau.device)
        return self


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


class _Rule:
    """How scores become weights: the settings that are no tensors."""

    __slots__ = ("approximate", "eps", "group_sizes", "score_function")

    def __init__(
        self, score_function: ScoreFunction, gelu: Gelu, eps: float | Sequence[float], group_sizes: tuple[int, ...]
    ) -> None:
        self.score_function, self.group_sizes = score_function, group_sizes
        self.eps = eps
        self.approximate = "none" if gelu == "erf" else "tanh"

    def beside(self, norms: Tensor) -> float | Tensor:
        """What is added to `norms` (groups, rows)."""
        if isinstance(self.eps, float):
            return self.eps
        return torch.cat([norms.new_full((1, 1), eps) for eps in self.eps])


def _norm_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _weights(scores: Tensor, tau: Tensor, rule: _Rule) -> Tensor:
    """S = f(A) for scores (rows, n) that nobody else uses: eager mode overwrites them."""
    if rule.score_function == "gelu":
        return F.gelu(scores, approximate=rule.approximate)
    if rule.score_function == "linear":
        return scores
    tau = tau.to(_norm_dtype(scores.dtype))
    if torch.compiler.is_compiling() or type(scores) not in (Tensor, FakeTensor) or tau.requires_grad:
        return _plain_weights(scores, tau, rule)
    if torch.is_grad_enabled() and scores.requires_grad:
        return _Weights.apply(scores, tau, rule)
    _compute_weights(scores, tau, rule, out=scores)
    return scores


def _plain_weights(scores: Tensor, tau: Tensor, rule: _Rule) -> Tensor:
    """The formula as written, for compilers (which fuse it and derive its gradient) and for tensor subclasses.

    Compilers make a loop of its own from each group that is a slice of the scores, and those loops run across memory.
    Where the group sizes have a large common divisor, whole rows are handled instead, seen as pieces of that size."""
    sizes, eps = list(rule.group_sizes), rule.eps
    piece = math.gcd(*sizes)
    if isinstance(eps, float) and piece == max(sizes):
        groups = scores.unflatten(-1, (len(sizes), piece))
        return _formula(groups, tau.unsqueeze(-1), rule, [eps]).flatten(-2)
    each = [eps] * len(sizes) if isinstance(eps, float) else eps
    if rule.score_function != "softmax" and piece >= SMALLEST_PIECE:
        pieces = [size // piece for size in sizes]
        return _formula(scores.unflatten(-1, (-1, piece)), tau, rule, each, pieces).flatten(-2)
    blocks = zip(scores.split(sizes, dim=-1), tau.split(1), each, strict=True)
    return torch.cat([_formula(block, factor, rule, [number]) for block, factor, number in blocks], dim=-1)


def _formula(scores: Tensor, tau: Tensor, rule: _Rule, eps: Sequence[float], pieces: Sequence[int] = ()) -> Tensor:
    """f(A) over the last dimension, or, if `pieces` says how many of them make up each group, over the last two.

    `eps` has one number for each of those groups."""
    dtype = _norm_dtype(scores.dtype)
    if rule.score_function == "softmax":
        return (torch.softmax(scores, dim=-1, dtype=dtype) * tau.square()).to(scores.dtype)
    if rule.score_function == "gelu_l2_norm":
        scores = F.gelu(scores, approximate=rule.approximate)
    # The root of a sum, kept off zero where its slope is infinite: its gradient costs one factor for each row, that of
    # `vector_norm` a division for each score.
    squares = scores.to(dtype).square().sum(dim=-1, keepdim=True)
    sums = [part.sum(dim=-2, keepdim=True) for part in squares.split(list(pieces), dim=-2)] if pieces else [squares]
    scales = [
        factor / (total.clamp_min(torch.finfo(dtype).tiny).sqrt() + number)
        for factor, total, number in zip(tau.split(1) if pieces else [tau], sums, eps, strict=True)
    ]
    if scores.dtype == torch.float16:
        scales = [scale.masked_fill(total == 0, 0) for scale, total in zip(scales, sums, strict=True)]
    scale = scales[0]
    if pieces:
        scale = torch.cat([one.expand(-1, count, -1) for one, count in zip(scales, pieces, strict=True)], dim=-2)
    normalised = (scores * scale).to(scores.dtype)
    return F.gelu(normalised, approximate=rule.approximate) if rule.score_function == "l2_norm_gelu" else normalised


def _row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Slices of rows that hold about as many elements as are worth handling at once."""
    rows, columns = matrix.shape
    if type(matrix) is FakeTensor:  # shapes alone have no cache to stay in
        yield slice(0, rows)
        return
    limit = (
        CPU_BLOCK_ELEMENTS_PER_THREAD * torch.get_num_threads()
        if matrix.device.type == "cpu"
        else DEVICE_BLOCK_ELEMENTS
    )
    step = max(1, limit // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _compute_weights(scores: Tensor, tau: Tensor, rule: _Rule, out: Tensor) -> Tensor | None:
    """Write S = f(A) to `out`, which may be `scores`, and return the norms (groups, rows), None for softmax.

    l2_norm_gelu leaves Z = tau A / (||A|| + eps) in `scores`, the others leave `scores` as they are (unless overwritten
    as `out`)."""
    sizes, dtype = list(rule.group_sizes), _norm_dtype(scores.dtype)
    if rule.score_function == "softmax":
        for rows in _row_blocks(scores):
            blocks = zip(scores[rows].split(sizes, dim=-1), out[rows].split(sizes, dim=-1), tau.square(), strict=True)
            for block, target, factor in blocks:
                torch.mul(torch.softmax(block, dim=-1, dtype=dtype), factor, out=target)
        return None
    norms = torch.empty(len(sizes), scores.shape[0], dtype=dtype, device=scores.device)
    norm_first = rule.score_function == "l2_norm_gelu"
    normalised = scores if norm_first else out
    for rows in _row_blocks(scores):
        if not norm_first:
            torch.ops.aten.gelu.out(scores[rows], approximate=rule.approximate, out=out[rows])
        blocks = normalised[rows].split(sizes, dim=-1)
        for norm, block in zip(norms[:, rows], blocks, strict=True):
            torch.linalg.vector_norm(block, dim=-1, dtype=dtype, out=norm)
        scale = _scale(norms[:, rows], tau, rule)
        for factor, block in zip(scale.unsqueeze(-1), blocks, strict=True):
            block.mul_(factor)
        if norm_first:
            torch.ops.aten.gelu.out(scores[rows], approximate=rule.approximate, out=out[rows])
    return norms


def _scale(norms: Tensor, tau: Tensor, rule: _Rule) -> Tensor:
    return tau.unsqueeze(-1) / (norms + rule.beside(norms))


class _Weights(torch.autograd.Function):
    """S = f(A), keeping one matrix of the scores' size and the norms.

    Two things go on in place. The forward pass overwrites the scores. The backward pass overwrites the gradient of S: S
    has one consumer, the value GEMM, whose backward pass has just made that gradient for this function alone.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, scores: Tensor, tau: Tensor, rule: _Rule) -> Tensor:
        weights = torch.empty_like(scores)
        norms = _compute_weights(scores, tau, rule, out=weights)
        ctx.rule = rule  # type: ignore[attr-defined]
        ctx.save_for_backward(weights if norms is None else scores, tau, *([] if norms is None else [norms]))
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        rule, (kept, tau, *norms) = ctx.rule, ctx.saved_tensors
        for rows in _row_blocks(kept):
            if rule.score_function == "softmax":
                _softmax_backward(gradient[rows], kept[rows], tau, rule)
            elif rule.score_function == "gelu_l2_norm":
                _gelu_l2_norm_backward(gradient[rows], kept[rows], norms[0][:, rows], tau, rule)
            else:
                _l2_norm_gelu_backward(gradient[rows], kept[rows], norms[0][:, rows], tau, rule)
        return gradient, None, None


def _softmax_backward(gradient: Tensor, weights: Tensor, tau: Tensor, rule: _Rule) -> None:
    """S = tau^2 p:  dA = S (dS - <S, dS> / tau^2)."""
    sums = _group_sums(gradient * weights, rule, tau.dtype) / tau.square().unsqueeze(-1)
    for sum_, block in zip(sums.unsqueeze(-1), gradient.split(list(rule.group_sizes), dim=-1), strict=True):
        block.sub_(sum_)
    gradient.mul_(weights)


def _l2_norm_gelu_backward(gradient: Tensor, normalised: Tensor, norms: Tensor, tau: Tensor, rule: _Rule) -> None:
    """Z = s A, s = tau / (||A|| + eps):  dA = s dZ - Z <Z, dZ> / (tau ||A||), eq. 25 of the paper with eps."""
    _gelu_backward_(gradient, normalised, rule)
    along = _group_sums(gradient * normalised, rule, norms.dtype) / _positive(norms) / tau.unsqueeze(-1)
    _subtract_projection_(gradient, normalised, _backward_scale(gradient, norms, tau, rule), along, rule)


def _gelu_l2_norm_backward(gradient: Tensor, scores: Tensor, norms: Tensor, tau: Tensor, rule: _Rule) -> None:
    """S = s G, s = tau / (||G|| + eps), G = GELU(A):  dG = s (dS - G <G, dS> / (||G|| (||G|| + eps))), dA from dG."""
    activated = F.gelu(scores, approximate=rule.approximate)
    scale = _backward_scale(gradient, norms, tau, rule)
    along = _group_sums(gradient * activated, rule, norms.dtype) / _positive(norms) * scale
    along = along / (norms + rule.beside(norms))
    _subtract_projection_(gradient, activated, scale, along, rule)
    _gelu_backward_(gradient, scores, rule)


def _gelu_backward_(gradient: Tensor, preactivation: Tensor, rule: _Rule) -> None:
    torch.ops.aten.gelu_backward.grad_input(gradient, preactivation, approximate=rule.approximate, grad_input=gradient)


def _group_sums(products: Tensor, rule: _Rule, dtype: torch.dtype) -> Tensor:
    """(rows, n) -> (groups, rows)."""
    return torch.stack([block.sum(dim=-1, dtype=dtype) for block in products.split(list(rule.group_sizes), dim=-1)])


def _subtract_projection_(gradient: Tensor, vectors: Tensor, scale: Tensor, along: Tensor, rule: _Rule) -> None:
    """gradient <- scale gradient - along vectors, group by group."""
    sizes = list(rule.group_sizes)
    columns = (scale.unsqueeze(-1), along.unsqueeze(-1), gradient.split(sizes, dim=-1), vectors.split(sizes, dim=-1))
    for factor, coefficient, block, vector in zip(*columns, strict=True):
        block.mul_(factor).addcmul_(vector, coefficient, value=-1)


def _positive(norms: Tensor) -> Tensor:
    """Norms fit for a division: where the norm is zero so is what is divided."""
    return norms.clamp_min(torch.finfo(norms.dtype).tiny)


def _backward_scale(gradient: Tensor, norms: Tensor, tau: Tensor, rule: _Rule) -> Tensor:
    scale = _scale(norms, tau, rule)
    return scale.masked_fill_(norms == 0, 0) if gradient.dtype == torch.float16 else scale
