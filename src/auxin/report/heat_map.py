"""A picture of many numbers in rows and columns, each a cell whose colour says how large it is.

The colours are viridis, which goes from dark to light evenly and for all kinds of colour vision; a scale says what they
mean. Its ends are nearly black and nearly white, so that a frame in grey holds every row together on any background.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from auxin.report.svg import CHARACTER, GREY, MARGIN, NARROW, document, escaped, heading, text

VIRIDIS = ("#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725")
"""Nathaniel Smith's and Stefan van der Walt's colours, ten of them, evenly apart (CC0)."""
SHADES = 64
"""Colours between the ends of a scale."""
SCALE_WIDTH, SCALE_HEIGHT = 192, 10
CELL_WIDTHS = (5, 28)
"""Of a column: the picture grows wider where there are too many, and leaves room where there are few."""
CELL_HEIGHT, LOW_CELL_HEIGHT, MANY_ROWS = 16.0, 10.0, 16
"""Of a row, and of one where a panel has many."""
DECADES = 4
"""Powers of ten on a logarithmic scale, at most; what is below has the lowest colour."""


@dataclass(frozen=True)
class Row:
    """The cells of one thing, from left to right."""

    label: str
    """Short: a layer's number."""
    values: Sequence[float | None]
    """Finite numbers; None leaves a cell empty. Rows may end before others."""
    margins: Sequence[float] = ()
    """Half the widths of their intervals, told to whoever points at a cell; empty: they are not known."""
    aside: str = ""
    """A few characters at the right of the cells."""


@dataclass(frozen=True)
class Panel:
    """Rows that have one scale of colours, under a title."""

    title: str
    rows: Sequence[Row]
    columns: Sequence[str] = ()
    """Their labels, short; every second one, or fewer, where there is no room for all. Empty: they have none."""
    across: str = ""
    """What the columns are, in a few words above their labels: "head"."""
    unit: str = ""
    """What the colours mean, in a few words beside the scale: "share of attention"."""
    low: float | None = None
    """The number of the darkest colour; None: the smallest one."""
    high: float | None = None
    """The number of the lightest colour; None: the largest one."""
    logarithmic: bool = False
    """Whether equal factors are equally far apart, and not equal differences; for numbers that are not negative."""


def heat_map_svg(title: str, panels: Sequence[Panel], note: str = "") -> str:
    """The picture's SVG.

    Args:
        title: above it, in lines of at most 50 characters.
        panels: one below the other, each with its scale.
        note: below the title: what is drawn, and how it is read.
    """
    body, y = heading(title, note)
    width = float(NARROW)
    for panel in panels:
        drawn, wide, y = _panel(panel, y + 30)
        body += drawn
        width = max(width, wide)
    return document(title, width, y + MARGIN, body)


@dataclass(frozen=True)
class _Scale:
    """From numbers to colours."""

    low: float
    high: float
    logarithmic: bool
    cut: bool
    """Whether there are numbers below the lowest."""

    @classmethod
    def of(cls, panel: Panel) -> "_Scale":
        values = [value for row in panel.rows for value in row.values if value is not None]
        high = panel.high if panel.high is not None else max(values, default=1.0)
        low = panel.low if panel.low is not None else min(values, default=0.0)
        logarithmic = panel.logarithmic and high > 0
        if logarithmic:
            low = max(low, high / 10**DECADES)
        return cls(low, high, logarithmic, any(value < low for value in values))

    def share(self, value: float) -> float:
        """0 at the lowest colour, 1 at the highest."""
        if self.high <= self.low:
            return 1.0 if value >= self.high else 0.0
        if value <= self.low:
            return 0.0
        if self.logarithmic:
            return min(math.log(value / self.low) / math.log(self.high / self.low), 1.0)
        return min((value - self.low) / (self.high - self.low), 1.0)

    def middle(self) -> float:
        """The number halfway."""
        return math.sqrt(self.low * self.high) if self.logarithmic else (self.low + self.high) / 2


def _panel(panel: Panel, y: float) -> tuple[list[str], float, float]:
    """Title, scale, labels and cells; how far they reach to the right, and down."""
    scale = _Scale.of(panel)
    parts = [text(MARGIN, y, panel.title, weight=600)]
    drawn, y = _scale(scale, panel.unit, y + 12)
    parts += drawn
    # Whole pixels, so that nothing shines through between cells.
    left = MARGIN + math.ceil(CHARACTER * max((len(row.label) for row in panel.rows), default=0)) + 8
    count = max((len(row.values) for row in panel.rows), default=0)
    narrowest, widest = CELL_WIDTHS
    asides = max((len(row.aside) for row in panel.rows), default=0)
    right = math.ceil(CHARACTER * asides) + 8 if asides else 0
    cell = min(max((NARROW - MARGIN - left - right) // max(count, 1), narrowest), widest)
    height = CELL_HEIGHT if len(panel.rows) <= MANY_ROWS else LOW_CELL_HEIGHT
    if panel.across:
        y += 18
        parts.append(text(left, y, panel.across, size=12))
    if panel.columns:
        y += 15
        parts += _column_labels(panel.columns, left, cell, y)
    y += 6
    # Labels of low rows would run into each other: every other one will do.
    step = 1 if height >= CELL_HEIGHT else 2
    for number, row in enumerate(panel.rows):
        if number % step == 0:
            parts.append(text(left - 8, y + height / 2 + 4, row.label, size=11, anchor="end"))
            if row.aside:
                parts.append(text(left + cell * count + 8, y + height / 2 + 4, row.aside, size=11))
        parts += _row(panel, row, scale, left, y, cell, height)
        y += height
    return parts, left + cell * count + right + MARGIN, y


def _scale(scale: _Scale, unit: str, y: float) -> tuple[list[str], float]:
    """The colours from the lowest to the highest, the numbers below them, and where these are."""
    step = SCALE_WIDTH / SHADES
    parts = [
        _cell(MARGIN + shade * step, y, step, SCALE_HEIGHT, _colour(shade / (SHADES - 1))) for shade in range(SHADES)
    ]
    parts.append(_frame(MARGIN, y, SCALE_WIDTH, SCALE_HEIGHT))
    if unit:
        parts.append(text(MARGIN + SCALE_WIDTH + 10, y + SCALE_HEIGHT, unit, size=12))
    y += SCALE_HEIGHT + 13
    below = "≤ " if scale.cut else ""
    parts.append(text(MARGIN, y, f"{below}{scale.low:.3g}", size=11))
    if scale.high > scale.low:
        parts.append(text(MARGIN + SCALE_WIDTH / 2, y, f"{scale.middle():.3g}", size=11, anchor="middle"))
        parts.append(text(MARGIN + SCALE_WIDTH, y, f"{scale.high:.3g}", size=11, anchor="end"))
    return parts, y


def _column_labels(labels: Sequence[str], left: float, cell: float, y: float) -> list[str]:
    """Those of every column, or of every second, fourth, ... one, so that none runs into the next."""
    wide, step = CHARACTER * max(map(len, labels)) + 4, 1
    while wide > cell * step:
        step *= 2
    shown = [(number, label) for number, label in enumerate(labels) if number % step == 0]
    return [text(left + cell * (number + 0.5), y, label, size=11, anchor="middle") for number, label in shown]


def _row(panel: Panel, row: Row, scale: _Scale, x: float, y: float, width: float, height: float) -> list[str]:
    """The cells, with their numbers for whoever points at them, and a frame around them."""
    parts = []
    for number, value in enumerate(row.values):
        if value is None:
            continue
        column = panel.columns[number] if number < len(panel.columns) else str(number)
        margin = f" ± {row.margins[number]:.2g}" if row.margins else ""
        told = f"{row.label}, {column}: {value:.4g}{margin}"
        parts.append(_cell(x + width * number, y, width, height, _colour(scale.share(value)), told))
    return [*parts, _frame(x, y, width * len(row.values), height)]


def _cell(x: float, y: float, width: float, height: float, colour: str, told: str = "") -> str:
    # As few characters as do: there are many cells.
    outline = f'<path d="M{x:g} {y:g}h{width:g}v{height:g}h-{width:g}z" fill="{colour}"'
    return f"{outline}><title>{escaped(told)}</title></path>" if told else f"{outline}/>"


def _frame(x: float, y: float, width: float, height: float) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="none" stroke="{GREY}" '
        'stroke-width="0.6"/>'
    )


def _colour(share: float) -> str:
    """The colour at a share of the scale, one of `SHADES`."""
    place = round(share * (SHADES - 1)) / (SHADES - 1) * (len(VIRIDIS) - 1)
    first = min(int(place), len(VIRIDIS) - 2)
    one, other = ([int(VIRIDIS[index][start : start + 2], 16) for start in (1, 3, 5)] for index in (first, first + 1))
    mixed = (round(a + (b - a) * (place - first)) for a, b in zip(one, other, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)
