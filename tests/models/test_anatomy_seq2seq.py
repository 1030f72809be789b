"""Encoder-decoders and models of sound with their heads and without, and with every switch that changes them."""

import copy

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import auxin
from auxin.edits import ConfigureModule, SetConfig
from auxin.errors import PlanError
from auxin.methods import methods
from auxin.models.anatomy import anatomy
from auxin.planning.depth import depth
from auxin.planning.size_edits import size_edits, size_values
from auxin.planning.width import widen
from auxin.planning.width_maps import Widening, circular, feed_forward_maps, head_maps, scoped_maps
from auxin.words.widths import Width
from outputs import output
from tiny_models import InDouble, change, filled, inputs, tiny
from tiny_seq2seq import MODELS

EXACT = 1e-12
HEADS = {
    "bart": (
        "BartModel",
        "BartForCausalLM",
        "BartForSequenceClassification",
        "BartForQuestionAnswering",
    ),
    "mbart": ("MBartModel", "MBartForCausalLM", "MBartForSequenceClassification", "MBartForQuestionAnswering"),
    "plbart": ("PLBartModel", "PLBartForCausalLM", "PLBartForSequenceClassification"),
    "pegasus": ("PegasusModel", "PegasusForCausalLM"),
    "marian": ("MarianModel", "MarianForCausalLM"),
    "blenderbot": ("BlenderbotModel", "BlenderbotForCausalLM"),
    "m2m_100": ("M2M100Model",),
    "t5 encoder": (
        "T5Model",
        "T5ForConditionalGeneration",
        "T5ForSequenceClassification",
        "T5ForTokenClassification",
        "T5ForQuestionAnswering",
    ),
    "mt5": ("MT5Model", "MT5EncoderModel", "MT5ForSequenceClassification", "MT5ForTokenClassification"),
    "umt5": ("UMT5Model", "UMT5EncoderModel", "UMT5ForTokenClassification", "UMT5ForQuestionAnswering"),
    "whisper": ("WhisperForAudioClassification",),
    "wav2vec2": ("Wav2Vec2Model", "Wav2Vec2ForSequenceClassification", "Wav2Vec2ForAudioFrameClassification"),
    "wav2vec2 stable": ("Wav2Vec2ForSequenceClassification", "Wav2Vec2ForPreTraining"),
    "hubert": ("HubertModel", "HubertForCTC"),
}
EVERY_HEAD = [(family, name) for family, names in HEADS.items() for name in names]
GATED = {"feed_forward_proj": "gated-gelu"}
UNTIED = {"tie_word_embeddings": False}
LAYERS = {"encoder_layers": 3, "decoder_layers": 2}
DROPPED = {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5}
SWITCHES = [
    *((family, switch) for family in ("bart", "mbart", "pegasus") for switch in (UNTIED, LAYERS, DROPPED)),
    *((family, {"scale_embedding": False}) for family in ("bart", "mbart", "pegasus", "blenderbot")),
    *((family, {"encoder_ffn_dim": 14, "decoder_ffn_dim": 14}) for family in ("bart", "mbart")),
    ("marian", {"share_encoder_decoder_embeddings": False}),
    ("marian", {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 23}),
    ("t5 encoder", GATED),
    ("mt5", GATED),
    ("umt5", GATED),
    ("mt5", {"num_decoder_layers": 3}),
    ("whisper", DROPPED),
    ("whisper", LAYERS),
    ("whisper", {"scale_embedding": False}),
    ("wav2vec2", {"layerdrop": 0.5}),
    ("wav2vec2", {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}),
    ("wav2vec2", {"num_conv_pos_embedding_groups": 1}),
    ("wav2vec2", {"num_conv_pos_embedding_groups": 16, "num_conv_pos_embeddings": 3}),
    ("hubert", {"feat_proj_layer_norm": False}),
    ("hubert headless", {"layerdrop": 0.5}),
]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """LiGO writes the file of its operator where it is asked for."""
    monkeypatch.chdir(tmp_path)


def made(family: str, name: str = "", **config) -> PreTrainedModel:
    """The tiny model of `family` with another head."""
    usual, config_class, values = MODELS[family]
    values = dict(values)
    # The cache of a decoder alone is as long as the encoder.
    values |= {"encoder_layers": 5} if name.endswith("CausalLM") else {}
    values = {**values, "num_labels": 2 if "QuestionAnswering" in name else 3, **config}
    model_class = getattr(transformers, name) if name else usual
    return filled(model_class(config_class(**values)), seed=3)


def outputs(model: PreTrainedModel) -> list[torch.Tensor]:
    """What the model says, in float64 throughout."""
    given = inputs(model)
    if "ForSequenceClassification" in type(model).__name__ and "input_ids" in given:
        # They read the decoder at the end token, of the text itself.
        ids = given["input_ids"]
        given = {"input_ids": torch.cat([ids, torch.full_like(ids[:, :1], model.config.eos_token_id)], 1)}
    with torch.no_grad(), InDouble():
        result = model(**given)
    if "start_logits" in result:
        return [result.start_logits, result.end_logits]
    if "projected_states" in result:
        return [result.projected_states]
    return [output(result)]


def moved(model: PreTrainedModel, plan) -> float:
    """How far the outputs move, of wider hidden states the units that were there."""
    before, model = outputs(model), copy.deepcopy(model)
    with InDouble():
        auxin.apply(plan, model)
    pairs = zip(before, outputs(model), strict=True)
    return max(change(old, new[..., : old.shape[-1]]) for old, new in pairs)


def said(plan: auxin.Plan) -> dict[str, object]:
    """The values that a plan sets in the config, which are all that it says of widths."""
    assert not any(isinstance(edit, ConfigureModule) for edit in plan.edits)
    return {key: value for edit in plan.edits if isinstance(edit, SetConfig) for key, value in edit.values.items()}


def grown_alone(model: PreTrainedModel, layer: str, units: int) -> auxin.Plan:
    """A plan that gives one layer more feed-forward units."""
    body = anatomy(model, scopes=[layer])
    old = body.sizes
    query, key_value = head_maps(old, old.query_heads, old.key_value_heads)
    scoped = scoped_maps(old, old, circular, lambda before, after: (query, key_value))
    scoped["ffn", layer] = circular(old.units("ffn", layer) or 0, units)
    same = feed_forward_maps(old, old, circular)
    residual = circular(old.residual, old.residual)
    edits = widen(body, Widening(residual, query, key_value, same, old.head_dim, scoped=scoped)).edits
    return auxin.Plan(method="one layer alone", promise="exact", edits=edits)


def plans(model: PreTrainedModel) -> dict[str, dict[str, object]]:
    """Settings of exact methods for a model, those that it takes."""
    found = anatomy(model)
    wider: dict[str, object] = {"intermediate_size": 21}
    deeper = {"num_hidden_layers": 1 + max(depth(model, stack) for stack in found.stacks)}
    pre_norm = found.norm_position != "after_residual"
    settings = {"hypercloning": wider if ("residual" in dict(found.fixed_widths)) else {"factor": 2}}
    settings["net2net"] = wider | (deeper if pre_norm else {})
    settings["lemon"] = methods()["lemon"].examples(model)
    settings |= {"llama-pro": {"group_size": 1}} if pre_norm else {}
    return settings


def check_all(model: PreTrainedModel) -> None:
    for name, settings in plans(model).items():
        plan = auxin.plan(model, name, **settings)
        assert plan.promise == "exact"
        assert moved(model, plan) <= EXACT, (name, settings)


@pytest.mark.parametrize(("family", "name"), EVERY_HEAD)
def test_exact_with_any_head_and_without(family, name):
    check_all(made(family, name))


@pytest.mark.parametrize(("family", "switch"), SWITCHES)
def test_exact_with_every_switch(family, switch):
    check_all(made(family, **switch))


def test_a_decoder_alone_gets_no_more_layers_than_its_cache():
    model = made("mbart", "MBartForCausalLM", encoder_layers=2)
    with pytest.raises(PlanError, match=r"decoder_layers = 4: transformers makes the cache .* encoder_layers = 2"):
        auxin.plan(model, "llama-pro", group_size=1)


def test_the_config_says_the_widths_of_each_stack():
    """Those asked for are both stacks'; a factor multiplies each stack's own; what one alone has, it alone gets."""
    model = made("bart")
    encoder, decoder = "model.encoder.layers", "model.decoder.layers"
    assert anatomy(model).sizes.units("ffn", encoder) == 12
    assert anatomy(model).sizes.units("ffn", decoder) == 14
    both = auxin.plan(model, "net2net", intermediate_size=20)
    assert said(both) == {"encoder_ffn_dim": 20, "decoder_ffn_dim": 20}
    each = said(auxin.plan(model, "hypercloning", factor=2))
    assert (each["encoder_ffn_dim"], each["decoder_ffn_dim"]) == (24, 28)
    assert (each["encoder_attention_heads"], each["decoder_attention_heads"]) == (8, 8)
    found = anatomy(model, scopes=[encoder])
    new = found.sizes.with_widths([*found.sizes.scoped, Width("ffn", encoder, 30)])
    config, modules = size_edits(found, new)
    assert size_values(found, config) == {"encoder_ffn_dim": 30}
    assert modules == []
    with pytest.raises(PlanError, match=rf"intermediate_size = 13 is less than the 14 that {decoder} has"):
        auxin.plan(model, "net2net", intermediate_size=13)


def test_layers_that_differ_from_their_stack_are_said_beside_the_config():
    model = made("bart")
    layer = "model.decoder.layers.1"
    auxin.apply(grown_alone(model, layer, 18), model)
    before = outputs(model)
    assert anatomy(model).sizes.units("ffn", layer) == 18
    plan = auxin.plan(model, "hypercloning", factor=2)
    assert moved(model, plan) <= EXACT
    auxin.apply(plan, model)
    widths = [anatomy(model).sizes.units("ffn", f"model.{path}") for path in ("encoder.layers.0", "decoder.layers.0")]
    assert [*widths, anatomy(model).sizes.units("ffn", layer)] == [24, 28, 36]
    assert change(before[0], outputs(model)[0]) <= EXACT


def test_stacks_with_heads_of_two_dimensions_grow_in_what_is_left():
    model = made("bart", encoder_attention_heads=4, decoder_attention_heads=2)
    reason = "encoder_attention_heads = 4 and decoder_attention_heads = 2 make heads of dimensions 4 and 8"
    for name, settings in (("hypercloning", {"factor": 2}), ("masked", {"num_attention_heads": 5})):
        with pytest.raises(PlanError, match=rf"hidden_size = \d+: {reason}"):
            auxin.plan(model, name, **settings)
    assert moved(model, auxin.plan(model, "net2net", intermediate_size=20)) <= EXACT
    auxin.apply(auxin.plan(model, "stacking", factor=2), model)
    assert len(model.model.encoder.layers) == 4


@pytest.mark.parametrize("family", ["marian", "m2m_100"])
def test_sinusoids_that_are_not_saved_keep_the_hidden_size(family):
    model = made(family)
    for name, settings in (
        ("hypercloning", {"factor": 2}),
        ("lemon", {"hidden_size": 32}),
        ("ligo", {"hidden_size": 20, "num_attention_heads": 5, "steps": 0}),
    ):
        with pytest.raises(PlanError, match=r"hidden_size = .*sinusoids .* does not save"):
            auxin.plan(model, name, **settings)


@pytest.mark.parametrize("family", ["bart", "mbart", "pegasus", "m2m_100", "whisper", "hubert"])
def test_a_larger_vocabulary_takes_what_follows_it_along(family):
    model = made(family, "HubertForCTC" if family == "hubert" else "")
    before, table = outputs(model)[0], model.config.vocab_size
    bias = getattr(model, "final_logits_bias", None)
    auxin.apply(auxin.plan(model, "vocabulary", rows=3), model)
    assert outputs(model)[0].shape[-1] == table + 3
    # Not to the bit: a product with more columns may add in another order.
    assert torch.allclose(outputs(model)[0][..., :table], before, rtol=0, atol=EXACT * before.abs().max().item())
    if bias is not None:
        assert torch.equal(model.final_logits_bias[:, :table], bias)
        torch.testing.assert_close(model.final_logits_bias[:, table:], bias.mean().expand(1, 3))


def test_no_vocabulary_grows_without_a_table():
    with pytest.raises(PlanError, match="No parameter of a HubertModel has rows for the 19 tokens"):
        auxin.plan(tiny("hubert headless"), "vocabulary", rows=3)


def test_a_convolution_in_groups_takes_whole_copies_in_order():
    model = made("wav2vec2 stable")
    plan = auxin.plan(model, "hypercloning", hidden_size=48, num_attention_heads=12)
    assert moved(model, plan) <= EXACT
    assert said(plan)["num_conv_pos_embedding_groups"] == 6
    for name, settings in (
        ("lemon", {"hidden_size": 24}),
        ("bert2bert", {"hidden_size": 32, "initialisation": "fpi"}),
        ("masked", {"hidden_size": 20, "num_attention_heads": 5}),
        ("ligo", {"hidden_size": 20, "num_attention_heads": 5, "steps": 0}),
    ):
        with pytest.raises(PlanError, match=r"mixes the 16 units of the residual in 2 groups .* Use hypercloning with"):
            auxin.plan(model, name, **settings)


def test_batch_norms_over_the_residual_keep_its_width():
    model = made("hubert", conv_pos_batch_norm=True)
    with pytest.raises(PlanError, match=r"hidden_size = 32: .*conv_pos_batch_norm"):
        auxin.plan(model, "hypercloning", factor=2)
    assert moved(model, auxin.plan(model, "net2net", intermediate_size=20)) <= EXACT
