"""How fast a stage learns, evaluations and checkpoints left out."""

import contextlib
import time
from collections.abc import Iterator


class Speed:
    """Units of data per second since the last line of metrics.

    Args:
        units_per_step: that a batch has.
        position: data position, in batches, at which the clock starts.
    """

    def __init__(self, units_per_step: int, position: int) -> None:
        self._units_per_step = units_per_step
        self.start(position)

    def start(self, position: int) -> None:
        """Measure from here on."""
        self._since, self._position, self._pause = time.perf_counter(), position, 0.0

    def units_per_second(self, position: int) -> float:
        """Of the time since the start in which it learnt."""
        elapsed = time.perf_counter() - self._since - self._pause
        return (position - self._position) * self._units_per_step / max(elapsed, 1e-9)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within the context nothing is learnt."""
        started = time.perf_counter()
        yield
        self._pause += time.perf_counter() - started
