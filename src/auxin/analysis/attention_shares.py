"""Sums over attention maps: how much of a head's weight goes to which kind of token, and how evenly."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from auxin.analysis.measurement import wide
from auxin.analysis.spread import Estimate, Spread

Target = Literal["special", "first", "current", "previous", "other", "nothing"]
TARGETS: tuple[Target, ...] = ("special", "first", "current", "previous", "other")
"""In the order in which they claim a token."""
ACROSS: tuple[Target, ...] = ("special", "first", "other")
"""Those of a cross-attention."""


SILENT = 1e-3
"""A row of less weight than this reads nothing."""


def rounding(dtype: torch.dtype) -> float:
    """How far the sum of a row of a map of that type may be from 1: most softmaxes are computed in float32."""
    return max(2 * torch.finfo(dtype).eps, 16 * torch.finfo(torch.float32).eps)


class Tokens(NamedTuple):
    """What the tokens of a stack are in a batch."""

    special: Tensor | None
    """(samples, tokens) boolean; None: the stack reads no ids."""
    kept: Tensor
    """(samples, tokens) boolean, False for padding."""


class HeadEstimates(NamedTuple):
    """Of one head."""

    shares: dict[Target, Estimate]
    entropy: Estimate
    silent: Estimate
    apart: Estimate


class AttentionShares:
    """Shares and entropies of the heads of one attention, over all batches; see `attention_targets` for what they are.

    Args:
        across: whether it sees the tokens of another stack, so that none is current or previous.
    """

    def __init__(self, across: bool) -> None:
        self.across = across
        self._heads, self._uniform = Spread(), Spread()
        self._sinks = False

    def add(self, weights: Tensor, queries: Tensor, keys: Tokens) -> None:
        """Add a batch: the map (samples, heads, queries, keys), which queries count (samples, queries), the keys."""
        off, weights = rounding(weights.dtype), wide(weights)
        kinds = self._kinds(weights.shape[2], keys)
        may_see = (weights > 0).any(dim=1) & keys.kept[:, None]
        seen = may_see.sum(dim=-1, dtype=weights.dtype)
        # What is padding is neither a target nor seen; the last column takes it.
        kinds = torch.where(may_see, kinds, len(TARGETS))
        shares = _by_kind(weights, kinds[:, None])
        nothing = 1 - shares.sum(dim=-1, keepdim=True)
        told = queries[:, None]
        self._sinks |= bool((torch.where(told, nothing[..., 0], 0) > off).any())
        means = _mean(torch.cat([shares, nothing], dim=-1), told)
        entropy = _mean(_relative_entropy(weights, may_see, seen)[..., None], told & (seen > 1)[:, None], of_none=1.0)
        silent = _mean((weights.sum(dim=-1, keepdim=True) < SILENT).to(weights.dtype), told)
        apart, several = _apart(weights, may_see)
        self._heads.add(torch.cat([means, entropy, silent, _mean(apart[..., None], told & several)], dim=-1))
        alike = _by_kind(may_see / seen.clamp(min=1)[..., None], kinds)
        self._uniform.add(_mean(alike, queries))

    def estimates(self) -> tuple[list[HeadEstimates], dict[Target, Estimate]]:
        """Of each head, and the shares of a head that attends to all alike."""
        targets = [*(ACROSS if self.across else TARGETS), *(("nothing",) if self._sinks else ())]
        numbers = self._heads.estimates()
        width = len(TARGETS) + 4
        heads = [numbers[start : start + width] for start in range(0, len(numbers), width)]
        named = [dict(zip((*TARGETS, "nothing"), head[:-3], strict=True)) for head in heads]
        alike = dict(zip(TARGETS, self._uniform.estimates(), strict=True))
        return (
            [
                HeadEstimates({target: shares[target] for target in targets}, *head[-3:])
                for shares, head in zip(named, heads, strict=True)
            ],
            {target: alike[target] for target in targets if target in alike},
        )

    def _kinds(self, queries: int, keys: Tokens) -> Tensor:
        """Which target each key is for each query, by its number, (samples, queries, keys)."""
        count = keys.kept.shape[1]
        kinds = torch.full((len(keys.kept), queries, count), TARGETS.index("other"), device=keys.kept.device)
        if not self.across:
            back = torch.arange(queries, device=kinds.device)[:, None] - torch.arange(count, device=kinds.device)
            kinds = torch.where(back == 1, TARGETS.index("previous"), kinds)
            kinds = torch.where(back == 0, TARGETS.index("current"), kinds)
        first = torch.nn.functional.one_hot(keys.kept.int().argmax(dim=1), count).bool()
        kinds = torch.where(first[:, None], TARGETS.index("first"), kinds)
        if keys.special is not None:
            kinds = torch.where(keys.special[:, None], TARGETS.index("special"), kinds)
        return kinds


def _by_kind(weights: Tensor, kinds: Tensor) -> Tensor:
    """Weights (..., keys) summed by kind, (..., targets); `kinds` has that shape too, or 1 for the heads."""
    sums = weights.new_zeros(*weights.shape[:-1], len(TARGETS) + 1)
    return sums.scatter_add_(-1, kinds.expand(weights.shape), weights)[..., : len(TARGETS)]


def _relative_entropy(weights: Tensor, may_see: Tensor, seen: Tensor) -> Tensor:
    """(samples, heads, queries), of the weights that go to tokens; 0 where all went to none."""
    weights = torch.where(may_see[:, None], weights, 0)
    total = weights.sum(dim=-1)
    # Of weights w of the sum s, -sum(w / s log(w / s)) = log s - sum(w log w) / s.
    entropy = total.log() - torch.special.xlogy(weights, weights).sum(dim=-1) / total
    return torch.where(total > 0, entropy / seen.clamp(min=2).log()[:, None], 0)


def _apart(weights: Tensor, may_see: Tensor) -> tuple[Tensor, Tensor]:
    """(samples, heads, queries): the log of the largest weight of a token over the least one that is not zero, and
    whether there are several."""
    left = may_see[:, None] & (weights > 0)
    largest = torch.where(left, weights, 0).amax(dim=-1)
    least = torch.where(left, weights, torch.inf).amin(dim=-1)
    several = left.sum(dim=-1) > 1
    return torch.where(several, largest.log() - least.log(), 0), several


def _mean(values: Tensor, counted: Tensor, of_none: float = 0.0) -> Tensor:
    """The mean of (samples, ..., queries, numbers) over the queries that count, (samples, ..., numbers)."""
    counts = counted.sum(dim=-1)[..., None]
    means = torch.where(counted[..., None], values, 0).sum(dim=-2) / counts.clamp(min=1)
    return torch.where(counts > 0, means, of_none)
