"""Convolutions of low rank are two convolutions, the nearest that there are, and know what the one did of itself."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from auxin.accounting import count_parameters
from auxin.errors import PlanError
from auxin.nn.low_rank_convolution import LowRankConvolution, window
from auxin.planning.ranks import Matrix

CLASSES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CASE = {
    "axes": st.integers(1, 3),
    "sides": st.tuples(st.integers(1, 5), st.integers(1, 5)),
    "kernel": st.integers(1, 3),
    "stride": st.integers(1, 2),
    "padding": st.sampled_from([0, 1, 2, "same"]),
    "dilation": st.integers(1, 2),
    "mode": st.sampled_from(["zeros", "reflect", "circular", "replicate"]),
    "bias": st.booleans(),
    "seed": st.integers(0, 999),
}


def convolution(axes, sides, kernel, stride, padding, dilation, mode, bias, seed) -> tuple[Any, Tensor]:
    """One of these, and something to read."""
    generator = torch.Generator().manual_seed(seed)
    module = CLASSES[axes - 1](
        *sides,
        kernel,
        stride=1 if padding == "same" else stride,
        padding=padding,
        dilation=dilation,
        padding_mode=mode,
        bias=bias,
        dtype=torch.float64,
    )
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module, torch.randn(2, sides[0], *[7] * axes, generator=generator, dtype=torch.float64)


@given(**CASE)
def test_with_all_ranks_it_is_the_convolution(**case):
    module, given_to = convolution(**case)
    full = min(window(module))
    low = LowRankConvolution.replacing(module, full)
    torch.testing.assert_close(low(given_to), module(given_to), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(low.weight + 0, module.weight, rtol=1e-9, atol=1e-9)
    assert low.weight.shape == module.weight.shape
    assert (low.bias is None) == (module.bias is None)
    assert low.bias is None or torch.equal(low.bias, module.bias)
    assert (low.stride, low.kernel_size, low.in_channels) == (module.stride, module.kernel_size, module.in_channels)


@given(rank=st.integers(1, 5), **CASE)
def test_it_is_two_convolutions_and_the_nearest_product(rank, **case):
    """The nearest by Eckart and Young's theorem: what is missed is the sum of the squares left out."""
    module, given_to = convolution(**case)
    rank = min(rank, *window(module))
    low = LowRankConvolution.replacing(module, rank)
    first = type(module)(
        module.in_channels,
        rank,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        bias=False,
        padding_mode=module.padding_mode,
    )
    second = type(module)(rank, module.out_channels, 1)
    first.weight.data = low.input_factor.detach()
    second.weight.data = low.output_factor.detach().view(second.weight.shape)
    second.bias.data = torch.zeros_like(second.weight[:, 0].flatten()) if low.bias is None else low.bias.detach()
    torch.testing.assert_close(low(given_to), second(first(given_to)), rtol=1e-12, atol=1e-12)
    weight = module.weight.detach().numpy()
    rows = np.array([[weight[(out, *place)] for place in np.ndindex(weight.shape[1:])] for out in range(len(weight))])
    left_out = np.linalg.svd(rows, compute_uv=False)[rank:]
    missed = (low.weight - module.weight).square().sum()
    np.testing.assert_allclose(missed.item(), (left_out**2).sum(), rtol=1e-9, atol=1e-12)
    sizes = low.output_factor.square().sum(), low.input_factor.square().sum()
    torch.testing.assert_close(*sizes, rtol=1e-9, atol=1e-12)


def test_it_pays_below_a_rank_that_counts_the_kernel():
    """Of 64 to 128 channels and a kernel of 3 x 3; the paper's code says 42, which is without the kernel."""
    module = nn.Conv2d(64, 128, 3, device="meta")
    assert Matrix(*window(module)).most == 104
    whole = count_parameters(module).total
    sizes = [count_parameters(LowRankConvolution.replacing(module, rank)).total for rank in (104, 105)]
    assert sizes[0] == 104 * (64 * 9 + 128) + 128
    assert sizes[0] < whole < sizes[1]


@given(rank=st.integers(1, 3), seed=st.integers(0, 99))
def test_moments_are_what_gradients_would_be(rank, seed):
    module, given_to = convolution(2, (3, 4), 2, 1, 0, 1, "zeros", True, seed)
    making = LowRankConvolution.making
    low = LowRankConvolution.replacing(module, rank)
    # At the product, so that both have one gradient with respect to the weight.
    module.weight.data.copy_((low.weight + 0).detach())
    for one in (module, low):
        one(given_to).pow(3).sum().backward()
    old = {name: tensor.detach() for name, tensor in module.named_parameters()}
    of_weight = {"weight": module.weight.grad}
    found = making.moments(old, of_weight, 1, rank=rank)
    assert found is not None
    for name, moment in found.items():
        torch.testing.assert_close(moment, low.get_parameter(name).grad, rtol=1e-6, atol=1e-6)
    back = making.back({name: tensor.detach() for name, tensor in low.named_parameters()})
    torch.testing.assert_close(back["weight"], module.weight.detach(), rtol=1e-9, atol=1e-9)
    again = making.moments_back(dict(low.named_parameters()), found, 1)
    assert again is not None
    assert again["weight"].shape == module.weight.shape


def test_another_rank_is_made_of_the_product():
    module, _ = convolution(1, (4, 5), 3, 1, 1, 1, "zeros", True, 0)
    low = LowRankConvolution.replacing(module, 4)
    lower = LowRankConvolution.replacing(low, 2)
    torch.testing.assert_close(lower.weight + 0, LowRankConvolution.replacing(module, 2).weight + 0)
    drawn = LowRankConvolution.replacing(copy.deepcopy(low), 2, start="random")
    assert torch.equal(drawn.bias, low.bias)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LowRankConvolution.replacing(nn.Conv1d(4, 4, 3, groups=2), 1), "has 2 groups.*Leave it whole"),
        (lambda: LowRankConvolution.replacing(weight_norm(nn.Conv1d(4, 4, 3)), 1), "ParametrizedConv1d.*weight norm"),
        (lambda: LowRankConvolution.replacing(nn.Linear(4, 4), 1), "received a Linear"),
        (lambda: LowRankConvolution.replacing(nn.ConvTranspose1d(4, 4, 3), 1), "received a ConvTranspose1d"),
        (lambda: LowRankConvolution.replacing(nn.Conv1d(4, 6, 3), 7), "rank 7 is none of a matrix of 6 x 12"),
    ],
)
def test_what_can_t_be_a_product_is_refused(make, words):
    with pytest.raises(PlanError, match=words):
        make()
