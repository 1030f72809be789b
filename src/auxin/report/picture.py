"""A static picture of a run: the measure against training FLOPs, as SVG that reads on white and on black."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from auxin.accounting.comparison import BranchComparison, Comparison
from auxin.accounting.results import BranchResult, CurvePoint, RunResults
from auxin.files import write_text
from auxin.report.curves import branch_colours, branch_order, drawable_growths, growth_label, half_width, points
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
    curves = {branch.name: measured for branch in order if (measured := points(branch, "value"))}
    body = [text(LEFT, 24, results.title, size=17, weight=600)]
    plane = _Plane.around(curves)
    if plane is None:
        body.append(text(WIDTH / 2, HEIGHT / 2, f"no {results.measure.name} was measured", anchor="middle"))
    else:
        colours = {name: colour.both for name, colour in branch_colours(results).items()}
        body += _axes(plane, f"validation {results.measure.with_unit}")
        drawn = [branch for branch in reversed(order) if branch.name in curves]
        if bands := [band for branch in drawn if (band := _band(plane, curves[branch.name], colours[branch.name]))]:
            body += [PLANE, *bands]
        body += [_curve(plane, branch, curves[branch.name], colours[branch.name], results) for branch in drawn]
        for branch in drawn:
            body += _growths(plane, branch, colours[branch.name], labelled=branch.name == results.main_branch)
        body += _labels(plane, drawn, curves, colours)
    return document(f"{results.title}: validation {results.measure.name} against training FLOPs", WIDTH, HEIGHT, body)


class _Plane(NamedTuple):
    """From costs and losses to places in the picture."""

    left: float
    right: float
    low: float
    high: float

    @classmethod
    def around(cls, curves: dict[str, list[CurvePoint]]) -> "_Plane | None":
        """The late part of all curves; None when there is nothing to draw."""
        largest = max((point.flops for curve in curves.values() for point in curve), default=0.0)
        if largest <= 0:
            return None
        left = LATE_SHARE * largest
        late = [
            (point.value, half_width(point) or 0.0)
            for curve in curves.values()
            for point in curve
            if point.flops >= left and point.value is not None
        ]
        low, high = min(loss for loss, _ in late), max(loss for loss, _ in late)
        # Bands are shown, but the widest must not press the curves flat.
        beyond = BAND_SHARE * (high - low)
        low = max(low - beyond, min(loss - width for loss, width in late))
        high = min(high + beyond, max(loss + width for loss, width in late))
        room = 0.06 * (high - low or 0.1)
        return cls(left, largest, low - room, high + room)

    def x(self, flops: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (flops - self.left) / (self.right - self.left)

    def y(self, loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (self.high - loss) / (self.high - self.low)


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


def _band(plane: _Plane, measured: list[CurvePoint], colour: str) -> str:
    """The interval around a mean curve, to be cut off at the plane's edges; empty where there is none."""
    widths = [half_width(point) for point in measured]
    if not any(widths):
        return ""

    def edge(sign: int) -> list[tuple[float, float]]:
        return [
            (point.flops, (point.value or 0.0) + sign * (width or 0.0))
            for point, width in zip(measured, widths, strict=True)
        ]

    outline = " ".join(f"{plane.x(x):.1f},{plane.y(y):.1f}" for x, y in [*edge(1), *reversed(edge(-1))])
    return f'<polygon points="{outline}" fill="{colour}" fill-opacity="0.16" clip-path="url(#plane)"/>'


def _curve(
    plane: _Plane, branch: Drawn, measured: list[CurvePoint], colour: str, results: RunResults | Comparison
) -> str:
    # The last point before the visible part is kept at its edge, so that no curve begins in the middle of nowhere.
    visible = _clip([(point.flops, point.value or 0.0) for point in measured], plane)
    path = " ".join(f"{plane.x(x):.1f},{plane.y(y):.1f}" for x, y in visible)
    width = 3.2 if branch.name == results.main_branch else 2
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-linejoin="round" '
        'stroke-linecap="round"/>'
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
    for growth in drawable_growths(branch):
        loss = growth.value_after
        if loss is None or growth.flops < plane.left or not plane.low <= loss <= plane.high:
            continue
        x, y = plane.x(growth.flops), plane.y(loss)
        parts.append(f'<path d="M{x:.1f} {y - 7.5:.1f}l7.5 7.5l-7.5 7.5l-7.5 -7.5z" fill="{colour}"/>')
        if labelled:
            parts.append(line(x + 4, y - 9, x + 16, y - 26, opacity=0.7))
            parts.append(text(x + 19, y - 28, growth_label(growth)))
    return parts


def _labels(
    plane: _Plane, branches: Sequence[Drawn], curves: dict[str, list[CurvePoint]], colours: dict[str, str]
) -> list[str]:
    """Title and last loss of every branch beside the end of its curve, moved apart where they would overlap."""
    order = sorted(branches, key=lambda branch: curves[branch.name][-1].value or 0.0, reverse=True)
    places = [plane.y(curves[branch.name][-1].value or 0.0) for branch in order]
    labels = [_label(branch.title, curves[branch.name][-1]) for branch in order]
    height = max(LABEL_HEIGHT, 2 + 16 * max(map(len, labels)))
    parts = []
    for branch, lines, place, moved in zip(order, labels, places, spread(places, height), strict=True):
        end, colour = curves[branch.name][-1], colours[branch.name]
        x = plane.x(end.flops)
        parts.append(f'<circle cx="{x:.1f}" cy="{place:.1f}" r="3.5" fill="{colour}"/>')
        elbow = WIDTH - RIGHT + 12
        parts.append(
            f'<polyline points="{x + 6:.1f},{place:.1f} {elbow},{moved:.1f} {elbow + 5},{moved:.1f}" '
            f'fill="none" stroke="{colour}" stroke-opacity="0.6"/>'
        )
        for index, content in enumerate(lines):
            y = moved + 4.5 + 16 * (index - (len(lines) - 1) / 2)
            parts.append(text(WIDTH - RIGHT + 22, y, content, colour=colour, weight=600))
    return parts


def _label(title: str, end: CurvePoint) -> list[str]:
    """The lines of a curve's title and last loss; a loss and its interval are not parted."""
    width = half_width(end)
    number = f"{end.value:.3f}" if width is None else f"{end.value:.3f}\u00a0±\u00a0{width:.3f}"
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
