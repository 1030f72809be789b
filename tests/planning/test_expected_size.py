"""The expected size of a model is its size where every unit is there or not, and rises evenly between."""

import itertools
import math
import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auxin.accounting import count_parameters, flops_per_token
from auxin.edits import apply
from auxin.models.anatomy import anatomy
from auxin.planning.expected_size import ExpectedSize
from auxin.planning.pruning import Pruning, prunable
from auxin.planning.removed_sublayers import parameters_of_sublayers
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


def test_it_is_the_mean_over_all_models_that_may_be_left():
    """Oracle: every choice of key-value groups, feed-forward units and sublayers of a layer, each by its probability,
    and the parameters of each counted by hand; the other layer stays."""
    model = decoder(tie_word_embeddings=True)
    config, layer = model.config, LAYERS[0]
    counts: dict[Place, int] = {("key_value", layer): 2, ("ffn", layer): 3}
    parts = {"self_attn": 0.7, "mlp": 0.4}
    names = parameters_of_sublayers(model, [f"{layer}.{part}" for part in parts])
    size = ExpectedSize(model, anatomy(model, scopes=LAYERS), counts, sublayers=names)
    generator = torch.Generator().manual_seed(0)
    stays: dict[Place, torch.Tensor] = {p: torch.rand(n, generator=generator).double() for p, n in counts.items()}
    hidden, dim, per = config.hidden_size, config.head_dim, config.num_attention_heads // config.num_key_value_heads
    group, unit = dim * hidden * (2 * per + 2), 3 * hidden * config.intermediate_size // 3
    fixed = {"self_attn": hidden + 2 * dim, "mlp": hidden}  # norms
    of_units = {"self_attn": [group] * 2, "mlp": [unit] * 3}
    rest = model.num_parameters() - sum(fixed.values()) - sum(map(sum, of_units.values()))
    total = 0.0
    probabilities = [*parts.values(), *stays["key_value", layer].tolist(), *stays["ffn", layer].tolist()]
    for there in itertools.product((0, 1), repeat=len(probabilities)):
        chance = math.prod(p if is_there else 1 - p for p, is_there in zip(probabilities, there, strict=True))
        attention = there[0] * (fixed["self_attn"] + sum(map(operator.mul, of_units["self_attn"], there[2:4])))
        feed_forward = there[1] * (fixed["mlp"] + sum(map(operator.mul, of_units["mlp"], there[4:])))
        total += chance * (rest + attention + feed_forward)
    shares = stays | {("sublayer", f"{layer}.{part}"): torch.tensor([p]) for part, p in parts.items()}
    assert size.left(shares).item() * model.num_parameters() == pytest.approx(total, rel=1e-6)
    alone = size.of_a_unit()
    for part, fixed_size in fixed.items():
        assert alone["sublayer", f"{layer}.{part}"] == pytest.approx(fixed_size + sum(of_units[part]))


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_multiplied_costs_flops(tied):
    """At one token, where attention multiplies next to nothing else."""
    model = decoder(tie_word_embeddings=tied)
    whole = expected(model, multiplied=True).whole
    attended = 2 * 2 * 2 * model.config.num_attention_heads * model.config.head_dim
    assert flops_per_token(model, 1).forward == pytest.approx(2 * whole + attended, rel=0.02)
