"""What measurements take, told apart when several go through one pass over the data.

It belongs to the result and is kept with it: a book that says what a plan cost must not say what somebody had measured
before.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence

from torch import nn

from auxin.accounting.executed import ExecutedFlops
from auxin.settings import Settings


class Effort(Settings):
    """What a measurement takes, measured alone."""

    samples: int = 0
    """Samples that it looks at."""
    units: int = 0
    """Units of data in them, where the data counts some."""
    passing: int = 0
    """FLOPs of running the model as far as it asks for; those that are measured together share them."""
    own: int = 0
    """FLOPs of all else that it does, runs of its own among it."""

    @property
    def flops(self) -> int:
        """All of them."""
        return self.passing + self.own

    @staticmethod
    def together(each: "Sequence[Effort]") -> "Effort":
        """What several take in one pass over the data."""
        return Effort(
            samples=max((one.samples for one in each), default=0),
            units=max((one.units for one in each), default=0),
            passing=max((one.passing for one in each), default=0),
            own=sum(one.own for one in each),
        )


class Tally:
    """Counts what a pass takes while `running`, for each measurement by its number."""

    def __init__(self) -> None:
        self.samples = 0
        self.units = 0
        self._executed = ExecutedFlops()
        self._own: Counter[int] = Counter()
        self._layers = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count what is done within."""
        with self._executed:
            yield

    @contextlib.contextmanager
    def of(self, number: int) -> Iterator[None]:
        """What is done within, one measurement does."""
        before = self._executed.total
        try:
            yield
        finally:
            self._own[number] += self._executed.total - before

    @contextlib.contextmanager
    def up_to_the_last_layer(self, base: nn.Module) -> Iterator[None]:
        """Within the context, know what of a pass is done in `base`, which leaves head and loss out."""
        started = 0

        def enter(*_: object) -> None:
            nonlocal started
            started = self._passing

        def leave(*_: object) -> None:
            self._layers += self._passing - started

        with contextlib.ExitStack() as stack:
            stack.callback(base.register_forward_pre_hook(enter).remove)
            stack.callback(base.register_forward_hook(leave).remove)
            yield

    @property
    def _passing(self) -> int:
        return self._executed.total - self._own.total()

    def effort(self, number: int, needs: str) -> Effort:
        """What the measurement `number`, which `needs` that, takes."""
        if needs == "weights":
            return Effort(own=self._own[number])
        # A model that runs its layers in another way than through its base model is taken for one without a head.
        passing = {"batches": 0, "layers": self._layers or self._passing, "logits": self._passing}[needs]
        return Effort(samples=self.samples, units=self.units, passing=passing, own=self._own[number])
