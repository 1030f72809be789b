"""Encoders of text beside their usual form: each switch that changes the structure, any head, or none."""

import math

import pytest
import torch

from auxin.edits import apply
from auxin.errors import PlanError
from auxin.methods import methods
from auxin.models.anatomy import anatomy
from auxin.planning.method import plan_for
from tiny_models import InDouble, tiny
from tiny_models import inputs as inputs_of

HEADS = {
    "bert": (
        "BertModel",
        "BertForPreTraining",
        "BertForNextSentencePrediction",
        "BertForSequenceClassification",
        "BertForTokenClassification",
        "BertForQuestionAnswering",
        "BertForMultipleChoice",
    ),
    "roberta": (
        "RobertaModel",
        "RobertaForSequenceClassification",
        "RobertaForTokenClassification",
        "RobertaForQuestionAnswering",
        "RobertaForMultipleChoice",
    ),
    "mpnet": ("MPNetModel", "MPNetForSequenceClassification"),
    "distilbert": (
        "DistilBertModel",
        "DistilBertForSequenceClassification",
        "DistilBertForTokenClassification",
        "DistilBertForQuestionAnswering",
        "DistilBertForMultipleChoice",
    ),
    "albert": (
        "AlbertModel",
        "AlbertForPreTraining",
        "AlbertForSequenceClassification",
        "AlbertForTokenClassification",
        "AlbertForQuestionAnswering",
    ),
    "electra": (
        "ElectraModel",
        "ElectraForPreTraining",
        "ElectraForSequenceClassification",
        "ElectraForTokenClassification",
        "ElectraForQuestionAnswering",
        "ElectraForMultipleChoice",
    ),
    "deberta": ("DebertaModel", "DebertaForSequenceClassification"),
    "deberta-v2": (
        "DebertaV2Model",
        "DebertaV2ForSequenceClassification",
        "DebertaV2ForTokenClassification",
        "DebertaV2ForQuestionAnswering",
    ),
    "modernbert": (
        "ModernBertModel",
        "ModernBertForSequenceClassification",
        "ModernBertForTokenClassification",
        "ModernBertForQuestionAnswering",
    ),
}
CASES = [(family, head) for family, heads in HEADS.items() for head in heads]
GROWTHS = {
    "hypercloning": {"factor": 2, "variant": "noisy"},
    "lemon": {"hidden_size": 32},
    "masked": {"num_attention_heads": 5, "hidden_size": 20, "intermediate_size": 15},
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """LiGO writes the file of its operator where it is asked for."""
    monkeypatch.chdir(tmp_path)


def inputs(model):
    given = inputs_of(model)
    if type(model).__name__.endswith("MultipleChoice"):
        return {name: ids[:, None].expand(-1, 3, -1).contiguous() for name, ids in given.items()}
    return given


def outputs(model):
    """All that the model says, by name; of wider hidden states what was there before."""
    with torch.no_grad(), InDouble():
        result = model(**inputs(model))
    return {name: value for name, value in result.items() if isinstance(value, torch.Tensor)}


def grown(model, method, **settings):
    """The largest relative change of an output by a plan of `method`, which is applied."""
    before = outputs(model)
    plan = plan_for(methods()[method], model, settings)
    apply(plan, model, probe=inputs(model))
    after = outputs(model)
    assert before.keys() == after.keys()
    assert plan.promise == "exact"
    changes = []
    for name, old in before.items():
        new = after[name][tuple(map(slice, old.shape))]
        changes.append(((new - old).abs().max() / old.abs().max()).item())
    return max(changes)


@pytest.mark.parametrize(("family", "head"), CASES)
def test_a_model_with_any_head_or_none_grows_exactly(family, head):
    for method, settings in GROWTHS.items():
        model = tiny(family, head=head)
        assert type(model).__name__ == head
        assert grown(model, method, **settings) < 1e-10, method
        assert model.config.hidden_size == settings.get("hidden_size", 32)


VARIANTS = [
    ("bert", {"tie_word_embeddings": False}),
    ("roberta", {"tie_word_embeddings": False}),
    ("electra", {"embedding_size": 16}),
    ("electra", {"embedding_size": 16, "tie_word_embeddings": False}),
    ("albert", {"embedding_size": 16}),
    ("albert", {"num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2}),
    ("distilbert", {"sinusoidal_pos_embds": True}),
    ("deberta", {"relative_attention": False, "position_biased_input": True, "type_vocab_size": 2}),
    ("deberta", {"pos_att_type": ["c2p"]}),
    ("deberta", {"pos_att_type": ["p2c"], "talking_head": True}),
    ("deberta", {"legacy": False}),
    ("deberta", {"embedding_size": 10}),
    ("deberta", {"embedding_size": 16}),
    ("deberta-v2", {"relative_attention": False, "position_biased_input": True, "type_vocab_size": 2}),
    ("deberta-v2", {"share_att_key": False}),
    ("deberta-v2", {"share_att_key": False, "pos_att_type": ["c2p"], "conv_kernel_size": 0}),
    ("deberta-v2", {"share_att_key": False, "pos_att_type": ["p2c"], "norm_rel_ebd": "none"}),
    ("deberta-v2", {"legacy": False, "position_buckets": -1}),
    ("deberta-v2", {"embedding_size": 10}),
    ("modernbert", {"norm_bias": False, "attention_bias": False, "mlp_bias": False, "classifier_bias": False}),
    ("modernbert", {"tie_word_embeddings": False, "decoder_bias": False}),
    ("mpnet", {"tie_word_embeddings": False}),
]


@pytest.mark.parametrize(("family", "config"), VARIANTS)
def test_every_switch_of_the_structure_is_followed(family, config):
    for method, settings in GROWTHS.items():
        assert grown(tiny(family, **config), method, **settings) < 1e-10, method
    for method, settings in {"net2net": {"intermediate_size": 17}, "hypercloning": {"hidden_size": 48}}.items():
        assert grown(tiny(family, **config), method, **settings) < 1e-10, method


def cross_states(model, batch=2, length=5):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, length, model.config.hidden_size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("family", "head"), [("bert", "BertLMHeadModel"), ("roberta", "RobertaForCausalLM")])
def test_a_decoder_grows_exactly_and_decodes_with_its_cache_as_without(family, head):
    model = tiny(family, head=head, is_decoder=True)
    assert grown(model, "hypercloning", factor=2) < 1e-10
    ids = inputs(model)["input_ids"]
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached, full = (model.generate(ids, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, full)


@pytest.mark.parametrize(
    ("family", "head"),
    [("bert", "BertLMHeadModel"), ("roberta", "RobertaForCausalLM"), ("electra", "ElectraForCausalLM")],
)
def test_a_decoder_with_cross_attention_grows_what_the_encoder_does_not_see(family, head):
    config = {"is_decoder": True, "add_cross_attention": True}
    model = tiny(family, head=head, **config)
    with pytest.raises(PlanError, match=r"hidden_size = 32: the cross-attention .*add_cross_attention = True.* Leave"):
        plan_for(methods()["hypercloning"], model, {"factor": 2})
    given = {**inputs(model), "encoder_hidden_states": cross_states(model)}
    with torch.no_grad():
        before = model(**given).logits
    apply(plan_for(methods()["net2net"], model, {"intermediate_size": 18}), model)
    apply(plan_for(methods()["masked"], model, {"layers": 3, "intermediate_size": 20}), model)
    with torch.no_grad():
        assert torch.allclose(model(**given).logits, before, rtol=0, atol=1e-10 * before.abs().max().item())


def test_the_norm_of_a_first_layer_that_has_none_comes_with_copies_of_it_elsewhere():
    """ModernBERT: layer 0 has no norm before its attention, and layers in other places do."""
    model = tiny("modernbert")
    assert grown(model, "llama-pro", group_size=1) == 0
    assert model.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2 + ["full_attention"] * 2
    assert torch.equal(model.model.layers[1].attn_norm.weight, torch.ones(16, dtype=torch.float64))
    with pytest.raises(
        PlanError, match=r"model.layers: layer 1 can't come first, where .* no attn_norm.bias. Begin wi"
    ):
        plan_for(methods()["solar"], tiny("modernbert"), {"slices": [[1, 3], [0, 2]]})


def test_layers_that_share_their_parameters_get_no_more_and_the_refusal_says_so():
    for method, settings in {
        "stacking": {"factor": 2},
        "net2net": {"num_hidden_layers": 5},
        "masked": {"layers": 5},
        "bert2bert": {"num_hidden_layers": 4},
        "ligo": {"layers": 4, "steps": 0},
    }.items():
        with pytest.raises(PlanError, match=r"the 3 layers \(num_hidden_layers\) share 1 set.*\(num_hidden_groups\)"):
            plan_for(methods()[method], tiny("albert"), settings)
    with pytest.raises(PlanError, match=r"share their parameters, so that there is no layer above .*fpi"):
        plan_for(methods()["bert2bert"], tiny("albert"), {"hidden_size": 32})
    assert grown(tiny("albert"), "altup", blocks=2, selection="same") == 0


@pytest.mark.parametrize(
    ("family", "missing"), [("electra", "embeddings_project"), ("deberta-v2", "embeddings.embed_proj")]
)
def test_a_hidden_size_for_which_the_projection_of_the_embeddings_would_go_is_refused(family, missing):
    model = tiny(family, embedding_size=32)
    for method, settings in {"hypercloning": {"factor": 2}, "masked": {"hidden_size": 32}}.items():
        with pytest.raises(
            PlanError, match=f"hidden_size = 32: it would be the embedding_size .* no {missing} between"
        ):
            plan_for(methods()[method], model, settings)
    assert grown(model, "hypercloning", factor=3) < 1e-10
    assert model.config.embedding_size == 32


def test_what_must_equal_the_hidden_size_follows_it():
    electra = tiny("electra", embedding_size=16)
    grown(electra, "hypercloning", factor=2)
    assert electra.config.embedding_size == 32
    deberta = tiny("deberta-v2")  # which has no pooler, as its classifier will
    grown(deberta, "hypercloning", hidden_size=32, num_attention_heads=4)
    assert (deberta.config.pooler_hidden_size, deberta.config.attention_head_size) == (32, 8)


def test_a_convolution_in_groups_keeps_the_hidden_size():
    model = tiny("deberta-v2", conv_groups=2)
    with pytest.raises(PlanError, match=r"hidden_size = 32: the convolution .* is in 2 groups \(conv_groups\)"):
        plan_for(methods()["hypercloning"], model, {"factor": 2})
    assert grown(model, "net2net", intermediate_size=17) < 1e-10


def test_padding_does_not_pass_the_norm_of_modernberts_embeddings():
    """Its output is the residual: (x - mean) / deviation times a gain has neither zeros nor its mean in the padding."""
    with pytest.raises(PlanError, match=r"hidden_size = 24 .*embeddings\.norm, a LayerNorm .* are 16 and 32"):
        plan_for(methods()["lemon"], tiny("modernbert"), {"hidden_size": 24})


def test_heads_of_another_dimension_score_as_before():
    """DeBERTa's scores are sums of up to three products, all divided by one root of the head dimension."""
    for family, config in (("deberta", {}), ("deberta-v2", {}), ("deberta-v2", {"share_att_key": False})):
        model = tiny(family, **config)
        assert grown(model, "hypercloning", hidden_size=32, num_attention_heads=4) < 1e-6  # the root is in float32
    assert math.isclose(model.config.hidden_size / model.config.num_attention_heads, 8)


def test_the_table_that_is_head_and_embedding_goes_by_the_embedding_wherever_it_is_named_first():
    model = tiny("xlm-roberta")
    role = anatomy(model).role("lm_head.decoder.weight")
    assert (role.kind, role.access) == ("embedding", ("writes", "writes"))


@pytest.mark.parametrize("family", ["electra", "albert", "deberta"])
def test_altup_makes_the_stream_wide_from_end_to_end(family):
    """A projection enters the layers, inside the encoder or before it; the last hidden state is one of a list."""
    for conversion in ("copies", "zeros", "free"):
        model = tiny(family, tie_word_embeddings=False)
        assert grown(model, "altup", blocks=2, conversion=conversion, selection="same") < 1e-10


def test_a_convolution_that_reads_the_embeddings_keeps_the_stream_narrow():
    with pytest.raises(PlanError, match=r"conversion = copies: deberta.encoder.conv reads what enters .*recycled"):
        plan_for(methods()["altup"], tiny("deberta-v2"), {"conversion": "copies"})


def test_layers_with_relative_positions_take_a_stride():
    """Distances stay those of the tokens, and masks of 0 and 1 stay such: what is padded changes nothing."""
    for mode in ("altup", "pool"):
        model = tiny("deberta-v2")
        apply(plan_for(methods()["sequence-altup"], model, {"layers": [1], "stride": 2, "mode": mode}), model)
        ids = inputs(model)["input_ids"]
        padded = torch.cat([ids, torch.zeros(len(ids), 3, dtype=torch.long)], dim=1)
        with torch.no_grad():
            alone = model(ids).logits
            behind = model(padded, attention_mask=(torch.arange(10) < 7).long().expand(len(ids), -1)).logits
        assert torch.allclose(alone, behind[:, :7], rtol=0, atol=1e-6 * alone.abs().max().item()), mode


def test_a_classifier_of_answers_is_probed_by_itself():
    model = tiny("bert", head="BertForMultipleChoice")
    receipt = apply(plan_for(methods()["hypercloning"], model, {"factor": 2}), model)
    assert receipt.max_relative_change < 1e-10
