"""How the scores of parameter tokens become their weights: the score functions of `auxin.nn.pattention`."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import FunctionCtx, once_differentiable

from auxin.nn.scores import Gelu, ScoreFunction
from auxin.nn.shared_rows import Processes

# On a CPU the elementwise work goes through blocks of rows that stay in the cache (and are still large enough to be
# shared between threads); elsewhere the blocks only bound the temporaries.
CPU_BLOCK_ELEMENTS_PER_THREAD = 2**18
DEVICE_BLOCK_ELEMENTS = 2**24
# Below this width (a vector register of float32) compiled code gains nothing from looking at rows as pieces.
SMALLEST_PIECE = 16


class Rule:
    """How scores become weights: the settings that are no tensors.

    Args:
        score_function, gelu, eps: see `auxin.nn.pattention.pattention`.
        group_sizes: tokens of each group; those of this process, where others have some.
        processes: those that have the groups' other tokens.
    """

    __slots__ = ("approximate", "eps", "group_sizes", "processes", "score_function")

    def __init__(
        self,
        score_function: ScoreFunction,
        gelu: Gelu,
        eps: float | Sequence[float],
        group_sizes: tuple[int, ...],
        processes: Processes | None = None,
    ) -> None:
        self.score_function, self.group_sizes, self.processes = score_function, group_sizes, processes
        self.eps = eps
        self.approximate = "none" if gelu == "erf" else "tanh"

    def beside(self, norms: Tensor) -> float | Tensor:
        """What is added to `norms` (groups, rows)."""
        if isinstance(self.eps, float):
            return self.eps
        return torch.cat([norms.new_full((1, 1), eps) for eps in self.eps])

    def of_all(self, sums: Tensor) -> Tensor:
        """`sums` over tokens, (groups, rows), with those of the tokens of other processes; overwritten."""
        if self.processes is not None:
            self.processes.add_up(sums)
        return sums


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which norms of scores of type `dtype` are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def token_weights(scores: Tensor, tau: Tensor, rule: Rule) -> Tensor:
    """S = f(A) for scores (rows, n) that nobody else uses: eager mode overwrites them."""
    if rule.score_function == "gelu":
        return F.gelu(scores, approximate=rule.approximate)
    if rule.score_function == "linear":
        return scores
    tau = tau.to(norm_dtype(scores.dtype))
    if torch.compiler.is_compiling() or type(scores) not in (Tensor, FakeTensor) or tau.requires_grad:
        return _plain_weights(scores, tau, rule)
    if torch.is_grad_enabled() and scores.requires_grad:
        return _Weights.apply(scores, tau, rule)
    _compute_weights(scores, tau, rule, out=scores)
    return scores


def _plain_weights(scores: Tensor, tau: Tensor, rule: Rule) -> Tensor:
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


def _formula(scores: Tensor, tau: Tensor, rule: Rule, eps: Sequence[float], pieces: Sequence[int] = ()) -> Tensor:
    """f(A) over the last dimension, or, if `pieces` says how many of them make up each group, over the last two.

    `eps` has one number for each of those groups."""
    dtype = norm_dtype(scores.dtype)
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


def _row_blocks(matrix: Tensor, rule: Rule) -> Iterator[slice]:
    """Slices of rows that hold about as many elements as are worth handling at once."""
    rows, columns = matrix.shape
    # Shapes alone have no cache to stay in; and processes meet once, however many tokens each has.
    if type(matrix) is FakeTensor or rule.processes is not None:
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


def _compute_weights(scores: Tensor, tau: Tensor, rule: Rule, out: Tensor) -> Tensor | None:
    """Write S = f(A) to `out`, which may be `scores`, and return the norms (groups, rows), None for softmax.

    l2_norm_gelu leaves Z = tau A / (||A|| + eps) in `scores`, the others leave `scores` as they are (unless overwritten
    as `out`)."""
    sizes, dtype = list(rule.group_sizes), norm_dtype(scores.dtype)
    if rule.score_function == "softmax":
        for rows in _row_blocks(scores, rule):
            blocks = zip(scores[rows].split(sizes, dim=-1), out[rows].split(sizes, dim=-1), tau.square(), strict=True)
            for block, target, factor in blocks:
                torch.mul(torch.softmax(block, dim=-1, dtype=dtype), factor, out=target)
        return None
    norms = torch.empty(len(sizes), scores.shape[0], dtype=dtype, device=scores.device)
    norm_first = rule.score_function == "l2_norm_gelu"
    normalised = scores if norm_first else out
    for rows in _row_blocks(scores, rule):
        if not norm_first:
            torch.ops.aten.gelu.out(scores[rows], approximate=rule.approximate, out=out[rows])
        blocks = normalised[rows].split(sizes, dim=-1)
        for norm, block in zip(norms[:, rows], blocks, strict=True):
            torch.linalg.vector_norm(block, dim=-1, dtype=dtype, out=norm)
        if rule.processes is not None:
            norms = rule.of_all(norms.square_()).sqrt_()
        scale = _scale(norms[:, rows], tau, rule)
        for factor, block in zip(scale.unsqueeze(-1), blocks, strict=True):
            block.mul_(factor)
        if norm_first:
            torch.ops.aten.gelu.out(scores[rows], approximate=rule.approximate, out=out[rows])
    return norms


def _scale(norms: Tensor, tau: Tensor, rule: Rule) -> Tensor:
    return tau.unsqueeze(-1) / (norms + rule.beside(norms))


class _Weights(torch.autograd.Function):
    """S = f(A), keeping one matrix of the scores' size and the norms.

    Two things go on in place. The forward pass overwrites the scores. The backward pass overwrites the gradient of S: S
    has one consumer, the value GEMM, whose backward pass has just made that gradient for this function alone.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, scores: Tensor, tau: Tensor, rule: Rule) -> Tensor:
        weights = torch.empty_like(scores)
        norms = _compute_weights(scores, tau, rule, out=weights)
        ctx.rule = rule  # type: ignore[attr-defined]
        ctx.save_for_backward(weights if norms is None else scores, tau, *([] if norms is None else [norms]))
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        rule, (kept, tau, *norms) = ctx.rule, ctx.saved_tensors
        for rows in _row_blocks(kept, rule):
            if rule.score_function == "softmax":
                _softmax_backward(gradient[rows], kept[rows], tau, rule)
            elif rule.score_function == "gelu_l2_norm":
                _gelu_l2_norm_backward(gradient[rows], kept[rows], norms[0][:, rows], tau, rule)
            else:
                _l2_norm_gelu_backward(gradient[rows], kept[rows], norms[0][:, rows], tau, rule)
        return gradient, None, None


def _softmax_backward(gradient: Tensor, weights: Tensor, tau: Tensor, rule: Rule) -> None:
    """S = tau^2 p:  dA = S (dS - <S, dS> / tau^2)."""
    sums = _group_sums(gradient * weights, rule, tau.dtype) / tau.square().unsqueeze(-1)
    for sum_, block in zip(sums.unsqueeze(-1), gradient.split(list(rule.group_sizes), dim=-1), strict=True):
        block.sub_(sum_)
    gradient.mul_(weights)


def _l2_norm_gelu_backward(gradient: Tensor, normalised: Tensor, norms: Tensor, tau: Tensor, rule: Rule) -> None:
    """Z = s A, s = tau / (||A|| + eps):  dA = s dZ - Z <Z, dZ> / (tau ||A||), eq. 25 of the paper with eps."""
    _gelu_backward_(gradient, normalised, rule)
    along = _group_sums(gradient * normalised, rule, norms.dtype) / _positive(norms) / tau.unsqueeze(-1)
    _subtract_projection_(gradient, normalised, _backward_scale(gradient, norms, tau, rule), along, rule)


def _gelu_l2_norm_backward(gradient: Tensor, scores: Tensor, norms: Tensor, tau: Tensor, rule: Rule) -> None:
    """S = s G, s = tau / (||G|| + eps), G = GELU(A):  dG = s (dS - G <G, dS> / (||G|| (||G|| + eps))), dA from dG."""
    activated = F.gelu(scores, approximate=rule.approximate)
    scale = _backward_scale(gradient, norms, tau, rule)
    along = _group_sums(gradient * activated, rule, norms.dtype) / _positive(norms) * scale
    along = along / (norms + rule.beside(norms))
    _subtract_projection_(gradient, activated, scale, along, rule)
    _gelu_backward_(gradient, scores, rule)


def _gelu_backward_(gradient: Tensor, preactivation: Tensor, rule: Rule) -> None:
    torch.ops.aten.gelu_backward.grad_input(gradient, preactivation, approximate=rule.approximate, grad_input=gradient)


def _group_sums(products: Tensor, rule: Rule, dtype: torch.dtype) -> Tensor:
    """(rows, n) -> (groups, rows)."""
    blocks = products.split(list(rule.group_sizes), dim=-1)
    return rule.of_all(torch.stack([block.sum(dim=-1, dtype=dtype) for block in blocks]))


def _subtract_projection_(gradient: Tensor, vectors: Tensor, scale: Tensor, along: Tensor, rule: Rule) -> None:
    """gradient <- scale gradient - along vectors, group by group."""
    sizes = list(rule.group_sizes)
    columns = (scale.unsqueeze(-1), along.unsqueeze(-1), gradient.split(sizes, dim=-1), vectors.split(sizes, dim=-1))
    for factor, coefficient, block, vector in zip(*columns, strict=True):
        block.mul_(factor).addcmul_(vector, coefficient, value=-1)


def _positive(norms: Tensor) -> Tensor:
    """Norms fit for a division: where the norm is zero so is what is divided."""
    return norms.clamp_min(torch.finfo(norms.dtype).tiny)


def _backward_scale(gradient: Tensor, norms: Tensor, tau: Tensor, rule: Rule) -> Tensor:
    scale = _scale(norms, tau, rule)
    return scale.masked_fill_(norms == 0, 0) if gradient.dtype == torch.float16 else scale
