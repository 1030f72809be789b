"""A config value that has no effect on the model that is built is refused, and no other is."""

import pytest
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from auxin.edits import Plan, SetConfig, apply
from auxin.edits.effects import _is_size
from auxin.edits.resolution import resolve
from auxin.errors import PlanError
from auxin.models.loading import skeleton
from cut_models import narrow_edits
from tiny_models import inputs, tiny


def set_values(model, **values):
    return apply(Plan(method="test", promise="none", edits=[SetConfig(values=values)]), model, probe=inputs(model))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("vit", "pooler_output_size"),  # of a pooler that this model has not
        ("llama", "num_of_nothing"),
        ("t5", "something"),
        ("qwen2", "max_of_nothing"),
    ],
)
def test_values_that_the_build_takes_nothing_from_are_refused(family, name):
    model = tiny(family)
    if not hasattr(model.config, name):
        setattr(model.config, name, 3)  # as a config.json of somebody may have it
    with pytest.raises(PlanError, match=rf"{name} = 7 has no effect: .* the same with {name} = "):
        set_values(model, **{name: 7})


def test_a_size_that_another_value_overrides_is_refused():
    """A model of experts in every layer takes their width from moe_intermediate_size."""
    config = Qwen3MoeConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=12,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        num_experts=2,
        num_experts_per_tok=1,
    )
    model = skeleton(config, Qwen3MoeForCausalLM)
    with pytest.raises(
        PlanError, match=r"intermediate_size = 24 has no effect: .*with intermediate_size = 12.*what the"
    ):
        resolve([SetConfig(values={"intermediate_size": 24})], model)
    with pytest.raises(PlanError, match=r"asks for"):  # is taken, and the parameters do not follow
        resolve([SetConfig(values={"moe_intermediate_size": 24})], model)


def test_a_size_that_every_layer_has_of_its_own_is_refused():
    model = tiny("llama")
    apply(Plan(method="cut", promise="none", edits=narrow_edits("llama", "*")), model)
    with pytest.raises(PlanError, match=r"intermediate_size = 24 has no effect"):
        set_values(model, intermediate_size=24)


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("llama", {"use_cache": False}),
        ("llama", {"eos_token_id": 3}),
        ("llama", {"attention_dropout": 0.5}),
        ("llama", {"rms_norm_eps": 0.5}),
        ("llama", {"initializer_range": 0.5}),
        ("llama", {"max_position_embeddings": 64}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
        ("llama", {"intermediate_size": 12, "hidden_size": 16}),
        ("gpt2", {"n_inner": 12}),
        ("t5", {"scale_decoder_outputs": False}),
        ("t5", {"relative_attention_max_distance": 20}),
        ("bert", {"chunk_size_feed_forward": 7}),
        ("bert", {"classifier_dropout": 0.5}),
        ("vit", {"hidden_dropout_prob": 0.5}),
    ],
    ids=str,
)
def test_values_that_are_read_when_the_model_runs_or_are_what_they_were_are_not(family, values):
    model = tiny(family)
    set_values(model, **values)
    assert {name: getattr(model.config, name) for name in values} == values


def test_a_size_that_says_what_would_follow_anyway_is_not():
    """GPT-2's feed-forward part is four times as wide as the residual where nothing else is said."""
    model = tiny("gpt2", n_inner=None)
    set_values(model, n_inner=64)
    assert model.config.n_inner == 64


@pytest.mark.parametrize(
    ("name", "is_size"),
    [
        ("hidden_size", True),
        ("num_key_value_heads", True),
        ("n_inner", True),
        ("d_ff", True),
        ("head_dim", True),
        ("decoder_layers", True),
        ("q_lora_rank", True),
        ("attention_chunk_size", False),
        ("sliding_window_size", False),
        ("num_logits_to_keep", False),
        ("decoder_start_token_id", False),
        ("max_position_embeddings", False),
        ("rope_theta", False),
    ],
)
def test_sizes_are_told_by_their_names(name, is_size):
    assert _is_size(name) == is_size
