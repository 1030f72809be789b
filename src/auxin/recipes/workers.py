"""Branches side by side: each in a process of one thread, as many at a time as asked for.

The processes (`auxin.recipes.worker`) are children of this one in process groups of their own, so that Ctrl-C in a
terminal comes here alone and is handed on once. They talk by lines of JSON: on standard input a branch to run, on
standard output what happens. A child whose standard input ends, because this process has died, ends at once, as if it
had been killed too. Whatever it was at is resumed by the next run, which could not disturb it either: a branch's folder
is locked while a process is at it.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from auxin.errors import TrainingError
from auxin.interruption import REQUEST, Interrupted, Interruption
from auxin.recipes.folder import is_finished
from auxin.recipes.schema import Recipe

WORKER = [sys.executable, "-P", "-c", "from auxin.recipes.worker import main; main()"]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
POLL = 0.2
"""Seconds after which a signal that came meanwhile is seen."""


@dataclass(frozen=True)
class Cell:
    """One branch of one run."""

    directory: Path
    """The run's folder, which is claimed for `recipe`."""
    data_directory: Path
    """The prepared data."""
    recipe: Recipe
    branch: str
    label: str = ""
    """What lines about it begin with, beside the branch's name."""

    def __str__(self) -> str:
        return f"{self.label}{self.branch}"

    def waits_for(self, cells: Sequence["Cell"]) -> bool:
        """Whether one of `cells` has to be finished before."""
        needed = self.recipe.depends_on(self.recipe.branch(self.branch))
        return any(cell.directory == self.directory and cell.branch in needed for cell in cells)


@dataclass(frozen=True)
class Failure:
    """Why a branch is not finished."""

    cell: Cell
    reason: str
    exit_code: int = 1


@dataclass
class _Worker:
    """A child, and what it is at."""

    process: subprocess.Popen[str]
    errors: Any
    """File of what it writes to standard error before its first branch has a log."""
    cell: Cell | None = None

    def begin(self, cell: Cell) -> None:
        self.cell = cell
        task = {"directory": str(cell.directory), "data": str(cell.data_directory), "branch": cell.branch}
        # What has died is noticed by the end of its output.
        with contextlib.suppress(BrokenPipeError):
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()

    def end(self) -> str:
        """Make sure that it is gone; how it ended."""
        self.process.kill()
        code = self.process.wait()
        self.errors.seek(0)
        told = self.errors.read().decode(errors="replace").strip().splitlines()
        self.errors.close()
        return f"its process ended with code {code}{f': {told[-1]}' if told else ''}"


def run_cells(cells: Sequence[Cell], jobs: int, announce: Callable[[str], None]) -> list[Failure]:
    """Run the branches of `cells` that are not finished yet, `jobs` at a time, each after those that it needs.

    What fails does not stop the others, but for those that need it.

    Args:
        cells: the branches, in the order in which they are begun; those that they need are among them, or finished.
        jobs: processes, of one thread each.
        announce: is told of every finished stage, a line at a time, with the branch before it.

    Returns:
        Why branches are not finished, in the order of `cells`; empty when all are.

    Raises:
        Interrupted: a signal came; the children have saved.
    """
    unfinished = [cell for cell in cells if not is_finished(cell.directory, cell.recipe.branch(cell.branch))]
    if not unfinished:
        return []
    pool = _Pool(unfinished, min(jobs, len(unfinished)), announce)
    with Interruption() as interruption:
        try:
            pool.run(interruption)
        finally:
            pool.close()
    if interruption.signal_name is not None:
        left = len(unfinished) - len(pool.done)
        raise Interrupted(
            f"Interrupted by {interruption.signal_name}; what was being trained is saved. Branches left: {left}. Run "
            "the same command again to go on."
        )
    return sorted(pool.failures, key=lambda failure: unfinished.index(failure.cell))


def raise_failures(failures: Sequence[Failure]) -> None:
    """Raise one error that names every branch that is not finished and says why; nothing where there is none.

    Raises:
        TrainingError: there are some. Its exit code is that of the first.
    """
    if failures:
        error = TrainingError(
            "Not finished: "
            + "; ".join(f"{failure.cell}: {failure.reason}" for failure in failures)
            + " All other branches are done. Run the same command again to retry these."
        )
        error.exit_code = failures[0].exit_code
        raise error


@dataclass
class _Pool:
    """The children and what is left to do."""

    waiting: list[Cell]
    jobs: int
    announce: Callable[[str], None]
    workers: list[_Worker] = field(default_factory=list)
    messages: "queue.Queue[tuple[_Worker, dict[str, Any] | None]]" = field(default_factory=queue.Queue)
    done: list[Cell] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.waiting = list(self.waiting)
        self.total = len(self.waiting)

    def run(self, interruption: Interruption) -> None:
        told = False
        while True:
            if interruption.signal_name is None:
                self._begin()
            elif not told:
                told = True
                for worker in self._busy():
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(worker.process.pid, REQUEST)
            if not self._busy():
                return
            with contextlib.suppress(queue.Empty):
                self._take(*self.messages.get(timeout=POLL), told)

    def close(self) -> None:
        for worker in self.workers:
            worker.end()

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self.workers if worker.cell is not None]

    def _begin(self) -> None:
        """Give every free child a branch that needs nothing unfinished; start children up to the number of jobs."""
        for failure in self.failures:
            for cell in [cell for cell in self.waiting if cell.waits_for([failure.cell])]:
                self.waiting.remove(cell)
                self.failures.append(Failure(cell, f"needs {failure.cell.branch}.", failure.exit_code))
        for cell in [*self.waiting]:
            if len(self._busy()) == self.jobs:
                return
            current = [worker.cell for worker in self._busy() if worker.cell is not None]
            if not cell.waits_for([*self.waiting, *current]):
                self.waiting.remove(cell)
                free = next((worker for worker in self.workers if worker.cell is None), None) or self._start()
                free.begin(cell)

    def _start(self) -> _Worker:
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        process = subprocess.Popen(
            WORKER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            env={**os.environ, **ONE_THREAD},
            process_group=0,
        )
        worker = _Worker(process, errors)
        self.workers.append(worker)
        threading.Thread(target=self._listen, args=(worker,), daemon=True).start()
        return worker

    def _listen(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        for line in worker.process.stdout:
            # A child that is killed may leave half a line.
            with contextlib.suppress(json.JSONDecodeError):
                self.messages.put((worker, json.loads(line)))
        self.messages.put((worker, None))

    def _take(self, worker: _Worker, message: dict[str, Any] | None, interrupted: bool) -> None:
        cell = worker.cell
        if message is None:
            self.workers.remove(worker)
            ended = worker.end()
            if cell is not None and not interrupted:
                self._fail(Failure(cell, f"{ended}."))
        elif cell is None:
            return
        elif "line" in message:
            self.announce(f"{cell}: {message['line']}")
        else:
            worker.cell = None
            if "seconds" in message:
                self.done.append(cell)
                self.announce(f"{cell}: done in {message['seconds']:.0f} s ({len(self.done)} of {self.total})")
            elif not interrupted:
                self._fail(Failure(cell, message["failed"], message["exit_code"]))

    def _fail(self, failure: Failure) -> None:
        self.failures.append(failure)
        self.announce(f"{failure.cell}: FAILED: {failure.reason}")
