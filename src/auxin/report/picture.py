"""A static picture of a run: the measure against training FLOPs, as SVG that reads on white and on black."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from auxin.accounting.comparison import BranchComparison, Comparison
from auxin.accounting.results import BranchResult, CurvePoint, RunResults
from auxin.files import write_text
from auxin.report.curves import (
    End,
    branch_colours,
    branch_order,
    drawable_growths,
    draws_training,
    end_of,
    explanation,
    growth_label,
    half_width,
    lines_of,
    on_a_part,
    points,
    show_all,
)
from auxin.report.formatting import SUPERSCRIPTS
from auxin.report.svg import document, line, text

Drawn = BranchResult | BranchComparison

WIDTH, HEIGHT = 880, 460
LEFT, RIGHT, TOP, BOTTOM = 62, 236, 50, 56
LATE_SHARE = 0.12
"""Share of the costs that is left out at the start, where the loss falls steeply and hides what comes after."""
PLANE = (
    f'<clipPath id="plane"><rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"/>'
    "</clipPath>"
)
"""What bands are cut off at."""
BAND_SHARE = 0.4
"""Of the curves' height: so much is added for bands on either side, at most."""
LABEL_HEIGHT = 34
LABEL_CHARACTERS = 25


def write_chart_svg(results: RunResults | Comparison, path: str | Path) -> Path:
    """Write the picture to `path`, whole or not at all; no font, script or image from elsewhere is needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, chart_svg(results))
    return path


def chart_svg(results: RunResults | Comparison) -> str:
    """The picture's SVG; with several seeds, means and bands of their 95 % intervals."""
    order = branch_order(results)
    curves = {branch.name: _curves(results, branch) for branch in order}
    drawn = [branch for branch in reversed(order) if curves[branch.name].end is not None]
    body = [text(LEFT, 24, results.title, size=17, weight=600)]
    body += [text(LEFT, 42, told, size=12) for told in ["; ".join(explanation(results))] if told]
    plane = _Plane.around([place for branch in drawn for place in curves[branch.name].places], show_all(results))
    if plane is None:
        body.append(text(WIDTH / 2, HEIGHT / 2, f"no {results.measure.name} was measured", anchor="middle"))
    else:
        colours = {name: colour.both for name, colour in branch_colours(results).items()}
        trained = any(curves[branch.name].training for branch in drawn)
        body += _axes(plane, results.measure.with_unit if trained else f"validation {results.measure.with_unit}")
        found = [_band(plane, line, colours[branch.name]) for branch in drawn for line in curves[branch.name].lines]
        if bands := [band for band in found if band]:
            body += [PLANE, *bands]
        for branch in drawn:
            body += _drawn(plane, curves[branch.name], colours[branch.name], branch.name == results.main_branch)
        for branch in drawn:
            body += _growths(plane, branch, colours[branch.name], labelled=branch.name == results.main_branch)
        body += _labels(plane, drawn, {name: curve.end for name, curve in curves.items() if curve.end}, colours)
    return document(f"{results.title}: validation {results.measure.name} against training FLOPs", WIDTH, HEIGHT, body)


class _Place(NamedTuple):
    """A point to draw, with half its interval."""

    flops: float
    loss: float
    half: float = 0.0


def _places(measured: Sequence[CurvePoint]) -> list[_Place]:
    return [_Place(point.flops, point.value or 0.0, half_width(point) or 0.0) for point in measured]


class _Plane(NamedTuple):
    """From costs and losses to places in the picture."""

    left: float
    right: float
    low: float
    high: float

    @classmethod
    def around(cls, places: Sequence[_Place], whole: bool) -> "_Plane | None":
        """The late part of all `places`, or the `whole`; None when there is nothing to draw."""
        largest = max((place.flops for place in places), default=0.0)
        if largest <= 0:
            return None
        left = 0.0 if whole else LATE_SHARE * largest
        late = [place for place in places if place.flops >= left]
        low, high = min(place.loss for place in late), max(place.loss for place in late)
        # Bands are shown, but the widest must not press the curves flat.
        beyond = BAND_SHARE * (high - low)
        low = max(low - beyond, min(place.loss - place.half for place in late))
        high = min(high + beyond, max(place.loss + place.half for place in late))
        room = 0.06 * (high - low or 0.1)
        return cls(left, largest, low - room, high + room)

    def x(self, flops: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (flops - self.left) / (self.right - self.left)

    def y(self, loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (self.high - loss) / (self.high - self.low)


class _Curves(NamedTuple):
    """What is drawn of a branch beside its growths."""

    lines: list[list[_Place]]
    training: list[_Place]
    dots: list[_Place]
    end: End | None

    @property
    def places(self) -> list[_Place]:
        end = [] if self.end is None else [_Place(self.end.point.flops, self.end.value, self.end.half or 0.0)]
        return [*(place for line in self.lines for place in line), *self.training, *self.dots, *end]


def _curves(results: RunResults | Comparison, branch: Drawn) -> _Curves:
    measured = points(branch, "value")
    if draws_training(results, branch):
        training = [_Place(point.flops, point.training_loss or 0.0) for point in points(branch, "training_loss")]
        return _Curves([], training, _places(measured), end_of(branch))
    return _Curves([_places(line) for line in lines_of(measured)], [], [], end_of(branch))


def _drawn(plane: _Plane, curves: _Curves, colour: str, main: bool) -> list[str]:
    parts = [_line(plane, line, colour, 3.2 if main else 2) for line in curves.lines]
    if curves.training:
        parts.append(_line(plane, curves.training, colour, 1.6))
    return [*parts, *(_dot(plane, place, colour) for place in curves.dots if place.flops >= plane.left)]


def _axes(plane: _Plane, vertical: str) -> list[str]:
    parts = []
    for loss in _ticks(plane.low, plane.high):
        y = plane.y(loss)
        parts.append(line(LEFT, y, WIDTH - RIGHT, y, opacity=0.22))
        parts.append(text(LEFT - 8, y + 4.5, f"{loss:.6g}", anchor="end"))
    ticks = _ticks(plane.left, plane.right)
    exponent = math.floor(math.log10(plane.right))
    for flops in ticks:
        x = plane.x(flops)
        parts.append(line(x, HEIGHT - BOTTOM, x, HEIGHT - BOTTOM + 5, opacity=0.6))
        parts.append(text(x, HEIGHT - BOTTOM + 21, f"{flops / 10**exponent:.3g}", anchor="middle"))
    parts.append(line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, opacity=0.6))
    power = f"10{str(exponent).translate(SUPERSCRIPTS)}"
    parts.append(
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, f"training FLOPs × {power}, ancestors included", anchor="middle")
    )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    title = text(0, 0, vertical, anchor="middle")
    parts.append(f'<g transform="translate(15 {middle:.0f}) rotate(-90)">{title}</g>')
    return parts


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between `low` and `high`, about six."""
    rough = (high - low) / 6
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * scale for factor in (1, 2, 2.5, 5, 10) if factor * scale >= rough)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _band(plane: _Plane, measured: Sequence[_Place], colour: str) -> str:
    """The interval around a mean curve, to be cut off at the plane's edges; empty where there is none."""
    if not any(place.half for place in measured):
        return ""
    edges = [(place.flops, place.loss + place.half) for place in measured]
    edges += [(place.flops, place.loss - place.half) for place in reversed(measured)]
    outline = " ".join(f"{plane.x(x):.1f},{plane.y(y):.1f}" for x, y in edges)
    return f'<polygon points="{outline}" fill="{colour}" fill-opacity="0.16" clip-path="url(#plane)"/>'


def _line(plane: _Plane, measured: Sequence[_Place], colour: str, width: float) -> str:
    # The last point before the visible part is kept at its edge, so that no curve begins in the middle of nowhere.
    visible = _clip([(place.flops, place.loss) for place in measured], plane)
    path = " ".join(f"{plane.x(x):.1f},{plane.y(y):.1f}" for x, y in visible)
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-linejoin="round" '
        'stroke-linecap="round"/>'
    )


def _dot(plane: _Plane, place: _Place, colour: str, hollow: bool = False) -> str:
    looks = f'fill="none" stroke="{colour}" stroke-width="2"' if hollow else f'fill="{colour}"'
    return (
        f'<circle cx="{plane.x(place.flops):.1f}" cy="{plane.y(place.loss):.1f}" r="{4.5 if hollow else 3.5}" {looks}/>'
    )


def _clip(curve: list[tuple[float, float]], plane: _Plane) -> list[tuple[float, float]]:
    """The part of `curve` that lies in the plane, begun on its edge."""
    result: list[tuple[float, float]] = []
    previous: tuple[float, float] | None = None
    for x, y in curve:
        if x >= plane.left:
            if previous is not None and previous[0] < plane.left:
                share = (plane.left - previous[0]) / (x - previous[0])
                entry = previous[1] + share * (y - previous[1])
                if plane.low <= entry <= plane.high:
                    result.append((plane.left, entry))
            result.append((x, y))
        previous = (x, y)
    return result


def _growths(plane: _Plane, branch: Drawn, colour: str, labelled: bool) -> list[str]:
    parts = []
    looks = f'fill="none" stroke="{colour}" stroke-width="2"' if on_a_part(branch) else f'fill="{colour}"'
    for growth in drawable_growths(branch):
        loss = growth.value_after
        if loss is None or growth.flops < plane.left or not plane.low <= loss <= plane.high:
            continue
        x, y = plane.x(growth.flops), plane.y(loss)
        parts.append(f'<path d="M{x:.1f} {y - 7.5:.1f}l7.5 7.5l-7.5 7.5l-7.5 -7.5z" {looks}/>')
        if labelled:
            parts.append(line(x + 4, y - 9, x + 16, y - 26, opacity=0.7))
            parts.append(text(x + 19, y - 28, growth_label(growth)))
    return parts


def _labels(plane: _Plane, branches: Sequence[Drawn], ends: dict[str, End], colours: dict[str, str]) -> list[str]:
    """Title and last loss of every branch beside the end of its curve, moved apart where they would overlap."""
    order = sorted(branches, key=lambda branch: ends[branch.name].value, reverse=True)
    places = [_Place(ends[branch.name].point.flops, ends[branch.name].value) for branch in order]
    labels = [_label(branch.title, ends[branch.name]) for branch in order]
    height = max(LABEL_HEIGHT, 2 + 16 * max(map(len, labels)))
    parts = []
    heights = spread([plane.y(place.loss) for place in places], height)
    for branch, lines, place, moved in zip(order, labels, places, heights, strict=True):
        colour = colours[branch.name]
        x, y = plane.x(place.flops), plane.y(place.loss)
        parts.append(_dot(plane, place, colour, hollow=ends[branch.name].apart))
        elbow = WIDTH - RIGHT + 12
        parts.append(
            f'<polyline points="{x + 6:.1f},{y:.1f} {elbow},{moved:.1f} {elbow + 5},{moved:.1f}" '
            f'fill="none" stroke="{colour}" stroke-opacity="0.6"/>'
        )
        for index, content in enumerate(lines):
            parts.append(
                text(
                    WIDTH - RIGHT + 22,
                    moved + 4.5 + 16 * (index - (len(lines) - 1) / 2),
                    content,
                    colour=colour,
                    weight=600,
                )
            )
    return parts


def _label(title: str, end: End) -> list[str]:
    """The lines of a curve's title and last loss; a loss and its interval are not parted."""
    number = f"{end.value:.3f}" if end.half is None else f"{end.value:.3f}\u00a0±\u00a0{end.half:.3f}"
    return textwrap.wrap(f"{title} {number}", LABEL_CHARACTERS)


def spread(places: list[float], height: float = LABEL_HEIGHT) -> list[float]:
    """Ascending places, moved as little down and then up as keeps labels of `height` apart and inside the picture."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + height) if moved else place)
    limit = float(HEIGHT - BOTTOM)
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - height
    return moved
