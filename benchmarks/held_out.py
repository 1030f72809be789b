"""The first held-out samples of a recipe's data, for benchmarks that measure what its branches have learnt."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from auxin.data import Dataset
from auxin.objectives.objective import Objective, held_out_noise


@dataclass(frozen=True)
class HeldOut:
    """The first held-out samples of prepared data, as measurements want them."""

    data: Dataset
    count: int
    """How many activations are looked at of."""
    objective: Objective | None = None
    """What labels ask for; None: there are none."""

    @property
    def fingerprint(self) -> str:
        """Of the data."""
        return f"{self.data.fingerprint} held out"

    @property
    def samples(self) -> int:
        """How many there are: with labels, as many again, on which losses are measured."""
        return min(self.count * (1 if self.objective is None else 2), len(self.data.split("validation")))

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Eight at a time, as the model reads them where nothing is hidden, or as it learns from them."""
        split, noise = self.data.split("validation"), held_out_noise()
        for start in range(0, self.samples, 8):
            batch = split.rows(range(start, min(start + 8, self.samples)))
            if self.objective is not None:
                yield self.objective.inputs(batch, noise)
            else:
                yield {name: tensor for name, tensor in batch.items() if name != "labels"}
