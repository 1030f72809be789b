"""Random features: the numbers of their definition, one by one and on average, and the fakes that those catch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from auxin.errors import ConfigError
from auxin.nn.random_features import drawn_directions, relu_features, ridge_solution
from auxin.nn.universal_features import UniversalFeatures, rescaled
from oracles import random_features as oracle

WIDTH, BIAS = 16, 0.3
SAMPLES = 100_000
TABLE = [
    # norm of x and w, x w, split, damping, f, E|T|^2 of the formula, the variance of a feature as it was simulated
    (0.5, 0.06, "inputs_plain", 0.0, 0.9356, 1.649, 0.28),
    (0.5, 0.06, "even", 0.0, 0.9356, 1.862, 0.17),
    (1.0, 0.22, "inputs_plain", 0.0, 0.8703, 7.39, 3.06),
    (1.0, 0.22, "conjugate", 0.0, 0.8703, 4.81, 2.09),
    (1.5, 0.98, "inputs_plain", 0.0, 0.2844, 90.0, 41),
    (1.5, 0.98, "conjugate", 0.0, 0.2844, 12.6, 6.6),
    (2.0, 2.09, "inputs_plain", 0.0, -0.733, 2981, 1412),
    (2.0, 2.09, "conjugate", 0.0, -0.733, 45.3, 22),
    (2.0, 0.61, "inputs_plain", 0.098, 0.616, 995, 472),
]  # fmt: skip
"""f(z) = cos(z + 0.3) in 16 dimensions, from 10^6 samples."""


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def tensors(*arrays):
    return tuple(torch.tensor(array, dtype=torch.float64) for array in arrays)


def samples(features, x, weight, bias=None):
    """The real part of every feature's product, (m,)."""
    with torch.no_grad():
        sides = features.inputs(x) * features.weights(weight, bias)
    return (sides * len(features.directions)).real


@pytest.mark.parametrize(("norm", "product", "split", "damping", "truth", "second", "simulated"), TABLE)
def test_estimates_and_their_variance_are_those_of_the_table(norm, product, split, damping, truth, second, simulated):
    x, weight = oracle.pair(norm, product, WIDTH)
    bound = oracle.moment(x, weight, 1.0, split, True, damping=damping).real
    # Products are told to two digits there.
    assert bound == pytest.approx(second, rel=0.03)
    variance = oracle.variance(x, weight, BIAS, "cos", split, damping)
    assert variance == pytest.approx(simulated, rel=0.12)
    exact = math.cos(product + BIAS)
    assert exact == pytest.approx(truth, abs=0.01)
    features = UniversalFeatures("cos", WIDTH, SAMPLES, split, damping=damping, draw=drawn())
    found = samples(features, *tensors(x, weight, BIAS))
    assert abs(float(found.mean()) - exact) < 4 * math.sqrt(variance / SAMPLES)
    fourth = oracle.moment(x, weight, 1.0, split, True, power=4, damping=damping).real
    # Var of the squared deviation is below the fourth moment; where that is out of reach nothing is told.
    if 4 * math.sqrt(fourth / SAMPLES) < variance:
        assert float(found.var()) == pytest.approx(variance, abs=4 * math.sqrt(fourth / SAMPLES))


@settings(max_examples=30)
@given(
    function=st.sampled_from(["cos", "sin", "gaussian"]),
    split=st.sampled_from(["inputs_plain", "even", "conjugate"]),
    balance=st.floats(0.5, 2),
    damping=st.sampled_from([0.0, 0.05]),
    seed=st.integers(0, 10**6),
)
def test_every_feature_is_what_the_definition_says(function, split, balance, damping, seed):
    features = UniversalFeatures(function, 3, 4, split, balance, damping, draw=drawn(seed))
    generator = np.random.default_rng(seed)
    x, weight, bias = generator.normal(size=3), generator.normal(size=3), float(generator.normal())
    found = features.inputs(*tensors(x)) * features.weights(*tensors(weight, bias)) * 4
    for number in range(4):
        g, wave = features.directions[number].double().numpy(), float(features.frequencies[number])
        told = oracle.feature(x, weight, bias, g, wave, function, split, balance, damping)
        assert complex(found[number]) == pytest.approx(told, rel=1e-9)
    kernel = features.kernel(*tensors(x[None], weight[None]), torch.tensor([bias], dtype=torch.float64))
    assert float(kernel) == pytest.approx(float(found.real.mean()), rel=1e-9)


@pytest.mark.parametrize("function", ["cos", "sin", "gaussian"])
@pytest.mark.parametrize("split", ["inputs_plain", "even", "conjugate"])
def test_all_of_them_are_unbiased(function, split):
    x, weight = oracle.pair(0.9, 0.3, WIDTH, 0.5)
    features = UniversalFeatures(function, WIDTH, SAMPLES, split, orthogonal=split == "conjugate", draw=drawn(1))
    found = samples(features, *tensors(x, weight, BIAS))
    # Of the Gaussian the sample's own error; of waves it is known.
    known = float(found.var()) if function == "gaussian" else oracle.variance(x, weight, BIAS, function, split)
    assert abs(float(found.mean()) - oracle.TRUTH[function](0.3 + BIAS)) < 4 * math.sqrt(known / SAMPLES)


def test_errors_fall_with_the_root_of_the_features():
    x, weight = oracle.pair(1.0, -0.13, WIDTH)
    variance = oracle.variance(x, weight, 0.0, "cos", "conjugate")
    fourth = oracle.moment(x, weight, 1.0, "conjugate", True, power=4).real
    for count, told in ((16, 0.462), (64, 0.231), (256, 0.115), (1024, 0.058)):
        assert math.sqrt(variance / count) == pytest.approx(told, rel=0.01)
        times = SAMPLES // count
        features = UniversalFeatures("cos", WIDTH, times * count, draw=drawn(2))
        found = samples(features, *tensors(x, weight)).view(times, count).mean(1)
        squares = (found - math.cos(-0.13)).square()
        spread = math.sqrt((2 * (variance / count) ** 2 + fourth / count**3) / times)
        assert float(squares.mean()) == pytest.approx(variance / count, abs=4 * spread)


def test_the_best_balance_is_the_root_of_the_ratio_of_norms():
    x, weight = oracle.pair(0.4, 0.1, WIDTH, 1.6)

    def spread(balance):
        features = UniversalFeatures("cos", WIDTH, SAMPLES, "inputs_plain", balance, draw=drawn(3))
        return float(samples(features, *tensors(x, weight)).var())

    # e^{balance^2 |x|^2 + |w|^2 / balance^2}: 15.4 at 1, 3.6 at 2.
    assert spread(2.0) < 0.3 * spread(1.0)
    assert spread(2.0) < spread(4.0)


@pytest.mark.parametrize("fake", ["other directions", "conjugate", "no correction of norms"])
def test_fakes_are_far_off(fake):
    x, weight = oracle.pair(1.0, 0.7, WIDTH)
    features = UniversalFeatures("cos", WIDTH, SAMPLES, draw=drawn(4))
    others = UniversalFeatures("cos", WIDTH, SAMPLES, draw=drawn(5)) if fake == "other directions" else features
    inputs, weights = features.inputs(*tensors(x)), others.weights(*tensors(weight))
    if fake == "conjugate":
        weights = weights.conj()
    if fake == "no correction of norms":
        inputs = inputs * (features._exponents()[0].to(inputs.dtype).square() / 2).exp()
    error = abs(float((inputs * weights).real.sum()) - math.cos(0.7))
    assert error > 10 * math.sqrt(oracle.variance(x, weight, 0.0, "cos", "conjugate") / SAMPLES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_they_are_computed_in_float32_at_least(dtype):
    features = UniversalFeatures("cos", WIDTH, 64, draw=drawn(6)).to(dtype)
    generator = drawn(7)
    x, weight = (torch.randn(3, WIDTH, generator=generator).to(dtype) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = features.kernel(x, weight)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    exact = features.double().kernel(x.double(), weight.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("by", ["norm", "width"])
def test_rescaled_states_have_the_norm_that_the_width_says(by):
    states = torch.randn(5, WIDTH, generator=drawn(8), dtype=torch.float64)
    states = states / states.norm(dim=-1, keepdim=True) * WIDTH**0.5  # as behind a norm
    found = rescaled(states, by)
    torch.testing.assert_close(found.norm(dim=-1), torch.full((5,), WIDTH**0.25, dtype=torch.float64))
    assert torch.equal(rescaled(torch.zeros(WIDTH), by), torch.zeros(WIDTH))


@pytest.mark.parametrize(
    ("angle", "mean", "variance"),
    [(0.0, 0.5, 1.25), (math.pi / 4, 0.3777, 0.85), (math.pi / 2, 0.1592, 0.224), (3 * math.pi / 4, 0.0242, 0.011)],
)
def test_relu_features_tend_to_the_arc_cosine_kernel_and_orthogonal_ones_faster(angle, mean, variance):
    x, weight = oracle.pair(1.0, math.cos(angle), WIDTH)
    assert oracle.arc_cosine(x, weight) == pytest.approx((mean, variance), abs=6e-3)
    mean, variance = oracle.arc_cosine(x, weight)
    blocks = 4000
    spreads = []
    for orthogonal in (False, True):
        directions = drawn_directions(blocks * WIDTH, WIDTH, drawn(9), orthogonal).double()
        products = [relu_features(side, directions) for side in tensors(x, weight)]
        found = (products[0] * products[1]).view(blocks, WIDTH).sum(1) * blocks
        spreads.append(float(found.var()))
        assert abs(float(found.mean()) - mean) < 4 * math.sqrt(variance / WIDTH / blocks)
        norms = directions.square().sum(1)
        assert float(norms.mean()) == pytest.approx(WIDTH, abs=4 * math.sqrt(2 * WIDTH / len(norms)))
        assert float(norms.var()) == pytest.approx(2 * WIDTH, rel=0.1)
    assert spreads[0] == pytest.approx(variance / WIDTH, rel=0.15)
    assert spreads[1] / spreads[0] < (0.75 if angle < 2 else 0.9)  # a third less, at wide angles a fifth


@given(count=st.integers(1, 20), width=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_orthogonal_directions_are_so_in_blocks(count, width, seed):
    directions = drawn_directions(count, width, drawn(seed), orthogonal=True).double()
    for block in directions.split(width):
        gram = block @ block.mT
        scale = torch.outer(block.norm(dim=1), block.norm(dim=1))
        torch.testing.assert_close(gram / scale, torch.eye(len(block), dtype=torch.float64), rtol=0, atol=1e-5)


def test_relu_features_without_a_threshold_are_linear_in_the_limit():
    x, directions = torch.randn(2, 3, WIDTH, generator=drawn(10)), drawn_directions(8, WIDTH, drawn(11))
    torch.testing.assert_close(relu_features(x, directions, -1e9), x @ directions.mT * 8**-0.5)


def test_a_closed_form_is_what_gradient_descent_converges_to():
    """Of a network that is bundled whole: features of features, and one matrix behind them."""
    generator = drawn(12)
    x = torch.randn(64, 6, generator=generator, dtype=torch.float64)
    targets = torch.randn(64, 3, generator=generator, dtype=torch.float64)
    first, second = (drawn_directions(10, width, generator, orthogonal=True).double() for width in (6, 10))
    features = relu_features(relu_features(x, first), second)
    ridge = 0.5
    matrix = torch.zeros(3, 10, dtype=torch.float64)
    curvature = torch.linalg.eigvalsh(features.mT @ features).max() + ridge
    for _ in range(4000):
        gradient = (features @ matrix.mT - targets).mT @ features + ridge * matrix
        matrix -= gradient / curvature
    torch.testing.assert_close(ridge_solution(features, targets, ridge), matrix, rtol=0, atol=1e-9)


def test_more_features_fit_a_feed_forward_part_better_and_enough_of_them_better_than_a_linear_map():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)).double().requires_grad_(False)
    learnt, unseen = 8192, 2048
    x = torch.randn(learnt + unseen, 32, dtype=torch.float64)
    x = x / x.norm(dim=1, keepdim=True) * 32**0.5
    y = teacher(x)

    def error(features):
        matrix = ridge_solution(features[:learnt], y[:learnt], 1e-3)
        return float((features[learnt:] @ matrix.mT - y[learnt:]).norm() / y[learnt:].norm())

    linear = error(torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1))
    errors = [error(relu_features(x, drawn_directions(m, 32, drawn(14)).double())) for m in (16, 64, 256, 1024)]
    assert errors == sorted(errors, reverse=True)
    assert max(errors[2:]) < linear


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"function": "relu"}, "function = 'relu' is none. Give one of cos, sin, gaussian"),
        ({"split": "odd"}, "split = 'odd' is none. Give one of inputs_plain"),
        ({"features": 0}, "features = 0 must be a whole number from 1 on"),
        ({"features": True}, "features = True must be a whole number from 1 on"),
        ({"width": -1}, "width = -1 must be a whole number from 1 on"),
        ({"balance": 0}, "balance = 0 must be above 0"),
        ({"balance": float("nan")}, "balance = nan must be above 0"),
        ({"damping": -1}, "damping = -1 not below, and both finite. Give 1 and 0"),
        ({"damping": float("inf")}, "damping = inf not below"),
    ],
)
def test_what_can_not_be_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        UniversalFeatures(**{"function": "cos", "width": 4, "features": 2, **values})


@pytest.mark.parametrize(
    ("features", "ridge", "message"),
    [
        (torch.ones(5, 2), 0.0, "2 features of 5 samples have not full rank.*a ridge above 0"),
        (torch.eye(2), -1.0, "ridge = -1 must be a number from 0 on"),
        (torch.eye(2), float("nan"), "ridge = nan must be a number from 0 on"),
        (torch.eye(2).cfloat(), 0.0, "features must be real and finite"),
        (torch.eye(2) / 0, 0.0, "features must be real and finite"),
    ],
)
def test_what_has_no_closed_form_is_refused(features, ridge, message):
    with pytest.raises(ConfigError, match=message):
        ridge_solution(features, torch.ones(len(features), 1), ridge)
