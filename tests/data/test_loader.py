"""The order of batches: every row once per epoch, decided by the seed, resumable at any batch."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auxin.data import make_loader
from auxin.data.dataset import Split
from auxin.data.loader import Batches, Contexts, ShuffledBatches
from auxin.errors import DataError

ARRAY = np.arange(23 * 4, dtype=np.uint16).reshape(23, 4)
SPLIT = Contexts(ARRAY)


def batches(loader: Any, count: int) -> list[list[list[int]]]:
    return [batch["input_ids"].tolist() for batch in islice(loader, count)]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**31), st.integers(0, 5))
def test_each_epoch_holds_every_row_once(rows: int, batch_size: int, seed: int, start: int) -> None:
    sampler = ShuffledBatches(rows, batch_size, seed)
    flat = [row for position in range(4 * rows // batch_size + 1) for row in sampler.batch(position)]
    for epoch in range(len(flat) // rows):
        assert sorted(flat[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    # A jump lands where walking leads.
    jumped = Batches(ShuffledBatches(rows, batch_size, seed), start)
    assert next(iter(jumped)) == sampler.batch(start)


def test_epochs_and_seeds_differ() -> None:
    epochs = [ShuffledBatches(50, 50, seed).batch(epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_does_not_depend_on_workers_and_restores_in_the_middle() -> None:
    alone = batches(make_loader(SPLIT, 5, seed=3), 12)
    with_workers = make_loader(SPLIT, 5, seed=3, num_workers=2)
    walk = iter(with_workers)
    assert [next(walk)["input_ids"].tolist() for _ in range(7)] == alone[:7]
    state = with_workers.state_dict()
    del walk
    restored = make_loader(SPLIT, 5, seed=3, num_workers=2)
    restored.load_state_dict(state)
    assert batches(restored, 5) == alone[7:]


def test_restore_and_jump_give_the_remaining_batches() -> None:
    whole = batches(make_loader(SPLIT, 4, seed=1), 15)
    loader = make_loader(SPLIT, 4, seed=1)
    batches(loader, 6)
    state = loader.state_dict()
    restored = make_loader(SPLIT, 4, seed=1)
    restored.load_state_dict(state)
    assert batches(restored, 9) == whole[6:]
    assert batches(make_loader(SPLIT, 4, seed=1, position=6), 9) == whole[6:]
    # A position beyond the first epochs is as good as any.
    assert make_loader(SPLIT, 4, seed=1, position=10**9) is not None


def test_batches_are_long_tensors_of_their_own() -> None:
    batch = next(iter(make_loader(SPLIT, 2, seed=0)))["input_ids"]
    assert batch.dtype == torch.int64
    assert batch.shape == (2, 4)
    batch.zero_()
    assert ARRAY.sum() > 0


def test_global_random_state_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    batches(make_loader(SPLIT, 4, seed=1), 3)
    assert torch.equal(before, torch.random.get_rng_state())


class Nothing:
    """A split without a sample."""

    def __len__(self) -> int:
        return 0

    def rows(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        raise AssertionError(f"rows {rows} of nothing")


class Pairs:
    """Samples of two tensors that don't belong to text."""

    def __len__(self) -> int:
        return 7

    def rows(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        numbers = torch.tensor(list(rows))
        return {"pixel_values": numbers.float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2), "labels": 10 * numbers}


def test_samples_of_any_kind_come_as_the_split_gives_them() -> None:
    loader = make_loader(Pairs(), 4, seed=2, num_workers=1)
    sampler = ShuffledBatches(7, 4, seed=2)
    for position, batch in enumerate(islice(loader, 5)):
        assert set(batch) == {"pixel_values", "labels"}
        assert (batch["labels"] // 10).tolist() == batch["pixel_values"][:, 2, 1, 0].tolist() == sampler.batch(position)


@pytest.mark.parametrize(
    ("split", "arguments", "message"),
    [
        (Nothing(), {}, "no sample"),
        (SPLIT, {"batch_size": 0}, "batch_size is 0"),
        (SPLIT, {"position": -1}, "position is -1"),
        (SPLIT, {"num_workers": -1}, "num_workers is -1"),
    ],
)
def test_wrong_arguments(split: Split, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_loader(split, **({"batch_size": 1, "seed": 0} | arguments))
