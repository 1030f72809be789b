"""What a stage measures on held-out samples, on the way and at its end."""

from dataclasses import dataclass

from torch import nn

from auxin.data.dataset import Dataset
from auxin.objectives.measures import Measure
from auxin.objectives.objective import Objective
from auxin.training.metrics import HELD_OUT_SAMPLES, VALIDATION, WHOLE_SPLIT


@dataclass(frozen=True)
class HeldOut:
    """Measures of one objective on the held-out split of one dataset."""

    measures: tuple[Measure, ...]
    """The first is measured on the way too, and is what branches are compared by."""
    objective: Objective
    """What they are of."""
    data: Dataset
    batch_size: int
    """Samples per forward pass."""
    max_batches: int | None = None
    """Batches of an evaluation on the way; None: the whole split."""

    @property
    def part(self) -> int | None:
        """Samples that an evaluation on the way takes, the first ones of the split; None: all of it."""
        if self.max_batches is None:
            return None
        samples = self.max_batches * self.batch_size
        return samples if samples < len(self.data.split("validation")) else None

    def first(self, model: nn.Module) -> float:
        """The first measure, on the samples of an evaluation on the way."""
        return self.measures[0](model, self.data.split("validation"), self.objective, self.batch_size, self.max_batches)

    def all(self, model: nn.Module) -> dict[str, float]:
        """All of them on the whole split, by name."""
        split = self.data.split("validation")
        return {measure.kind: measure(model, split, self.objective, self.batch_size) for measure in self.measures}

    def line(self, value: float) -> dict[str, float]:
        """What a line of metrics says of `value`, the first measure on the way."""
        values = {VALIDATION + self.measures[0].kind: value}
        return values if self.part is None else {**values, HELD_OUT_SAMPLES: self.part}

    def last_line(self, model: nn.Module, found: dict[str, float]) -> dict[str, float]:
        """What the last line of a stage says, where `found` are all measures on the whole split.

        Where evaluations on the way take a part of it, the first measure is taken on that part once more: only what was
        measured on the same samples tells how the model moved. The whole split has names of its own then.
        """
        if self.part is None:
            return {VALIDATION + kind: value for kind, value in found.items()}
        return {**self.line(self.first(model)), **{WHOLE_SPLIT + kind: value for kind, value in found.items()}}
