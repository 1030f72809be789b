"""A picture of many numbers that lie close to one, or to zero: rows from top to bottom, marks with intervals from left
to right.

The axis is logarithmic in the distance from there, so that 0.9, 0.99 and 0.999 lie equally far apart, or 0.1, 0.01 and
0.001. It is narrow and as long as there are rows: it reads on a telephone, and for a model of eighty layers.
"""

import math
from dataclasses import dataclass
from typing import Literal

from auxin.report.svg import CHARACTER, GREY, MARGIN, NARROW, document, escaped, heading, line, text

WIDTH = NARROW
LEFT, RIGHT = 40, 24
"""Room beside the axis: for labels at least so much, and more for long ones."""
MARK_HEIGHT, ROW_SPACE = 8, 6
"""Of a mark, and between rows."""
NEAREST = 1e-5
"""Distance from one or zero below which a mark lies at the axis' end."""


@dataclass(frozen=True)
class Series:
    """What marks of one kind look like."""

    name: str
    colour: str
    """At least 3:1 on white and on black."""
    shape: Literal["circle", "square", "triangle", "diamond"]


@dataclass(frozen=True)
class Mark:
    """One number."""

    series: str
    """Name of its series."""
    value: float
    """At most 1 where numbers lie close to one, at least 0 where they lie close to zero."""
    margin: float | None = None
    """Half the width of its interval."""


@dataclass(frozen=True)
class Row:
    """The marks of one thing, one below the other."""

    label: str
    marks: list[Mark]


@dataclass(frozen=True)
class Panel:
    """Rows that belong together, under a title."""

    title: str
    rows: list[Row]


def forest_svg(title: str, note: str, panels: list[Panel], series: list[Series], near: Literal[0, 1] = 1) -> str:
    """The picture's SVG.

    Args:
        title: above it.
        note: below the title: what is drawn, and how it is read.
        panels: one below the other, on one axis.
        series: the looks of all marks; those that have none are left out of the legend.
        near: the number that they are close to, at the right end.
    """
    body, y = heading(title, note)
    labels = [len(row.label) for panel in panels for row in panel.rows]
    marks = [mark for panel in panels for row in panel.rows for mark in row.marks]
    used = {mark.series for mark in marks}
    looks = {item.name: item for item in series if item.name in used}
    legend, y = _legend(list(looks.values()), y + 24)
    axis = _Axis.around(marks, near, max(LEFT, MARGIN + 8 + math.ceil(CHARACTER * max(labels, default=0))))
    body += legend
    for panel in panels:
        drawn, y = _panel(panel, axis, looks, y + 28)
        body += drawn
    return document(title, WIDTH, y + 12, body)


@dataclass(frozen=True)
class _Axis:
    """From numbers to places, in decades of the distance from one or zero."""

    near: int
    """The number at the right end."""
    first: float
    """Decade of the largest distance, at the left."""
    last: float
    """Of the smallest one; what is closer lies at the right end."""
    left: int
    """Where it begins."""

    @classmethod
    def around(cls, marks: list[Mark], near: int, left: int) -> "_Axis":
        """All marks, and all intervals; those around one up to where the distance is 2, that of opposites."""
        apart = [_apart(mark.value, near) for mark in marks]
        last = math.log10(min((distance for distance in apart if distance > NEAREST), default=0.1)) - 0.2
        farthest = max((d + (mark.margin or 0) for d, mark in zip(apart, marks, strict=True)), default=0.0)
        first = math.log10(min(max(farthest, NEAREST), 2.0 if near else math.inf)) + 0.06
        return cls(near, max(first, last + 1), last, left)

    def x(self, value: float) -> float:
        distance = _apart(value, self.near)
        decade = math.log10(distance) if distance > 0 else -math.inf
        # The number at the end is at no finite place of the axis: it has the end of a last stretch.
        share = (self.first - max(decade, self.last - 0.3)) / (self.first - self.last + 0.3)
        return self.left + (WIDTH - self.left - RIGHT) * min(max(share, 0.0), 1.0)

    def ticks(self) -> list[tuple[float, str]]:
        """Values with their labels: the one at the end and what is a power of ten from it, and halfway where there is
        room."""
        steps = (1, 5) if self.first - self.last < 3 else (1,)
        decades = range(math.floor(self.last), math.floor(self.first) + 1)
        distances = [*([2.0] if self.near else []), *(step * 10.0**decade for decade in decades for step in steps)]
        inside = [d for d in distances if self.last <= math.log10(d) <= self.first]
        found = [(float(self.near), str(self.near))]
        for distance in sorted(inside):
            value = 1 - distance if self.near else distance
            label = f"{value:.10g}"
            # A label that would run into the one at its right is left out, its line with it.
            if self.x(found[-1][0]) - self.x(value) > CHARACTER * (len(label) + len(found[-1][1])) / 2 + 4:
                found.append((value, label))
        return found


def _apart(value: float, near: int) -> float:
    """How far `value` is from one, below it, or from zero, above it."""
    return near - value if near else value


def _legend(series: list[Series], y: float) -> tuple[list[str], float]:
    """The looks and names of the series, in as many lines as they need; and where the last line is."""
    parts, x = [], float(MARGIN)
    for item in series:
        width = 16 + CHARACTER * len(item.name) + 18
        if x + width > WIDTH and x > MARGIN:
            x, y = float(MARGIN), y + 18
        parts.append(_shape(item, x + 4, y - 4))
        parts.append(text(x + 14, y, item.name, size=12))
        x += width
    return parts, y


def _panel(panel: Panel, axis: _Axis, looks: dict[str, Series], y: float) -> tuple[list[str], float]:
    """Title, axis and rows, and where they end."""
    parts = [text(MARGIN, y, panel.title, weight=600)]
    top = y + 26
    bottom = top + sum(_height(row) for row in panel.rows)
    for value, label in axis.ticks():
        place = axis.x(value)
        parts.append(line(place, top, place, bottom, opacity=0.3))
        parts.append(text(place, top - 5, label, size=11, anchor="middle"))
    place = top
    for number, row in enumerate(panel.rows):
        height = _height(row)
        if number % 2 == 0:
            parts.append(
                f'<rect x="{MARGIN}" y="{place:.1f}" width="{WIDTH - 2 * MARGIN + 8}" height="{height}" fill="{GREY}" '
                'fill-opacity="0.1"/>'
            )
        parts.append(text(axis.left - 8, place + height / 2 + 4, row.label, size=11, anchor="end"))
        for index, mark in enumerate(row.marks):
            parts += _mark(mark, axis, looks[mark.series], place + ROW_SPACE / 2 + MARK_HEIGHT * (index + 0.5))
        place += height
    return parts, bottom


def _height(row: Row) -> float:
    return MARK_HEIGHT * len(row.marks) + ROW_SPACE


def _mark(mark: Mark, axis: _Axis, look: Series, y: float) -> list[str]:
    """The interval and the mark, with the numbers for whoever points at it."""
    margin = mark.margin or 0.0
    low, high = axis.x(mark.value - margin), axis.x(mark.value + margin)
    told = f"{look.name}: {mark.value:.6g}" + (f" ± {margin:.2g}" if mark.margin is not None else "")
    return [
        f"<g><title>{escaped(told)}</title>",
        f'<path d="M{low:.1f} {y:.1f}H{high:.1f}" stroke="{look.colour}" stroke-width="1.6"/>',
        _shape(look, axis.x(mark.value), y),
        "</g>",
    ]


def _shape(look: Series, x: float, y: float) -> str:
    if look.shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4" fill="{look.colour}"/>'
    outline = {
        "square": "m-3.1 -3.1h6.2v6.2h-6.2z",
        "triangle": "m0 -4l3.9 6.8h-7.8z",
        "diamond": "m0 -4.2l4.2 4.2l-4.2 4.2l-4.2 -4.2z",
    }[look.shape]
    return f'<path d="M{x:.1f} {y:.1f}{outline}" fill="{look.colour}"/>'
