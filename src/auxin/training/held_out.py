"""What a stage measures on held-out samples, on the way and at its end."""

from dataclasses import dataclass

from torch import nn

from auxin.data.dataset import Dataset
from auxin.objectives.measures import Measure
from auxin.objectives.objective import Objective
from auxin.training.metrics import VALIDATION


@dataclass(frozen=True)
class HeldOut:
    """Measures of one objective on the held-out split of one dataset."""

    measures: tuple[Measure, ...]
    """The first is measured on the way too, and is what branches are compared by."""
    objective: Objective
    """What they are of."""
    data: Dataset

    @property
    def key(self) -> str:
        """What lines of metrics call the first measure."""
        return VALIDATION + self.measures[0].kind

    def first(self, model: nn.Module, batch_size: int, max_batches: int | None) -> float:
        """The first measure, on at most so many batches."""
        return self.measures[0](model, self.data.split("validation"), self.objective, batch_size, max_batches)

    def all(self, model: nn.Module, batch_size: int) -> dict[str, float]:
        """All of them on the whole split, by name."""
        split = self.data.split("validation")
        return {measure.kind: measure(model, split, self.objective, batch_size) for measure in self.measures}
