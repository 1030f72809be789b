"""The expected size of a model is its size where every unit is there or not, and rises evenly between."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auxin.accounting import count_parameters, flops_per_token
from auxin.edits import apply
from auxin.models.anatomy import anatomy
from auxin.planning.expected_size import ExpectedSize
from auxin.planning.pruning import Pruning, prunable
from auxin.planning.unit_order import Place
from tiny_models import tiny

LAYERS = [f"model.layers.{layer}" for layer in range(2)]
COUNTS: dict[Place, int] = {
    **{("key_value", layer): 2 for layer in LAYERS},
    **{("ffn", layer): 12 for layer in LAYERS},
    ("residual", ""): 24,
}


def decoder(**values):
    """Its config takes any number of heads with any hidden size."""
    return tiny("qwen3", hidden_size=24, intermediate_size=12, **values)


def expected(model, multiplied=False) -> ExpectedSize:
    return ExpectedSize(model, anatomy(model, scopes=LAYERS), COUNTS, multiplied)


@given(
    groups=st.sampled_from([0.5, 1.0]),
    units=st.sampled_from([0.25, 0.5, 1.0]),
    residual=st.sampled_from([0.5, 0.75, 1.0]),
    tied=st.booleans(),
)
def test_it_is_the_number_of_parameters_of_what_is_cut(groups, units, residual, tied):
    model = decoder(tie_word_embeddings=tied)
    asked = {"heads": groups, "ffn": units, "hidden": residual}
    shares = {
        place: torch.full((count,), {"key_value": groups, "ffn": units, "residual": residual}[place[0]])
        for place, count in COUNTS.items()
    }
    before, left = model.num_parameters(), expected(model).left(shares).item()
    if asked != {"heads": 1.0, "ffn": 1.0, "hidden": 1.0}:
        found = prunable(model, Pruning.parse(asked))
        apply(found.plan("by hand", {place: [0.0] * count for place, count in found.units.items()}), model)
    assert left * before == pytest.approx(count_parameters(model).total, rel=1e-6)


def test_one_unit_has_the_parameters_that_go_with_it():
    model = decoder()
    config, found = model.config, expected(model).of_a_unit()
    heads = config.num_attention_heads // config.num_key_value_heads
    for layer in LAYERS:
        assert found["ffn", layer] == pytest.approx(3 * config.hidden_size)
        assert found["key_value", layer] == pytest.approx((2 * heads + 2) * config.head_dim * config.hidden_size)
    along = sum(p.numel() for name, p in model.named_parameters() if "q_norm" not in name and "k_norm" not in name)
    assert found["residual", ""] == pytest.approx(along / config.hidden_size)


def test_where_every_unit_of_queries_goes_alone_a_shared_key_value_head_stays():
    model = decoder(num_key_value_heads=1)
    config = model.config
    found = ExpectedSize(model, anatomy(model, scopes=LAYERS), {("query", LAYERS[0]): config.num_attention_heads})
    assert found.of_a_unit()["query", LAYERS[0]] == pytest.approx(2 * config.head_dim * config.hidden_size)


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_multiplied_costs_flops(tied):
    """At one token, where attention multiplies next to nothing else."""
    model = decoder(tie_word_embeddings=tied)
    whole = expected(model, multiplied=True).whole
    attended = 2 * 2 * 2 * model.config.num_attention_heads * model.config.head_dim
    assert flops_per_token(model, 1).forward == pytest.approx(2 * whole + attended, rel=0.02)
