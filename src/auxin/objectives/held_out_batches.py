"""The batches of a held-out split, and how several processes that measure one model divide them among themselves."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager

import numpy as np
from torch import Tensor

from auxin.data.dataset import Split
from auxin.errors import DataError
from auxin.objectives.objective import Objective, held_out_noise

Made = tuple[int, dict[str, Tensor], dict[str, Tensor]]
"""A batch's number, what it holds, and what a model is called with for it, on the CPU."""


class HeldOutBatches:
    """The batches of `split` in its order.

    Args:
        split: the samples.
        objective: makes inputs of them.
        batch_size: samples per batch.
        max_batches: of the first samples; None: all.

    Raises:
        DataError: there is no sample, or a number is out of range.
    """

    def __init__(self, split: Split, objective: Objective, batch_size: int, max_batches: int | None = None) -> None:
        if not len(split):
            raise DataError("The held-out split has no sample: there is nothing to measure.")
        for name, value in (("batch_size", batch_size), ("max_batches", max_batches)):
            if value is not None and value < 1:
                raise DataError(f"{name} is {value}. Give 1 or more.")
        rows = len(split) if max_batches is None else min(len(split), max_batches * batch_size)
        self._split, self._objective = split, objective
        self._rows = [range(start, min(start + batch_size, rows)) for start in range(0, rows, batch_size)]

    def __len__(self) -> int:
        return len(self._rows)

    def of(self, numbers: Collection[int]) -> Iterator[Made]:
        """The batches of these numbers, in order. The noise of each is what it is when all of them are made."""
        noise: np.random.Generator = held_out_noise()
        for number, rows in enumerate(self._rows):
            wanted = number in numbers
            if wanted or self._objective.noisy:
                batch = self._split.rows(rows)
                inputs = self._objective.inputs(batch, noise)
                if wanted:
                    yield number, batch, inputs


class Sharing:
    """The processes that measure a model together, as one of them sees them. This one is alone."""

    rank: int = 0
    """Which one this is."""
    size: int = 1
    """How many they are."""
    in_step: bool = False
    """Whether a forward pass is one of all processes together, each with a batch of its own."""

    def own(self, batches: HeldOutBatches) -> Iterator[Made]:
        """What this process measures: every batch whose number leaves its rank when it is divided by their number.
        Where passes are in step and others have one more, the first batch comes at last, and counts nothing."""
        own = range(self.rank, len(batches), self.size)
        lacks = self.in_step and len(own) < len(range(0, len(batches), self.size))
        spare: list[Made] = []
        for made in batches.of({*own, 0} if lacks else own):
            if made[0] in own:
                yield made
            else:
                spare.append(made)
        yield from spare

    def measuring(self) -> AbstractContextManager[None]:
        """Within the context this process measures its batches."""
        return contextlib.nullcontext()

    def all_of(self, found: Mapping[int, Tensor], count: int) -> list[Tensor]:
        """What was found of each batch, by its number, of what the processes have found of theirs.

        Args:
            found: by the number of the batch: float64, on the CPU, (rows, columns).
            count: of all batches.
        """
        return [found[number] for number in range(count)]


ALONE = Sharing()
