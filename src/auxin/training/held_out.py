"""What a stage measures on held-out samples, on the way and at its end."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from auxin.data.dataset import Dataset, Split
from auxin.errors import TrainingError
from auxin.objectives.held_out_batches import ALONE, Sharing
from auxin.objectives.measures import Measure
from auxin.objectives.objective import Objective
from auxin.training.metrics import HELD_OUT_SAMPLES, VALIDATION, WHOLE_SPLIT
from auxin.training.strategies import Copies


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
    told: Callable[[int, int], None] = lambda done, total: None
    """Is told of how many samples out of how many are measured, at the beginning and the end of each measure too."""
    sharing: Sharing = ALONE
    """Who measures with this process."""

    def __post_init__(self) -> None:
        """Refuse measures of something else than the objective's answers; ConfigError."""
        for measure in self.measures:
            measure.check(self.objective)

    @property
    def part(self) -> int | None:
        """Samples that an evaluation on the way takes, the first ones of the split; None: all of it."""
        if self.max_batches is None:
            return None
        samples = self.max_batches * self.batch_size
        return samples if samples < len(self.data.split("validation")) else None

    def first(self, model: nn.Module) -> float:
        """The first measure, on the samples of an evaluation on the way."""
        return self._measured(self.measures[0], model, self.part)

    def all(self, model: nn.Module) -> dict[str, float]:
        """All of them on the whole split, by name.

        Raises:
            TrainingError: one is no finite number.
        """
        found = {measure.kind: self._measured(measure, model, None) for measure in self.measures}
        for kind, value in found.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"{kind} on the held-out data is {value:g}: the training has diverged. Start it again with a lower "
                    "learning_rate, a longer warmup, or from other weights."
                )
        return found

    @property
    def last_samples(self) -> int:
        """Samples that are measured at the end of a stage, one after the other."""
        return len(self.measures) * len(self.data.split("validation")) + (self.part or 0)

    def _measured(self, measure: Measure, model: nn.Module, part: int | None) -> float:
        split = _Watched(self.data.split("validation"), part, self.told)
        batches = None if part is None else self.max_batches
        value = measure(model, split, self.objective, self.batch_size, batches, self.sharing)
        self.told(split.total, split.total)
        return value

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


class SharedAmong(Sharing):
    """The processes that train a model measure it together, each a part of the batches.

    Args:
        strategy: how it lies in them.
    """

    def __init__(self, strategy: Copies) -> None:
        self._all, self._sharers = strategy.ranks, strategy.sharers
        self.rank, self.size, self.in_step = self._sharers.rank, self._sharers.size, strategy.in_step

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """What goes wrong in one goes wrong in all, where they don't wait for one another in each pass."""
        self._all.take_time()
        if self.in_step:
            yield
        else:
            with self._all.together():
                yield

    def all_of(self, found: Mapping[int, Tensor], count: int) -> list[Tensor]:
        """As those who found it tell; the slowest is waited for as long as it lives."""
        if not self._sharers.several:
            return super().all_of(found, count)
        own = {number: one for number, one in found.items() if number % self.size == self.rank}
        shapes: dict[int, tuple[int, ...]] = {}
        for each in self._sharers.each({number: list(one.shape) for number, one in own.items()}):
            shapes |= {int(number): tuple(shape) for number, shape in each.items()}
        parts = [own[number] if number in own else torch.zeros(shapes[number]) for number in range(count)]
        flat = torch.cat([part.double().flatten() for part in parts])
        self._sharers.add_up(flat)
        return [part.view(shapes[number]) for number, part in enumerate(flat.split([part.numel() for part in parts]))]


class _Watched:
    """A split, or its first `part` samples, that tells how far a measure has come with it."""

    def __init__(self, split: Split, part: int | None, told: Callable[[int, int], None]) -> None:
        self._split, self._told = split, told
        self.total = len(split) if part is None else part

    def __len__(self) -> int:
        return len(self._split)

    def rows(self, rows: Sequence[int]) -> dict[str, Tensor]:
        self._told(rows[0], self.total)
        return self._split.rows(rows)
