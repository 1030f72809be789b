"""Ctrl-C and SIGTERM: the first asks the loop to save and stop, the second quits at once."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from auxin.errors import TrainingError


class TrainingInterrupted(TrainingError):
    """Training was interrupted by a signal and saved; the same call resumes it."""

    exit_code = 130

    def __init__(self, message: str, checkpoint: Path) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


class Interruption:
    """Within the context, SIGINT and SIGTERM set `signal_name` once; then their former handlers are back in force.

    Only the main thread may handle signals; in any other the context does nothing.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        self._restore()
        # Written past Python's buffers: the handler may run in the middle of a print.
        os.write(2, b"\nStopping after this step; press Ctrl-C again to quit at once without saving.\n")

    def _restore(self) -> None:
        while self._former:
            number, handler = self._former.popitem()
            signal.signal(number, handler)
