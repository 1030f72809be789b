"""What the charts draw, and the colours they draw it in."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple, overload

from auxin.accounting.comparison import BranchComparison, Comparison
from auxin.accounting.results import BranchResult, CurvePoint, GrowthPoint, RunResults
from auxin.accounting.statistics import Estimate
from auxin.report.formatting import is_number, short
from auxin.settings import Settings

AXES = ("units", "flops", "seconds")
"""The costs that the measure is drawn against."""
HALF_WIDTHS = {"value": "half_width", "training_loss": "training_half_width"}
"""The fields of a mean curve's points that hold the intervals."""


class BranchColour(Settings):
    """One hue on three backgrounds, after Okabe and Ito's colours for all kinds of colour vision."""

    light: str
    """On white."""
    dark: str
    """On near-black."""
    both: str
    """Where the background is not known: at least 3:1 on either."""


COLOURS = (
    BranchColour(light="#C85200", dark="#F0803C", both="#D55E00"),
    BranchColour(light="#0072B2", dark="#56B4E9", both="#2F8AC9"),
    BranchColour(light="#00805D", dark="#2CC99B", both="#009E73"),
    BranchColour(light="#A8477F", dark="#E19AC2", both="#BF659A"),
    BranchColour(light="#8A6A00", dark="#E6B325", both="#A88418"),
    BranchColour(light="#5F6670", dark="#AEB6C0", both="#7D8590"),
)
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "cross", "x")
"""Plotly's markers: a second way to tell branches apart."""


@overload
def branch_order(results: RunResults) -> list[BranchResult]: ...
@overload
def branch_order(results: Comparison) -> list[BranchComparison]: ...
@overload
def branch_order(results: RunResults | Comparison) -> Sequence[BranchResult | BranchComparison]: ...
def branch_order(results: RunResults | Comparison) -> Sequence[BranchResult | BranchComparison]:
    """The main branch first, so that its colour is the same in every report; then as the recipe has them."""
    if isinstance(results, Comparison):
        return sorted(results.branches, key=lambda branch: branch.name != results.main_branch)
    return sorted(results.branches, key=lambda branch: branch.name != results.main_branch)


def branch_colours(results: RunResults | Comparison) -> dict[str, BranchColour]:
    """The colour of each branch; they repeat when there are more branches than colours."""
    return {branch.name: COLOURS[index % len(COLOURS)] for index, branch in enumerate(branch_order(results))}


def points(branch: BranchResult | BranchComparison, loss: str) -> list[CurvePoint]:
    """The points of `branch` at which `loss` ("training_loss" or "value") was measured and is finite."""
    return [point for point in branch.curve if is_number(getattr(point, loss))]


def lines_of(measured: Sequence[CurvePoint]) -> list[list[CurvePoint]]:
    """The points that a line may join: neighbours that were measured on the same samples."""
    return [list(points) for _, points in groupby(measured, key=lambda point: point.samples)]


def on_a_part(branch: BranchResult | BranchComparison) -> bool:
    """Whether the curve was measured on a part of the held-out split, so that what was measured on all of it (the
    branch's final value, those at its growths) does not lie on the curve."""
    return any(point.samples is not None for point in points(branch, "value"))


class End(NamedTuple):
    """Where a branch ended."""

    point: CurvePoint
    value: float
    half: float | None
    """Half the interval of `value`; None where there is none."""
    apart: bool
    """Whether `value` is of the whole held-out split, and the curve of a part of it."""


def end_of(branch: BranchResult | BranchComparison) -> End | None:
    """The curve's last point, or, where that is of a part of the held-out split, the final value on all of it; None
    where nothing was measured."""
    measured = points(branch, "value")
    if not measured:
        return None
    last, final = measured[-1], branch.value
    value, half = (final.mean, final.half_width) if isinstance(final, Estimate) else (final, None)
    if last.samples is not None and value is not None and is_number(value):
        return End(last, value, half, apart=True)
    return End(last, last.value or 0.0, half_width(last), apart=False)


def only_trained(branch: BranchResult | BranchComparison) -> bool:
    """Whether nothing but the training loss tells what happened between the ends of its train stages."""
    by_stage = [list(stage) for _, stage in groupby(points(branch, "value"), key=lambda point: point.stage)]
    return bool(points(branch, "training_loss")) and all(len(stage) <= 2 for stage in by_stage)


def draws_training(results: RunResults | Comparison, branch: BranchResult | BranchComparison) -> bool:
    """Whether a picture shows the training loss of `branch` in place of a line: it has nothing else, and is measured
    by a loss too."""
    return results.measure.kind == "loss" and only_trained(branch)


def show_all(results: RunResults | Comparison) -> bool:
    """Whether a picture shows the whole run and not its late part: of a branch that is two points and no training loss
    beside them, the late part is a stub."""
    return any(only_trained(branch) and not draws_training(results, branch) for branch in results.branches)


def explanation(results: RunResults | Comparison) -> list[str]:
    """What lines and marks of a picture are, where a reader could take them for something else."""
    told = []
    if any(draws_training(results, branch) for branch in results.branches):
        told.append(f"thin lines: training loss; dots: validation {results.measure.name}")
    if any(on_a_part(branch) for branch in results.branches):
        sizes = {point.samples for branch in results.branches for point in points(branch, "value") if point.samples}
        part = f"the first {min(sizes):,} held-out samples" if len(sizes) == 1 else "a part of the held-out split"
        told.append(f"validation on {part}; hollow marks: on the whole split")
    return told


def chart_data(results: RunResults | Comparison) -> list[dict[str, Any]]:
    """Everything that the page's chart draws, as JSON values, in the order of the legend."""
    colours = branch_colours(results)
    return [
        {
            "name": branch.name,
            "title": branch.title,
            "main": branch.name == results.main_branch,
            "light": colours[branch.name].light,
            "dark": colours[branch.name].dark,
            "symbol": SYMBOLS[index % len(SYMBOLS)],
            "validation": _columns(points(branch, "value"), "value"),
            "training": _columns(points(branch, "training_loss"), "training_loss"),
            "growths": [_growth(growth) for growth in drawable_growths(branch)],
            "end": _end(branch),
            "apart": on_a_part(branch),
            "trained": draws_training(results, branch),
        }
        for index, branch in enumerate(branch_order(results))
    ]


def chart_words(results: RunResults | Comparison) -> dict[str, str]:
    """What the page's chart calls what it draws, and what part of the run it shows at first."""
    return {
        "unit": results.unit,
        "measure": results.measure.name,
        "axis": results.measure.with_unit,
        "range": "all" if show_all(results) else "late",
    }


def drawable_growths(branch: BranchResult | BranchComparison) -> list[GrowthPoint]:
    """The growths of `branch` whose place on the measure's axis is known."""
    return [growth for growth in branch.growths if is_number(growth.value_after)]


def growth_label(growth: GrowthPoint) -> str:
    """How the sizes before and after a change are written in a chart."""
    return f"{short(growth.parameters_before)} → {short(growth.parameters_after)}"


def word_for(changes: Iterable[GrowthPoint]) -> str:
    """What such changes are called: "growth" where every one of them left more parameters, else "change"."""
    return "growth" if all(point.parameters_after > point.parameters_before for point in changes) else "change"


def _columns(measured: list[CurvePoint], loss: str) -> dict[str, Any]:
    columns: dict[str, Any] = {axis: [getattr(point, axis) for point in measured] for axis in AXES}
    columns |= {"loss": [getattr(point, loss) for point in measured], "stage": [p.stage for p in measured]}
    if loss == "value":
        columns["lines"] = [len(line) for line in lines_of(measured)]
    widths = [half_width(point, loss) for point in measured]
    return columns if None in widths or not widths else {**columns, "half": widths}


def half_width(point: CurvePoint, loss: str = "value") -> float | None:
    """Of the interval around `loss` at a point of a mean curve; None where there is no interval."""
    return getattr(point, HALF_WIDTHS[loss], None)


def _end(branch: BranchResult | BranchComparison) -> dict[str, Any] | None:
    end = end_of(branch)
    if end is None:
        return None
    costs = {axis: getattr(end.point, axis) for axis in AXES}
    return {**costs, "loss": end.value, "half": end.half, "apart": end.apart}


def _growth(growth: GrowthPoint) -> dict[str, Any]:
    costs = {axis: getattr(growth, axis) for axis in AXES}
    words = {"label": growth_label(growth), "word": word_for([growth])}
    return {**costs, **words, "loss": growth.value_after, "stage": growth.stage}
