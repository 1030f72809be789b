"""Products that multiply by the whole matrix for few tokens: the same numbers, made anew when a factor changes."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import auxin
from auxin.errors import ConfigError, PlanError
from auxin.nn.bricks import find_brick
from auxin.nn.low_rank import Product
from auxin.planning.pre_merged import pre_merge
from auxin.planning.product_times import ProductTimes
from tiny_models import tiny

FORMS = {
    "low_rank_linear": {"rank": 3},
    "block_dense_linear": {"rank": 4, "blocks": 2},
    "block_shuffle_linear": {"blocks": 2},
}


def made(brick: str, bias: bool = True, dtype: torch.dtype = torch.float64) -> Product:
    torch.manual_seed(0)
    return find_brick(brick).replacing(nn.Linear(8, 12, bias=bias, dtype=dtype), **FORMS[brick]).eval()


@pytest.mark.parametrize("brick", FORMS)
@given(tokens=st.integers(1, 9), below=st.integers(0, 9), bias=st.booleans())
def test_few_tokens_get_the_same_by_the_whole_matrix(brick, tokens, below, bias):
    layer = made(brick, bias)
    x = torch.randn(tokens, 8, dtype=torch.float64)
    with torch.no_grad():
        factors = layer(x)
        layer.merge_below(below)
        assert (layer.merged_for(x) is not None) == (tokens < below)
        assert torch.allclose(layer(x), factors, atol=1e-12)
        assert layer.merged_for(x.view(1, tokens, 8)) is layer.merged_for(x), "made once"


@pytest.mark.parametrize("brick", FORMS)
def test_the_matrix_is_made_anew_when_a_factor_changes_moves_or_is_cast(brick):
    layer, x = made(brick), torch.randn(2, 8, dtype=torch.float64)
    layer.merge_below(16)
    with torch.no_grad():
        layer(x)
        for change in (
            lambda: layer.output_factor.add_(1),
            lambda: layer.input_factor.mul_(2),
            lambda: setattr(layer.input_factor, "data", layer.input_factor.data.clone() + 1),
            lambda: layer.load_state_dict(made(brick).state_dict()),
        ):
            change()
            plain = copy.deepcopy(layer)
            plain.merge_below(0)
            assert torch.allclose(layer(x), plain(x), atol=1e-12)
        assert layer.float()(x.float()).dtype == torch.float32


@pytest.mark.parametrize("brick", FORMS)
@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}, {}], ids=["fused", "foreach", "plain"])
def test_after_a_step_of_any_optimizer_the_matrix_is_that_of_the_new_factors(brick, how):
    """A fused step raises no version of what it changes."""
    layer, x = made(brick), torch.randn(2, 8, dtype=torch.float64)
    layer.merge_below(16)
    with torch.no_grad():
        before = layer(x)
    layer.train()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, **how)
    layer(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert layer.merged_for(x) is None, "in training mode"
        layer.eval()
        after = layer(x)
        assert layer.merged_for(x) is not None
        assert not torch.allclose(after, before)
        layer.merge_below(0)
        assert torch.allclose(after, layer(x), atol=1e-12)


def test_what_learns_goes_by_the_factors_and_a_checkpoint_knows_nothing_of_it():
    layer, x = made("low_rank_linear"), torch.randn(2, 8, dtype=torch.float64)
    before = set(layer.state_dict())
    layer.merge_below(16)
    layer(x).sum().backward()
    assert layer.input_factor.grad is not None
    with torch.no_grad():
        layer(x)
    assert set(layer.state_dict()) == before == {"input_factor", "output_factor", "bias"}


def test_a_model_answers_alike_below_and_above_what_was_measured(monkeypatch):
    """By a clock of calls and multiply-adds, on a model with its keys and values kept."""
    monkeypatch.setattr(
        ProductTimes,
        "seconds",
        lambda self, modules, tokens: [
            calls * 300 + tokens * sum(one.numel() for one in module.parameters())
            for calls, module in zip((1, 2), modules, strict=True)
        ],
    )
    model = tiny("llama", dtype=torch.float32)
    auxin.apply(auxin.plan(model, "structured-ffn", rank=0.25, first_layer=True), model)
    whole = copy.deepcopy(model)
    told = pre_merge(model)
    assert told
    for path, below in told.items():
        product = model.get_submodule(path)
        saved = product.in_features * product.out_features - sum(
            value.numel() for name, value in product.named_parameters() if name != "bias"
        )
        first = next(tokens for tokens in (1, 4, 16, 64) if tokens * saved > 300)
        assert below == (0 if first == 1 else first) == product.below
    ids = torch.arange(6)[None]
    with torch.no_grad():
        for part in (ids, ids[:, :1]):
            assert torch.allclose(model(part).logits, whole(part).logits, atol=1e-5)
    assert model.generate(ids, max_new_tokens=4, do_sample=False).tolist() == (
        whole.generate(ids, max_new_tokens=4, do_sample=False).tolist()
    )
    assert set(pre_merge(model, below=0).values()) == {0}
    with pytest.raises(PlanError, match="has no layer that is a product"):
        pre_merge(tiny("llama"))
    for below in (-1, 1.5, "16", True):
        with pytest.raises(ConfigError, match="is no number of tokens"):
            pre_merge(model, below)


def test_a_product_that_is_never_faster_always_multiplies_by_the_matrix(monkeypatch):
    monkeypatch.setattr(ProductTimes, "seconds", lambda self, modules, tokens: [1.0, 2.0])
    model = tiny("gpt2", dtype=torch.float32)
    auxin.apply(auxin.plan(model, "greenformers", rank=4, solver="svd"), model)
    assert min(pre_merge(model).values()) > 4096
