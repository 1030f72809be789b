"""What a person sees of a run: a bar on a terminal, sparse lines elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_INTERVAL = 30.0
"""Seconds between lines where there is no terminal."""


class ProgressDisplay:
    """Shows steps, loss, what is measured, speed and the time left, on standard error.

    Args:
        name: of the stage.
        total_steps: its steps.
        step: those that are done.
        enabled: whether anything is shown.
        unit: of the data, in the singular.
        measure: what is measured on the held-out split.
    """

    def __init__(self, name: str, total_steps: int, step: int, enabled: bool, unit: str, measure: str) -> None:
        self._unit, self._measure = unit, measure
        self._console = Console(stderr=True, quiet=not enabled)
        self._name = name
        self._total = total_steps
        self._bar: Progress | None = None
        self._first = (time.perf_counter(), step)
        self._last_line = time.perf_counter()
        self._validation = ""
        if enabled and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                # Narrow, so that the numbers are whole on a terminal of 80 columns.
                BarColumn(bar_width=8),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(compact=True, elapsed_when_finished=True),
                console=self._console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task(name, total=total_steps, completed=step, status="")
            self._bar.start()

    def update(self, step: int, loss: float, units_per_second: float) -> None:
        """Show the state after `step` steps."""
        status = f"loss {loss:.4f}{self._validation}  {_short(units_per_second)} {self._unit}s/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status)
        elif time.perf_counter() - self._last_line >= LINE_INTERVAL:
            self._last_line = time.perf_counter()
            started, first = self._first
            left = (self._last_line - started) / max(1, step - first) * (self._total - step)
            self.line(f"step {step}/{self._total}  {status}  {left:.0f} s left")

    def show_validation(self, value: float) -> None:
        """Show what was measured on the held-out split from now on."""
        name = "val." if self._measure == "loss" else self._measure
        self._validation = f"  {name} {value:.4f}"

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(f"{self._name}: {text}", highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def _short(number: float) -> str:
    """Three digits and a unit: 13.7k."""
    for unit in ("", "k", "M"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}G"
