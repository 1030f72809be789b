"""Repeated measurements: their mean, and how far it can be trusted."""

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Self

from scipy.stats import t as student

from auxin.settings import Settings

CONFIDENCE = 0.95
"""Of every interval."""


class Estimate(Settings):
    """The mean of repeated measurements and its 95 % interval, mean ± half_width."""

    mean: float
    half_width: float | None = None
    """None for a single measurement, which says nothing about its spread."""
    count: int
    """Measurements."""

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Self | None:
        """Of `values`, by Student's t distribution: t(0.975, n - 1) * s / sqrt(n) on either side, with the sample's
        standard deviation s (Student 1908, Biometrika 6).

        None where there is no value, or one was not measured or is not finite: a mean of the others would hide it.
        """
        numbers = [math.nan if value is None else value for value in values]
        if not numbers or not all(map(math.isfinite, numbers)):
            return None
        count = len(numbers)
        half_width = None
        if count > 1:
            quantile = float(student.ppf((1 + CONFIDENCE) / 2, count - 1))
            half_width = quantile * statistics.stdev(numbers) / math.sqrt(count)
        return cls(mean=statistics.fmean(numbers), half_width=half_width, count=count)

    @property
    def low(self) -> float:
        """The interval's lower end; the mean where there is no interval."""
        return self.mean - (self.half_width or 0.0)

    @property
    def high(self) -> float:
        """The interval's upper end; the mean where there is no interval."""
        return self.mean + (self.half_width or 0.0)

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval lies above or below 0; 0 where it holds 0, or where there is none."""
        if self.half_width is None or self.low <= 0 <= self.high:
            return 0
        return 1 if self.mean > 0 else -1

    def text(self, digits: int = 3, signed: bool = False) -> str:
        """As tables have it: "3.059 ± 0.019", or the mean alone where there is no interval."""
        mean = f"{self.mean:{'+' if signed else ''}.{digits}f}"
        return mean if self.half_width is None else f"{mean} ± {self.half_width:.{digits}f}"


def paired_difference(values: Mapping[int, float | None], others: Mapping[int, float | None]) -> Estimate | None:
    """Of value - other, pair by pair, over the keys (seeds) that both have: what all runs of a seed share (the order
    of the data, the initial weights) then falls out. None as in `Estimate.of`."""
    pairs = [(values[key], others[key]) for key in values if key in others]
    return Estimate.of(None if value is None or other is None else value - other for value, other in pairs)
