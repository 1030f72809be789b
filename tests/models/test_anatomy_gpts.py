"""The families around GPT, and decoders with low-rank attention or shared experts, with each switch of their configs
that changes what is built or how scores are scaled: growths are exact, or refused for what stands against them."""

import copy
import re

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from auxin.edits import apply
from auxin.errors import PlanError
from auxin.methods import methods
from auxin.models.anatomy import anatomy
from auxin.planning.bench import Bench
from tiny_models import MODELS, InDouble, change, inputs, logits, tiny

UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
ALIBI_STAYS = r"the biases of ALiBi are divided by the root of the head dimension.*Leave hidden_size out"
POST_NORM = r"an identity block is impossible in this architecture, whose norms come after the residual sum"
NO_GAIN = r"no norm with a gain comes right before it that could take up the number of copies"
EPSILON = r"padding needs norms with a gain and an epsilon that can be scaled"
CLIPPED = r"queries can't make up for where they are clipped \(clip_qkv = 0\.8\)"
ONE_ROTATION = r"every rotary frequency must exist again"
SUM = r"padding does not pass a norm that comes after the residual sum"
HEAD_NORM = r"the norm on queries and keys would divide by another mean square"

VARIANTS = [
    ("falcon", {}, {}),
    ("falcon", {**UNTIED, "num_ln_in_parallel_attn": 1}, {}),
    ("falcon", {"num_kv_heads": 8}, {}),
    ("falcon", {"num_kv_heads": 1}, {}),
    ("falcon", {"alibi": True}, dict.fromkeys(("copies", "larger heads", "padded", "copies and deeper"), ALIBI_STAYS)),
    ("falcon multi-query", {"parallel_attn": False}, {}),
    ("falcon multi-query", {"ffn_hidden_size": None, "bias": False}, {}),
    ("falcon multi-query", {"multi_query": False}, {}),
    ("falcon multi-query", {"multi_query": False, "parallel_attn": False, **UNTIED}, {}),
    ("falcon multi-query", {"num_attention_heads": 1}, {"padded": ONE_ROTATION}),
    ("falcon alibi", {}, dict.fromkeys(("copies", "larger heads", "padded", "copies and deeper"), ALIBI_STAYS)),
    ("bloom", {}, {"padded": r"padding does not pass transformer\.word_embeddings_layernorm"}),
    ("bloom", UNTIED, {"padded": r"padding does not pass transformer\.word_embeddings_layernorm"}),
    (
        "bloom",
        {"apply_residual_connection_post_layernorm": True},
        {"padded": SUM, "copies and deeper": POST_NORM, "deeper": POST_NORM},
    ),
    ("mpt", {}, {}),
    ("mpt", UNTIED, {}),
    ("mpt", {"n_heads": 6, "d_model": 24}, {}),
    (
        "mpt",
        {"attn_config": {"clip_qkv": 0.8}},
        dict.fromkeys(("copies", "larger heads", "padded", "copies and deeper"), CLIPPED),
    ),
    ("mpt", {"attn_config": {"clip_qkv": 0.8, "softmax_scale": 0.7}}, {}),
    ("opt", {}, {"padded": EPSILON}),
    ("opt", {**UNTIED, "enable_bias": False}, {"padded": EPSILON}),
    ("opt", {**UNTIED, "layer_norm_elementwise_affine": False}, {"padded": EPSILON}),
    (
        "opt",
        {"_remove_final_layer_norm": True},
        dict.fromkeys(("copies", "larger heads", "padded", "copies and deeper"), NO_GAIN),
    ),
    (
        "opt",
        {**UNTIED, "do_layer_norm_before": False},
        {"padded": SUM, "copies and deeper": POST_NORM, "deeper": POST_NORM},
    ),
    ("opt projected", {}, {"padded": SUM, "copies and deeper": POST_NORM, "deeper": POST_NORM}),
    ("opt projected", {"do_layer_norm_before": True}, {"padded": EPSILON}),
    ("gptj", {}, {}),
    ("gptj", {**TIED, "n_inner": None}, {}),
    ("gpt_neo", {}, {}),
    ("gpt_neo", {**UNTIED, "intermediate_size": None}, {}),
    ("gpt_bigcode", {"n_inner": None, **UNTIED}, {}),
    ("gpt_bigcode", {"scale_attn_weights": False}, {}),
    ("gpt_bigcode", {"n_head": 1}, {}),
    ("gpt_bigcode by heads", {}, {}),
    ("gpt_bigcode by heads", {"scale_attn_weights": False, "n_inner": 12}, {}),
    ("deepseek_v2", {"q_lora_rank": None, "attention_bias": False}, {}),
    ("deepseek_v2", {"first_k_dense_replace": 0, "topk_method": "greedy"}, {}),
    ("deepseek_v2", {"first_k_dense_replace": 2}, {}),
    ("deepseek_v3", {"q_lora_rank": 7, "rope_interleave": False}, {}),
    ("deepseek_v3", {"n_shared_experts": 1, "first_k_dense_replace": 0, **TIED}, {}),
    ("glm4_moe", {"use_qk_norm": False, "attention_bias": True}, {}),
    ("dots1", {"n_shared_experts": 1}, {}),
    ("ernie4_5_moe", {"moe_num_shared_experts": 0, "use_bias": False}, {}),
    ("nemotron", {"head_dim": 6, "attention_bias": True, "mlp_bias": True}, {}),
    ("nemotron", TIED, {}),
    ("helium", {"num_key_value_heads": 1, **TIED}, {}),
    ("arcee", {"mlp_bias": True, "attention_bias": True}, {}),
    ("apertus", {"attention_bias": True, **TIED}, {"larger heads": HEAD_NORM}),
    ("seed_oss", {"attention_bias": False, "attention_out_bias": True}, {}),
    ("hunyuan_v1_dense", TIED, {}),
    ("nanochat", {"attention_bias": True}, {"padded": EPSILON, "larger heads": HEAD_NORM}),
    ("nanochat", TIED, dict.fromkeys(("copies", "larger heads", "padded", "copies and deeper"), NO_GAIN)),
    ("olmo", {"clip_qkv": 0.8}, {"padded": EPSILON, "larger heads": CLIPPED}),
]
"""Name, what is unlike the usual config, and which growths are refused, with the reason."""


def growths(model):
    """Methods with settings, by what they do."""
    sizes, fields = anatomy(model).sizes, anatomy(model).fields
    hidden, layers = sizes.residual, model.config.num_hidden_layers
    yield "copies", "hypercloning", {"factor": 2, "variant": "noisy"}
    yield "larger heads", "hypercloning", {"hidden_size": 2 * hidden, "num_attention_heads": sizes.query_heads}
    yield "padded", "lemon", {"hidden_size": hidden * 3 // 2}
    # Which layers hold experts depends on their number.
    if not hasattr(model.config, "moe_intermediate_size"):
        yield "copies and deeper", "lemon", {"hidden_size": 2 * hidden, "num_hidden_layers": layers + 1}
        yield "deeper", "llama-pro", {"group_size": 1}
    else:
        yield "copies and deeper", "lemon", {"hidden_size": 2 * hidden}
    if fields.ffn and sizes.ffn:
        yield "wider", "net2net", {"intermediate_size": sizes.ffn * 3 // 2}


def grown(model, name, settings):
    """A copy of the model after the method."""
    model, method = copy.deepcopy(model), methods()[name]
    plan = method.plan(Bench(model), method.settings.parse(settings))
    assert plan.promise == "exact"
    apply(plan, model, probe=inputs(model))
    return model


@pytest.mark.parametrize(("name", "config", "refused"), VARIANTS, ids=str)
def test_growths_are_exact_or_refused_for_what_stands_against_them(name, config, refused):
    model = tiny(name, seed=3, **config)
    before, tried = logits(model), set()
    for what, method, settings in growths(model):
        tried.add(what)
        if what in refused:
            with pytest.raises(PlanError, match=refused[what]):
                grown(model, method, settings)
        else:
            # Routers go to float32.
            allowed = 1e-6 if any(name.endswith("experts") for name, _ in model.named_modules()) else 1e-12
            assert change(before, logits(grown(model, method, settings))) < allowed, what
    assert set(refused) <= tried


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("falcon", {}),
        ("falcon", {"num_kv_heads": 8}),
        ("falcon multi-query", {"multi_query": False}),
        ("gpt_bigcode by heads", {}),
        ("deepseek_v2", {}),
        ("deepseek_v3", {}),
        ("glm4_moe", {}),
        ("helium", {}),
    ],
    ids=str,
)
def test_each_copy_can_read_its_own_copy(name, config):
    model = tiny(name, seed=3, **config)
    after = logits(grown(model, "hypercloning", {"factor": 2, "variant": "diagonal"}))
    assert change(logits(model), after) < 1e-6


HEADS = [
    (AutoModelForSequenceClassification, ("bloom", "mpt", "opt", "opt projected", "falcon", "gptj", "gpt_neo", "gpt2")),
    (AutoModelForTokenClassification, ("bloom", "mpt", "falcon multi-query", "gpt_neox", "gpt_bigcode", "deepseek_v3")),
    (AutoModelForQuestionAnswering, ("bloom", "opt projected", "falcon", "gptj", "gpt_neo", "gpt2", "nemotron")),
]


def with_head(auto, name):
    """A tiny model of the architecture with another head, or with none."""
    _, config, values = MODELS[name]
    MODELS["with head"] = (auto._model_mapping[config], config, values)
    try:
        return tiny("with head", seed=3, pad_token_id=2)
    finally:
        del MODELS["with head"]


def outputs(model):
    """All that the model says, in one row."""
    with torch.no_grad(), InDouble():
        result = model(**inputs(model))
    return torch.cat([value.flatten() for value in result.values() if isinstance(value, torch.Tensor)])


@pytest.mark.parametrize(("auto", "name"), [(auto, name) for auto, names in HEADS for name in names])
def test_other_heads_read_what_grew(auto, name):
    model = with_head(auto, name)
    before = outputs(model)
    assert change(before, outputs(grown(model, "hypercloning", {"factor": 2}))) < 1e-6
    if anatomy(model).fields.ffn:
        assert change(before, outputs(grown(model, "net2net", {"intermediate_size": 18}))) < 1e-6


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "tokenformer", "falcon alibi", "bloom", "opt projected", "gptj"])
def test_a_model_without_a_head_has_the_anatomy_of_one_with(name):
    headless = with_head(AutoModel, name) if name != "tokenformer" else tiny(name).base_model
    found, whole = anatomy(headless), anatomy(tiny(name))
    assert found.head is None
    assert found.sizes == whole.sizes
    prefix = f"{tiny(name).base_model_prefix}."
    inside = [role.pattern.removeprefix(prefix) for role in whole.roles if role.pattern.startswith(prefix)]
    assert [role.pattern for role in found.roles] == inside
    before = outputs(headless)
    assert change(before, outputs(grown_layers(headless, found))) < 1e-12


def grown_layers(model, found):
    """A layer more, or where no identity block goes, wider inside."""
    if found.norm_position == "after_residual":
        return grown(model, "net2net", {"intermediate_size": 18})
    return grown(model, "llama-pro", {"group_size": 2})


@pytest.mark.parametrize(
    ("name", "config", "field"),
    [
        ("falcon multi-query", {"multi_query": False}, "num_kv_heads"),
        ("deepseek_v3", {}, "num_key_value_heads"),
        ("opt", {}, "word_embed_proj_dim"),
        ("helium", {}, "head_dim"),
    ],
)
def test_values_that_must_be_the_same_follow(name, config, field):
    model = tiny(name, seed=3, **config)
    before = getattr(model.config, field)
    settings = {"hidden_size": 32}
    if field == "head_dim":
        settings["num_attention_heads"] = 4
    elif name == "deepseek_v3":
        settings["num_attention_heads"] = 8
    assert getattr(grown(model, "hypercloning", settings).config, field) == 2 * before


@pytest.mark.parametrize(
    ("method", "settings", "name", "reason"),
    [
        ("net2net", {"num_attention_heads": 8}, "bloom", "num_attention_heads = 8: the slopes of ALiBi"),
        ("masked", {"hidden_size": 32}, "mpt", "new heads are whole heads here, and num_attention_heads = 4 stays"),
        ("lemon", {"hidden_size": 18}, "bloom", "is no multiple of the 4 heads, whose number stays: the slopes"),
        (
            "hypercloning",
            {"factor": 2, "variant": "diagonal"},
            "mpt",
            "needs 2 copies of everything, as of hidden_size. Their number can't change here; ask for",
        ),
        ("hypercloning", {"num_key_value_heads": 2}, "gpt_bigcode", "all query heads read one key-value head"),
        ("hypercloning", {"intermediate_size": 99, "factor": 2}, "bloom", "works it out from the hidden size: 128 for"),
        (
            "masked",
            {"layers": 3},
            "apertus",
            "act_fn.beta is a constant that the model's class sets where it is built, and no rule of its",
        ),
    ],
)
def test_what_can_not_change_is_refused_in_the_models_terms(method, settings, name, reason):
    with pytest.raises(PlanError, match=re.escape(reason)):
        grown(tiny(name), method, settings)


def test_new_layers_hold_the_buffers_that_their_rule_of_initialisation_says():
    model = tiny("deepseek_v3", first_k_dense_replace=0)
    with torch.no_grad():
        model.model.layers[0].mlp.gate.e_score_correction_bias.fill_(0.1)
    after = grown(model, "masked", {"layers": 3})
    bias = dict(after.named_buffers())["model.layers.2.inner.mlp.gate.e_score_correction_bias"]
    assert torch.equal(bias, torch.zeros_like(bias))
    assert change(logits(model), logits(after)) < 1e-6
