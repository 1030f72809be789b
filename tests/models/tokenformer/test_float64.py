"""A TokenFormer in float64 computes in float64 throughout: weights, scales, rotary tables, softmax and loss."""

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import auxin
from auxin.models.tokenformer import PUBLISHED, TokenFormerConfig, TokenFormerForCausalLM
from auxin.nn import Pattention
from oracles import tokenformer as oracle

PATTS = ("attention.query", "attention.key", "attention.value", "attention.proj", "mlp")
VOCABULARY, HEADS, LAYERS = 61, 2, 3


def config(**changes):
    # No root of a size here is a whole number. The official code, and so the oracle, has no epsilon in Pattention.
    sizes = {"qkv_tokens": 11, "proj_tokens": 7, "ffn_tokens": 29, "hidden_size": 32, "num_hidden_layers": LAYERS}
    values = {"vocab_size": VOCABULARY, "num_attention_heads": HEADS, "pattention_eps": 1e-30, **PUBLISHED, **sizes}
    return TokenFormerConfig(**{**values, **changes})


def awake(model):
    """Weights large enough that attention is far from uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4, generator=generator)
    return model.eval()


def official(model):
    """The model's weights under the official names."""
    weights = model.state_dict()
    state = {"sequential.0.word_embeddings.weight": weights["model.embed_tokens.weight"]}
    for layer in range(LAYERS):
        for patt in PATTS:
            ours, theirs = f"model.layers.{layer}.{patt}", f"sequential.{layer + 2}.{patt}"
            state[f"{theirs}.key_param_tokens"] = weights[f"{ours}.key_tokens"]
            state[f"{theirs}.value_param_tokens"] = weights[f"{ours}.value_tokens"]
    for name in ("weight", "bias"):
        state[f"sequential.{LAYERS + 3}.norm.{name}"] = weights[f"model.norm.{name}"]
    return state


def tokens(seed=1):
    return torch.randint(VOCABULARY, (2, 23), generator=torch.Generator().manual_seed(seed))


def assert_in_float64(model, reference=None):
    """The model's logits are those of the oracle with the weights of `reference` (default: its own)."""
    assert {t.dtype for t in (*model.parameters(), *model.buffers())} == {torch.float64}
    with torch.no_grad():
        ours = model(tokens()).logits
    exact = oracle.logits(official(reference or model), tokens(), HEADS)
    assert ours.dtype == torch.float64
    assert (ours - exact).abs().max() <= 1e-12 * exact.abs().max()


def from_config(folder):
    return awake(AutoModelForCausalLM.from_config(config(), dtype=torch.float64))


def cast(folder):
    return awake(TokenFormerForCausalLM(config())).double()


def cast_back(folder):
    return awake(TokenFormerForCausalLM(config())).double().bfloat16().half().float().double()


def loaded(folder):
    awake(TokenFormerForCausalLM(config())).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def loaded_as_saved(folder):
    from_config(folder).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [from_config, cast, cast_back, loaded, loaded_as_saved])
def test_however_it_was_built_its_logits_are_the_oracles(build, attention, tmp_path):
    model = build(tmp_path)
    model.set_attn_implementation(attention)
    assert_in_float64(model)


def test_the_oracle_sees_what_float32_would_round():
    """The measure can fail: one scale rounded to float32 is seen."""
    model = from_config(None)
    mlp = model.model.layers[1].mlp
    mlp.tau.copy_(mlp.tau.float())
    with pytest.raises(AssertionError):
        assert_in_float64(model)


def test_the_loss_is_in_float64_too():
    model, ids = from_config(None), tokens()
    labels = ids.clone()
    labels[0, :5] = -100
    log_probabilities = oracle.logits(official(model), ids, HEADS).log_softmax(-1)[:, :-1]
    picked = -log_probabilities.gather(-1, ids[:, 1:, None])[..., 0][labels[:, 1:] != -100]
    with torch.no_grad():
        mean, total = model(ids, labels=labels).loss, model(ids, labels=labels, num_items_in_batch=7).loss
        shifted = model(ids, labels=labels, shift_labels=labels.roll(-1, dims=1)).loss
    torch.testing.assert_close(mean, picked.mean(), rtol=1e-13, atol=0)
    torch.testing.assert_close(total, picked.sum() / 7, rtol=1e-13, atol=0)
    assert shifted.dtype == torch.float64
    model.loss_function = lambda logits, **_: logits.sum() * 0 + 3
    assert model(ids, labels=labels).loss == 3, "a loss of the user's own is left alone"


@pytest.mark.parametrize("regime", ["duplicate", "grouped"])
def test_after_a_growth(regime):
    """The scales that a growth sets are float64's, whatever type the skeleton is in that it goes by."""
    model = from_config(None)
    before = copy.deepcopy(model)
    auxin.grow(model, qkv_tokens=22, proj_tokens=14, ffn_tokens=58, regime=regime)
    for slot, patt in (("qkv", "attention.key"), ("proj", "attention.proj"), ("ffn", "mlp")):
        tau = model.model.layers[2].get_submodule(patt).tau
        assert tau.tolist() == [math.sqrt(size) for size in model.config.group_sizes(slot)]
    assert_in_float64(model, before)
    if regime == "duplicate":
        assert_in_float64(model)
    else:
        assert_in_float64(model.truncate_groups(1))


def test_one_graph_under_compile():
    model, ids = from_config(None), tokens()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected, got = (each(ids, labels=ids, use_cache=False) for each in (model, compiled))
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-12)


def test_a_step_with_a_cache_equals_the_whole():
    model, ids = from_config(None), tokens()
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        last = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
        whole = model(ids).logits[:, -1]
    assert (last - whole).abs().max() <= 1e-12 * whole.abs().max()


def test_casting_back_and_forth_leaves_the_float32_model_as_it_was():
    model = awake(TokenFormerForCausalLM(config()))
    with torch.no_grad():
        before = model(tokens()).logits
        after = model.double().float()(tokens()).logits
    assert torch.equal(after, before)
    assert {m.tau.dtype for m in model.modules() if isinstance(m, Pattention)} == {torch.float32}
