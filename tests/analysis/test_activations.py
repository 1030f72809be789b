"""Sizes of activations are those of Minitron's equations, token by token, for every kind of unit."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from analysis.samples import Samples
from auxin.analysis import measure
from auxin.analysis.activations import Activations, ActivationSizes
from auxin.edits import apply
from auxin.errors import ConfigError, PlanError
from auxin.methods import method
from auxin.planning.bench import Bench
from oracles import activations as oracle
from oracles.importance import entering, entering_experts
from tiny_models import InDouble, inputs, tiny

HOW = ("mean", "l2", "variance")
PAIRS = list(product(HOW, HOW))
LLAMA = "model.layers"


def found(model: Any, data: Samples, over_tokens: Any = "mean", over_samples: Any = "l2") -> ActivationSizes:
    with InDouble():
        asked = Activations(over_tokens=over_tokens, over_samples=over_samples)
        return measure(asked, model, data, cache=False)


def array(tensor: torch.Tensor) -> NDArray[np.float64]:
    return tensor.detach().numpy()


@pytest.mark.parametrize(
    ("family", "module", "group", "entries"),
    [
        ("llama", f"{LLAMA}.1.self_attn.o_proj", ("query", f"{LLAMA}.1"), 4),
        ("llama", f"{LLAMA}.0.mlp.down_proj", ("ffn", f"{LLAMA}.0"), 1),
        ("gpt2", "transformer.h.1.mlp.c_proj", ("ffn", "transformer.h.1"), 1),
        ("gpt_neox", "gpt_neox.layers.0.attention.dense", ("query", "gpt_neox.layers.0"), 8),
        ("bert", "bert.encoder.layer.0.output.dense", ("ffn", "bert.encoder.layer.0"), 1),
        ("t5", "encoder.block.0.layer.0.SelfAttention.o", ("query", "encoder.block.0"), 5),
    ],
)
def test_heads_and_feed_forward_units_are_what_enters_the_output_matrix(family, module, group, entries):
    model = tiny(family)
    data = Samples.of(model, samples=5)
    with InDouble():
        given = entering(model, module, data.rows)
    samples = list(array(given if given.dim() == 3 else given.unflatten(0, (5, -1))))
    for pair in PAIRS:
        got = found(model, data, *pair).of(*group).scores.means
        np.testing.assert_allclose(got, oracle.scores(samples, entries, *pair), rtol=1e-9, err_msg=str(pair))


def test_the_score_of_a_group_is_the_sum_over_its_query_heads():
    model = tiny("llama")
    result = found(model, Samples.of(model, samples=3))
    for layer in ("model.layers.0", "model.layers.1"):
        heads = np.array(result.of("query", layer).scores.means).reshape(2, 2)
        np.testing.assert_allclose(result.of("key_value", layer).scores.means, heads.sum(1), rtol=1e-12)


@pytest.mark.parametrize(
    ("family", "norms"),
    [
        ("llama", [f"{LLAMA}.{n}.{name}_layernorm" for n in (0, 1) for name in ("input", "post_attention")]),
        # Which has norms of other streams, too.
        ("deepseek_v3", [f"{LLAMA}.{n}.{name}_layernorm" for n in (0, 1) for name in ("input", "post_attention")]),
        ("gpt2", [f"transformer.h.{n}.ln_{m}" for n in (0, 1) for m in (1, 2)]),
        # Behind the sum of stream and output, where they are what the stream becomes.
        (
            "bert",
            [f"bert.encoder.layer.{n}.{name}.LayerNorm" for n in (0, 1) for name in ("attention.output", "output")],
        ),
        # Behind the outputs.
        ("olmo2", [f"{LLAMA}.{n}.post_{name}_layernorm" for n in (0, 1) for name in ("attention", "feedforward")]),
    ],
)
def test_units_of_the_residual_are_the_sum_over_the_norms_of_all_layers(family, norms):
    model = tiny(family)
    data = Samples.of(model, samples=4)
    for pair in PAIRS:
        total: Any = 0
        for path in norms:
            norm = model.get_submodule(path)
            with InDouble():
                hidden = array(entering(model, path, data.rows))
            if family in ("llama", "deepseek_v3", "olmo2"):
                normed = oracle.rms_norm(hidden, array(norm.weight), norm.variance_epsilon)
            else:
                normed = oracle.layer_norm(hidden, array(norm.weight), array(norm.bias), norm.eps)
            total = total + oracle.scores(list(normed), 1, *pair)
        np.testing.assert_allclose(found(model, data, *pair).of("residual", "").scores.means, total, rtol=1e-8)


def test_experts_count_with_the_routers_weight_and_as_nothing_where_they_are_not_chosen():
    model = tiny("mixtral")
    data = Samples.of(model, samples=4)
    with InDouble():
        inner, output = entering_experts(model, f"{LLAMA}.1.mlp.experts", data.rows)
    for pair in PAIRS:
        result = found(model, data, *pair)
        units = sum(oracle.scores(list(array(inner[:, :, expert])), 1, *pair) for expert in range(4))
        np.testing.assert_allclose(result.of("ffn", f"{LLAMA}.1").scores.means, units, rtol=1e-9)
        whole = oracle.scores(list(array(output.flatten(2))), output.shape[-1], *pair)
        np.testing.assert_allclose(result.of("expert", f"{LLAMA}.1").scores.means, whole, rtol=1e-9)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_padding_does_not_count(pair):
    model, lengths = tiny("llama"), [7, 4, 3]
    tokens = inputs(model, batch=3, length=7)["input_ids"]
    mask = torch.tensor([[1] * length + [0] * (7 - length) for length in lengths])
    with InDouble():
        rows = [
            array(entering(model, f"{LLAMA}.0.mlp.down_proj", {"input_ids": tokens[n : n + 1, :length]})[0])
            for n, length in enumerate(lengths)
        ]
    got = found(model, Samples({"input_ids": tokens, "attention_mask": mask}, 3), *pair)
    np.testing.assert_allclose(
        got.of("ffn", f"{LLAMA}.0").scores.means, oracle.scores(rows, 1, *pair), rtol=1e-9, atol=1e-12
    )


@settings(max_examples=10)
@given(
    family=st.sampled_from(["llama", "gpt2", "bert", "t5", "mixtral", "albert"]),
    pair=st.sampled_from(PAIRS),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 6)),
)
def test_the_size_of_the_batches_changes_nothing(family, pair, sizes):
    model = tiny(family)
    one, other = (found(model, Samples({**inputs(model, batch=6)}, size), *pair) for size in sizes)
    for a, b in zip(one.groups, other.groups, strict=True):
        np.testing.assert_allclose(a.scores.means, b.scores.means, rtol=1e-8, atol=1e-12)


@settings(max_examples=10)
@given(factor=st.floats(0.1, 10), pair=st.sampled_from(PAIRS), unit=st.integers(0, 11))
def test_an_activation_that_is_larger_by_a_factor_scores_more_by_its_degree(factor, pair, unit):
    """A variance is of degree two; a variance over samples of one over tokens of four. Where that leaves the function
    as it was, and the other units with it."""
    model, scaled = tiny("llama"), tiny("llama")
    with torch.no_grad():
        mlp = scaled.model.layers[1].mlp
        mlp.up_proj.weight[unit] *= factor
        if mlp.up_proj.bias is not None:
            mlp.up_proj.bias[unit] *= factor
        mlp.down_proj.weight[:, unit] /= factor
    data = Samples.of(model, samples=3)
    before, after = (found(one, data, *pair).of("ffn", f"{LLAMA}.1").scores.means for one in (model, scaled))
    factors = np.ones(12)
    factors[unit] = factor ** (2 ** pair.count("variance"))
    np.testing.assert_allclose(after, np.array(before) * factors, rtol=1e-7, atol=1e-12)


def test_models_that_are_no_language_models_have_them_too():
    for family in ("vit", "bart", "deberta", "whisper"):
        model = tiny(family, dtype=torch.float32)
        result = measure(Activations(), model, Samples.of(model, samples=2), cache=False)
        for group in result.groups:  # a ReLU may leave a unit at zero for every token
            assert group.stream == "ffn" or min(group.scores.means) > 0
        assert {"query", "ffn", "residual"} <= {group.stream for group in result.groups}


@pytest.mark.parametrize("over_samples", HOW)
def test_deviations_are_those_of_leaving_samples_out(over_samples):
    """Oracle: the jackknife by measuring five samples without each of them, for units of one place and of several."""
    model = tiny("llama")
    rows = Samples.of(model, samples=5).rows
    whole = found(model, Samples(rows), over_samples=over_samples)
    others = [[row for row in range(5) if row != left] for left in range(5)]
    without = [
        found(model, Samples({name: tensor[kept] for name, tensor in rows.items()}), over_samples=over_samples)
        for kept in others
    ]
    for group in whole.groups:
        scores = np.array([one.of(group.stream, group.scope).scores.means for one in without])
        errors = np.sqrt(4 / 5 * ((scores - scores.mean(0)) ** 2).sum(0))
        assert group.scores.deviations is not None
        np.testing.assert_allclose(group.scores.deviations, errors * np.sqrt(5), rtol=1e-6)
        assert group.scores.freedom == 4


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ConfigError, match="over_tokens"):
        Activations.parse({"over_tokens": "median"})
    with pytest.raises(PlanError, match=r"several towers.*Load one of them"):
        found(tiny("clip"), Samples.of(tiny("clip")))
    model = tiny("olmo")
    result = found(model, Samples.of(model))
    with pytest.raises(PlanError, match="residual units was not measured: The norms of its layers have no gains"):
        result.of("residual", "")
    model = tiny("llama")
    chosen = method("altup")
    plan = chosen.plan(Bench(model), chosen.settings.parse({"blocks": 2}))
    apply(plan, model)
    assert "several blocks" in found(model, Samples.of(model)).missing["residual units"]


def test_a_person_can_read_it():
    model = tiny("t5", dtype=torch.float32)
    result = measure(Activations(), model, Samples.of(model), cache=False)
    assert ActivationSizes.model_validate_json(result.model_dump_json()) == result
    assert any("Query heads that matter least by activations: " in said for said in result.findings())
    assert "activations" in result.picture("A model")
