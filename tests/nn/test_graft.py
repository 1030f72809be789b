"""The grafted layers alone: the formula, the graft's exactness, and gradients of ordinary size."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from auxin.errors import ConfigError
from auxin.nn.bricks import find_brick
from auxin.nn.graft import Grafted, GraftedConv1D, GraftedLinear
from auxin.nn.pattention import Pattention
from oracles import pattention as oracle

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def numbers(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def layer(kind: str, inputs: int = 12, outputs: int = 7, bias: bool = True, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    module = nn.Linear(inputs, outputs, bias) if kind == "linear" else Conv1D(outputs, inputs)
    if kind == "conv1d":
        nn.init.normal_(module.weight, std=inputs**-0.5)
        nn.init.normal_(module.bias)
    return module.to(dtype)


def graft_of(module: nn.Module, tokens: list[int], **settings) -> Grafted:
    cls = GraftedConv1D if isinstance(module, Conv1D) else GraftedLinear
    return cls.replacing(module, tokens, **settings)


def awake(graft: Grafted, seed: int = 3) -> Grafted:
    """Values as after training."""
    with torch.no_grad():
        graft.branch.value_tokens.copy_(numbers(*graft.branch.value_tokens.shape, seed=seed))
    return graft


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("score_function", ["l2_norm_gelu", "gelu_l2_norm", "gelu", "linear", "softmax"])
def test_the_layer_is_the_dense_one_plus_the_published_branch(kind, score_function):
    dense = layer(kind)
    graft = awake(graft_of(dense, [5, 3], tau=[1.5, 2.5], score_function=score_function))
    x = numbers(4, 12, seed=1)
    weight = (dense.weight if kind == "linear" else dense.weight.T).detach().numpy()
    branch = [t.detach().numpy() for t in (graft.branch.key_tokens, graft.branch.value_tokens)]
    wanted = x.numpy() @ weight.T + dense.bias.detach().numpy()
    wanted = wanted + oracle.pattention(x.numpy(), *branch, [1.5, 2.5], [5, 3], score_function)
    np.testing.assert_allclose(graft(x).detach().numpy(), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fresh_graft_is_the_layer_to_the_last_bit(kind, dtype):
    dense = layer(kind, dtype=dtype).eval()
    graft = graft_of(dense, [6])
    x = numbers(3, 5, 12, scale=40.0, dtype=dtype)
    assert torch.equal(graft(x), dense(x))
    assert graft.weight is dense.weight
    assert graft.bias is dense.bias
    assert isinstance(graft, type(dense))
    assert not graft.training
    assert {p.dtype for p in graft.parameters()} == {dtype}
    assert graft.branch.tau.dtype == torch.promote_types(dtype, torch.float32)
    names = [name for name, _ in graft.named_parameters()]
    assert names == ["weight", "bias", "branch.key_tokens", "branch.value_tokens"]


def test_a_layer_without_bias_stays_without():
    dense = layer("linear", bias=False)
    graft = graft_of(dense, [3])
    assert graft.bias is None
    assert torch.equal(graft(numbers(2, 12)), dense(numbers(2, 12)))


def test_a_further_group_keeps_the_old_rows_and_the_function():
    graft = awake(graft_of(layer("linear"), [4], tau=[3.0]))
    x = numbers(5, 12, seed=2)
    grown = GraftedLinear.replacing(graft, [4, 6], tau=[3.0, math.sqrt(6)])
    torch.testing.assert_close(grown(x), graft(x), rtol=1e-13, atol=1e-13)
    assert torch.equal(grown.branch.key_tokens[:4], graft.branch.key_tokens)
    assert grown.branch.initial_tau == (3.0, math.sqrt(6))
    same = GraftedLinear.replacing(graft, [4], tau=[2.0])
    assert same.branch.key_tokens is graft.branch.key_tokens
    assert same.branch.initial_tau == (2.0,)


def test_on_the_meta_device_it_has_shapes_and_its_scales_come_back():
    graft = graft_of(layer("linear").to("meta"), [4, 2], tau=[2.5, 1.0])
    assert {p.device.type for p in graft.parameters()} == {"meta"}
    with torch.device("meta"):
        assert graft_of(nn.Linear(3, 3), [2]).branch.tau.is_meta
    # As a loader does it: buffers that are in no checkpoint are made empty, then filled by their owner.
    graft.branch.tau = torch.full((2,), math.nan)
    graft.branch.reset_buffers()
    assert graft.branch.tau.tolist() == [2.5, 1.0]


def test_the_constructors_make_what_replacing_makes():
    linear, conv = GraftedLinear(12, 7, [4, 2], bias=False, dtype=torch.bfloat16), GraftedConv1D(7, 12, [4])
    assert linear(numbers(2, 12, dtype=torch.bfloat16)).shape == (2, 7)
    assert conv(numbers(2, 12, dtype=torch.float32)).shape == (2, 7)
    assert not linear.branch.value_tokens.any()
    assert not conv.branch.value_tokens.any()
    assert "branch" in repr(conv)
    assert find_brick("grafted_linear") is GraftedLinear
    assert find_brick("grafted_conv1d") is GraftedConv1D


def test_fresh_keys_have_scores_of_ordinary_size():
    for inputs in (16, 768):
        graft = graft_of(layer("linear", inputs, 8, dtype=torch.float32), [512])
        scores = numbers(64, inputs, dtype=torch.float32) @ graft.branch.key_tokens.T
        assert scores.square().mean().sqrt().item() == pytest.approx(1, rel=0.1)


def test_layers_that_can_not_be_grafted_are_refused():
    for module in (NonDynamicallyQuantizableLinear(3, 3), nn.Conv1d(3, 3, 1), Conv1D(3, 3)):
        with pytest.raises(ConfigError, match=f"GraftedLinear replaces a Linear, received a {type(module).__name__}"):
            GraftedLinear.replacing(module, [2])
    dense = nn.Linear(3, 3)
    dense.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"weight is torch\.int8"):
        GraftedLinear.replacing(dense, [2])
    with pytest.raises(ConfigError, match="positive integers"):
        GraftedLinear.replacing(nn.Linear(3, 3), [])


def gradients(graft: Grafted, x: Tensor, output_gradient: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    graft(x).backward(output_gradient)
    found = {name: p.grad for name, p in graft.named_parameters()} | {"input": x.grad}
    graft.zero_grad()
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


@given(
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["linear", "conv1d"]),
    shape=st.tuples(st.integers(2, 96), st.integers(1, 48)),
    tokens=st.integers(2, 40),
    rows=st.integers(1, 30),
    scale=st.sampled_from([1e-2, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_gradients_at_the_graft_are_finite_and_of_ordinary_size(dtype, kind, shape, tokens, rows, scale, seed):
    dense = layer(kind, *shape, dtype=dtype)
    x = numbers(rows, shape[0], seed=seed, scale=scale, dtype=dtype)
    above = numbers(rows, shape[1], seed=seed + 1, dtype=dtype)
    plain = gradients(copy.deepcopy(dense), x, above)
    torch.manual_seed(seed)
    graft = graft_of(dense, [tokens])
    first = gradients(graft, x, above)
    assert all(gradient.isfinite().all() for gradient in first.values())
    # Zero values: nothing flows through the branch to what lies below, nor to the keys.
    assert torch.equal(first["input"], plain["input"])
    assert torch.equal(first["weight"], plain["weight"])
    assert not first["branch.key_tokens"].any()
    # dV = S^T dY with |S| <= |Z|, and the squares of a row of Z sum to the number of tokens.
    bound = math.sqrt(tokens) * above.double().norm(dim=1).sum().item()
    assert 0 < first["branch.value_tokens"].double().norm().item() <= 1.01 * bound
    # After a step of the values' own size the keys are awake. Per row |dA| <= |f'| tau / |A| |V dY|.
    with torch.no_grad():
        graft.branch.value_tokens.copy_(numbers(tokens, shape[1], seed=seed + 2, scale=1e-2))
    second = gradients(graft, x, above)
    assert all(gradient.isfinite().all() for gradient in second.values())
    scores = (x.double() @ graft.branch.key_tokens.double().T).norm(dim=1)
    through = (above.double() @ graft.branch.value_tokens.double().T).norm(dim=1)
    bound = (1.13 * math.sqrt(tokens) / scores * through * x.double().norm(dim=1)).sum().item()
    assert second["branch.key_tokens"].double().norm().item() <= 1.1 * bound + 1e-3


def test_keys_of_zero_would_blow_up():
    """Why a first group has random keys: with zero keys and random values, the paper's start for tokens that are added
    to others under one norm, the gradient of the scores is tau/eps."""
    x, above = numbers(32, 24, seed=1), numbers(32, 24, seed=2)
    keys_gradient = {}
    for rule in ("random keys", "zero keys"):
        branch = Pattention(24, 24, [16], dtype=torch.float64)
        with torch.no_grad():
            branch.key_tokens.copy_(numbers(16, 24, scale=24**-0.5 if rule == "random keys" else 0.0))
            branch.value_tokens.copy_(numbers(16, 24, scale=1e-2))
        branch(x).backward(above)
        keys_gradient[rule] = rms(branch.key_tokens.grad)
    assert keys_gradient["random keys"] < 1
    assert keys_gradient["zero keys"] > 1e5 * keys_gradient["random keys"]
    # And with both zero nothing would ever move.
    dead = Pattention(24, 24, [16], dtype=torch.float64)
    for parameter in dead.parameters():
        nn.init.zeros_(parameter)
    dead(x).backward(above)
    assert not any(parameter.grad.any() for parameter in dead.parameters())


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_first_steps_move_the_output_by_what_a_lora_of_equal_size_moves_it(kind):
    """AdamW's first step moves every value by the learning rate; the output then moves by that times the sum of the
    weights, as a LoRA's moves by the sum of A x."""
    dense = layer(kind, 64, 64, dtype=torch.float32)
    x, target = numbers(256, 64, dtype=torch.float32), numbers(256, 64, seed=1, dtype=torch.float32)
    graft = graft_of(dense, [16])
    before = graft(x).detach()
    optimizer = torch.optim.AdamW(graft.branch.parameters(), lr=1e-2)
    for _ in range(2):
        (graft(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = rms(graft(x) - before)
    a = numbers(16, 64, scale=64**-0.5, dtype=torch.float32)
    lora = rms(2 * 1e-2 * (x @ a.T).abs().sum(dim=1))
    assert 0.1 * lora < moved < lora
