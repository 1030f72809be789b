"""Grids of integers: what a tensor is after a round trip through INT8, and from where to where a grid should reach.

Simulated quantization: what a grid holds is computed with in floating point (Bondarenko et al. 2023, arXiv 2306.12929;
Nagel et al. 2021, arXiv 2106.08295). With b bits, of an activation's range low <= 0 <= high

    delta = (high - low) / (2^b - 1)    zero = round(-low / delta)
    x' = delta (clip(round(x / delta) + zero, 0, 2^b - 1) - zero)

and of a weight, whose grid lies around zero, with the threshold t

    delta = t / (2^(b-1) - 1)           w' = delta clip(round(w / delta), -2^(b-1), 2^(b-1) - 1)

Inside the range the round trip's error is at most delta / 2, and 0 stays 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

WeightRanges = Literal["min-max", "mse"]
ActivationRanges = Literal["min-max", "percentile", "mse"]
OLD = 0.9
"""How much of a running range stays at each batch."""
THRESHOLDS, BEYOND = 100, 0.5
"""How many thresholds of a weight are tried, and how far beyond its largest entry the last one lies."""
_GOLDEN = (5**0.5 - 1) / 2
_NARROWEST, _STEPS = 0.05, 12


@dataclass(frozen=True)
class Grid:
    """The grid of an activation: one for the whole tensor, whatever is in it."""

    low: float
    high: float
    bits: int = 8

    def __post_init__(self) -> None:
        assert self.low <= 0 <= self.high, "a range holds 0"

    @property
    def delta(self) -> float:
        """The distance between neighbours, no smaller than what float32 divides by: of a range that is a point, one
        that changes nothing near 0."""
        return max((self.high - self.low) / (2**self.bits - 1), torch.finfo(torch.float32).tiny)

    @property
    def zero(self) -> int:
        """Which integer is 0."""
        return round(-self.low / self.delta)

    def round_trip(self, x: Tensor) -> Tensor:
        """What `x` is on the grid, in its own type; computed in float32 at least."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        whole = (wide / self.delta).round().add(self.zero).clamp(0, 2**self.bits - 1)
        return whole.sub(self.zero).mul(self.delta).to(x.dtype)


def rounded_weight(
    weight: Tensor, bits: int = 8, ranges: WeightRanges = "min-max", rows: int = 1, group: int | None = None
) -> Tensor:
    """What a weight is on grids around zero, in its own type and shape.

    Args:
        weight: any tensor.
        bits: of each entry.
        ranges: "min-max": the threshold is the largest absolute value. "mse": it is the one with the smallest squared
            error of 100 that are evenly spaced up to that value and 0.5.
        rows: in how many equal parts, along the first axis, the tensor falls that have a grid of their own; 1: one
            grid for all of it.
        group: of each part every so many entries have a grid of their own; None: the whole part has one.
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    parts = wide.reshape(rows, -1)
    if group is not None and parts.shape[1] % group == 0:
        parts = parts.reshape(-1, group)
    largest = parts.abs().amax(dim=1, keepdim=True)
    if ranges == "min-max":
        return _around_zero(parts, largest, bits).view(weight.shape).to(weight.dtype)
    best, least = parts, torch.full_like(largest, float("inf"))
    for number in range(1, THRESHOLDS + 1):
        tried = _around_zero(parts, (largest + BEYOND) * number / THRESHOLDS, bits)
        error = (tried - parts).square().sum(dim=1, keepdim=True)
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best.view(weight.shape).to(weight.dtype)


def _around_zero(parts: Tensor, threshold: Tensor, bits: int) -> Tensor:
    delta = threshold / (2 ** (bits - 1) - 1)
    delta = torch.where(delta > 0, delta, 1)
    return (parts / delta).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * delta


def whole_range(x: Tensor) -> tuple[float, float]:
    """From the smallest to the largest entry of `x`, and to 0."""
    low, high = x.aminmax()
    return min(low.item(), 0.0), max(high.item(), 0.0)


def percentile_range(x: Tensor, percentile: float) -> tuple[float, float]:
    """From the (100 - percentile)th to the percentile-th percentile of all entries of `x`, and to 0: the entries of the
    nearest rank, of which there are no others beyond than that share."""
    entries = x.flatten()
    rank = min(max(-(-entries.numel() * percentile // 100), 1), entries.numel())
    above, below = int(rank), entries.numel() + 1 - int(rank)
    return min(entries.kthvalue(below).values.item(), 0.0), max(entries.kthvalue(above).values.item(), 0.0)


def least_error_range(x: Tensor, bits: int = 8) -> tuple[float, float]:
    """The range of the least squared error of the round trip, as a golden-section search finds it: first its upper end,
    then its lower one, each between a twentieth of the whole range's and all of it. Never worse than the whole range.
    """
    low, high = whole_range(x)

    def error(low: float, high: float) -> float:
        return (Grid(low, high, bits).round_trip(x) - x).square().sum().item()

    least = error(low, high)
    share, found = _golden_section(lambda share: error(low, share * high))
    if found < least:
        high, least = share * high, found
    share, found = _golden_section(lambda share: error(share * low, high))
    return (share * low if found < least else low), high


def _golden_section(of: Callable[[float], float]) -> tuple[float, float]:
    """Where in the interval of shares the function is smallest, if it has one valley, and what it is there."""
    left, right = _NARROWEST, 1.0
    one, other = right - _GOLDEN * (right - left), left + _GOLDEN * (right - left)
    at_one, at_other = of(one), of(other)
    for _ in range(_STEPS):
        if at_one <= at_other:
            right, other, at_other = other, one, at_one
            one = right - _GOLDEN * (right - left)
            at_one = of(one)
        else:
            left, one, at_one = one, other, at_other
            other = left + _GOLDEN * (right - left)
            at_other = of(other)
    return (one, at_one) if at_one <= at_other else (other, at_other)


class RunningRange:
    """A range that follows those of batches: r <- 0.9 r + 0.1 new."""

    def __init__(self) -> None:
        self._range: tuple[float, float] | None = None
        self._batch: tuple[float, float] | None = None

    def see(self, low: float, high: float) -> None:
        """One of the current batch: of several, the widest counts."""
        before = self._batch or (low, high)
        self._batch = min(before[0], low), max(before[1], high)

    def step(self) -> None:
        """The batch is over."""
        if self._batch is not None:
            before = self._range or self._batch
            self._range = tuple(OLD * old + (1 - OLD) * new for old, new in zip(before, self._batch, strict=True))  # type: ignore[assignment]
            self._batch = None

    @property
    def grid(self) -> Grid:
        """Of what was seen, with 8 bits."""
        assert self._range is not None
        return Grid(*self._range)
