"""Signals that ask to stop: SIGINT (Ctrl-C), SIGTERM, SIGHUP, which comes when the terminal is closed, and SIGUSR1 and
SIGUSR2, by which schedulers say that the time is nearly over.

The first one ends the work in an order that loses nothing. A second SIGINT or SIGTERM ends it at once; the others never
do, since they come again: shells send SIGHUP to what the terminal has sent it to already, schedulers signal every
process of a job. Nor does a second SIGTERM of a process that torchrun has started: a scheduler sends one to it and one
to torchrun, which passes it on, and kills whoever takes too long. The others are also taken only where they would kill:
one that is ignored (`nohup`) stays so, and a program may have a meaning of its own for them.
"""

import contextlib
import os
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from auxin.errors import TrainingError

REQUEST = signal.SIGUSR1
"""What a process asks its children by: none of them is ended at once by it, whatever else they are sent."""
_INSISTING = frozenset({signal.SIGINT, signal.SIGTERM})
LAUNCHED = "TORCHELASTIC_RUN_ID"
"""Set in the environment of what torchrun starts."""
SIGNALS = (*sorted(_INSISTING), signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(TrainingError):
    """A signal came. What was finished before is kept, and the same call goes on from there."""

    exit_code = 130


class TrainingInterrupted(Interrupted):
    """Training was interrupted by a signal and saved; the same call resumes it."""

    def __init__(self, message: str, checkpoint: Path) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


class _Stop(BaseException):
    """Raised by a handler where the work ends: no `except Exception` on the way holds it up, and no one who waits for
    Ctrl-C. Where it comes between two instructions of the end of one context, the next one around takes it."""

    def __init__(self, signal_name: str) -> None:
        super().__init__(f"ended by {signal_name}")
        self.signal_name = signal_name


class Interruption:
    """Within the context, a signal sets `signal_name` once; then the former handlers are back in force.

    Only the main thread may handle signals; in any other the context does nothing.

    Args:
        ignored: whether SIGINT and SIGTERM are taken even where they are ignored, as SIGINT is by what a shell starts
            in the background: for what saves, and goes on when it is called again.
        says: whether the person who asks is told that it was heard; of several processes one does.
    """

    def __init__(self, ignored: bool = True, says: bool = True) -> None:
        self.signal_name: str | None = None
        self._ignored, self._says = ignored, says
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                current = signal.getsignal(number)
                if number in _INSISTING:
                    taken = self._ignored or current is not signal.SIG_IGN
                else:
                    taken = current is signal.SIG_DFL or isinstance(getattr(current, "__self__", None), Interruption)
                if taken:
                    self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore(*self._former)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number in _INSISTING:
            passed_on = {number} if number == signal.SIGTERM and LAUNCHED in os.environ else set()
            self._restore(*self._former.keys() & _INSISTING - passed_on)
        for other in self._former.keys() - _INSISTING:
            signal.signal(other, signal.SIG_IGN)
        _leave_closed_terminal()
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            self._begin_to_stop()

    def _begin_to_stop(self) -> None:
        if not self._says:
            return
        # Written past Python's buffers: the handler may run in the middle of a print.
        with contextlib.suppress(OSError):
            os.write(2, b"\nStopping after this step; press Ctrl-C again to quit at once without saving.\n")

    def _restore(self, *numbers: signal.Signals) -> None:
        for number in numbers:
            signal.signal(number, self._former.pop(number))


class _Raising(Interruption):
    """Ends what is being done where it stands; folders that are half written go as the error passes them."""

    def _begin_to_stop(self) -> None:
        assert self.signal_name is not None
        raise _Stop(self.signal_name)


@contextlib.contextmanager
def ended_by_signals(doing: str | None = None) -> Iterator[None]:
    """Within the context, a signal ends the work at once, with an error that says what it was. For work that keeps
    nothing on the way and is done again from its beginning; what saves on the way (`Interruption`) may stand within.

    Args:
        doing: what is done in the context ("preparing the data"), a part of what the same call goes on with. None: what
            it has made by then goes, the exit code is that of shells, 128 and the signal's number, and a signal that is
            ignored stays so.

    Raises:
        Interrupted: a signal came.
    """
    try:
        with _Raising(ignored=doing is not None):
            yield
    except _Stop as stop:
        if doing is None:
            ended = Interrupted(f"Ended by {stop.signal_name}; nothing half-written is left.")
            ended.exit_code = 128 + signal.Signals[stop.signal_name]
            raise ended from None
        raise Interrupted(
            f"Interrupted by {stop.signal_name} while {doing}. What was finished or saved before is kept, and "
            "nothing half-written is left. Give the same command to go on."
        ) from None


def _leave_closed_terminal() -> None:
    """Let output to a terminal that has been closed go nowhere, where it would be an error in the midst of saving."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            status = os.fstat(descriptor)
            # A closed terminal is one no longer.
            is_device = stat.S_ISCHR(status.st_mode) and status.st_rdev != os.stat(os.devnull).st_rdev
            if is_device and not os.isatty(descriptor):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
