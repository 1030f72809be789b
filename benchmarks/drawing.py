"""Draws losses, as curves or against a cost, as SVG that reads on white and on black, for the benchmarks that compare
branches over seeds."""

import math
import statistics
import textwrap
from dataclasses import dataclass
from xml.sax.saxutils import escape

from auxin.report.picture import LABEL_HEIGHT, spread

Curve = list[tuple[float, float]]
"""(cost, loss) in the order of the cost."""

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 520, 64, 262, 48, 56
GREY = "#7d8590"
LABEL_CHARACTERS = 36
ONE_LINE = 16
"""Height of a label of one line."""
COLOURS = (
    *("#D55E00", "#B8860B", "#2F8AC9", "#009E73", "#BF659A"),
    *("#7a6fd0", "#7D8590", "#56907f", "#9b6b43", "#5f7fa8"),
)
"""At least 3:1 on white and on black."""


@dataclass(frozen=True)
class Line:
    """One branch: its curves over the seeds, which were measured at the same costs."""

    title: str
    colour: str
    curves: list[Curve]
    dashed: bool = False

    @property
    def mean(self) -> Curve:
        """The mean over the seeds."""
        return [
            (points[0][0], statistics.mean(loss for _, loss in points)) for points in zip(*self.curves, strict=False)
        ]


def draw(heading: str, lines: list[Line], start: float, label: str | None = None) -> str:
    """The SVG: mean held-out loss against a cost from `start` on, titles and last losses at the right.

    The top of a curve that explodes is cut off.

    Args:
        heading: above it.
        lines: one for each branch.
        start: the first cost that is shown.
        label: of the axis of costs; None: they are training FLOPs.
    """
    shown = [(line, [point for point in line.mean if point[0] >= start]) for line in lines]
    shown = sorted(((line, curve) for line, curve in shown if curve), key=lambda pair: -pair[1][-1][1])
    right = max(curve[-1][0] for _, curve in shown)
    losses = sorted(loss for _, curve in shown for _, loss in curve)
    low = losses[0] - 0.03
    high = min(losses[-1], losses[0] + 2.5 * (statistics.median(losses) - losses[0])) + 0.03

    def x(flops: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (flops - start) / (right - start)

    def y(loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - min(loss, high)) / (high - low)

    parts = [_text(LEFT, 26, heading, size=16, weight=600)]
    step = next(step for step in (0.05, 0.1, 0.2, 0.5, 1.0) if (high - low) / step <= 10)
    for number in range(math.ceil(low / step), math.floor(high / step) + 1):
        place = y(number * step)
        parts.append(f'<path d="M{LEFT} {place:.1f}H{WIDTH - RIGHT}" stroke="{GREY}" stroke-opacity="0.22"/>')
        parts.append(_text(LEFT - 8, place + 4, f"{number * step:.2f}", anchor="end"))
    exponent = math.floor(math.log10(right)) if label is None else 0
    for number in range(5):
        flops = start + (right - start) * number / 4
        parts.append(_text(x(flops), HEIGHT - BOTTOM + 22, f"{flops / 10**exponent:.2f}", anchor="middle"))
    label = label or f"training FLOPs, 10^{exponent}, ancestors included; held-out loss in nats per token"
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, label, anchor="middle"))
    places = [y(curve[-1][1]) for _, curve in shown]
    edge = WIDTH - RIGHT
    between = min(LABEL_HEIGHT, (HEIGHT - TOP - BOTTOM) / len(places))  # of many, closer together
    for (line, curve), place, moved in zip(shown, places, spread(places, between), strict=True):
        dash = ' stroke-dasharray="6 4"' if line.dashed else ""
        points = " ".join(f"{x(flops):.1f},{y(loss):.1f}" for flops, loss in curve)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{line.colour}" stroke-width="2"{dash}/>')
        lead = f"M{x(curve[-1][0]) + 2:.1f} {place:.1f}L{edge + 12} {moved:.1f}"
        parts.append(f'<path d="{lead}" stroke="{line.colour}" fill="none"/>')
        title = f"{line.title} {curve[-1][1]:.3f}"
        wrapped = textwrap.wrap(title, LABEL_CHARACTERS)
        for row, text in enumerate(wrapped):
            below = 4 + 13 * (row - (len(wrapped) - 1) / 2)
            parts.append(_text(edge + 15, moved + below, text, colour=line.colour, weight=600, size=11))
    return _document(heading, parts)


def _document(heading: str, parts: list[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif">\n'
        f"<title>{escape(heading)}</title>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _text(
    x: float, y: float, text: str, size: float = 12, anchor: str = "start", weight: int = 400, colour: str = GREY
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{escape(text)}</text>'
    )


@dataclass(frozen=True)
class Point:
    """One branch: what a step costs and the losses over the seeds."""

    title: str
    colour: str
    cost: float
    losses: list[float]

    @property
    def mean(self) -> float:
        """The mean loss over the seeds."""
        return statistics.mean(self.losses)


def scatter(heading: str, label: str, points: list[Point], along: list[str]) -> str:
    """The SVG: mean loss against cost, the range over the seeds as a bar.

    Args:
        heading: above it.
        label: of the axis of costs.
        points: the branches.
        along: titles of the points that a line joins, in order of their cost.
    """
    right, left = max(point.cost for point in points), min(point.cost for point in points)
    left, right = left - 0.05 * (right - left), right + 0.03 * (right - left)
    low = min(min(point.losses) for point in points)
    high = max(max(point.losses) for point in points)
    low, high = low - 0.04 * (high - low), high + 0.04 * (high - low)

    def x(cost: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (cost - left) / (right - left)

    def y(loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low)

    parts = [_text(LEFT, 26, heading, size=16, weight=600)]
    step = next(step for step in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if (high - low) / step <= 10)
    for number in range(math.ceil(low / step), math.floor(high / step) + 1):
        place = y(number * step)
        parts.append(f'<path d="M{LEFT} {place:.1f}H{WIDTH - RIGHT}" stroke="{GREY}" stroke-opacity="0.22"/>')
        parts.append(_text(LEFT - 8, place + 4, f"{number * step:.2f}", anchor="end"))
    for number in range(5):
        cost = left + (right - left) * number / 4
        parts.append(_text(x(cost), HEIGHT - BOTTOM + 22, f"{cost:.2f}", anchor="middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, label, anchor="middle"))
    joined = sorted((point for point in points if point.title in along), key=lambda point: point.cost)
    line = " ".join(f"{x(point.cost):.1f},{y(point.mean):.1f}" for point in joined)
    parts.append(f'<polyline points="{line}" fill="none" stroke="{GREY}" stroke-width="1.5" stroke-dasharray="6 4"/>')
    shown = sorted(points, key=lambda point: -point.mean)
    places = [y(point.mean) for point in shown]
    for point, place, moved in zip(shown, places, spread(places, ONE_LINE), strict=True):
        centre = x(point.cost)
        parts += [
            f'<path d="M{centre:.1f} {y(min(point.losses)):.1f}V{y(max(point.losses)):.1f}" stroke="{point.colour}" '
            'stroke-width="1.5"/>',
            f'<circle cx="{centre:.1f}" cy="{place:.1f}" r="5" fill="{point.colour}"/>',
            f'<path d="M{centre + 6:.1f} {place:.1f}L{WIDTH - RIGHT + 12} {moved:.1f}" stroke="{point.colour}" '
            'stroke-opacity="0.45" fill="none"/>',
            _text(WIDTH - RIGHT + 15, moved + 4, f"{point.title} {point.mean:.3f}", colour=point.colour, size=11),
        ]
    return _document(heading, parts)
