"""How fast a stage learns, evaluations and checkpoints left out."""

import contextlib
import time
from collections.abc import Iterator


class Speed:
    """Units of data per second since the last line of metrics, and how long they were waited for.

    Args:
        units_per_step: that a batch has.
        position: data position, in batches, at which the clock starts.
    """

    def __init__(self, units_per_step: int, position: int) -> None:
        self._units_per_step = units_per_step
        self.start(position)

    def start(self, position: int) -> None:
        """Measure from here on."""
        self._since, self._position, self._pause, self._waited = time.perf_counter(), position, 0.0, 0.0

    def units_per_second(self, position: int) -> float:
        """Of the time since the start in which it learnt."""
        return (position - self._position) * self._units_per_step / max(self._elapsed(), 1e-9)

    def data_share(self) -> float:
        """Share of that time in which it waited for a batch, 0 to 1."""
        return self._waited / max(self._elapsed(), 1e-9)

    def _elapsed(self) -> float:
        return time.perf_counter() - self._since - self._pause

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Within the context a batch is drawn, and what the objective makes of it."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within the context nothing is learnt."""
        started = time.perf_counter()
        yield
        self._pause += time.perf_counter() - started
