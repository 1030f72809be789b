"""What pruning leaves, drawn against how much went: all models with the front of those that no other beats, and each
method by itself before and after it is mended; and the distance of a model's output over the parts that went."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from auxin.report.curve import Step, curve_svg
from auxin.report.svg import CHARACTER, GREY, document, escaped, line, text, ticks

ORANGE, BLUE = "#D55E00", "#2F8AC9"
WIDTH, LEFT, RIGHT = 900, 56, 24
FRONT_HEIGHT, FRONT_RIGHT = 300, 316
"""Of the picture with the front, and the room for its labels."""
COLUMNS, PANEL_HEIGHT, GAP = 4, 100, 60
"""Of the pictures of single methods; the gap has room for a title of two lines."""
TITLE_CHARACTERS = 30
Point = tuple[float, float]
"""(per cent of the parameters that went, loss)."""


@dataclass(frozen=True)
class Method:
    """One method at several sizes, in the order of what went; means over the seeds."""

    title: str
    mended: list[Point]
    before: list[Point]
    """Without training; none of what was never whole."""


@dataclass(frozen=True)
class _Plane:
    """From numbers to places."""

    left: float
    right: float
    top: float
    bottom: float
    first: float
    last: float
    low: float
    high: float

    def x(self, value: float) -> float:
        return self.left + (self.right - self.left) * (value - self.first) / (self.last - self.first)

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * (value - self.low) / (self.high - self.low)

    def axes(self, most: int, labelled: bool = True) -> list[str]:
        """Lines and numbers at round values, `most` at each axis at most; at the left where it is `labelled`."""
        parts = []
        for value, word in ticks(self.low, self.high, most):
            parts.append(line(self.left, self.y(value), self.right, self.y(value), opacity=0.25))
            if labelled:
                parts.append(text(self.left - 6, self.y(value) + 4, word, size=11, anchor="end"))
        for value, word in ticks(self.first, self.last, most):
            parts.append(line(self.x(value), self.top, self.x(value), self.bottom, opacity=0.15))
            parts.append(text(self.x(value), self.bottom + 15, word, size=11, anchor="middle"))
        return parts

    def joined(self, points: Sequence[Point], colour: str, told: str) -> list[str]:
        """A line through some points, and a dot at each that says what it is to whoever points at it."""
        places = " ".join(f"{self.x(went):.1f},{self.y(loss):.1f}" for went, loss in points)
        drawn = [f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="1.6"/>'] if points else []
        return drawn + [self.dot(point, colour, 2.6, told) for point in points]

    def dot(self, point: Point, colour: str, radius: float, told: str) -> str:
        """A dot."""
        said = escaped(f"{told}: {point[1]:.3f}, {point[0]:.1f} % gone")
        place = f'cx="{self.x(point[0]):.1f}" cy="{self.y(point[1]):.1f}"'
        return f'<circle {place} r="{radius}" fill="{colour}"><title>{said}</title></circle>'


def pruning_svg(
    title: str, methods: Sequence[Method], scratch: Method, front: Sequence[tuple[str, Point]], unit: str
) -> str:
    """The picture's SVG.

    Args:
        title: above it.
        methods: all that prune.
        scratch: models of those sizes from scratch.
        front: those that no other pruned model of as few parameters is better than, with titles, in any order.
        unit: what losses are in.
    """
    went = [point[0] for one in (*methods, scratch) for point in (*one.mended, *one.before)]
    last = 10 * math.ceil(max(went) / 10)
    body = [text(16, 28, title, size=16, weight=600)]
    body += [text(16, 48, f"Mended: held-out loss in {unit}, against per cent of the parameters that went", size=12)]
    front_words = "front: no other pruned one as small is better"
    body += _legend({"a pruned model": GREY, front_words: ORANGE, "from scratch": BLUE}, 68)
    body += _front(methods, scratch, front, last)
    top = 84 + FRONT_HEIGHT + 56
    body.append(text(16, top, "Each method by itself", size=14, weight=600))
    body += _legend({"without training": BLUE, "mended": ORANGE, "all others": GREY}, top + 20)
    panels, bottom = _panels(methods, last, top + 34)
    return document(title, WIDTH, bottom, body + panels)


def _legend(colours: Mapping[str, str], y: float) -> list[str]:
    """What the colours mean, in a line."""
    parts, x = list[str](), 16.0
    for words, colour in colours.items():
        parts += [f'<circle cx="{x + 4}" cy="{y - 4}" r="4" fill="{colour}"/>', text(x + 13, y, words, size=12)]
        x += 13 + CHARACTER * len(words) + 22
    return parts


def _front(methods: Sequence[Method], scratch: Method, front: Sequence[tuple[str, Point]], last: float) -> list[str]:
    """All mended models, with the front and its names at the right."""
    losses = [loss for one in (*methods, scratch) for _, loss in one.mended]
    edge = (max(losses) - min(losses)) * 0.05
    plane = _Plane(LEFT, WIDTH - FRONT_RIGHT, 84, 84 + FRONT_HEIGHT, 0, last, min(losses) - edge, max(losses) + edge)
    parts = plane.axes(8)
    for one in methods:
        parts += [plane.dot(point, GREY, 3, one.title) for point in one.mended]
    parts += plane.joined(scratch.mended, BLUE, told=scratch.title)
    ordered = sorted(front, key=lambda named: named[1])
    # To the next, smaller one of the front, its loss is what is to be had: up first, then along.
    corners = [(plane.x(went), plane.y(loss)) for _, (went, loss) in ordered]
    steps = [f"M{corners[0][0]:.1f} {corners[0][1]:.1f}"] + [f"V{y:.1f}H{x:.1f}" for x, y in corners[1:]]
    parts.append(f'<path d="{"".join(steps)}" fill="none" stroke="{ORANGE}" stroke-width="1.6"/>')
    named = sorted(ordered, key=lambda one: -one[1][1])
    places = _apart([plane.y(loss) for _, (_, loss) in named], plane.top, plane.bottom)
    for (name, point), place in zip(named, places, strict=True):
        parts.append(plane.dot(point, ORANGE, 4, name))
        lead = f"M{plane.x(point[0]) + 5:.1f} {plane.y(point[1]):.1f}L{plane.right + 8:.1f} {place:.1f}"
        parts.append(f'<path d="{lead}" stroke="{ORANGE}" stroke-opacity="0.35" fill="none"/>')
        words = f"{name} {point[1]:.3f} ({point[0]:.0f} %)"
        parts.append(text(plane.right + 12, place + 4, words, size=11, colour=ORANGE))
    return parts


def _apart(places: Sequence[float], top: float, bottom: float, height: float = 15) -> list[float]:
    """Ascending places, moved so that labels neither touch nor leave the plane."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + height if moved else top))
    limit = bottom
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - height
    return moved


def _panels(methods: Sequence[Method], last: float, top: float) -> tuple[list[str], float]:
    """A small picture of every method, with all others in grey behind it; and where they end."""
    losses = [loss for one in methods for _, loss in (*one.mended, *one.before)]
    edge = (max(losses) - min(losses)) * 0.05
    width = (WIDTH - LEFT - RIGHT - (COLUMNS - 1) * 16) / COLUMNS
    parts = []
    for number, one in enumerate(methods):
        row, column = divmod(number, COLUMNS)
        left, y = LEFT + column * (width + 16), top + row * (PANEL_HEIGHT + GAP)
        plane = _Plane(
            left, left + width, y + 32, y + 32 + PANEL_HEIGHT, 0, last, min(losses) - edge, max(losses) + edge
        )
        wrapped = textwrap.wrap(one.title, TITLE_CHARACTERS)
        for index, words in enumerate(wrapped):
            parts.append(text(left, y + 26 - 13 * (len(wrapped) - 1 - index), words, size=11, weight=600))
        parts += plane.axes(4, labelled=column == 0)
        for other in methods:
            for points in (other.before, other.mended):
                places = " ".join(f"{plane.x(went):.1f},{plane.y(loss):.1f}" for went, loss in points)
                parts.append(f'<polyline points="{places}" fill="none" stroke="{GREY}" stroke-opacity="0.25"/>')
        parts += plane.joined(one.before, BLUE, told=f"{one.title}, without training")
        parts += plane.joined(one.mended, ORANGE, told=f"{one.title}, mended")
    rows = math.ceil(len(methods) / COLUMNS)
    return parts, top + rows * (PANEL_HEIGHT + GAP)


def removals_svg(title: str, note: str, distances: Sequence[tuple[str, float]]) -> str:
    """The distance of a model's output from the whole one's over the parts that are gone, with the part that each
    removal took.

    Args:
        title: above it.
        note: below the title.
        distances: of each removal, in their order, a short name of what it took, and the distance after it.
    """
    return curve_svg(title, note, [Step(name, value) for name, value in distances])
