"""A process that runs branches for `auxin.recipes.workers`, one after another, with one thread."""

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import torch

from auxin.errors import AuxinError
from auxin.interruption import REQUEST
from auxin.recipes.folder import BRANCHES, RECIPE_FILE
from auxin.recipes.runner import prepared_run, run_branch
from auxin.recipes.schema import Recipe
from auxin.recipes.stages import Run

LOG_FILE = "log.txt"
"""In a branch's folder: what its process wrote, progress included."""


def main() -> None:
    """Do the tasks that come on standard input, a line of JSON each, until it ends.

    A task names the run's folder, the folder of the data and the branch. Lines of JSON on standard output answer:
    `line` for something to tell, and at the end `seconds`, or `failed` with `exit_code`.
    """
    torch.set_num_threads(1)
    # What is ignored is inherited, such as Ctrl-C by what a shell starts in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(REQUEST, signal.SIG_DFL)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what else is printed must not come among the answers
    tasks: queue.Queue[dict[str, str]] = queue.Queue()
    threading.Thread(target=_listen, args=(tasks,), daemon=True).start()
    try:
        while True:
            _answer(answers, _done(tasks.get(), answers))
    except KeyboardInterrupt:
        os._exit(130)  # not by sys.exit, which would wait for the thread that reads


def _listen(tasks: "queue.Queue[dict[str, str]]") -> None:
    """Hand on tasks as they come; when the process at the other end is gone, so is this one."""
    for line in sys.stdin:
        tasks.put(json.loads(line))
    os._exit(1)


def _done(task: dict[str, str], answers: TextIO) -> dict[str, Any]:
    """Do a task; the last answer to it."""
    directory, started = Path(task["directory"]), time.perf_counter()
    folder = directory / BRANCHES / task["branch"]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG_FILE).open("a", encoding="utf-8") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    try:
        run = _run(directory, Path(task["data"]))
        course = run.course.of_branches([task["branch"]])
        run = replace(run, announce=lambda line: _tell(answers, line), course=course)
        run_branch(run, run.recipe.branch(task["branch"]))
    except AuxinError as error:
        return {"failed": str(error), "exit_code": error.exit_code}
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error} (see {folder / LOG_FILE}).", "exit_code": 1}
    return {"seconds": time.perf_counter() - started}


@cache
def _run(directory: Path, data: Path) -> Run:
    return prepared_run(Recipe.from_yaml(directory / RECIPE_FILE), directory, data, lambda line: None)


def _tell(answers: TextIO, line: str) -> None:
    _answer(answers, {"line": line.strip()})


def _answer(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
