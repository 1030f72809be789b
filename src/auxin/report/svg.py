"""What every picture is made of: a document, text and lines, as SVG that reads on white and on black."""

import math
import textwrap
from collections.abc import Sequence
from xml.sax.saxutils import escape

from auxin.words.printable import printable

GREY = "#7d8590"
"""At least 3.5:1 on white and on black; grids have it almost transparent."""
MARGIN = 16
"""Between a narrow picture's edge and what is in it."""
NARROW = 480
"""Width of a picture that reads on a telephone."""
TITLE_CHARACTERS, NOTE_CHARACTERS = 50, 72
"""In a line of a narrow picture's title, and of the note below it."""
CHARACTER = 6.6
"""Width of a small character, about."""
ROUND = (1, 2, 5, 10)
"""What numbers of an axis are multiples of, times a power of ten."""


def document(title: str, width: float, height: float, body: Sequence[str]) -> str:
    """The whole picture; no font, script or image from elsewhere is needed.

    Args:
        title: what is read out, or shown in a tab, instead of the picture.
        width: in pixels.
        height: in pixels.
        body: its elements, the hindmost first.
    """
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" '
        'font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif" '
        f'font-size="13">\n<title>{escaped(title)}</title>\n' + "\n".join(body) + "\n</svg>\n"
    )


def heading(title: str, note: str) -> tuple[list[str], float]:
    """A narrow picture's title and the note below it, in lines, and the base line of the last one."""
    parts, y = [], 8.0
    for content in textwrap.wrap(title, TITLE_CHARACTERS):
        y += 20
        parts.append(text(MARGIN, y, content, size=16, weight=600))
    y += 4
    for content in textwrap.wrap(note, NOTE_CHARACTERS):
        y += 17
        parts.append(text(MARGIN, y, content, size=12))
    return parts, y


def text(
    x: float, y: float, content: str, size: int = 13, anchor: str = "start", weight: int = 400, colour: str = GREY
) -> str:
    """One line of text; (x, y) is its start, middle or end on the base line."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{escaped(content)}</text>'
    )


def line(x1: float, y1: float, x2: float, y2: float, opacity: float) -> str:
    """A thin straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{GREY}" stroke-opacity="{opacity}"/>'


def escaped(content: str) -> str:
    """Any text, to stand in an element."""
    return escape(printable(content))


def ticks(low: float, high: float, most: int) -> list[tuple[float, str]]:
    """Round numbers between two, and how they are written: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * one for one in ROUND if (high - low) / (power * one) <= most)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [(number * step, f"{number * step:.{digits}f}") for number in numbers]
