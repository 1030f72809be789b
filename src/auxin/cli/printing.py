"""Tables, numbers and lines as the commands print them."""

import math
import os
import sys
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from auxin.words.printable import printable


def print_table(header: list[str], rows: list[list[str]], words: bool = False, optional: int = 0) -> None:
    """Print a table; from the second column on it holds numbers, unless `words` or it has two columns only.

    Lines are broken between words alone, so that no number and no name is taken apart. Where a table has no room for
    that, the last `optional` columns are left out, from the right and with a line that names them; where that is not
    enough, every row becomes a block of lines.
    """
    numbers = set() if words or len(header) == 2 else set(range(1, len(header)))
    for left_out in range(optional + 1):
        kept = len(header) - left_out
        columns = [_Column.of([line[index] for line in (header, *rows)], index in numbers) for index in range(kept)]
        # Names are kept legible rather than all columns.
        widths = _widths(columns, _LEAST_NAME if left_out < optional else 0)
        if widths is None:
            continue
        table = Table(box=None, pad_edge=False, header_style="bold")
        for index, width in enumerate(widths):
            right = index in numbers
            table.add_column(escaped(header[index]), justify="right" if right else "left", width=width)
        for row in rows:
            table.add_row(*(escaped(cell) for cell in row[:kept]))
        print_wide(table)
        if left_out:
            print_line(f"Not shown, for want of room: {', '.join(header[kept:])}.")
        return
    for row in rows:
        print_line(row[0])
        for title, cell in zip(header[1:], row[1:], strict=True):
            if cell:
                print_line(f"  {title}: {cell}" if title else f"  {cell}")


_LEAST_NAME = 24
"""Characters of the first column, if it has as many, beside which columns that may be left out have a place."""
_GAP = 2
"""Characters between columns."""


class _Column(NamedTuple):
    """How wide a column is."""

    least: int
    """Where lines are broken at every place that allows it."""
    whole: int
    number: bool

    @classmethod
    def of(cls, lines: list[str], number: bool) -> "_Column":
        words = [word for line in (lines[:1] if number else lines) for word in line.split()]
        cells = lines[1:] if number else []
        return cls(max(map(len, [*words, *cells, ""])), max(map(len, lines)), number)


def _widths(columns: list[_Column], name: int) -> list[int] | None:
    """The widths at which a table fits, titles of numbers broken before words; None where it can't.

    Args:
        columns: those of the table.
        name: the first one keeps so many characters, if it has them.
    """
    room = _wide_console().width - _GAP * (len(columns) - 1)
    widths = [column.whole for column in columns]
    if sum(widths) > room:
        widths = [column.least if column.number else column.whole for column in columns]
    least = [column.least for column in columns]
    least[0] = max(least[0], min(name, columns[0].whole))
    while sum(widths) > room:
        index = max(range(len(columns)), key=lambda index: widths[index] - least[index])
        if widths[index] <= least[index]:
            return None
        widths[index] -= 1
    return widths


def print_wide(content: Any) -> None:
    """Print what rich can draw, as wide as the terminal or as COLUMNS says; else, on a pipe, 200 columns wide, where
    rich would cut at 80: a script wants whole lines."""
    _wide_console().print(content)


def _wide_console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200)


def print_list(rows: list[tuple[str, str]]) -> None:
    """Print names and what is said about each, in 80 columns or less."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for row in rows:
        table.add_row(*(escaped(cell) for cell in row))
    console = Console(highlight=False)
    console.width = min(console.width, 80)
    console.print(table)


def number(value: float | None, digits: int) -> str:
    """`value` with `digits` decimals; a dash where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def escaped(text: str) -> str:
    """`text` as a terminal can show it, with brackets that rich does not take for markup."""
    return printable(text).replace("[", r"\[")


def print_line(line: str) -> None:
    """Print a line at once."""
    print(printable(line), flush=True)


def to_stderr(line: str) -> None:
    """Print a line at once, to standard error."""
    print(printable(line), file=sys.stderr, flush=True)
