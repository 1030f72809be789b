"""Tables, numbers and lines as the commands print them."""

import math
import os
import sys
from typing import Any

from rich.console import Console
from rich.table import Table


def print_table(header: list[str], rows: list[list[str]], words: bool = False) -> None:
    """Print a table; from the second column on it holds numbers, unless `words` or it has two columns only."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    numbers = [] if words or len(header) == 2 else list(range(1, len(header)))
    room = _wide_console().width - 2 * (len(header) - 1)
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    if sum(widths) > room:  # titles are broken between words then, and numbers nowhere, if there is room for that
        header = [title.replace(" ", "\n") if column in numbers else title for column, title in enumerate(header)]
    least = [max(len(part) for line in (header, *rows) for part in line[column].split("\n")) for column in numbers]
    whole = sum(least) + _LEAST_NAME <= room
    for column, title in enumerate(header):
        right = column in numbers
        table.add_column(title, justify="right" if right else "left", overflow="fold", no_wrap=right and whole)
    for row in rows:
        table.add_row(*(escaped(cell) for cell in row))
    print_wide(table)


_LEAST_NAME = 8
"""Characters of the first column of a table beside which numbers are kept whole."""


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
    """`text` with brackets that rich does not take for markup."""
    return text.replace("[", r"\[")


def print_line(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def to_stderr(line: str) -> None:
    """Print a line at once, to standard error."""
    print(line, file=sys.stderr, flush=True)
