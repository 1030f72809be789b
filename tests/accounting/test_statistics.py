"""Means and intervals of repeated measurements, against tables of Student's distribution and numbers made by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auxin.accounting.statistics import Estimate, paired_difference

# Table of Student's t, 0.975 quantile, by degrees of freedom.
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262}


@pytest.mark.parametrize("freedom", T_975)
def test_the_interval_is_student_s(freedom):
    # 0 and 2 around 1, n values: of deviation s = sqrt(n / (n - 1)) where n is even.
    values = [float(2 * (number % 2)) for number in range(freedom + 1)]
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / freedom)
    found = Estimate.of(values)
    assert found.mean == pytest.approx(mean)
    assert found.half_width == pytest.approx(T_975[freedom] * deviation / math.sqrt(len(values)), rel=2e-4)
    assert found.count == len(values)


def test_one_measurement_has_no_interval():
    assert Estimate.of([2.5]) == Estimate(mean=2.5, half_width=None, count=1)
    assert Estimate.of([2.5]).sign == 0
    assert Estimate.of([2.5]).text() == "2.500"


@pytest.mark.parametrize("values", [[], [1.0, None], [1.0, math.nan], [math.inf, 1.0]])
def test_what_is_missing_or_diverged_leaves_no_mean(values):
    assert Estimate.of(values) is None


@pytest.mark.parametrize(("values", "sign"), [([1.0, 1.1, 1.2], 1), ([-1.0, -1.1, -1.2], -1), ([-1.0, 0.5, 1.0], 0)])
def test_a_sign_is_only_told_where_the_interval_excludes_zero(values, sign):
    assert Estimate.of(values).sign == sign


def test_pairs_take_out_what_a_seed_shifts():
    """Seeds shift both by up to 10; the difference is 0.1 with every seed, and its interval must not see the shift."""
    shifts = {0: 0.0, 1: 10.0, 2: -7.0}
    main = {seed: 3.0 + shift for seed, shift in shifts.items()}
    other = {seed: 3.1 + shift for seed, shift in shifts.items()}
    found = paired_difference(other, main)
    assert found.mean == pytest.approx(0.1)
    assert found.half_width == pytest.approx(0.0, abs=1e-9)
    assert paired_difference({0: 1.0, 5: 2.0}, {0: 0.5, 7: 9.0}) == Estimate.of([0.5])
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=8), st.floats(-50, 50), st.floats(0.1, 10))
def test_an_interval_moves_and_scales_with_what_is_measured(values, shift, scale):
    one, other = Estimate.of(values), Estimate.of([scale * value + shift for value in values])
    assert other.mean == pytest.approx(scale * one.mean + shift, abs=1e-6)
    assert other.half_width == pytest.approx(scale * one.half_width, rel=1e-6, abs=1e-6)
