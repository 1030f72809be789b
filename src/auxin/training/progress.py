"""What a person sees of a run: a bar on a terminal, sparse lines elsewhere."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

LINE_INTERVAL = 30.0
"""Seconds between lines where there is no terminal."""


CENTURY = 100 * 365.25 * 24 * 3600.0
"""Seconds."""


def hours(seconds: float | None) -> str:
    """Hours, minutes and seconds, 1:02:03; empty where they are not known."""
    if seconds is None:
        return ""
    return str(timedelta(seconds=round(seconds))) if seconds < CENTURY else "over 100 years"


@dataclass(frozen=True)
class Place:
    """Where a stage stands in a run of several."""

    number: int = 1
    """From 1."""
    total: int = 1
    flops_after: float = 0.0
    """Training FLOPs of the stages that come after it."""


class TimeLeft:
    """How long a stage and the run will take on, by what its steps and evaluations took so far.

    The first step of a call is left out: it compiles, allocates and fills caches, and may take ten times as long as the
    others. What comes between steps (evaluations on the way, checkpoints) counts as part of them.

    Args:
        total_steps: of the stage.
        flops_per_step: training FLOPs of a step.
        final_samples: held-out samples to measure after the last step.
        flops_after: training FLOPs of the stages after this one.
        clock: seconds from any start.
    """

    def __init__(
        self,
        total_steps: int,
        flops_per_step: float,
        final_samples: int,
        flops_after: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._total_steps, self._flops_per_step = total_steps, flops_per_step
        self._final_samples, self._flops_after, self._clock = final_samples, flops_after, clock
        self._first: float | None = None
        self._seconds, self._steps = 0.0, 0
        self._evaluation_began, self._per_sample = 0.0, 0.0
        self._before, self._measured = 0, 0

    def stepped(self) -> None:
        """A step was done."""
        self._before = self._measured = 0
        if self._first is None:
            self._first = self._clock()
        else:
            self._seconds, self._steps = self._clock() - self._first, self._steps + 1

    def evaluating(self, done: int) -> None:
        """So many samples of an evaluation are done; one after the other may follow a step."""
        if not done:
            self._evaluation_began, self._before = self._clock(), self._measured
        else:
            self._per_sample, self._measured = (self._clock() - self._evaluation_began) / done, self._before + done

    def of_stage(self, step: int) -> float | None:
        """Seconds that the stage takes after `step` steps; None: not known yet."""
        per_step = self._per_step()
        if per_step is None:
            return None
        steps = self._total_steps - step
        samples = self._final_samples if steps else max(0, self._final_samples - self._measured)
        return per_step * steps + self._per_sample * samples

    def of_run(self, step: int) -> float | None:
        """Seconds of the run; later stages are taken to train as many FLOPs per second as this one, and what they
        measure at their ends is left out."""
        stage, per_step = self.of_stage(step), self._per_step()
        if stage is None or per_step is None:
            return None
        return stage + self._flops_after * per_step / self._flops_per_step

    def _per_step(self) -> float | None:
        return self._seconds / self._steps if self._steps else None


class ProgressDisplay:
    """Shows steps, loss, what is measured, speed and the time left, on standard error.

    Args:
        name: of the stage.
        total_steps: its steps.
        step: those that are done.
        enabled: whether anything is shown.
        unit: of the data, in the singular.
        measure: what is measured on the held-out split.
        place: where the stage stands in its run.
        left: estimates the time.
    """

    def __init__(
        self,
        name: str,
        total_steps: int,
        step: int,
        enabled: bool,
        unit: str,
        measure: str,
        place: Place,
        left: TimeLeft,
    ) -> None:
        self._unit, self._measure, self._place, self._left = unit, measure, place, left
        self._console = Console(stderr=True, quiet=not enabled)
        self._name = name
        self._total, self._step = total_steps, step
        self._bar: Progress | None = None
        self._last_line = time.perf_counter()
        self._validation = ""
        if enabled and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                # Narrow, so that the numbers are whole on a terminal of 80 columns.
                BarColumn(bar_width=8),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TextColumn("{task.fields[left]}"),
                console=self._console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task(name, total=total_steps, completed=step, status="", left="")
            if place.total > 1:
                told = f"stage {place.number} of {place.total}"
                self._run = self._bar.add_task(
                    "run", total=place.total, completed=place.number - 1, status=told, left=""
                )
            self._bar.start()

    def update(self, step: int, loss: float, units_per_second: float) -> None:
        """Show the state after `step` steps."""
        self._left.stepped()
        self._step = step
        status = f"loss {loss:.4f}{self._validation}  {_short(units_per_second)} {self._unit}s/s"
        if self._bar is not None:
            self._show(status)
        elif self._due():
            self.line(f"step {step}/{self._total}  {status}{self._times()}")

    def evaluating(self, done: int, total: int) -> None:
        """Show that `done` of `total` held-out samples are measured."""
        self._left.evaluating(done)
        status = f"measured on {done:,} of {total:,} held-out samples"
        if self._bar is not None:
            self._show(status)
        elif self._due():
            self.line(f"{status}{self._times()}")

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

    def _show(self, status: str) -> None:
        assert self._bar is not None
        left = hours(self._left.of_stage(self._step))
        self._bar.update(self._task, completed=self._step, status=status, left=left)
        if self._place.total > 1:
            self._bar.update(self._run, left=hours(self._left.of_run(self._step)))

    def _times(self) -> str:
        """What is left, for the end of a line."""
        stage, run = self._left.of_stage(self._step), self._left.of_run(self._step)
        if stage is None:
            return ""
        told = f"  {hours(stage)} left"
        if self._place.total == 1:
            return told
        return f"{told}; stage {self._place.number} of {self._place.total}, {hours(run)} left of the run"

    def _due(self) -> bool:
        """Whether it is time for a line, which is then the last one."""
        now = time.perf_counter()
        if now - self._last_line < LINE_INTERVAL:
            return False
        self._last_line = now
        return True


def _short(number: float) -> str:
    """Three digits and a unit: 13.7k."""
    for unit in ("", "k", "M"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}G"
