"""One run for each of several seeds, put together: means, intervals, and differences seed by seed."""

from collections.abc import Mapping, Sequence

from auxin.accounting.results import (
    BranchResult,
    BranchSpread,
    CurvePoint,
    GrowthPoint,
    RunResults,
    perplexity_of,
)
from auxin.accounting.statistics import Spread, difference, spread


def compared(runs: Mapping[int, RunResults], command: str) -> RunResults:
    """The results of the same recipe with several seeds as one.

    What depends on the seed is a mean, with the 95% interval of Student's t; costs are means without one. Ledgers, and
    with them the lineage, are those of the first seed.

    Args:
        runs: what each seed measured, by seed; all have the same branches.
        command: the command line that reproduces the comparison.
    """
    seeds = list(runs)
    first = runs[seeds[0]]
    columns = {branch.name: [_branch(run, branch.name) for run in runs.values()] for branch in first.branches}
    values = {name: spread([branch.value for branch in column]) for name, column in columns.items()}
    return first.model_copy(
        update={
            "command": command,
            "seed": seeds[0],
            "seeds": seeds,
            "branches": [
                _together(column, values[name], None if name == first.main_branch else values.get(first.main_branch))
                for name, column in columns.items()
            ],
        }
    )


def _branch(run: RunResults, name: str) -> BranchResult:
    return next(branch for branch in run.branches if branch.name == name)


def _together(column: Sequence[BranchResult], value: Spread, main: Spread | None) -> BranchResult:
    """One branch of all seeds."""
    first = column[0]
    kinds = [kind for kind in first.measures if all(kind in branch.measures for branch in column)]
    bits = spread([branch.bits_per_byte for branch in column]).mean
    known = first.perplexity is not None and value.mean is not None
    return first.model_copy(
        update={
            "curve": _mean_curve([branch.curve for branch in column]),
            "growths": [_mean_growth(growths) for growths in zip(*(b.growths for b in column), strict=False)],
            "units": round(_mean([branch.units for branch in column])),
            "flops": _mean([branch.flops for branch in column]),
            "seconds": _mean([branch.seconds for branch in column]),
            "value": value.mean,
            "measures": {kind: _mean([branch.measures[kind] for branch in column]) for kind in kinds},
            # Of the mean loss: the mean of perplexities is ruled by the worst seed.
            "perplexity": perplexity_of(value.mean) if known and value.mean is not None else None,
            "bits_per_byte": bits,
            "spread": BranchSpread(
                value=value,
                gap=None if main is None else difference(value, main),
                measures={kind: spread([branch.measures[kind] for branch in column]) for kind in kinds},
            ),
        }
    )


def _mean_curve(curves: Sequence[Sequence[CurvePoint]]) -> list[CurvePoint]:
    """The places at which every seed was measured, with mean and interval; nothing is interpolated."""
    places = [{(point.stage, point.units): point for point in curve} for curve in curves]
    found = []
    for place in places[0]:
        if not all(place in other for other in places):
            continue
        points = [other[place] for other in places]
        value = spread([point.value for point in points])
        found.append(
            points[0].model_copy(
                update={
                    "flops": _mean([point.flops for point in points]),
                    "seconds": _mean([point.seconds for point in points]),
                    "training_loss": spread([point.training_loss for point in points]).mean,
                    "value": value.mean,
                    "half_width": value.half_width,
                }
            )
        )
    return found


def _mean_growth(growths: Sequence[GrowthPoint]) -> GrowthPoint:
    """The same growth in every seed."""
    return growths[0].model_copy(
        update={
            "flops": _mean([growth.flops for growth in growths]),
            "seconds": _mean([growth.seconds for growth in growths]),
            "value_before": spread([growth.value_before for growth in growths]).mean,
            "value_after": spread([growth.value_after for growth in growths]).mean,
            "changes": spread([growth.change for growth in growths]),
        }
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
