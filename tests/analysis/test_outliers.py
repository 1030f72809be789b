"""Outliers are what loops over hand-written states find, on every architecture; planted ones are found and named."""

import re
import xml.etree.ElementTree as ElementTree
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from analysis.hand_written import by_hand
from analysis.samples import Samples
from auxin.analysis import measure
from auxin.analysis.outlier_results import Outliers
from auxin.analysis.outliers import OutlierMeasurement
from auxin.analysis.similarity import Similarity
from auxin.edits import apply
from auxin.errors import ConfigError, DataError, PlanError
from auxin.methods import method
from auxin.models.anatomy import anatomy
from auxin.planning.bench import Bench
from covering import whole
from oracles import outliers as oracle
from tiny_models import FAMILIES, MODELS, InDouble, inputs, tiny

OTHERS = [family for family in MODELS if family not in (*FAMILIES, "albert", "deberta-v2")]
"""ALBERT runs its one layer several times, and a convolution adds to what DeBERTa's first layer leaves."""
EVERY = [*FAMILIES, "gpt_oss", "olmoe", "clip", "whisper"]
EVERY += [pytest.param(family, marks=whole) for family in OTHERS if family not in EVERY]
BY_HAND = [family for family in FAMILIES if family not in ("qwen2", "qwen3", "olmo")]
LOW = 2.0
"""Deviations from which on something is beyond in tensors of some hundred entries."""


def found(model: Any, data: Samples, **values: Any) -> Outliers:
    with InDouble():
        return measure(OutlierMeasurement(**values), model, data, cache=False)


def tensors(model: Any, row: dict[str, Tensor]) -> list[np.ndarray]:
    """Of one sample what each part of each layer gives, and what the layer leaves, written out by hand."""
    return [
        after - before if number < len(layer) - 1 else after
        for stack in by_hand(model, row)
        for layer in stack
        for number, (before, after) in enumerate(layer)
    ]


@pytest.mark.parametrize("family", BY_HAND)
def test_they_are_what_loops_over_hand_written_states_find(family):
    model = tiny(family)
    rows = inputs(model, batch=5)
    alone = [{name: tensor[n] for name, tensor in rows.items()} for n in range(5)]
    if family not in ("vit", "t5"):
        lengths = [7, 3, 5, 7, 2]
        alone = [{k: v[:length] for k, v in row.items()} for row, length in zip(alone, lengths, strict=True)]
        rows = rows | {"attention_mask": torch.tensor([[1] * n + [0] * (7 - n) for n in lengths])}
    result = found(model, Samples(rows), deviations=LOW)
    samples = [[oracle.outliers(x, LOW) for x in tensors(model, row)] for row in alone]
    # The angles of a TokenFormer's rotation are float32 whatever the model's type.
    close = {"rel": 1e-6 if family == "tokenformer" else 1e-10}
    places = list(result.tensors())
    assert len(places) == len(samples[0])
    for number, place in enumerate(places):
        told = [sample[number] for sample in samples]
        for column, estimate in enumerate((place.infinity_norm, place.peak, place.kurtosis, place.beyond)):
            values = [one[column] for one in told]
            assert estimate.mean == pytest.approx(np.mean(values), **close), (place.module, column)
            assert estimate.deviation == pytest.approx(np.std(values, ddof=1), abs=1e-12, **close)
        expected = oracle.frequent((one[4] for one in told), 0.25)
        assert {one.dimension: one.samples for one in place.dimensions} == pytest.approx(expected)
        shares = [one.samples for one in place.dimensions]
        assert shares == sorted(shares, reverse=True)
    for stack in result.stacks:
        streams = [layer.stream for layer in stack.layers]
        assert stack.kurtosis == pytest.approx(np.mean([stream.kurtosis.mean for stream in streams]))
        assert stack.infinity_norm == pytest.approx(np.mean([stream.infinity_norm.mean for stream in streams]))
        assert stack.largest.stream.infinity_norm.mean == max(stream.infinity_norm.mean for stream in streams)


@pytest.mark.parametrize("family", EVERY)
def test_every_architecture_has_them(family):
    """The stream behind the first layer is what transformers collects there."""
    model = tiny(family)
    data = Samples.of(model, samples=3, batch_size=3)
    result = found(model, data)
    with torch.no_grad(), InDouble():
        output = model(**data.rows, output_hidden_states=True)
    towers = [getattr(output, f"{tower}_model_output", None) for tower in ("vision", "text")]
    collected = [
        states
        for place in (output, *towers)
        for name in ("encoder_hidden_states", "hidden_states", "decoder_hidden_states")
        if (states := getattr(place, name, None))
    ]
    assert len(collected) == len(result.stacks)
    for states, stack in zip(collected, result.stacks, strict=True):
        told = [oracle.outliers(x.reshape(-1, x.shape[-1]).numpy(), 6.0) for x in states[1]]
        assert stack.layers[0].stream.kurtosis.mean == pytest.approx(np.mean([one[2] for one in told]), rel=1e-9)
        assert stack.layers[0].stream.infinity_norm.mean == pytest.approx(np.mean([one[0] for one in told]), rel=1e-9)
        assert stack.layers[0].parts[0].kind == "attention"


@settings(max_examples=20)
@given(family=st.sampled_from(FAMILIES), sizes=st.tuples(st.integers(1, 7), st.integers(1, 7)), seed=st.integers(0, 9))
def test_the_size_of_the_batches_changes_nothing(family, sizes, seed):
    model = tiny(family, dtype=torch.float32)
    wanted = OutlierMeasurement(deviations=LOW)
    one, other = (
        measure(wanted, model, Samples.of(model, 7, size, seed), cache=False).model_dump_json() for size in sizes
    )
    pattern = re.compile(r"-?\d+\.\d+(?:e-?\d+)?|null")
    for a, b in zip(pattern.findall(one), pattern.findall(other), strict=True):
        assert a == b or float(a) == pytest.approx(float(b), rel=1e-4, abs=1e-5)


class Planted:
    """A Llama whose first layer leaves chosen states, whatever it reads."""

    def __init__(self, width: int = 64) -> None:
        self.model = tiny("llama", dtype=torch.float32, hidden_size=width, num_hidden_layers=1)
        self.states = torch.empty(0)
        self.model.model.layers[0].register_forward_hook(lambda module, arguments, output: self.states)

    def found(self, states: Tensor, mask: Tensor | None = None, **values: Any) -> Any:
        """What is found in `states`, (samples, tokens, width)."""
        self.states = states
        rows = {"input_ids": torch.zeros(states.shape[:2], dtype=torch.long)}
        rows |= {} if mask is None else {"attention_mask": mask}
        data = Samples(rows, batch_size=len(states))
        result = measure(OutlierMeasurement(**values), self.model, data, cache=False)
        return result.stacks[0].layers[0].stream


@cache
def planted() -> Planted:
    return Planted()


@given(seed=st.integers(0, 99), scale=st.floats(1e-6, 1e6), mean=st.floats(-3, 3))
def test_a_gaussian_has_a_kurtosis_of_three_and_no_outliers(seed, scale, mean):
    """4 x 32 x 64 entries each: the standard error of the kurtosis is sqrt(24 / 2048) by sample. It knows no scale."""
    gauss = torch.randn(4, 32, 64, generator=torch.Generator().manual_seed(seed))
    stream = planted().found(scale * (gauss + mean))
    assert stream.kurtosis.mean == pytest.approx(3, abs=5 * (24 / 2048 / 4) ** 0.5)
    assert stream.beyond.mean == 0
    assert stream.dimensions == []
    assert 2.5 < stream.peak.mean < 6 + abs(mean)
    assert stream.infinity_norm.mean == pytest.approx(scale * (gauss + mean).abs().amax((1, 2)).mean().item(), rel=1e-5)


@settings(max_examples=30)
@given(dimension=st.integers(0, 63), token=st.integers(0, 31), seed=st.integers(0, 99))
def test_a_planted_outlier_is_found_and_named(dimension, token, seed):
    states = torch.randn(8, 32, 64, generator=torch.Generator().manual_seed(seed))
    plain = planted().found(states.clone())
    states[:3, token, dimension] = 100.0  # in three of eight samples, more than a quarter
    states[3:5, token, (dimension + 1) % 64] = -100.0  # in two, no more than a quarter
    stream = planted().found(states)
    assert [one.dimension for one in stream.dimensions] == [dimension]
    assert stream.dimensions[0].samples == 3 / 8
    assert stream.beyond.mean == pytest.approx(5 / 8 / (32 * 64))
    assert stream.kurtosis.mean > 100 * plain.kurtosis.mean
    assert stream.peak.mean > 5 * plain.peak.mean
    both = {dimension, (dimension + 1) % 64}
    assert {one.dimension for one in planted().found(states, sample_share=0.2).dimensions} == both
    padding = torch.ones(8, 32, dtype=torch.long)
    padding[:, token] = 0
    assert planted().found(states, padding).dimensions == []


def test_what_has_no_deviation_has_no_outliers():
    model = tiny("llama", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.model.layers[1].mlp.down_proj.parameters():
            parameter.zero_()
    layer = measure(OutlierMeasurement(), model, Samples.of(model), cache=False).stacks[0].layers[1]
    silent = layer.parts[1]
    numbers = (silent.infinity_norm, silent.peak, silent.kurtosis, silent.beyond)
    assert [number.mean for number in numbers] == [0, 0, 0, 0]
    assert planted().found(torch.full((2, 3, 64), 7.0)).kurtosis.mean == 0


def test_every_part_says_where_and_what_it_is():
    (encoder, decoder) = found(tiny("t5"), Samples.of(tiny("t5"))).stacks
    assert [(part.module, part.kind) for part in encoder.layers[1].parts] == [
        ("encoder.block.1.layer.0.SelfAttention.o", "attention"),
        ("encoder.block.1.layer.1.DenseReluDense.wo", "feed-forward"),
    ]
    assert [part.kind for part in decoder.layers[0].parts] == ["attention", "cross-attention", "feed-forward"]
    assert (decoder.layers[0].stream.module, decoder.layers[0].stream.kind) == ("decoder.block.0", "stream")
    (stack,) = found(tiny("olmo2"), Samples.of(tiny("olmo2"))).stacks
    assert stack.layers[0].parts[0].module == "model.layers.0.post_attention_layernorm"


NORMS = {
    "llama": ["{}.input_layernorm", "{}.post_attention_layernorm", "model.norm"],
    "bert": ["{}.attention.output.LayerNorm", "{}.output.LayerNorm"],
    "opt": ["{}.self_attn_layer_norm", "{}.final_layer_norm", "model.decoder.final_layer_norm"],
    "olmo2": ["model.norm"],  # the others end parts
    "vit": ["{}.layernorm_before", "{}.layernorm_after", "vit.layernorm"],
}
LAYERS = {"llama": "model.layers", "bert": "bert.encoder.layer", "opt": "model.decoder.layers", "vit": "vit.layers"}


@pytest.mark.parametrize("family", NORMS)
def test_norms_count_too_and_behind_sums_what_they_read(family):
    """Each sample by itself, as the paper has it, and then the largest norm and the mean kurtosis of all."""
    model = tiny(family)
    rows = inputs(model, batch=3)
    result = found(model, Samples(rows, batch_size=2))
    layers = [f"{LAYERS.get(family, 'model.layers')}.{number}" for number in range(2)]
    inside = [name.format(layer) for layer in layers for name in NORMS[family] if "{}" in name]
    paths = inside + [name for name in NORMS[family] if "{}" not in name]
    (stack,) = result.stacks
    assert sorted(one.module for one in stack.norms) == sorted(paths)
    assert sorted(one.module for one in stack.sums) == sorted(inside if family == "bert" else [])
    read: dict[tuple[str, str], list[np.ndarray]] = {}
    for path in paths:
        model.get_submodule(path).register_forward_hook(
            lambda module, arguments, output, path=path: (
                (
                    read.setdefault((path, "sum"), []).append(arguments[0].flatten(0, -2).numpy()),
                    read.setdefault((path, "norm"), []).append(output.flatten(0, -2).numpy()),
                )[2:]
                or None
            )
        )
    with torch.no_grad(), InDouble():
        for number in range(3):
            model(**{name: tensor[number : number + 1] for name, tensor in rows.items()})
    for one in (*stack.norms, *stack.sums):
        told = [oracle.outliers(x, 6.0) for x in read[one.module, one.kind]]
        assert one.infinity_norm.mean == pytest.approx(np.mean([each[0] for each in told]), rel=1e-9)
        assert one.kurtosis.mean == pytest.approx(np.mean([each[2] for each in told]), rel=1e-9)
    every = [*result.tensors(), *stack.norms]
    assert result.kurtosis == pytest.approx(np.mean([one.kurtosis.mean for one in every]))
    assert result.largest.infinity_norm.mean == max(one.infinity_norm.mean for one in (*every, *stack.sums))


def test_it_shares_a_pass_and_its_settings_count(tmp_path):
    model = tiny("llama", dtype=torch.float32)
    data = Samples.of(model)
    alone = measure(Similarity(), model, data, cache=False)
    data.passes = 0
    assert measure("similarity", model, data, cache=tmp_path) == alone
    six = measure("outliers", model, data, cache=tmp_path)
    two = measure(OutlierMeasurement(deviations=LOW), model, data, cache=tmp_path)
    assert data.passes == 3
    assert (six.deviations, two.deviations) == (6.0, 2.0)
    assert two.stacks[0].layers[0].stream.beyond.mean > six.stacks[0].layers[0].stream.beyond.mean
    for wrong in ({"deviations": 0}, {"sample_share": 1}, {"sample_share": -0.1}, {"layers": 3}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            OutlierMeasurement.parse(wrong, source="outliers")


def test_what_cannot_be_measured_is_refused():
    blocks = tiny("llama")
    apply(method("altup").plan(Bench(blocks), method("altup").settings.parse({"blocks": 2})), blocks)
    data = Samples.of(blocks)
    with pytest.raises(PlanError, match="several blocks"):
        found(blocks, data)
    assert data.passes == 0
    shared = tiny("albert")
    with pytest.raises(PlanError, match=r"was run 3 times in one pass, and one is expected"):
        found(shared, Samples.of(shared))
    model = tiny("bert")
    with pytest.raises(DataError, match=r"A mask of \(samples, tokens\) = \(2, 6\) was given"):
        found(model, Samples({**inputs(model), "attention_mask": torch.ones(2, 6)}))


def test_a_layer_that_lacks_a_part_has_the_others():
    model = tiny("llama")
    stack = anatomy(model).stacks[0]
    assert stack.outputs[0] == "self_attn.o_proj"
    model.model.layers[1].self_attn.o_proj = torch.nn.Sequential()
    del model.model.layers[1].self_attn.o_proj
    model.model.layers[1].self_attn.forward = lambda hidden_states, **named: (torch.zeros_like(hidden_states), None)
    layers = found(model, Samples.of(model)).stacks[0].layers
    assert [part.kind for part in layers[1].parts] == ["feed-forward"]


def test_a_person_can_read_it():
    for family in ("t5", "llama"):
        model = tiny(family, dtype=torch.float32)
        result = measure(OutlierMeasurement(deviations=LOW), model, Samples.of(model), cache=False)
        assert Outliers.model_validate_json(result.model_dump_json()) == result
        for table, stack in zip(result.tables(), result.stacks, strict=True):
            assert table.title == stack.path
            last = stack.layers[1].stream
            assert table.rows[-1][:6] == [
                "1",
                "stream",
                f"{last.infinity_norm.mean:.3g}",
                f"{last.peak.mean:.3g}",
                f"{last.kurtosis.mean:.3g}",
                f"± {last.kurtosis.margin:.2g}",
            ]
        worst = max(result.tensors(), key=lambda place: place.kurtosis.mean)
        assert (
            f"Largest kurtosis: {worst.module} {worst.kurtosis.mean:.4g}," in result.findings()[len(result.stacks) + 1]
        )
        root = ElementTree.fromstring(result.picture("A model"))
        texts = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("}text")]
        assert {"A model", *(f"kurtosis ({stack.path})" for stack in result.stacks), "A", "F", "S"} <= set(texts)
        assert ("C" in texts) == (family == "t5")
        told = [element.text for element in root.iter() if element.tag.endswith("}title")][1:]
        assert len(told) == 2 * len(list(result.tensors()))


def test_a_table_of_large_numbers_fits_a_terminal():
    model = tiny("t5", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.decoder.block[1].parameters():
            parameter.mul_(3e4)
    result = measure(OutlierMeasurement(deviations=1.0, sample_share=0.0), model, Samples.of(model), cache=False)
    named = [
        one.model_copy(update={"dimension": 10_000 + one.dimension})
        for one in result.stacks[1].layers[1].stream.dimensions
    ]
    result.stacks[1].layers[1].stream.dimensions[:] = named
    for table in result.tables():
        widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
        assert sum(widths) + 2 * (len(widths) - 1) <= 80
