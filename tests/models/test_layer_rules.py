"""Rules by numbers, followed over random orders: what the new values say of each layer is what the old ones did."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auxin.errors import PlanError
from auxin.models.layer_rules import arranged_values, is_per_layer

LAYERS = 4
ORDERS = st.lists(st.integers(0, LAYERS - 1), min_size=1, max_size=9)


def config(**values):
    return SimpleNamespace(to_dict=lambda: values)


def dense_first(values, number, length):
    return number < values["first_k_dense_replace"]


def shared_last(values, number, length):
    return number >= length - values["num_kv_shared_layers"]


def attends(values, number, length):
    return number % values["attn_layer_period"] == values["attn_layer_offset"]


def sparse(values, number, length):
    return number not in values["mlp_only_layers"] and (number + 1) % values["decoder_sparse_step"] == 0


def between(values, number, length):
    first, last = values["moe_layer_start_index"], values["moe_layer_end_index"]
    return first <= number <= (length - 1 if last == -1 else last) and (number + 1) % values["moe_layer_interval"] == 0


def listed(values, number, length):
    return number in values["attn_layer_indices"]


RULES = [
    (dense_first, {"first_k_dense_replace": st.integers(0, LAYERS)}),
    (shared_last, {"num_kv_shared_layers": st.integers(0, LAYERS)}),
    (attends, {"attn_layer_period": st.integers(2, 4), "attn_layer_offset": st.integers(0, 1)}),
    (sparse, {"mlp_only_layers": st.lists(st.integers(0, 3), max_size=2), "decoder_sparse_step": st.integers(1, 3)}),
    (
        between,
        {
            "moe_layer_start_index": st.integers(0, 3),
            "moe_layer_end_index": st.integers(-1, 3),
            "moe_layer_interval": st.integers(1, 2),
        },
    ),
    (listed, {"attn_layer_indices": st.lists(st.integers(0, 3), max_size=3, unique=True)}),
]


@pytest.mark.parametrize(("says", "fields"), RULES)
@given(data=st.data(), order=ORDERS)
def test_a_rule_says_the_same_of_each_layer_or_the_order_is_refused(says, fields, data, order):
    values = {name: data.draw(numbers) for name, numbers in fields.items()}
    wanted = [says(values, old, LAYERS) for old in order]
    unsayable = {dense_first: wanted != sorted(wanted, reverse=True), shared_last: wanted != sorted(wanted)}.get(says)
    if unsayable:
        with pytest.raises(PlanError, match=f"by {next(iter(fields))} = .*no value"):
            arranged_values(config(**values), order, LAYERS)
        return
    try:
        new = {**values, **arranged_values(config(**values), order, LAYERS)}
    except PlanError:
        new = None
    if unsayable is False or says in (sparse, listed):
        assert new is not None, "which can say it"
    if new is not None:
        assert [says(new, number, len(order)) for number in range(len(order))] == wanted


def test_values_that_serve_stay():
    assert arranged_values(config(mlp_only_layers=[], decoder_sparse_step=2), [0, 1, 2, 3, 0, 1], LAYERS) == {}
    assert arranged_values(config(first_k_dense_replace=1), [0, 2, 1, 3, 3], LAYERS) == {}


@given(value=st.floats(0.1, 10), old=st.integers(1, 80), new=st.integers(1, 160))
def test_a_factor_over_the_root_of_the_number_of_layers_stays(value, old, new):
    order = [0] * new
    said = arranged_values(config(scale_depth=value), order, old).get("scale_depth", value)
    assert said / math.sqrt(new) == pytest.approx(value / math.sqrt(old), rel=3e-16)


def test_lists_are_of_layers_by_their_names_and_lengths():
    assert is_per_layer("layer_types", ["a", "b"], 2)
    assert is_per_layer("num_attention_heads_per_layer", [4, 4], 2)
    assert not is_per_layer("layer_types", ["a", "b"], 3)
    for other in (
        "eos_token_id",
        "image_size",
        "conv_kernel",
        "layer_norm_eps",
        "mtp_layer_types",
        "vision_feature_layer",
    ):
        assert not is_per_layer(other, [1, 2], 2)


def test_lists_and_tables_are_arranged_and_taken_outputs_follow():
    values = {
        "layer_types": ["a", "b", "c", "d"],
        "deepstack_visual_indexes": [1, -1],
        "moe_layers": [1, 3],
        "eos_token_id": [1, 2, 3, 4],
        "per_layer_config": {"1": {"head_dim": 8}},
    }
    assert arranged_values(config(**values), [0, 1, 1, None, 3], LAYERS) == {
        "layer_types": ["a", "b", "b", "b", "d"],
        "deepstack_visual_indexes": [2, -1],
        "moe_layers": [1, 2, 3, 4],
        "per_layer_config": {1: {"head_dim": 8}, 2: {"head_dim": 8}, 3: {"head_dim": 8}},
    }
    with pytest.raises(PlanError, match="deepstack_visual_indexes: layer 1, whose output is taken from there, is gone"):
        arranged_values(config(**values), [0, 2, 3], LAYERS)
