"""What the charts draw, and the colours they draw it in."""

from collections.abc import Iterable, Sequence
from typing import Any, overload

from auxin.accounting.comparison import BranchComparison, Comparison
from auxin.accounting.results import BranchResult, CurvePoint, GrowthPoint, RunResults
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
        }
        for index, branch in enumerate(branch_order(results))
    ]


def chart_words(results: RunResults | Comparison) -> dict[str, str]:
    """What the page's chart calls what it draws."""
    return {"unit": results.unit, "measure": results.measure.name, "axis": results.measure.with_unit}


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
    widths = [half_width(point, loss) for point in measured]
    return columns if None in widths or not widths else {**columns, "half": widths}


def half_width(point: CurvePoint, loss: str = "value") -> float | None:
    """Of the interval around `loss` at a point of a mean curve; None where there is no interval."""
    return getattr(point, HALF_WIDTHS[loss], None)


def _growth(growth: GrowthPoint) -> dict[str, Any]:
    costs = {axis: getattr(growth, axis) for axis in AXES}
    words = {"label": growth_label(growth), "word": word_for([growth])}
    return {**costs, **words, "loss": growth.value_after, "stage": growth.stage}
