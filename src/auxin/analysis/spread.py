"""Means over samples and how far samples are from them, streaming: no sample is kept. What is no mean over samples has
its spread by the jackknife, made anew without each of a few groups of them."""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import NormalDist
from typing import cast

import torch
from torch import Tensor

from auxin.errors import DataError
from auxin.settings import Settings

LEVEL = 0.95
"""Of the intervals."""
GROUPS = 16
"""To which samples are dealt where there are more."""


class Estimate(Settings):
    """A mean over samples, with its spread."""

    mean: float
    deviation: float | None
    """Standard deviation of a sample, with samples - 1 in the denominator; None with one sample."""
    margin: float | None
    """Half the width of the mean's 95% interval, of Student's t: in 95 of 100 drawings of the samples, the mean over
    all data of their kind lies within `mean` plus or minus `margin`. None with one sample."""

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.margin is None else f" ± {self.margin:.4f}")

    @property
    def plus_minus(self) -> str:
        """What goes behind the mean, in two digits: " ± 0.12"; empty without a margin."""
        return "" if self.margin is None else f" ± {self.margin:.2g}"


class Estimates(Settings):
    """Estimates of many numbers over the same samples, in order: what a list of `Estimate` says, as plain lists."""

    samples: int
    """Over which they are means."""
    means: list[float]
    """By number."""
    deviations: list[float] | None
    """Standard deviations of a sample, by number, as in `Estimate`; None where they are not known."""
    freedom: int | None = None
    """Degrees of freedom of the deviations, for margins; None: samples - 1."""

    @property
    def margins(self) -> list[float] | None:
        """By number, as in `Estimate`; None where the deviations are not known."""
        if self.deviations is None:
            return None
        factor = student_quantile(self.freedom or self.samples - 1) / math.sqrt(self.samples)
        return [factor * deviation for deviation in self.deviations]

    def each(self) -> list[Estimate]:
        """One by one."""
        deviations: Sequence[float | None] = self.deviations or [None] * len(self.means)
        margins: Sequence[float | None] = self.margins or [None] * len(self.means)
        return [
            Estimate(mean=mean, deviation=deviation, margin=margin)
            for mean, deviation, margin in zip(self.means, deviations, margins, strict=True)
        ]

    def part(self, start: int, stop: int) -> "Estimates":
        """Those from `start` up to, and without, `stop`."""
        deviations = self.deviations and self.deviations[start:stop]
        means = self.means[start:stop]
        return Estimates(samples=self.samples, means=means, deviations=deviations, freedom=self.freedom)


class Spread:
    """Mean and variance of some numbers over samples that arrive batch by batch, in float64.

    The sums of squares are those around the mean (Chan, Golub and LeVeque 1979), so that the digits of small
    differences are kept. Only a count and two tensors of the numbers' shape stay in memory.
    """

    def __init__(self) -> None:
        self.samples = 0
        """How many samples were added."""
        self._mean = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Add a batch.

        Args:
            values: (samples, ...), the same shape behind the first axis at every call.

        Raises:
            DataError: a value is not finite.
        """
        values = values.detach().to("cpu").double()
        finite = torch.isfinite(values.reshape(len(values), -1)).all(dim=1)
        if not finite.all():
            number = self.samples + int(finite.logical_not().nonzero()[0])
            raise DataError(
                f"Sample {number} (from 0) gives a value that is not finite. Look at it, at the model's weights and at "
                "the data type in which it computes."
            )
        new = values.mean(dim=0)
        self._join(len(values), new, ((values - new) ** 2).sum(dim=0))

    @classmethod
    def of_all(cls, parts: Iterable["Spread"]) -> "Spread":
        """That of the samples of several, of numbers of one shape."""
        whole = cls()
        for part in parts:
            whole._join(part.samples, part._mean, part._squares)
        return whole

    def _join(self, count: int, mean: Tensor, squares: Tensor) -> None:
        """Add `count` samples with their mean and the sum of squares around it."""
        total = self.samples + count
        change = mean - self._mean
        self._squares = self._squares + squares + change**2 * (self.samples * count / max(total, 1))
        self._mean = self._mean + change * (count / max(total, 1))
        self.samples = total

    def together(self) -> Estimates:
        """The estimates of all numbers, in the order of the flattened shape."""
        means = cast(list[float], self._mean.reshape(-1).tolist())
        if self.samples < 2:
            return Estimates(samples=self.samples, means=means, deviations=None)
        deviations = (self._squares / (self.samples - 1)).sqrt().reshape(-1)
        return Estimates(samples=self.samples, means=means, deviations=cast(list[float], deviations.tolist()))

    def estimates(self) -> list[Estimate]:
        """The same, one by one."""
        return self.together().each()

    def means(self) -> Tensor:
        """The means, float64, of the numbers' shape."""
        return self._mean

    def mean_squares(self) -> Tensor:
        """Mean squared distances from the means, float64, of the numbers' shape."""
        return self._squares / max(self.samples, 1)


class Dealt:
    """A `Spread` of numbers over samples that are dealt in turn to `GROUPS` groups, whatever the batches, and that of
    all but one group. Keeps as much as so many spreads."""

    def __init__(self) -> None:
        self.samples = 0
        """How many samples were added."""
        self._groups: list[Spread] = []

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, values: Tensor) -> None:
        """Add a batch, as `Spread.add`."""
        if not torch.isfinite(values).all():
            Spread.of_all(self._groups).add(values)  # refuses it, with the sample's number
        for value in values:
            if len(self._groups) < GROUPS:
                self._groups.append(Spread())
            self._groups[self.samples % GROUPS].add(value[None])
            self.samples += 1

    def without(self, group: int | None = None) -> Spread:
        """That of all samples, or of all that are not in `group`."""
        return Spread.of_all(part for number, part in enumerate(self._groups) if number != group)


def jackknife(made: Callable[[int | None], Tensor], samples: int, groups: int) -> Estimates:
    """Estimates of numbers that are made of all samples together, with their spread by the jackknife (Tukey 1958; of
    groups: Shao and Wu 1989, Annals of Statistics 17): with g groups and x_j made without group j, the variance of x is
    (g - 1) / g sum (x_j - mean of x_j)^2. For means of equally many samples in all groups it is theirs.

    Args:
        made: makes the numbers, of one shape, without the group of that number; None: of all.
        samples: how many there are.
        groups: to which they are dealt; with one nothing is known of the spread.
    """
    means = cast(list[float], made(None).reshape(-1).tolist())
    if groups < 2:
        return Estimates(samples=samples, means=means, deviations=None)
    left = Spread()
    for group in range(groups):
        left.add(made(group)[None])
    deviations = ((groups - 1) * samples * left.mean_squares()).sqrt().reshape(-1)
    return Estimates(
        samples=samples, means=means, deviations=cast(list[float], deviations.tolist()), freedom=groups - 1
    )


_FEW = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706)


def student_quantile(freedom: int) -> float:
    """The factor t of a 95% interval: Student's variable with `freedom` degrees of freedom is within -t ... t.

    Expansion in 1 / freedom around the normal quantile (Abramowitz and Stegun 26.7.5), exact to 1e-3; where there are
    too few degrees for it, from the table.
    """
    if freedom <= len(_FEW):
        return _FEW[freedom - 1]
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
