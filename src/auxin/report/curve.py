"""A picture of what grows step by step: a line over the number of steps, each with its interval and what it took."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from auxin.report.svg import MARGIN, document, escaped, line, text, ticks

BLUE = "#2F8AC9"
"""At least 3:1 on white and on black."""
LEFT, CELL, TOP, HEIGHT = 56, 40, 92, 220
"""Of the plane: its left edge, the width of a step, its upper edge and how high it is; in pixels."""


@dataclass(frozen=True)
class Step:
    """One step."""

    name: str
    """What it took, in a few characters."""
    value: float
    """What it led to; before the first one it was 0."""
    margin: float | None = None
    """Half the width of its interval."""


def curve_svg(title: str, note: str, steps: Sequence[Step]) -> str:
    """The picture's SVG.

    Args:
        title: above it.
        note: below the title.
        steps: one at least, in their order.
    """
    width = LEFT + CELL * (len(steps) + 1)
    highest = 1.06 * max(max(step.value + (step.margin or 0.0) for step in steps), 1e-12)
    lowest = min(0.0, *(1.06 * step.value for step in steps))

    def x(number: float) -> float:
        return LEFT + CELL * number

    def y(value: float) -> float:
        return TOP + HEIGHT * (highest - value) / (highest - lowest)

    body = [text(MARGIN, 28, title, size=16, weight=600)]
    body += [text(MARGIN, 50 + 16 * row, words, size=12) for row, words in enumerate(textwrap.wrap(note, width // 7))]
    for value, word in ticks(lowest, highest, 8):
        body.append(line(LEFT, y(value), width, y(value), opacity=0.25))
        body.append(text(LEFT - 6, y(value) + 4, word, size=11, anchor="end"))
    places = " ".join(f"{x(number):.1f},{y(value):.1f}" for number, value in enumerate([0, *(s.value for s in steps)]))
    body.append(f'<polyline points="{places}" fill="none" stroke="{BLUE}" stroke-width="1.6"/>')
    for number, step in enumerate(steps, start=1):
        said = f"{number} gone, {step.name} last: {step.value:.3g}"
        if step.margin is not None:
            said += f" ± {step.margin:.2g}"
            low, high = y(max(lowest, step.value - step.margin)), y(step.value + step.margin)
            body.append(f'<path d="M{x(number):.1f} {low:.1f}V{high:.1f}" stroke="{BLUE}" stroke-opacity="0.6"/>')
        body.append(
            f'<circle cx="{x(number):.1f}" cy="{y(step.value):.1f}" r="3" fill="{BLUE}">'
            f"<title>{escaped(said)}</title></circle>"
        )
        body.append(text(x(number), TOP + HEIGHT + 16, f"{number}", size=11, anchor="middle"))
        body.append(text(x(number), TOP + HEIGHT + 32, step.name, size=11, anchor="middle"))
    return document(title, width + MARGIN, TOP + HEIGHT + 44, body)
