"""Means and their spread are NumPy's, however the samples arrive; intervals are Student's."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auxin.analysis import Estimate, Spread
from auxin.analysis.spread import GROUPS, Dealt, jackknife, student_quantile
from auxin.errors import DataError


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=8),
    st.sampled_from([(), (3,), (2, 3)]),
    st.sampled_from([0.0, 1.0, 1e6]),
    st.integers(0, 2**32 - 1),
)
def test_batches_of_any_size_give_the_mean_and_deviation_of_all(sizes, shape, offset, seed):
    """Also far from zero, where the mean of squares less the square of the mean has no digit left."""
    values = offset + 1e-3 * np.random.default_rng(seed).standard_normal((sum(sizes), *shape))
    spread, start = Spread(), 0
    for size in sizes:
        spread.add(torch.from_numpy(values[start : start + size]))
        start += size
    estimates = spread.estimates()
    assert spread.samples == len(values)
    np.testing.assert_allclose([e.mean for e in estimates], values.mean(axis=0).ravel(), rtol=1e-13, atol=1e-13)
    if len(values) == 1:
        assert all(e.deviation is None and e.margin is None for e in estimates)
        return
    deviations = values.std(axis=0, ddof=1).ravel()
    np.testing.assert_allclose([e.deviation for e in estimates], deviations, rtol=1e-6, atol=1e-12)
    factor = student_quantile(len(values) - 1) / math.sqrt(len(values))
    np.testing.assert_allclose([e.margin for e in estimates], factor * deviations, rtol=1e-6, atol=1e-12)
    together = spread.together()
    assert together.each() == estimates
    assert together.margins == [e.margin for e in estimates]
    assert together.part(1, 3).each() == estimates[1:3]
    np.testing.assert_allclose(spread.mean_squares(), values.var(axis=0), rtol=1e-6, atol=1e-15)


def test_equal_values_have_no_spread():
    spread = Spread()
    for size in (1, 3, 2):
        spread.add(torch.full((size, 2), 0.3))
    for estimate in spread.estimates():
        assert (estimate.mean, estimate.deviation, estimate.margin) == (float(torch.tensor(0.3)), 0.0, 0.0)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 6, 7, 10, 20, 63, 500])
def test_the_factor_is_students(freedom):
    """95% of Student's density, integrated with Simpson's rule, lie between minus and plus the factor."""
    x = np.linspace(0, student_quantile(freedom), 20001)
    log_norm = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    density = np.exp(log_norm - (freedom + 1) / 2 * np.log1p(x**2 / freedom))
    weights = np.ones_like(x)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    share = 2 * (weights @ density) * (x[1] - x[0]) / 3
    assert share == pytest.approx(0.95, abs=1e-4)


def test_intervals_hold_the_mean_as_often_as_they_say():
    """Effect: of 2000 drawings of six samples."""
    values = torch.randn(6, 2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    spread = Spread()
    spread.add(values)
    held = np.mean([abs(e.mean - 3) <= e.margin for e in spread.estimates() if e.margin is not None])
    assert held == pytest.approx(0.95, abs=0.015)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 2**32 - 1))
def test_dealt_samples_are_all_of_them_and_all_but_those_of_a_group(sizes, seed):
    values = 1e3 + np.random.default_rng(seed).standard_normal((sum(sizes), 3))
    dealt, start = Dealt(), 0
    for size in sizes:
        dealt.add(torch.from_numpy(values[start : start + size]))
        start += size
    assert (dealt.samples, len(dealt)) == (len(values), min(len(values), GROUPS))
    for left_out in (None, *range(len(dealt))):
        kept = values[[n for n in range(len(values)) if left_out is None or n % GROUPS != left_out]]
        spread = dealt.without(left_out)
        assert spread.samples == len(kept)
        if len(kept):
            np.testing.assert_allclose(spread.means(), kept.mean(axis=0), rtol=1e-13)
            np.testing.assert_allclose(spread.mean_squares(), kept.var(axis=0), rtol=1e-6, atol=1e-12)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = torch.randn(GROUPS, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dealt, spread = Dealt(), Spread()
    dealt.add(values)
    spread.add(values)
    made = jackknife(lambda left_out: dealt.without(left_out).means(), dealt.samples, len(dealt))
    np.testing.assert_allclose(made.means, spread.together().means, rtol=1e-12)
    np.testing.assert_allclose(made.deviations, spread.together().deviations, rtol=1e-9)
    assert jackknife(lambda left_out: torch.ones(2), samples=1, groups=1).deviations is None


def test_intervals_of_the_jackknife_hold_a_variance_nearly_as_often_as_they_say():
    """Effect: the standard deviation of 48 samples, of three in each group, in 2000 drawings."""
    values = torch.randn(48, 2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dealt = Dealt()
    dealt.add(values)
    made = jackknife(lambda left_out: dealt.without(left_out).mean_squares().sqrt(), dealt.samples, len(dealt))
    assert made.freedom == GROUPS - 1
    held = np.mean([abs(one.mean - 1) <= one.margin for one in made.each() if one.margin is not None])
    assert held == pytest.approx(0.95, abs=0.03)


def test_what_is_not_finite_is_refused_with_its_number():
    spread = Spread()
    spread.add(torch.ones(3, 2))
    with pytest.raises(DataError, match=r"Sample 4 \(from 0\)"):
        spread.add(torch.tensor([[1.0, 1.0], [float("inf"), 1.0]]))
    dealt = Dealt()
    dealt.add(torch.ones(3, 2))
    with pytest.raises(DataError, match=r"Sample 4 \(from 0\)"):
        dealt.add(torch.tensor([[1.0, 1.0], [float("inf"), 1.0]]))


def test_an_estimate_reads_as_mean_and_margin():
    assert str(Estimate(mean=0.98765, deviation=0.1, margin=0.0123)) == "0.9877 ± 0.0123"
    assert str(Estimate(mean=0.5, deviation=None, margin=None)) == "0.5000"
