"""Batches of samples in an order that the seed decides, from any position on."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from auxin.data.dataset import BatchOrder, Split, Stream
from auxin.errors import DataError

# torchdata 0.11 calls a function that torch 2.13 deprecates; nobody who trains can do anything about it.
warnings.filterwarnings("ignore", message="'set_vital' is deprecated", category=UserWarning)


class ShuffledBatches:
    """Endless batches of row numbers; every epoch is a permutation of its own, drawn from (seed, epoch).

    Batch p holds rows p * batch_size ... (p + 1) * batch_size - 1 of the epochs laid end to end, so that no row is left
    out and jumping to a batch costs one permutation.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def batch(self, position: int) -> list[int]:
        """The rows of batch number `position`."""
        rows: list[int] = []
        start = position * self.batch_size
        while len(rows) < self.batch_size:
            epoch, offset = divmod(start + len(rows), self.num_samples)
            rows += self._permutation(epoch)[offset : offset + self.batch_size - len(rows)].tolist()
        return rows

    def _permutation(self, epoch: int) -> torch.Tensor:
        if epoch != self._epoch:
            self._order = permutation(self.num_samples, f"{self.seed}:{epoch}")
            self._epoch = epoch
        return self._order


def permutation(count: int, label: str) -> torch.Tensor:
    """The numbers from 0 to `count` - 1, (count,), in an order that `label` decides."""
    digest = hashlib.sha256(label.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(count, generator=generator)


class Batches(Sampler[list[int]]):
    """The batches of an order from `position` on, without an end."""

    def __init__(self, order: BatchOrder, position: int) -> None:
        self._order, self._position = order, position

    def __iter__(self) -> "_BatchIterator":
        return _BatchIterator(self._order, self._position)


class _BatchIterator(Iterator[list[int]]):
    """Walks over the batches; its state, which the loader saves, is one number."""

    def __init__(self, batches: BatchOrder, position: int) -> None:
        self._batches, self._position = batches, position

    def __next__(self) -> list[int]:
        rows = self._batches.batch(self._position)
        self._position += 1
        return rows

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._position = state["position"]


class Contexts:
    """Rows of an array of token ids, (num_contexts, context_length), as a split of samples; see `dataset.Split`.

    Raises:
        DataError: the array has no rows, or other axes.
    """

    def __init__(self, array: np.ndarray) -> None:
        if array.ndim != 2 or not len(array) or array.shape[1] < 2:
            raise DataError(f"Token array of shape {array.shape}: expected (num_contexts >= 1, context_length >= 2).")
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def rows(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """`input_ids` (rows, context_length), 64-bit integers; a whole batch is read at once."""
        return {"input_ids": torch.from_numpy(self.array[list(rows)].astype(np.int64))}


class _Rows(Dataset[dict[str, torch.Tensor]]):
    """A split as torch's loader wants it, which asks for the samples that the order names."""

    def __init__(self, split: Split | Stream) -> None:
        self._split = split

    def __getitems__(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        return self._split.rows(rows)


def _as_is(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch


def samples_of(split: Split | Stream) -> int | None:
    """How many samples there are; None of a stream, whose nobody has counted."""
    return len(split) if isinstance(split, Sized) else None


def batch_order(split: Split | Stream, batch_size: int, seed: int, position: int = 0) -> BatchOrder:
    """The order of the batches of `split`: a permutation for each epoch, or a stream's own.

    Args:
        split: the samples.
        batch_size: samples per batch.
        seed: of the order.
        position: the batch that will be asked for first.
    """
    if isinstance(split, Sized):
        return ShuffledBatches(len(split), batch_size, seed)
    return split.order(batch_size, seed, position)


def make_loader(
    split: Split | Stream, batch_size: int, seed: int, position: int = 0, num_workers: int = 0
) -> StatefulDataLoader:
    """An endless loader of shuffled batches of `split`, tensors by name.

    The order depends on the samples, `batch_size` and `seed` alone, not on `num_workers`; torch's global random state
    is not touched. Restore with `load_state_dict(state_dict())`, or start at `position`: at no cost, but for a stream,
    which has to have counted what lies before.

    Args:
        split: the samples.
        batch_size: samples per batch; may exceed the number of samples.
        seed: of the order.
        position: batches to leave out at the start.
        num_workers: reading processes; 0 reads in this one.

    Raises:
        DataError: there is no sample, or a number is out of range.
    """
    if isinstance(split, Sized) and not len(split):
        raise DataError("The split has no sample: there is nothing to draw batches from.")
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("position", position, 0),
        ("num_workers", num_workers, 0),
    ):
        if value < least:
            raise DataError(f"{name} is {value}. Give {least} or more.")
    return StatefulDataLoader(
        _Rows(split),
        batch_sampler=Batches(batch_order(split, batch_size, seed, position), position),
        num_workers=num_workers,
        collate_fn=_as_is,
        # Without one of its own the loader draws from the global generator and so disturbs dropout's stream.
        generator=torch.Generator().manual_seed(seed),
    )
