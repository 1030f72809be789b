"""A thread beside the training of one of several processes: it says that the process lives and, when a step takes too
long, where in the code it is."""

import faulthandler
import itertools
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

_SHOWN = 3
"""Innermost calls that a message names."""
_LATE = 0.5
"""Of the longest wait for the others: what takes longer says where it is, before they give up."""
_LONGEST_PAUSE = 5.0
"""Seconds between two signs of life."""


class Watch(threading.Thread):
    """Runs from `start` to `stop`, and watches the thread that makes it.

    Where no other thread of Python can run, because the one that trains holds its lock, the stacks of all of them go to
    standard error, by `faulthandler`, whose own timer this takes.

    Args:
        say: leaves a message for the others.
        working: the step that this process works at alone, and since when by `time.monotonic`; None while it waits.
        rank: which one this is.
        seconds: longest wait for the others.
    """

    def __init__(
        self,
        say: Callable[[str, Mapping[str, Any]], None],
        working: Callable[[], tuple[int, float] | None],
        rank: int,
        seconds: float,
    ) -> None:
        super().__init__(name="auxin-watch", daemon=True)
        self._say, self._working, self._rank, self._seconds = say, working, rank, seconds
        self._watched = threading.get_ident()
        self._ended = threading.Event()

    def run(self) -> None:
        """Until `stop`, or until nobody is there to be told."""
        shown: int | None = None
        late, pause = _LATE * self._seconds, min(_LONGEST_PAUSE, self._seconds / 20)
        try:
            for number in itertools.count():
                faulthandler.dump_traceback_later(late, file=2)
                self._say(f"alive/{self._rank}", {"number": number})
                working = self._working()
                if working is not None and working[0] != shown and time.monotonic() - working[1] > late:
                    shown = working[0]
                    self._show(shown)
                if self._ended.wait(pause):
                    return
        except RuntimeError:  # the store is gone, and with it who could be told
            return
        finally:
            faulthandler.cancel_dump_traceback_later()

    def stop(self) -> None:
        """Say no more. A store that does not answer is not waited for."""
        self._ended.set()
        self.join(_LONGEST_PAUSE)

    def _show(self, step: int) -> None:
        frame = sys._current_frames().get(self._watched)
        if frame is None:
            return
        self._say(f"where/{self._rank}", {"step": step, "where": where(frame)})
        stack = "".join(traceback.format_stack(frame))
        told = f"Process {self._rank} works at step {step} for more than {_LATE * self._seconds:g} s. It is here:"
        print(told, stack, sep="\n", file=sys.stderr, flush=True)


def where(frame: FrameType) -> str:
    """The innermost calls of a stack, the last one first."""
    calls = traceback.extract_stack(frame)[: -_SHOWN - 1 : -1]
    return ", in ".join(f"{call.name} at {Path(call.filename).name}:{call.lineno}" for call in calls)
