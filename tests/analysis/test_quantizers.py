"""Grids are those of the equations, entry by entry; what lies in their range moves by half a step at most."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from auxin.analysis.quantizers import (
    Grid,
    RunningRange,
    least_error_range,
    percentile_range,
    rounded_weight,
    whole_range,
)
from oracles import quantization as oracle

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4)
SCALES = st.floats(1e-3, 1e3)


def drawn(shape: list[int], seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scale * (values + shift)


@given(shape=SHAPES, seed=st.integers(0, 99), scale=SCALES, shift=st.floats(-5, 5), bits=st.integers(2, 8))
def test_inside_the_range_the_error_is_half_a_step_and_nothing_stays_nothing(shape, seed, scale, shift, bits):
    x = drawn(shape, seed, scale, shift)
    grid = Grid(*whole_range(x), bits)
    assert (grid.round_trip(x) - x).abs().max() <= grid.delta / 2 * (1 + 1e-9)
    assert torch.equal(grid.round_trip(torch.zeros(3)), torch.zeros(3))
    assert len(grid.round_trip(x).unique()) <= 2**bits
    assert torch.equal(grid.round_trip(x), grid.round_trip(grid.round_trip(x)))


@given(shape=SHAPES, seed=st.integers(0, 99), low=st.floats(-9, 0), high=st.floats(0.1, 9))
def test_activations_are_rounded_and_clipped_as_the_equation_says(shape, seed, low, high):
    x = drawn(shape, seed, 4.0)
    expected = oracle.activation(x.numpy(), low, high)
    np.testing.assert_allclose(Grid(low, high).round_trip(x).numpy(), expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=25)
@given(shape=SHAPES, seed=st.integers(0, 99), scale=SCALES, bits=st.sampled_from([4, 8]))
def test_weights_are_on_the_grids_of_their_thresholds(shape, seed, scale, bits):
    w = drawn(shape, seed, scale)
    close = {"rtol": 1e-12, "atol": 1e-12 * scale}
    np.testing.assert_allclose(rounded_weight(w, bits).numpy(), oracle.weight(w.numpy(), bits), **close)
    step = w.abs().max() / (2 ** (bits - 1) - 1)
    assert (rounded_weight(w, bits) - w).abs().max() <= step / 2 * (1 + 1e-9)
    found = rounded_weight(w, bits, "mse")
    np.testing.assert_allclose(found.numpy(), oracle.least_error(w.numpy(), bits), **close)
    assert torch.equal(rounded_weight(torch.zeros_like(w), bits), torch.zeros_like(w))


@given(rows=st.integers(1, 4), groups=st.integers(1, 3), group=st.integers(1, 4), seed=st.integers(0, 9))
def test_rows_and_groups_have_grids_of_their_own(rows, groups, group, seed):
    w = drawn([rows, groups * group], seed) * torch.logspace(0, 3, rows, dtype=torch.float64)[:, None]
    by_rows = np.stack([oracle.weight(row, 4) for row in w.numpy()])
    np.testing.assert_allclose(rounded_weight(w, 4, rows=rows).numpy(), by_rows, atol=1e-12)
    parts = w.numpy().reshape(-1, group)
    by_groups = np.stack([oracle.weight(part, 4) for part in parts]).reshape(w.shape)
    np.testing.assert_allclose(rounded_weight(w, 4, rows=rows, group=group).numpy(), by_groups, atol=1e-12)
    undivided = rounded_weight(w, 4, rows=rows, group=groups * group + 1)
    np.testing.assert_allclose(undivided.numpy(), by_rows, atol=1e-12)


@given(shape=SHAPES, seed=st.integers(0, 99), percentile=st.floats(50.1, 100), shift=st.floats(-3, 3))
def test_percentiles_are_those_of_the_sorted_entries(shape, seed, percentile, shift):
    x = drawn(shape, seed, shift=shift)
    assert percentile_range(x, percentile) == oracle.percentiles(x.numpy(), percentile)
    assert percentile_range(x, 100.0) == whole_range(x)


@settings(max_examples=25)
@given(size=st.integers(1, 300), seed=st.integers(0, 99), outlier=st.floats(0, 500), shift=st.floats(-2, 2))
def test_the_range_of_the_least_error_is_never_worse_than_the_whole_one(size, seed, outlier, shift):
    x = drawn([size], seed, shift=shift)
    x[0] += outlier
    low, high = least_error_range(x)
    whole = whole_range(x)
    assert whole[0] <= low <= 0 <= high <= whole[1]
    errors = [(Grid(*one).round_trip(x) - x).square().sum().item() for one in ((low, high), whole)]
    assert errors[0] <= errors[1]


def test_a_few_outliers_are_clipped_for_the_sake_of_many():
    """With 4 bits: ten thousand Gaussian entries, and one of 40 that would leave them six steps."""
    x = torch.cat([drawn([10_000], 0), torch.tensor([40.0], dtype=torch.float64)])
    low, high = least_error_range(x, bits=4)
    assert high < 10
    assert low < -1


@given(ranges=st.lists(st.tuples(st.floats(-9, 0), st.floats(0, 9)), min_size=1, max_size=8))
def test_a_running_range_moves_by_a_tenth_and_covers_all_of_a_batch(ranges):
    follows = RunningRange()
    for low, high in ranges:
        follows.see(low / 2, high)
        follows.see(low, high / 2)
        follows.step()
    assert (follows.grid.low, follows.grid.high) == pytest.approx(oracle.running(ranges))
