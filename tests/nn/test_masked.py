"""The bricks of masked growth, against an oracle that counts every entry as often as its mask says."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from auxin.errors import ConfigError
from auxin.nn.masked import MaskedBlock, MaskedModule, MaskedNorm
from oracles.masked import mask, weighted_norm

EPS = 1e-2


def norm_of(kind, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    norm = nn.LayerNorm(size, eps=EPS) if kind == "layer" else LlamaRMSNorm(size, eps=EPS)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(1 + 0.5 * torch.randn(size, generator=generator))
    return norm.double()


def entries(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@given(old=st.integers(2, 7), added=st.integers(1, 6), strength=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_masked_norm_weights_its_statistics(kind, old, added, strength, seed):
    size = old + added
    norm = norm_of(kind, size, seed)
    masked = MaskedNorm(norm, kind, EPS, size, [[old, size]])
    masked.set_strength(strength)
    x = entries(2, 3, size, seed=seed) + 0.7
    bias = norm.bias.detach().numpy() if kind == "layer" else None
    wanted = weighted_norm(x.numpy(), mask(old, size, strength), norm.weight.detach().numpy(), bias, EPS, kind)
    np.testing.assert_allclose(masked(x).detach().numpy(), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_at_strength_0_a_masked_norm_is_the_old_one_and_at_1_the_plain_one(kind):
    norm = norm_of(kind, 9)
    old = copy.deepcopy(norm)
    for parameter in old.parameters():
        parameter.data = parameter.data[:6]
    old.normalized_shape = (6,)
    masked = MaskedNorm(norm, kind, EPS, 9, [[6, 9]])
    x = entries(4, 9)
    at_0 = masked(x)
    torch.testing.assert_close(at_0[:, :6], old(x[:, :6]), rtol=1e-6, atol=1e-6)  # Llama's own is in float32
    assert (at_0[:, 6:] == 0).all()
    masked.set_strength(1.0)
    torch.testing.assert_close(masked(x), norm(x), rtol=1e-6, atol=1e-6)


def test_plain_statistics_on_the_masked_input_would_be_another_function():
    norm = norm_of("layer", 9)
    masked = MaskedNorm(norm, "layer", EPS, 9, [[6, 9]])
    x = entries(4, 9) * torch.tensor(mask(6, 9, 0.0))
    assert (masked(x)[:, :6] - norm(x)[:, :6]).abs().max() > 0.1


def test_inputs_and_outputs_are_masked_where_they_are_new():
    linear = nn.Linear(5, 6).double()
    masked = MaskedModule(linear, input_size=5, new_inputs=[[1, 2], [4, 5]], output_size=6, new_outputs=[[0, 3]])
    masked.set_strength(0.25)
    m_in = torch.tensor([1, 0.25, 1, 1, 0.25], dtype=torch.float64)
    m_out = torch.tensor([0.25, 0.25, 0.25, 1, 1, 1], dtype=torch.float64)
    x = entries(3, 5)
    torch.testing.assert_close(masked(x), linear(x * m_in) * m_out)
    assert masked.strengths().tolist() == [0.25] * 5


def test_a_new_block_is_mixed_with_its_input_and_what_else_it_returns_stays():
    class Layer(nn.Linear):
        def forward(self, x, scale, *, extra):
            return super().forward(x) * scale, extra

    layer = Layer(4, 4).double()
    block = MaskedBlock(layer)
    x = entries(2, 4)
    assert torch.equal(block(x, 2.0, extra="cache")[0], x)
    block.set_strength(0.3)
    mixed, extra = block(x, 2.0, extra="cache")
    torch.testing.assert_close(mixed, 0.3 * layer(x, 2.0, extra=None)[0] + 0.7 * x)
    assert extra == "cache"


def test_what_models_read_of_the_inner_module_is_found_on_the_wrapper():
    masked = MaskedModule(nn.Linear(3, 4), output_size=4, new_outputs=[[2, 4]])
    assert masked.weight is masked.inner.weight
    assert masked.out_features == 4
    assert not hasattr(masked, "no_such_thing")
    assert not hasattr(MaskedModule(nn.Sequential(nn.Linear(3, 4))), "append")
    copied = copy.deepcopy(masked)
    assert copied.weight is copied.inner.weight is not masked.weight


def test_masks_are_saved_and_loaded_and_reset_leaves_loaded_ones_alone():
    masked = MaskedNorm(norm_of("layer", 4), "layer", EPS, 4, [[3, 4]])
    masked.set_strength(0.5)
    other = MaskedNorm(norm_of("layer", 4), "layer", EPS, 4, [[3, 4]])
    other.load_state_dict(masked.state_dict())
    loaded = other.mask
    assert loaded.tolist() == [1, 1, 1, 0.5]
    other.reset_buffers()
    assert other.mask.tolist() == [1, 1, 1, 0]
    assert loaded.tolist() == [1, 1, 1, 0.5]


def test_a_norm_in_bfloat16_computes_in_float32():
    masked = MaskedNorm(norm_of("rms", 8).bfloat16(), "rms", EPS, 8, [[6, 8]])
    x = entries(2, 8).bfloat16()
    assert masked(x).dtype == torch.bfloat16
    weight = masked.weight.detach().float().numpy()
    wanted = weighted_norm(x.float().numpy().astype(np.float64), mask(6, 8, 0.0), weight, None, EPS, "rms")
    np.testing.assert_allclose(masked(x).detach().float().numpy(), wanted, rtol=5e-3, atol=1e-6)


def test_new_units_beyond_the_axis_are_refused():
    with pytest.raises(ConfigError, match=r"\[\[3, 9\]\] don't lie within 0\.\.4"):
        MaskedModule(nn.Linear(3, 4), output_size=4, new_outputs=[[3, 9]])
