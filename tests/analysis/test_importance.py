"""The importance of units is what masks in the weights give, one sample at a time, on every kind of architecture."""

import copy
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from analysis.samples import Samples
from auxin.analysis import measure, measure_all
from auxin.analysis.importance import Importance, Importances
from auxin.analysis.unit_scores import COLUMNS
from auxin.edits import apply
from auxin.errors import ConfigError, DataError, PlanError
from auxin.methods import method
from auxin.planning.bench import Bench
from auxin.planning.cutting import cut
from byte_language import byte_model, held_out_loss, library, train
from oracles import importance as oracle
from oracles.importance import both, columns, rows
from tiny_models import MODELS, InDouble, inputs, labels, tiny

SCORES = ("taylor", "fisher", "activation", "output", "fluctuation")


def stream(
    *linear: str, norms: tuple[str, ...] = (), tables: tuple[str, ...] = (), conv: bool = False
) -> oracle.Masked:
    """Everything that writes the residual stream: linear layers with their biases, norms, embedding tables."""
    weights = columns(*(f"{name}.weight" for name in linear)) if conv else rows(*(f"{name}.weight" for name in linear))
    vectors = [*(f"{name}.bias" for name in linear), *(f"{name}.{part}" for name in norms for part in _PARTS)]
    return lambda w, m: {
        **weights(w, m),
        **rows(*(name for name in vectors if name in w))(w, m),
        **columns(*(f"{name}.weight" for name in tables))(w, m),
    }


_PARTS = ("weight", "bias")
LLAMA, GPT2, BERT = "model.layers", "transformer.h", "bert.encoder.layer"
EXPERTS = f"{LLAMA}.1.mlp.experts.down_proj"
MASKS: dict[str, dict[tuple[str, str], tuple[int, oracle.Masked]]] = {
    "llama": {
        ("query", f"{LLAMA}.1"): (4, columns(f"{LLAMA}.1.self_attn.o_proj.weight", entries=4)),
        # Values enter the attention's output linearly: a mask there is one of the whole group.
        ("key_value", f"{LLAMA}.0"): (2, rows(*(f"{LLAMA}.0.self_attn.v_proj.{p}" for p in _PARTS), entries=4)),
        ("ffn", f"{LLAMA}.0"): (12, columns(f"{LLAMA}.0.mlp.down_proj.weight")),
        ("residual", ""): (
            16,
            stream(
                *(f"{LLAMA}.{n}.{name}" for n in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")),
                tables=("model.embed_tokens",),
            ),
        ),
    },
    "olmo2": {
        ("residual", ""): (
            16,
            stream(
                norms=tuple(
                    f"{LLAMA}.{n}.post_{name}_layernorm" for n in (0, 1) for name in ("attention", "feedforward")
                ),
                tables=("model.embed_tokens",),
            ),
        ),
    },
    "gpt2": {
        ("query", f"{GPT2}.0"): (4, columns(f"{GPT2}.0.attn.c_proj.weight", entries=4, axis=0)),
        ("ffn", f"{GPT2}.1"): (12, columns(f"{GPT2}.1.mlp.c_proj.weight", axis=0)),
        ("residual", ""): (
            16,
            stream(
                *(f"{GPT2}.{n}.{name}.c_proj" for n in (0, 1) for name in ("attn", "mlp")),
                tables=("transformer.wte", "transformer.wpe"),
                conv=True,
            ),
        ),
    },
    "gpt_neox": {
        ("query", "gpt_neox.layers.1"): (4, columns("gpt_neox.layers.1.attention.dense.weight", entries=8)),
        ("ffn", "gpt_neox.layers.0"): (12, columns("gpt_neox.layers.0.mlp.dense_4h_to_h.weight")),
        ("residual", ""): (
            32,
            stream(
                *(f"gpt_neox.layers.{n}.{name}" for n in (0, 1) for name in ("attention.dense", "mlp.dense_4h_to_h")),
                tables=("gpt_neox.embed_in",),
            ),
        ),
    },
    # Adds one part's output to the other's in place.
    "falcon": {
        ("key_value", f"{GPT2}.0"): (2, columns(f"{GPT2}.0.self_attention.dense.weight", entries=16)),
        ("residual", ""): (
            32,
            stream(
                *(f"{GPT2}.{n}.{name}" for n in (0, 1) for name in ("self_attention.dense", "mlp.dense_4h_to_h")),
                tables=("transformer.word_embeddings",),
            ),
        ),
    },
    "bert": {
        ("query", f"{BERT}.1"): (4, columns(f"{BERT}.1.attention.output.dense.weight", entries=4)),
        ("ffn", f"{BERT}.0"): (12, columns(f"{BERT}.0.output.dense.weight")),
        ("residual", ""): (
            16,
            stream(
                *(f"{BERT}.{n}.{name}.dense" for n in (0, 1) for name in ("attention.output", "output")),
                norms=(
                    "bert.embeddings.LayerNorm",
                    *(f"{BERT}.{n}.{name}.LayerNorm" for n in (0, 1) for name in ("attention.output", "output")),
                ),
            ),
        ),
    },
    "t5": {
        ("query", "encoder.block.1"): (4, columns("encoder.block.1.layer.0.SelfAttention.o.weight", entries=5)),
        # A layer's heads of a number are cut together, of both of its attentions.
        ("query", "decoder.block.0"): (
            4,
            columns(
                "decoder.block.0.layer.0.SelfAttention.o.weight",
                "decoder.block.0.layer.1.EncDecAttention.o.weight",
                entries=5,
            ),
        ),
        ("ffn", "decoder.block.1"): (12, columns("decoder.block.1.layer.2.DenseReluDense.wo.weight")),
        ("residual", ""): (
            16,
            stream(
                *(
                    f"encoder.block.{n}.layer.{name}"
                    for n in (0, 1)
                    for name in ("0.SelfAttention.o", "1.DenseReluDense.wo")
                ),
                *(
                    f"decoder.block.{n}.layer.{name}"
                    for n in (0, 1)
                    for name in ("0.SelfAttention.o", "1.EncDecAttention.o", "2.DenseReluDense.wo")
                ),
                tables=("encoder.embed_tokens", "decoder.embed_tokens"),
            ),
        ),
    },
    "mixtral": {
        ("ffn", f"{LLAMA}.1"): (12, columns(EXPERTS)),
        ("expert", f"{LLAMA}.1"): (4, columns(EXPERTS, axis=0)),
    },
    "qwen2_moe": {
        ("ffn", f"{LLAMA}.0"): (12, columns(f"{LLAMA}.0.mlp.down_proj.weight")),
        ("expert_ffn", f"{LLAMA}.1"): (10, columns(EXPERTS)),
        ("shared_expert_ffn", f"{LLAMA}.1"): (14, columns(f"{LLAMA}.1.mlp.shared_expert.down_proj.weight")),
        ("expert", f"{LLAMA}.1"): (4, columns(EXPERTS, axis=0)),
    },
    "gpt_oss": {
        ("ffn", f"{LLAMA}.1"): (12, columns(EXPERTS, axis=1)),
        ("expert", f"{LLAMA}.1"): (4, columns(EXPERTS, f"{EXPERTS}_bias", axis=0)),
    },
    "deepseek_v3": {
        ("expert_ffn", f"{LLAMA}.1"): (
            16,
            both(columns(EXPERTS), columns(f"{LLAMA}.1.mlp.shared_experts.down_proj.weight", entries=2)),
        ),
        ("query", f"{LLAMA}.0"): (4, columns(f"{LLAMA}.0.self_attn.o_proj.weight", entries=5)),
    },
    # All layers are one, which is run several times.
    "albert": {
        ("ffn", "albert.encoder.albert_layer_groups.0"): (
            12,
            columns("albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output.weight"),
        ),
    },
    "vit": {("query", "vit.layers.1"): (4, columns("vit.layers.1.attention.o_proj.weight", entries=4))},
}
"""By architecture and group of units: how many units, and what of the weights their mask multiplies."""


def data_of(model: Any, samples: int = 4, batch_size: int = 3, seed: int = 1) -> Samples:
    """Samples with labels, of which some have more than others, and with padding where the model takes a mask."""
    found = {**inputs(model, seed=seed, batch=samples), "labels": labels(model, seed=seed + 1, batch=samples)}
    family = model.config.model_type
    if found["labels"].dim() == 2:
        for row in range(0, samples, 2):
            found["labels"][row, -1 - row % 3 :] = -100
    if family in ("llama", "gpt2", "bert"):
        found["attention_mask"] = (found["labels"] != -100).long()
    return Samples(found, batch_size, f"labelled {samples} {seed}")


def found(model: Any, data: Samples, score: Any) -> Importances:
    with InDouble():
        result = measure(Importance(score=score), model, data, cache=False)
    assert isinstance(result, Importances)
    return result


@pytest.mark.parametrize("family", MASKS)
def test_it_is_what_masks_in_the_weights_give(family):
    model = tiny(family)
    data = data_of(model)
    results = {score: found(model, data, score) for score in ("taylor", "fisher")}
    for (kind, scope), (units, masked) in MASKS[family].items():
        with InDouble():
            slopes = [
                oracle.slopes(model, {name: tensor[n] for name, tensor in data.rows.items()}, units, masked)
                for n in range(data.samples)
            ]
        for score, values in (("taylor", torch.stack(slopes).abs()), ("fisher", torch.stack(slopes).square())):
            got = results[score].of(kind, scope).scores
            np.testing.assert_allclose(got.means, values.mean(0), rtol=1e-9, atol=1e-12, err_msg=f"{kind} {scope}")
            np.testing.assert_allclose(got.deviations, values.std(0), rtol=1e-8, atol=1e-12)
            # Student's t with three degrees of freedom, from a printed table.
            np.testing.assert_allclose(got.margins, 3.182 * values.std(0) / 2, rtol=1e-3, atol=1e-12)
            assert max(got.means) > 1e-6


@pytest.mark.parametrize(
    ("family", "module", "group", "entries"),
    [
        ("llama", f"{LLAMA}.1.self_attn.o_proj", ("query", f"{LLAMA}.1"), 4),
        ("llama", f"{LLAMA}.1.self_attn.o_proj", ("key_value", f"{LLAMA}.1"), 8),
        ("llama", f"{LLAMA}.0.mlp.down_proj", ("ffn", f"{LLAMA}.0"), 1),
        ("gpt2", f"{GPT2}.1.mlp.c_proj", ("ffn", f"{GPT2}.1"), 1),
        ("gpt_neox", "gpt_neox.layers.0.attention.dense", ("query", "gpt_neox.layers.0"), 8),
        ("bert", f"{BERT}.0.output.dense", ("ffn", f"{BERT}.0"), 1),
        ("t5", "encoder.block.0.layer.0.SelfAttention.o", ("query", "encoder.block.0"), 5),
        ("qwen2_moe", f"{LLAMA}.1.mlp.shared_expert.down_proj", ("shared_expert_ffn", f"{LLAMA}.1"), 1),
    ],
)
def test_statistics_are_those_of_what_enters_the_output_matrix(family, module, group, entries):
    model = tiny(family)
    data = Samples.of(model, samples=5)
    with InDouble():
        entering = oracle.entering(model, module, data.rows)
    entering = entering if entering.dim() == 3 else entering.unflatten(0, (5, -1))
    square, variance = oracle.moments(entering)
    weight = model.get_submodule(module).weight.detach()
    length = weight.square().sum(1 if family == "gpt2" else 0)
    if group[0] == "query":
        of_heads = found(model, data, "fluctuation").of_heads[group[1]]
        np.testing.assert_allclose(of_heads, variance * length, rtol=1e-9)
    for score, values in (("activation", square), ("output", square * length), ("fluctuation", variance * length)):
        values = values.view(-1, entries).sum(1)
        got = found(model, data, score).of(*group).scores
        np.testing.assert_allclose(got.means, values if score == "fluctuation" else values.sqrt(), rtol=1e-9)
        assert got.deviations is not None


def test_statistics_of_experts_count_the_router_and_those_not_chosen():
    model = tiny("mixtral")
    data = Samples.of(model, samples=5)
    with InDouble():
        inner, output = oracle.entering_experts(model, f"{LLAMA}.1.mlp.experts", data.rows)
    length = model.get_parameter(EXPERTS).detach().square().sum(1)
    square, variance = oracle.moments(inner)
    whole, whole_variance = (values.sum(1) for values in oracle.moments(output))
    for score, units, experts in (
        ("activation", square.sum(0).sqrt(), whole.sqrt()),
        ("output", (square * length).sum(0).sqrt(), whole.sqrt()),
        ("fluctuation", (variance * length).sum(0), whole_variance),
    ):
        result = found(model, data, score)
        np.testing.assert_allclose(result.of("ffn", f"{LLAMA}.1").scores.means, units, rtol=1e-9)
        np.testing.assert_allclose(result.of("expert", f"{LLAMA}.1").scores.means, experts, rtol=1e-9)


def test_padding_does_not_count():
    model = tiny("llama")
    tokens = inputs(model, batch=3, length=7)["input_ids"]
    lengths = [7, 4, 3]
    mask = torch.tensor([[1] * length + [0] * (7 - length) for length in lengths])
    padded = Samples({"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}, 3)
    alone = [
        Samples({"input_ids": tokens[n : n + 1, :length], "labels": tokens[n : n + 1, :length]})
        for n, length in enumerate(lengths)
    ]
    for score in ("taylor", "activation"):
        together = found(model, padded, score)
        one_by_one = [found(model, data, score) for data in alone]
        for group in together.groups:
            each = np.array([single.of(group.stream, group.scope).scores.means for single in one_by_one])
            expected = each.mean(0) if score == "taylor" else np.sqrt((each**2).mean(0))
            np.testing.assert_allclose(group.scores.means, expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=10)
@given(
    family=st.sampled_from(["llama", "gpt2", "bert", "t5", "mixtral"]),
    score=st.sampled_from(SCORES),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    seed=st.integers(0, 9),
)
def test_the_size_of_the_batches_changes_nothing(family, score, sizes, seed):
    model = tiny(family)
    one, other = (found(model, data_of(model, 6, size, seed), score) for size in sizes)
    for a, b in zip(one.groups, other.groups, strict=True):
        np.testing.assert_allclose(a.scores.means, b.scores.means, rtol=1e-8, atol=1e-12)


@settings(max_examples=10)
@given(score=st.sampled_from(SCORES), seed=st.integers(0, 9))
def test_a_unit_without_output_weights_scores_nothing(score, seed):
    """Its output, that is: an activation there may be."""
    model = tiny("llama", seed=seed)
    unit, head = seed % 12, seed % 4
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, unit] = 0
        model.model.layers[0].self_attn.o_proj.weight[:, 4 * head : 4 * head + 4] = 0
    result = found(model, data_of(model, seed=seed), score)
    for group, place in ((("ffn", f"{LLAMA}.1"), unit), (("query", f"{LLAMA}.0"), head)):
        means = result.of(*group).scores.means
        assert (means[place] == 0) == (score != "activation")
        assert all(mean > 0 for number, mean in enumerate(means) if number != place)


@settings(max_examples=10)
@given(score=st.sampled_from(SCORES), order=st.permutations(range(12)), heads=st.permutations(range(4)))
def test_units_keep_their_scores_wherever_they_stand(score, order, heads):
    """A permutation of units permutes their scores; a copy of a unit has the score of the unit."""
    model, moved = tiny("gpt2"), tiny("gpt2")
    entries = [16 * part + 4 * head + e for part in range(3) for head in heads for e in range(4)]
    for one in (model, moved):
        mlp = one.transformer.h[0].mlp
        with torch.no_grad():
            mlp.c_fc.weight[:, 3], mlp.c_fc.bias[3] = mlp.c_fc.weight[:, 8], mlp.c_fc.bias[8]
            mlp.c_proj.weight[3] = mlp.c_proj.weight[8]
    layer = moved.transformer.h[0]
    with torch.no_grad():
        for parameter, axis in ((layer.mlp.c_fc.weight, 1), (layer.mlp.c_fc.bias, 0), (layer.mlp.c_proj.weight, 0)):
            parameter.copy_(parameter.index_select(axis, torch.tensor(order)))
        for parameter, axis in ((layer.attn.c_attn.weight, 1), (layer.attn.c_attn.bias, 0)):
            parameter.copy_(parameter.index_select(axis, torch.tensor(entries)))
        layer.attn.c_proj.weight.copy_(layer.attn.c_proj.weight[entries[:16]])
    before, after = found(model, data_of(model), score), found(moved, data_of(moved), score)
    for kind, places in (("ffn", order), ("query", heads)):
        means = before.of(kind, f"{GPT2}.0").scores.means
        np.testing.assert_allclose(after.of(kind, f"{GPT2}.0").scores.means, [means[n] for n in places], rtol=1e-8)
    units = before.of("ffn", f"{GPT2}.0").scores.means
    assert units[3] == pytest.approx(units[8], rel=1e-9)


def test_a_stream_that_norms_rescale_has_slopes_that_add_up_to_nothing():
    """RMSNorms without epsilon read the same from a stream of another length: all masks together do nothing."""
    model = tiny("llama", rms_norm_eps=1e-30)
    data = Samples({name: tensor[:1] for name, tensor in data_of(model).rows.items()})
    (taylor, fisher) = (found(model, data, score).of("residual", "").scores.means for score in ("taylor", "fisher"))
    np.testing.assert_allclose(np.square(taylor), fisher, rtol=1e-9)
    with InDouble():
        slopes = oracle.slopes(model, {n: t[0] for n, t in data.rows.items()}, *MASKS["llama"]["residual", ""])
    np.testing.assert_allclose(taylor, slopes.abs(), rtol=1e-9)
    assert abs(slopes.sum()) < 1e-8 * slopes.abs().sum()


@pytest.mark.parametrize("family", MODELS)
def test_every_architecture_is_measured_or_refused_in_words(family):
    model = tiny(family)
    data = Samples(inputs(model, batch=2))
    if family in ("clip", "siglip"):
        with pytest.raises(PlanError, match="several towers"):
            found(model, data, "activation")
        return
    result = found(model, data, "activation")
    streams = {group.stream for group in result.groups}
    assert "ffn" in streams if family.startswith("resnet") else "query" in streams  # a ResNet has no heads
    assert all(np.isfinite(group.scores.means).all() for group in result.groups)


@pytest.mark.parametrize("family", ["llama", "t5", "mixtral"])
@pytest.mark.parametrize("score", ["taylor", "output"])
def test_the_model_stays_as_it_is(family, score):
    model = tiny(family, dtype=torch.float32).train()
    model.requires_grad_(False)
    kept = next(model.parameters())
    kept.requires_grad_(True)
    kept.grad = torch.ones_like(kept)
    before = copy.deepcopy(model.state_dict())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with torch.inference_mode():
        one = measure(Importance(score=score), model, data_of(model), cache=False)
    other = measure(Importance(score=score), model, data_of(model), cache=False)
    assert one == other
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [p is kept for p in model.parameters()]
    assert torch.equal(kept.grad, torch.ones_like(kept))
    assert all(p.grad is None for p in model.parameters() if p is not kept)
    assert all(m.training for m in model.modules())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert not any("forward" in vars(m) for m in model.modules())


def test_half_precision_is_added_up_in_single():
    model = tiny("llama")
    exact = found(model, data_of(model), "taylor")
    rough = measure(Importance(), tiny("llama", dtype=torch.bfloat16), data_of(model), cache=False)
    for a, b in zip(exact.groups, rough.groups, strict=True):
        assert np.corrcoef(a.scores.means, b.scores.means)[0, 1] > 0.95


def test_losses_that_are_no_means_over_samples_are_taken_one_by_one(monkeypatch):
    model = tiny("llama")
    data = data_of(model, samples=4, batch_size=4)
    data.rows["labels"] = data.rows["input_ids"]
    data.rows["attention_mask"] = torch.ones_like(data.rows["input_ids"])
    expected = found(model, data, "taylor")
    original = type(model).forward

    def summed(self: Any, *arguments: Any, **named: Any) -> Any:
        output = original(self, *arguments, **named)
        output.loss = output.loss * len(output.logits)
        return output

    monkeypatch.setattr(type(model), "forward", summed)
    assert [g.scores.means for g in found(model, data, "taylor").groups] == [
        pytest.approx(g.scores.means, rel=1e-9) for g in expected.groups
    ]


def test_what_routers_add_to_a_loss_is_left_out():
    plain = tiny("mixtral")
    balanced = tiny("mixtral", output_router_logits=True, router_aux_loss_coef=10.0)
    assert found(plain, data_of(plain), "taylor") == found(balanced, data_of(plain), "taylor")


def test_what_cannot_be_measured_is_refused():
    model = tiny("llama")
    data = data_of(model)
    unlabelled = Samples({"input_ids": data.rows["input_ids"]})
    with pytest.raises(DataError, match="gives no loss for input_ids, of which the score taylor is the gradient"):
        found(model, unlabelled, "taylor")
    with pytest.raises(PlanError, match=r"several towers.*Load one of them"):
        found(tiny("clip"), Samples.of(tiny("clip")), "activation")
    with pytest.raises(PlanError, match="Pattention makes its output of query heads by more than one matrix"):
        found(tiny("tokenformer"), Samples.of(tiny("tokenformer")), "output")
    with pytest.raises(PlanError, match="residual units was not measured: The score activation is of what enters one"):
        found(model, unlabelled, "activation").of("residual", "")
    with pytest.raises(PlanError, match=r"experts was not measured: there are none in model\.layers\.0"):
        found(model, unlabelled, "activation").of("expert", "model.layers.0")
    with pytest.raises(ConfigError, match="score"):
        Importance.parse({"score": "magnitude"})
    with torch.inference_mode():
        made = tiny("llama", dtype=torch.float32)
    with pytest.raises(PlanError, match="inference_mode"):
        measure(Importance(), made, data, cache=False)


def test_heads_of_a_model_with_several_blocks_are_measured_and_the_stream_is_not():
    model = tiny("llama")
    chosen = method("altup")
    apply(chosen.plan(Bench(model), chosen.settings.parse({"blocks": 2})), model)
    result = found(model, data_of(model), "taylor")
    assert {group.stream for group in result.groups} == {"query", "key_value", "ffn"}
    assert "several blocks" in result.missing["residual units"]
    assert any("Not measured: residual units. The residual stream has several" in said for said in result.findings())


def test_what_wraps_an_output_matrix_counts_once():
    """A branch that gives nothing changes nothing: what it wraps takes the same input as it does itself."""
    model, grafted = tiny("llama"), tiny("llama")
    chosen = method("graft")
    targets = ["self_attn.o_proj", "mlp.down_proj"]
    apply(chosen.plan(Bench(grafted), chosen.settings.parse({"tokens": 4, "targets": targets})), grafted)
    for score in ("taylor", "activation"):
        before, after = found(model, data_of(model), score), found(grafted, data_of(model), score)
        for group in before.groups:
            if group.stream != "residual":
                means = after.of(group.stream, group.scope).scores.means
                np.testing.assert_allclose(means, group.scores.means, rtol=1e-9, atol=1e-12)
    with pytest.raises(PlanError, match="GraftedLinear makes its output of query heads by more than one matrix"):
        found(grafted, data_of(model), "output")


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Tensor, Samples]:
    """A small language model of bytes, held-out bytes, and samples of those it was trained on."""
    model = byte_model(0, hidden_size=32, intermediate_size=96, num_hidden_layers=2)
    data = library("argparse", "ast", "inspect", "typing")
    train(model, data, 200)
    rows = data[: 48 * 64].view(64, 48)
    return model, library("pdb"), Samples({"input_ids": rows, "labels": rows}, 8)


def loss_after_cutting(model: Any, held_out: Tensor, kept: dict[str, list[int]]) -> float:
    """The held-out loss with these feed-forward units alone, by layer."""
    smaller = copy.deepcopy(model)
    with torch.no_grad():
        for scope, units in kept.items():
            weight = smaller.get_submodule(scope).mlp.down_proj.weight
            weight[:, [unit for unit in range(weight.shape[1]) if unit not in units]] = 0
    return held_out_loss(smaller, held_out)


@pytest.mark.parametrize("score", SCORES)
def test_units_that_score_least_are_missed_less_than_random_ones(trained, score):
    """Effect: without a quarter of the feed-forward units of every layer."""
    model, held_out, data = trained
    result = measure(Importance(score=score), model.eval(), data, cache=False)
    layers = [group for group in result.groups if group.stream == "ffn"]
    stay = 72
    best = {
        group.scope: sorted(range(96), key=lambda unit, means=group.scores.means: -means[unit])[:stay]
        for group in layers
    }
    draw = np.random.default_rng(0)
    random = [
        loss_after_cutting(model, held_out, {group.scope: draw.permutation(96)[:stay].tolist() for group in layers})
        for _ in range(15)
    ]
    assert loss_after_cutting(model, held_out, best) < np.median(random)


def test_its_groups_are_what_cutting_takes(trained):
    """The units that stay, by the group they were measured in, make a plan."""
    model = trained[0]
    result = measure(Importance(score="output"), model, trained[2], cache=False)
    group = result.of("ffn", "model.layers.1")
    keep = sorted(range(96), key=lambda unit: -group.scores.means[unit])[:72]
    assert cut(model, {(group.stream, group.scope): keep}).edits


def test_a_person_can_read_it():
    for family, score in (("t5", "taylor"), ("qwen2_moe", "fisher"), ("llama", "fluctuation")):
        model = tiny(family, dtype=torch.float32)
        result = measure(Importance(score=score), model, data_of(model), cache=False)
        assert Importances.model_validate_json(result.model_dump_json()) == result
        for table in result.tables():
            widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
            assert sum(widths) + 2 * (len(widths) - 1) <= 80
        assert sum(int(row[1]) for table in result.tables() for row in table.rows) == sum(
            len(group.scores.means) for group in result.groups
        )
        root = ElementTree.fromstring(result.picture("A model"))
        texts = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("}text")]
        assert {"A model", score, *(table.title for table in result.tables())} <= set(texts)
        first = result.groups[0]
        assert f"Query heads that matter least by {score}: " in result.findings()[0]
        assert re.search(r": number \d+ of [a-z.]+\d+ \([\d.e-]+ ± [\d.e-]+\), ", result.findings()[0])
        assert first.stream == "query"


def test_many_units_are_drawn_by_size():
    model = tiny("llama", dtype=torch.float32, intermediate_size=3 * COLUMNS + 5)
    result = measure(Importance(), model, data_of(model), cache=False)
    root = ElementTree.fromstring(result.picture("A model"))
    told = [element.text or "" for element in root.iter() if element.tag.endswith("}title")]
    shares = [float(text.split(": ")[1]) for text in told if text.startswith("0, ") and "%" in text]
    assert len(shares) == COLUMNS
    assert shares == sorted(shares, reverse=True)
    assert shares[0] <= max(result.of("ffn", "model.layers.0").scores.means)


def test_scores_are_kept_by_setting(tmp_path):
    model = tiny("llama", dtype=torch.float32)
    data = data_of(model)
    asked = [Importance(score="taylor"), Importance(score="activation"), "similarity"]
    first = measure_all(asked, model, data, cache=tmp_path)
    assert measure_all(asked, model, data, cache=tmp_path) == first
    assert data.passes == 1
    assert len({record.subject.digest for record in first}) == 3
