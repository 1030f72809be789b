"""What the runs of one recipe with several seeds show together: the content of a comparison's `results.json`."""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np

from auxin.accounting.results import BranchResult, CurvePoint, GrowthPoint, MeasureDescription, RunResults
from auxin.accounting.statistics import Estimate, paired_difference
from auxin.settings import Settings

COSTS = ("units", "flops", "seconds")
SAME_FLOPS = 1e-9
"""Relative difference up to which two points of a curve lie at the same FLOPs."""


class MeanPoint(CurvePoint):
    """One point of a mean curve: costs, training loss and measure are means over the seeds."""

    half_width: float | None = None
    """Of the measure's 95 % interval; None with one seed."""
    training_half_width: float | None = None
    """Of the training loss's."""


class MeanGrowth(GrowthPoint):
    """One growth: costs and measures are means over the seeds, sizes those of the first."""

    change_estimate: Estimate | None = None
    """What the growth did to the measure, seed by seed."""
    largest_change: float | None = None
    """The largest absolute change of a seed; None where one was not measured."""


class BranchComparison(Settings):
    """One branch over the seeds that finished it; costs include those of its ancestors."""

    name: str
    title: str
    parent: str | None = None
    """The branch it was forked from."""
    seeds: list[int]
    """Those that finished it."""
    parameters: int
    """Of the first seed's model."""
    units: float
    """Units of data that were trained on, mean over the seeds."""
    flops: float
    """Mean over the seeds."""
    seconds: float
    """Mean over the seeds."""
    values: dict[int, float | None]
    """The run's measure at the end, by seed."""
    value: Estimate | None = None
    """Of `values`."""
    difference: Estimate | None = None
    """The branch's final measure minus the main branch's, seed by seed; None for the main branch itself."""
    measures: dict[str, Estimate | None] = {}
    """All measures at the end, by kind."""
    perplexity: Estimate | None = None
    bits_per_byte: Estimate | None = None
    curve: list[MeanPoint] = []
    growths: list[MeanGrowth] = []


class Comparison(Settings):
    """The branches of one recipe over several seeds, and what is needed to run them again."""

    name: str
    title: str
    description: str = ""
    command: str
    seeds: list[int]
    machine: dict[str, str]
    """Of the first seed's run, as of `versions` and `data`."""
    versions: dict[str, str]
    unit: str = "token"
    """Of the data, in the singular."""
    measure: MeasureDescription = MeasureDescription()
    """What the branches are compared by."""
    other_measures: list[MeasureDescription] = []
    """What else was measured of them at the end."""
    data: dict[str, str]
    """Source, fingerprint, sizes."""
    main_branch: str
    """The branch that the others are compared with."""
    branches: list[BranchComparison]

    @property
    def main(self) -> BranchComparison | None:
        """The branch that the others are compared with; None where no seed finished it."""
        return next((branch for branch in self.branches if branch.name == self.main_branch), None)


def compare(runs: Sequence[RunResults], command: str) -> Comparison:
    """Put the runs of one recipe with different seeds together.

    Args:
        runs: at least one; a branch is compared over the seeds that have it.
        command: the command line that reproduces all of them.
    """
    first = runs[0]
    found: dict[str, dict[int, BranchResult]] = {}
    for run in runs:
        for branch in run.branches:
            found.setdefault(branch.name, {})[run.seed] = branch
    main = {seed: branch.value for seed, branch in found.get(first.main_branch, {}).items()}
    return Comparison(
        **{
            name: getattr(first, name)
            for name in (
                "name",
                "title",
                "description",
                "machine",
                "versions",
                "unit",
                "measure",
                "other_measures",
                "data",
            )
        },
        command=command,
        seeds=[run.seed for run in runs],
        main_branch=first.main_branch,
        branches=[_branch(by_seed, None if name == first.main_branch else main) for name, by_seed in found.items()],
    )


def _branch(by_seed: Mapping[int, BranchResult], main: Mapping[int, float | None] | None) -> BranchComparison:
    branches = list(by_seed.values())
    first = branches[0]
    values = {seed: branch.value for seed, branch in by_seed.items()}
    return BranchComparison(
        name=first.name,
        title=first.title,
        parent=first.parent,
        seeds=list(by_seed),
        parameters=first.parameters,
        **{cost: statistics.fmean(getattr(branch, cost) for branch in branches) for cost in COSTS},
        values={seed: value if value is not None and math.isfinite(value) else None for seed, value in values.items()},
        value=Estimate.of(values.values()),
        difference=None if main is None else paired_difference(values, main),
        measures={kind: Estimate.of(branch.measures.get(kind) for branch in branches) for kind in first.measures},
        perplexity=Estimate.of(branch.perplexity for branch in branches),
        bits_per_byte=Estimate.of(branch.bits_per_byte for branch in branches),
        curve=mean_curve([branch.curve for branch in branches]),
        growths=_growths([branch.growths for branch in branches]),
    )


def mean_curve(curves: Sequence[Sequence[CurvePoint]]) -> list[MeanPoint]:
    """The mean of `curves` and its interval, over FLOPs that all of them reach.

    Where the curves were measured at the same costs, as runs of one recipe mostly are, the points are those. A stage
    in which they were not (a seed's model is larger, or took more steps) is read at the first curve's FLOPs, between
    the measured points of that stage linearly, never before its first or behind its last one; nor across stages,
    between which the measure may jump.
    """
    stages = [_stages(curve) for curve in curves]
    result: list[MeanPoint] = []
    for parts in zip(*stages, strict=False):
        if len({part[0].stage for part in parts}) == 1:
            result += _mean_stage(parts)
    return result


def _stages(curve: Sequence[CurvePoint]) -> list[list[CurvePoint]]:
    return [list(points) for _, points in groupby(curve, key=lambda point: point.stage)]


def _mean_stage(parts: Sequence[Sequence[CurvePoint]]) -> list[MeanPoint]:
    rows = list(zip(*parts, strict=False))
    aligned = len({len(part) for part in parts}) == 1 and all(
        math.isclose(point.flops, row[0].flops, rel_tol=SAME_FLOPS) and _measured(point) == _measured(row[0])
        for row in rows
        for point in row
    )
    if not aligned:
        start, end = max(part[0].flops for part in parts), min(part[-1].flops for part in parts)
        if start > end:
            return []
        grid = sorted({start, end, *(point.flops for point in parts[0] if start <= point.flops <= end)})
        samples = next((point.samples for point in reversed(parts[0]) if point.value is not None), None)
        read = [[_read(part, flops, samples) for flops in grid] for part in parts]
        rows = list(zip(*read, strict=True))
    return [_mean_point(row) for row in rows]


def _measured(point: CurvePoint) -> tuple[bool, bool, int | None]:
    return point.value is not None, point.training_loss is not None, point.samples


def _read(part: Sequence[CurvePoint], flops: float, samples: int | None) -> CurvePoint:
    """The stage's curve at `flops`; a quantity that was not measured on both sides is None. Of the measure, what was
    measured on the first `samples` held-out samples."""

    def at(name: str) -> float | None:
        points = part if name != "value" else [point for point in part if point.samples == samples]
        known = [(point.flops, value) for point in points if (value := getattr(point, name)) is not None]
        if not known or not known[0][0] <= flops <= known[-1][0]:
            return None
        return float(np.interp(flops, [x for x, _ in known], [y for _, y in known]))

    return CurvePoint(
        stage=part[0].stage,
        units=round(at("units") or 0),
        flops=flops,
        seconds=at("seconds") or 0.0,
        training_loss=at("training_loss"),
        value=at("value"),
        samples=samples,
    )


def _mean_point(points: Sequence[CurvePoint]) -> MeanPoint:
    value, training = (Estimate.of(getattr(point, name) for point in points) for name in ("value", "training_loss"))
    return MeanPoint(
        stage=points[0].stage,
        units=round(statistics.fmean(point.units for point in points)),
        flops=statistics.fmean(point.flops for point in points),
        seconds=statistics.fmean(point.seconds for point in points),
        training_loss=None if training is None else training.mean,
        training_half_width=None if training is None else training.half_width,
        value=None if value is None else value.mean,
        samples=points[0].samples,
        half_width=None if value is None else value.half_width,
    )


def _growths(by_seed: Sequence[Sequence[GrowthPoint]]) -> list[MeanGrowth]:
    """Every growth over the seeds; a seed's growths come in the recipe's order."""
    result = []
    for points in zip(*by_seed, strict=False):
        first = points[0]
        before, after, change = (
            Estimate.of(getattr(point, name) for point in points) for name in ("value_before", "value_after", "change")
        )
        result.append(
            MeanGrowth(
                stage=first.stage,
                units=round(statistics.fmean(point.units for point in points)),
                flops=statistics.fmean(point.flops for point in points),
                seconds=statistics.fmean(point.seconds for point in points),
                parameters_before=first.parameters_before,
                parameters_after=first.parameters_after,
                value_before=None if before is None else before.mean,
                value_after=None if after is None else after.mean,
                promise=first.promise,
                change_estimate=change,
                largest_change=None if change is None else max(abs(point.change or 0.0) for point in points),
            )
        )
    return result
