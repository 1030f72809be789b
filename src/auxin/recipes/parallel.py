"""Branches of one run, or of one run per seed, side by side in processes of one thread each.

A process does one branch. It ends with the one that started it, however that one ends: what it has not saved is done
again by the next call. Ctrl-C reaches the parent alone, which passes it on once; training stages then save.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, cast

from auxin.errors import AuxinError, TrainingError
from auxin.recipes.branch_order import depends_on
from auxin.recipes.folder import is_finished
from auxin.recipes.schema import Branch, Recipe
from auxin.training.interruption import TrainingInterrupted

Announce = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """One branch of one run."""

    recipe: Recipe
    directory: Path
    """The run's folder."""
    data: Path
    """Of the prepared data."""
    branch: Branch
    label: str
    """What lines about it begin with."""

    @property
    def is_finished(self) -> bool:
        """Whether every stage is done."""
        return is_finished(self.directory, self.branch)

    def waits_for(self, other: "Cell") -> bool:
        """Whether `other` has to be finished first."""
        return self.directory == other.directory and other.branch.name in depends_on(self.recipe, self.branch)


class BranchesFailed(TrainingError):
    """Branches that ended with an error; the others were finished."""


def run_cells(cells: Sequence[Cell], jobs: int, work: Callable[[Cell], None], announce: Announce) -> None:
    """Do `cells`, `jobs` at a time, each when those that it needs are finished.

    Args:
        cells: finished ones are left out.
        jobs: processes at a time.
        work: does one; a function of a module, which the processes import.
        announce: is told what happens.

    Raises:
        BranchesFailed: some failed; those that do not need them were finished.
        TrainingInterrupted: SIGINT or SIGTERM; training stages saved what they had.
    """
    waiting = [cell for cell in cells if not cell.is_finished]
    total = len(waiting)
    failed: list[tuple[Cell, str]] = []
    running: dict[int, _Job] = {}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["auxin.recipes.seeds"])
    with _PassedOn(running) as stopped:
        while (waiting or running) and not (stopped() and not running):
            unfinished = [*waiting, *(job.cell for job in running.values()), *(cell for cell, _ in failed)]
            for cell in [*waiting]:
                ready = not any(cell.waits_for(other) for other in unfinished)
                if len(running) < jobs and ready and not stopped():
                    job = _Job.started(context, cell, work)
                    running[job.process.sentinel] = job
                    waiting.remove(cell)
            if not running:
                break
            for sentinel in wait(list(running), timeout=1.0):
                job = running.pop(cast(int, sentinel))
                if (problem := job.problem()) is not None:
                    failed.append((job.cell, problem))
                    announce(f"{job.cell.label}: {problem}")
                else:
                    done = total - len(waiting) - len(running) - len(failed)
                    announce(f"{job.cell.label}: finished ({done} of {total}, {time.perf_counter() - job.since:.0f} s)")
        if stopped():
            raise TrainingInterrupted(
                "Interrupted; what the branches in progress had trained is saved. Give the same command to go on.",
                cells[0].directory,
            )
    if failed:
        raise BranchesFailed(
            f"{len(failed)} of {total} branches failed: "
            + "; ".join(f"{cell.label}: {problem}" for cell, problem in failed)
            + (f". {len(waiting)} that need them were not begun" if waiting else "")
            + ". The others are finished. Mend this and give the same command again."
        )


@dataclass(frozen=True)
class _Job:
    """A process that does a cell."""

    cell: Cell
    process: BaseProcess
    errors: Connection
    since: float

    @classmethod
    def started(cls, context: Any, cell: Cell, work: Callable[[Cell], None]) -> "_Job":
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_do, args=(cell, work, sender), name=cell.label)
        process.start()
        sender.close()
        return cls(cell, process, receiver, time.perf_counter())

    def problem(self) -> str | None:
        """What went wrong in the process, which has ended; None: nothing."""
        self.process.join()
        if self.process.exitcode == 0:
            return None
        try:
            return str(self.errors.recv())
        except EOFError:
            return f"the process ended with {self.process.exitcode}"


class _PassedOn:
    """Within the context, SIGINT and SIGTERM are passed on to the processes; the call tells whether one came."""

    def __init__(self, running: dict[int, _Job]) -> None:
        self._running = running
        self._came = False
        self._former: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        return self._came

    def __enter__(self) -> "_PassedOn":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        for job in self._running.values():
            job.process.kill()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        for job in self._running.values():
            if job.process.pid is not None and job.process.is_alive():
                os.kill(job.process.pid, signal.SIGINT)


def _do(cell: Cell, work: Callable[[Cell], None], errors: Connection) -> None:
    """In a process of its own: do `cell`, and tell what goes wrong."""
    import torch

    os.setpgrp()  # Ctrl-C in a terminal goes to the parent, which passes it on
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        work(cell)
    except KeyboardInterrupt:
        errors.send("interrupted")
        os._exit(130)
    except BaseException as error:
        name = "" if isinstance(error, AuxinError) else f"{type(error).__name__}: "
        errors.send(f"{name}{error}")
        os._exit(1)
    os._exit(0)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
