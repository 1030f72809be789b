"""What the charts draw, and the colours they draw it in."""

from typing import Any

from auxin.accounting.results import BranchResult, CurvePoint, GrowthPoint, RunResults
from auxin.report.formatting import is_number, short
from auxin.settings import Settings

AXES = ("units", "flops", "seconds")
"""The costs that the measure is drawn against."""


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


def branch_order(results: RunResults) -> list[BranchResult]:
    """The main branch first, so that its colour is the same in every report; then as the recipe has them."""
    return sorted(results.branches, key=lambda branch: branch.name != results.main_branch)


def branch_colours(results: RunResults) -> dict[str, BranchColour]:
    """The colour of each branch; they repeat when there are more branches than colours."""
    return {branch.name: COLOURS[index % len(COLOURS)] for index, branch in enumerate(branch_order(results))}


def points(branch: BranchResult, loss: str) -> list[CurvePoint]:
    """The points of `branch` at which `loss` ("training_loss" or "value") was measured and is finite."""
    return [point for point in branch.curve if is_number(getattr(point, loss))]


def chart_data(results: RunResults) -> list[dict[str, Any]]:
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


def chart_words(results: RunResults) -> dict[str, str]:
    """What the page's chart calls what it draws."""
    return {"unit": results.unit, "measure": results.measure.name, "axis": results.measure.with_unit}


def drawable_growths(branch: BranchResult) -> list[GrowthPoint]:
    """The growths of `branch` whose place on the measure's axis is known."""
    return [growth for growth in branch.growths if is_number(growth.value_after)]


def growth_label(growth: GrowthPoint) -> str:
    """What a growth is called in a chart."""
    return f"{short(growth.parameters_before)} → {short(growth.parameters_after)}"


def _columns(measured: list[CurvePoint], loss: str) -> dict[str, Any]:
    columns: dict[str, Any] = {axis: [getattr(point, axis) for point in measured] for axis in AXES}
    return {**columns, "loss": [getattr(point, loss) for point in measured], "stage": [p.stage for p in measured]}


def _growth(growth: GrowthPoint) -> dict[str, Any]:
    costs = {axis: getattr(growth, axis) for axis in AXES}
    return {**costs, "loss": growth.value_after, "label": growth_label(growth), "stage": growth.stage}
