"""How several processes divide the batches that are held out."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig

from auxin.data import Contexts, SampleForm
from auxin.objectives.held_out_batches import HeldOutBatches, Made, Sharing
from auxin.objectives.objective import Objective

LENGTH = 3


class Noisy(Objective):
    """Takes a number for each token."""

    noisy = True

    def inputs(self, batch: dict[str, Tensor], noise: np.random.Generator) -> dict[str, Tensor]:
        return {"noise": torch.from_numpy(noise.random(batch["input_ids"].shape))}


class Still(Noisy):
    """Takes none, and notes what it is asked for."""

    noisy = False

    def inputs(self, batch: dict[str, Tensor], noise: np.random.Generator) -> dict[str, Tensor]:
        return dict(batch)


def batches(kind: type[Objective], rows: int, batch_size: int) -> HeldOutBatches:
    split = Contexts(np.arange(rows * LENGTH, dtype=np.uint16).reshape(rows, LENGTH))
    form = SampleForm("token", LENGTH, ("input_ids",), length=LENGTH, vocab_size=rows * LENGTH)
    return HeldOutBatches(split, kind(LlamaConfig(), form), batch_size)


def sharing(rank: int, size: int, in_step: bool) -> Sharing:
    found = Sharing()
    found.rank, found.size, found.in_step = rank, size, in_step
    return found


def same(one: Made, other: Made) -> bool:
    return one[0] == other[0] and all(
        left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
        for left, right in zip(one[1:], other[1:], strict=True)
    )


@pytest.mark.parametrize("kind", [Noisy, Still])
@given(rows=st.integers(1, 20), batch_size=st.integers(1, 6), size=st.integers(1, 5), in_step=st.booleans())
def test_each_batch_is_measured_once_and_is_what_one_process_makes(kind, rows, batch_size, size, in_step):
    whole = list(Sharing().own(batches(kind, rows, batch_size)))
    assert [number for number, _, _ in whole] == list(range(len(whole)))
    each = [list(sharing(rank, size, in_step).own(batches(kind, rows, batch_size))) for rank in range(size)]
    counted = [made for rank, own in enumerate(each) for made in own if made[0] % size == rank]
    assert sorted(made[0] for made in counted) == list(range(len(whole)))
    assert all(same(made, whole[made[0]]) for own in each for made in own)
    if in_step:
        assert len({len(own) for own in each}) == 1
    else:
        assert sum(map(len, each)) == len(whole)


def test_what_others_measure_is_not_read_where_it_gives_no_noise():
    read: list[int] = []

    class Watched(Contexts):
        def rows(self, rows):
            read.extend(rows)
            return super().rows(rows)

    form = SampleForm("token", LENGTH, ("input_ids",), length=LENGTH, vocab_size=99)
    split = Watched(np.zeros((8, LENGTH), dtype=np.uint16))
    list(sharing(1, 2, False).own(HeldOutBatches(split, Still(LlamaConfig(), form), 2)))
    assert read == [2, 3, 6, 7]
