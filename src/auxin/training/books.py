"""What a stage of training writes down: lines of metrics on the way, its record in the ledger, and what it gave."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auxin.accounting.ledger import Ledger, StageRecord
from auxin.data.dataset import SampleForm
from auxin.objectives.measures import Measure
from auxin.training.identity import RunIdentity
from auxin.training.result import TrainingResult
from auxin.training.speed import Speed
from auxin.training.state import TrainingState


@dataclass(frozen=True)
class Rates:
    """What a stage costs by the sample, and what the machine could do."""

    samples: int
    """In a batch."""
    flops: float
    """Of learning from one sample, forward and backward."""
    peak: float | None
    """FLOPs a second of all devices together, by their data sheets; None where that is not known."""


class Books:
    """The books of a stage.

    Args:
        state: of the stage, which changes.
        identity: of the stage.
        form: of the samples.
        rates: what they cost.
        parameters: the model's.
        measures: of the stage; the first is what branches are compared by.
        parent: the books up to the stage.
    """

    def __init__(
        self,
        state: TrainingState,
        identity: RunIdentity,
        form: SampleForm,
        rates: Rates,
        parameters: int,
        measures: Sequence[Measure],
        parent: Ledger,
    ) -> None:
        self._state, self._identity, self._form, self._rates = state, identity, form, rates
        self._parameters, self._measures, self.parent = parameters, measures, parent
        self.open()

    def open(self) -> None:
        """Count time from here on."""
        self._clock = time.perf_counter()

    def tick(self) -> None:
        """Note the time until now in the state."""
        now = time.perf_counter()
        self._state.seconds += now - self._clock
        self._clock = now

    def go_on_from(self, parent: Ledger, finished: bool) -> None:
        """Take over the books of a checkpoint of this stage; its record is written anew with every checkpoint, where
        the stage is not finished."""
        self.parent = parent if finished else Ledger(stages=parent.stages[:-1])

    @property
    def units_per_step(self) -> int:
        """Units of data in a batch."""
        return self._form.amount(self._rates.samples)

    @property
    def units(self) -> int:
        """Units of data that were paid for."""
        return self._batches * self.units_per_step

    @property
    def flops(self) -> float:
        """FLOPs that were paid for."""
        return self._batches * self._rates.samples * self._rates.flops

    @property
    def _batches(self) -> int:
        # Positions, not steps: a batch whose step was skipped or rewound was paid for too.
        return self._state.data_position - self._state.start_position

    def line(self, values: dict[str, Any]) -> dict[str, Any]:
        """A line of metrics with `values`."""
        self.tick()
        state = self._state
        return {
            "step": state.step,
            "data_position": state.data_position,
            "units": self.units,
            "flops": self.flops,
            "seconds": round(state.seconds, 3),
            **values,
        }

    def measurements(self, speed: Speed, learning_rate: float, gradient_norm: float) -> dict[str, Any]:
        """Loss (mean over the good steps since the last call), rate, gradient norm and speed, which starts anew."""
        state, rates = self._state, self._rates
        units, data_share = speed.units_per_second(state.data_position), speed.data_share()
        flops = units / self._form.units * rates.flops
        mean = state.loss_sum / state.loss_count if state.loss_count else math.nan
        state.loss_sum, state.loss_count = 0.0, 0
        speed.start(state.data_position)
        values = {
            "loss": mean,
            "learning_rate": learning_rate,
            "gradient_norm": gradient_norm,
            "units_per_second": units,
            "flops_per_second": flops,
            "data_share": data_share,
        }
        return values if rates.peak is None else {**values, "mfu": flops / rates.peak}

    def ledger(self, final: dict[str, float]) -> Ledger:
        """The parent's books with a record of this stage as it stands, and at its end with what was measured."""
        state, measure = self._state, self._measures[0]
        record = StageRecord(
            name=self._identity.stage_name,
            kind="train",
            parameters=self._parameters,
            units=self.units,
            unit=self._form.unit,
            flops=self.flops,
            seconds=state.seconds,
            measure=measure.kind,
            value_before=state.value_before,
            value_after=final.get(measure.kind),
            measures=final,
            data_fingerprint=self._identity.data_fingerprint,
            seed=int(self._identity.settings["seed"]),
            started_at=state.started_at,
            notes=[*state.notes, *(f"guard: {event}" for event in state.guard.events)],
        )
        return self.parent.append(record)

    def result(self, checkpoint: Path, final: dict[str, float], ledger: Ledger | None = None) -> TrainingResult:
        """What the stage gave, with its books, or those given."""
        state = self._state
        return TrainingResult(
            checkpoint,
            final.get(self._measures[0].kind),
            final,
            self.units,
            self.flops,
            state.seconds,
            state.step,
            state.data_position,
            self.ledger(final) if ledger is None else ledger,
        )
