"""Trains in forked children on request, so that a test can kill real processes without paying torch's start each time.

Reads one JSON request per line from standard input and answers with one JSON line. The parent never computes anything:
forking a process whose libraries have started threads would not be safe.
"""

import fcntl
import json
import os
import resource
import signal
import sys
import termios
import traceback
from pathlib import Path

import torch

from auxin.errors import AuxinError
from auxin.objectives.measures import Accuracy, Loss
from auxin.training import GuardSettings, train
from labelled import TinyLabelled
from training.tiny import SPANS, TinyData, poisoned_bert, poisoned_llama, poisoned_t5, tiny_settings

# Dropout draws from the generator whose state a checkpoint must carry; two rows are poisoned.
TASKS = {
    "language": (lambda: poisoned_llama(attention_dropout=0.2), TinyData, {}, (Loss(),)),
    "spans": (lambda: poisoned_t5(dropout=0.2), TinyData, SPANS, (Loss(),)),
    "classes": (
        lambda: poisoned_bert(dropout=0.2),
        TinyLabelled,
        {"objective": "classification"},
        (Accuracy(), Loss()),
    ),
}
"""By what is learnt: the model, the data, the objective and what is measured."""
FILE_OPERATIONS = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink")


class Mischief:
    """A hook that hits its own process, at a given step: fills the disk, or sends signals."""

    def __init__(self, request: dict) -> None:
        self.request = request

    def attach(self, model, optimizer) -> None: ...

    def before_step(self, step: int) -> None:
        if step == self.request.get("disk_full_at"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        if step == self.request.get("signal_at"):
            for _ in range(self.request.get("times", 1)):
                # Unlike os.kill it has come when the call returns, so that two are never taken for one.
                signal.raise_signal(getattr(signal, self.request["signal"]))
        if step == self.request.get("close_terminal_at"):
            os.close(self.request["terminal"])
            signal.raise_signal(signal.SIGHUP)  # as the shell of a terminal does after the terminal itself

    def after_step(self, step: int) -> None: ...

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None: ...


def count_file_operations(kill_at: int | None, report: Path) -> None:
    """Count the calls that change names or flush files; die by SIGKILL just before number `kill_at`."""
    calls = 0

    def wrap(function):
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            report.write_text(str(calls))
            return function(*args, **kwargs)

        return wrapped

    for name in FILE_OPERATIONS:
        setattr(os, name, wrap(getattr(os, name)))


def take_terminal() -> int:
    """Let this process be what a new terminal has started; the end that the terminal's window has."""
    window, terminal = os.openpty()
    os.setsid()
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for descriptor in (1, 2):
        os.dup2(terminal, descriptor)
    os.close(terminal)
    return window


def child(request: dict) -> None:
    output_dir = Path(request["output_dir"])
    signal.signal(signal.SIGHUP, signal.SIG_IGN if request.get("nohup") else signal.SIG_DFL)
    if "close_terminal_at" in request:
        request["terminal"] = take_terminal()
    # A shell lets what it starts in the background ignore Ctrl-C, and that would be inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if "dies_after" in request:
        # Seconds of this process's own work, however long the machine takes for them; no handler, so it dies at once.
        signal.setitimer(signal.ITIMER_PROF, request["dies_after"])
    if "count" in request:
        count_file_operations(request.get("kill_at"), Path(request["count"]))
    make_model, make_data, objective, measures = TASKS[request.get("task", "language")]
    settings = tiny_settings(
        steps=17,
        checkpoint_interval=5,
        evaluation_interval=6,
        log_interval=2,
        num_workers=request.get("workers", 0),
        guard=GuardSettings(action="rewind", maximum_events=9),
        **objective,
    )
    data, hooks = make_data(poisoned_rows=(5, 40)), [Mischief(request)]
    train(make_model(), data, settings, output_dir, measures=measures, hooks=hooks, progress="terminal" in request)


def serve(request: dict) -> dict:
    errors = Path(request["output_dir"] + ".err")
    pid = os.fork()
    if pid == 0:
        with errors.open("w") as file:
            code = 0
            try:
                child(request)
            except AuxinError as error:
                file.write(str(error))
                code = error.exit_code
            except KeyboardInterrupt:
                code = 99
            except BaseException:
                traceback.print_exc(file=file)
                code = 98
        os._exit(code)
    _, status, used = os.wait4(pid, 0)
    worked = used.ru_utime + used.ru_stime
    return {"code": os.waitstatus_to_exitcode(status), "message": errors.read_text(), "seconds": worked}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
