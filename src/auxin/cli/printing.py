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
    for column, title in enumerate(header):
        left = words or column == 0 or len(header) == 2
        table.add_column(title, justify="left" if left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(escaped(cell) for cell in row))
    print_wide(table)


def print_wide(content: Any) -> None:
    """Print what rich can draw, as wide as the terminal or as COLUMNS says; else, on a pipe, 200 columns wide, where
    rich would cut at 80: a script wants whole lines."""
    Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200).print(content)


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
