"""Decoders with Llama's names: every switch of their configs that changes what is where, to twelve digits."""

import pytest

import auxin
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.words.widths import FEED_FORWARD
from tiny_decoders import rope
from tiny_models import change, logits, tiny

EXACT = 1e-12
IN_FLOAT32 = dict.fromkeys(("gemma2", "gemma3_text"), 1e-7)
"""Gemma keeps the root of the hidden size, by which it multiplies embeddings, in float32."""
VARIANTS = [
    ("mistral", {"sliding_window": None}),
    ("ministral", {"tie_word_embeddings": True}),
    ("mixtral", {"num_experts_per_tok": 1}),
    ("phi", {"qk_layernorm": False}),
    ("phi3", rope(1.0)),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True}),
    ("gemma3_text", {"attention_bias": True}),
    ("qwen2_moe", {"mlp_only_layers": [], "norm_topk_prob": True}),
    ("qwen2_moe", {"mlp_only_layers": [0, 1]}),
    ("qwen3_moe", {"mlp_only_layers": [1], "attention_bias": True}),
    ("olmo3", {"attention_bias": True}),
    ("olmoe", {"clip_qkv": 0.7}),
    ("granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("granitemoe", {"attention_bias": True}),
    ("cohere", {"use_qk_norm": False, "attention_bias": True}),
    ("cohere2", {"attention_bias": True}),
    ("smollm3", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    ("stablelm", {"use_parallel_residual": True}),
    ("starcoder2", {"use_bias": False}),
    ("glm4", {"attention_bias": True, "tie_word_embeddings": True}),
    ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    ("gpt_oss", {"tie_word_embeddings": True}),
]
PLANS = [
    ("hypercloning", {"factor": 2, "variant": "noisy"}),
    ("hypercloning", {"factor": 2, "variant": "diagonal"}),
    ("lemon", {"num_hidden_layers": 3}),
    ("llama-pro", {"layers": 4}),
]


def exactly(model, method, **settings):
    """By how much the output moved under a plan that promises not to move it."""
    before = logits(model)
    plan = auxin.plan(model, method, **settings)
    assert plan.promise == "exact"
    auxin.apply(plan, model)
    return change(before, logits(model))


@pytest.mark.parametrize(("method", "settings"), PLANS)
@pytest.mark.parametrize(("family", "values"), VARIANTS)
def test_every_variant_grows_exactly(family, values, method, settings):
    if values.get("mlp_only_layers") in ([0], [1]) and method != "hypercloning":
        pytest.skip("layers of two kinds: see the tests of depth")
    assert exactly(tiny(family, **values), method, **settings) <= IN_FLOAT32.get(family, EXACT)


@pytest.mark.parametrize("family", ["cohere", "phi", "phi3", "stablelm", "starcoder2", "granite", "smollm3"])
def test_larger_head_dimensions_are_exact_with_every_kind_of_rotation(family):
    """Halves (all but Cohere) or neighbours (Cohere), of all dimensions or a share, scaled by a constant (Granite)."""
    off = {"cohere": {"use_qk_norm": False}, "phi": {"qk_layernorm": False}}
    model = tiny(family, **off.get(family, {}))
    assert exactly(model, "lemon", hidden_size=2 * model.config.hidden_size, num_attention_heads=4) <= EXACT
    assert model.model.layers[0].self_attn.head_dim == model.config.hidden_size // 4


@pytest.mark.parametrize("family", ["ministral", "cohere2", "gpt_oss", "qwen3_moe", "glm4", "glm", "gemma3_text"])
def test_the_residual_is_padded_exactly(family):
    """Behind norms before, after, or before and after a part, with experts, with gains stored less one."""
    assert exactly(tiny(family), "lemon", hidden_size=24) <= IN_FLOAT32.get(family, EXACT)


def test_experts_the_shared_one_and_dense_layers_have_widths_of_their_own():
    model = tiny("qwen2_moe")
    sizes = anatomy(model).sizes
    assert {stream: sizes.units(stream) for stream in FEED_FORWARD} == {
        "ffn": 12,
        "expert_ffn": 10,
        "shared_expert_ffn": 14,
    }
    wanted = {"intermediate_size": 13, "moe_intermediate_size": 17, "shared_expert_intermediate_size": 16}
    assert exactly(model, "net2net", **wanted) <= EXACT
    assert {name: getattr(model.config, name) for name in wanted} == wanted
    assert model.model.layers[1].mlp.experts.down_proj.shape == (4, 16, 17)
    assert model.model.layers[1].mlp.shared_expert.up_proj.weight.shape == (16, 16)
    assert model.model.layers[0].mlp.up_proj.weight.shape == (13, 16)


def test_a_width_that_no_layer_has_is_refused_with_those_there_are():
    with pytest.raises(PlanError, match=r"intermediate_size = 20: this qwen3_moe model has no such size.*moe_inter"):
        auxin.plan(tiny("qwen3_moe"), "net2net", intermediate_size=20)
    with pytest.raises(PlanError, match=r"moe_intermediate_size = 20: this mistral model.* is intermediate_size\."):
        auxin.plan(tiny("mistral"), "net2net", moe_intermediate_size=20)


def test_a_norm_for_every_head_takes_no_larger_heads():
    with pytest.raises(PlanError, match=r"A head dimension of 8 instead of 4: the norm on queries and keys"):
        auxin.plan(tiny("cohere"), "lemon", hidden_size=32, num_attention_heads=4)


def test_a_parameter_of_another_shape_is_named():
    model = tiny("mistral")
    model.model.norm.weight = type(model.model.norm.weight)(model.model.norm.weight[:9].clone())
    with pytest.raises(PlanError, match=r"model\.norm\.weight has shape \[9\], and the anatomy of mistral says \[16\]"):
        anatomy(model)
