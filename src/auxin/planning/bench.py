"""What a method works at: a model, data to look at, a seed, a folder for files, and a meter that nobody has to feed."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel

from auxin.accounting import Cost, ExecutedFlops
from auxin.edits.plan import Plan
from auxin.objectives.calibration import Calibration
from auxin.settings import Settings

MethodSettings = TypeVar("MethodSettings", bound=Settings)


class Meter:
    """Adds up what looking and learning took: samples and units as they are drawn, FLOPs as they are executed. What was
    measured before and is known counts like what is measured now (`auxin.analysis.run`)."""

    def __init__(self) -> None:
        self.samples = 0
        """Samples drawn; those that were drawn twice count twice."""
        self.units = 0
        """Units of data in them."""
        self.flops = 0.0
        """FLOPs executed within `running`, forward and backward."""
        self.seconds = 0.0
        """Wall time within `running`."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the FLOPs and the time of what is done within, at a cost of some ten microseconds per tensor operation.

        It may be entered again afterwards, not inside.
        """
        started = time.perf_counter()
        counter = ExecutedFlops()
        try:
            with counter:
                yield
        finally:
            self.flops += counter.total
            self.seconds += time.perf_counter() - started

    def drawn(self, samples: int, units: int) -> None:
        """Count a batch."""
        self.samples += samples
        self.units += units

    def cost(self, data: Calibration | None = None) -> Cost:
        """What was counted so far, of `data`."""
        return Cost(
            samples=self.samples,
            units=self.units,
            unit="token" if data is None else data.unit,
            flops=self.flops,
            seconds=self.seconds,
            data=None if data is None else data.fingerprint,
            text=None if data is None else data.text,
        )


@dataclass(frozen=True)
class Bench:
    """What a method gets to make a plan with."""

    model: PreTrainedModel
    """The model to change. On the meta device, shapes without weights, unless the method says `needs_weights`. A plan
    function leaves it as it is."""
    data: Calibration | None = None
    """Samples to look at or to learn from, for a method that asks for some (`Method.calibration`). The meter counts
    what is drawn from it. In a recipe it is the run's training split."""
    seed: int = 0
    """Seed of all that is random in the plan. A method whose settings have a `seed` lets it override this one where it
    is set (`seeded`), for all methods alike. A recipe's seed is its benches'; on the command line it is 0."""
    folder: Path = Path()
    """Where files that belong to the plan go. An outline writes none."""
    spent: Meter = field(default_factory=Meter)
    """What making the plan has taken so far."""

    def __post_init__(self) -> None:
        if self.data is not None:
            object.__setattr__(self, "data", replace(self.data, watch=self.spent.drawn))

    def seeded(self, settings: MethodSettings) -> MethodSettings:
        """`settings` with the bench's seed, where they have a `seed` that is not set."""
        if "seed" not in type(settings).model_fields or "seed" in settings.model_fields_set:
            return settings
        return settings.model_copy(update={"seed": self.seed})


def from_model(plan: Callable[[PreTrainedModel, MethodSettings], Plan]) -> Callable[[Bench, Any], Plan]:
    """The plan function of a method that needs no more than the bench's model and its seed.

    Args:
        plan: (model, settings) -> plan.
    """
    return lambda bench, settings: plan(bench.model, bench.seeded(settings))
