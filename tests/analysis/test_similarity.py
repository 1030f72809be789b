"""The similarity of hidden states is what NumPy makes of hand-written forward passes, on every architecture."""

import copy
import gc
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from analysis.hand_written import by_hand
from analysis.samples import Samples
from auxin.analysis import measure
from auxin.analysis.parts import KINDS
from auxin.analysis.similarity import Similarities, Similarity
from auxin.edits import apply
from auxin.errors import DataError, PlanError
from auxin.methods import method
from auxin.models.anatomy import anatomy
from auxin.planning.bench import Bench
from oracles import similarity as oracle
from tiny_models import FAMILIES, InDouble, inputs, tiny

VARIANTS = [*((family, {}) for family in FAMILIES), ("gpt_neox", {"use_parallel_residual": False})]
every_variant = pytest.mark.parametrize(("family", "config"), VARIANTS, ids=str)
ORACLES = [variant for variant in VARIANTS if variant[0] not in ("qwen2", "qwen3", "olmo")]
"""One of each build: the other three differ from Llama in what is inside of their parts."""


def found(model: Any, data: Samples) -> Similarities:
    with InDouble():
        return measure(Similarity(), model, data, cache=False)


def numbers(result: Similarities) -> list[list[list[float]]]:
    """By stack, layer and part; the whole layer last."""
    return [
        [[*(part.similarity.mean for part in layer.parts), layer.similarity.mean] for layer in stack.layers]
        for stack in result.stacks
    ]


@pytest.mark.parametrize(("family", "config"), ORACLES, ids=str)
def test_it_is_what_hand_written_forward_passes_give(family, config):
    model = tiny(family, **config)
    data = Samples.of(model, samples=5)
    rows = [{name: rows[n] for name, rows in data.rows.items()} for n in range(5)]
    samples = [oracle.similarities(by_hand(model, row)) for row in rows]
    result = found(model, data)
    # The angles of a TokenFormer's rotation are float32 whatever the model's type.
    close = 1e-6 if family == "tokenformer" else 1e-10
    for stack, (got, layers) in enumerate(zip(result.stacks, samples[0], strict=True)):
        for number, layer in enumerate(got.layers):
            estimates = [*(part.similarity for part in layer.parts), layer.similarity]
            for place, estimate in enumerate(estimates):
                values = [sample[stack][number][place] for sample in samples]
                assert estimate.mean == pytest.approx(np.mean(values), abs=close)
                assert estimate.deviation == pytest.approx(np.std(values, ddof=1), abs=close)
                # Student's t with four degrees of freedom, from a printed table.
                assert estimate.margin == pytest.approx(2.776 * np.std(values, ddof=1) / np.sqrt(5), rel=1e-3)
        assert len(got.layers) == len(layers)


@every_variant
def test_a_whole_layer_is_what_transformers_collects_between_layers(family, config):
    """Beside the oracle, for the architectures that have none; the last state is left out: it may be normed already."""
    model = tiny(family, **config)
    data = Samples.of(model, samples=3)
    with torch.no_grad(), InDouble():
        output = model(**data.rows, output_hidden_states=True)
    names = ("encoder_hidden_states", "decoder_hidden_states") if family == "t5" else ("hidden_states",)
    for name, stack in zip(names, found(model, data).stacks, strict=True):
        before, after = (state.numpy() for state in output[name][:2])
        values = [oracle.cosine(x, y) for x, y in zip(before, after, strict=True)]
        assert stack.layers[0].similarity.mean == pytest.approx(np.mean(values), abs=1e-10)
        assert stack.layers[0].influence == pytest.approx(1 - np.mean(values), abs=1e-10)


def test_every_part_says_where_and_what_it_is():
    (encoder, decoder) = found(tiny("t5"), Samples.of(tiny("t5"))).stacks
    assert [(part.module, part.kind) for part in encoder.layers[1].parts] == [
        ("encoder.block.1.layer.0.SelfAttention.o", "attention"),
        ("encoder.block.1.layer.1.DenseReluDense.wo", "feed-forward"),
    ]
    assert [part.kind for part in decoder.layers[0].parts] == ["attention", "cross-attention", "feed-forward"]
    for family in FAMILIES:
        if family != "t5":
            (stack,) = found(tiny(family), Samples.of(tiny(family))).stacks
            assert [part.kind for part in stack.layers[0].parts] == ["attention", "feed-forward"], family


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_part_that_gives_zero_has_exactly_one(family, config, dtype):
    model = tiny(family, dtype=dtype, **config)
    for stack in anatomy(model).stacks:
        for place, name in enumerate(stack.outputs):
            silenced = copy.deepcopy(model)
            with torch.no_grad():
                for parameter in silenced.get_submodule(f"{stack.path}.1.{name}").parameters():
                    parameter.zero_()
            result = measure(Similarity(), silenced, Samples.of(silenced, samples=3), cache=False)
            layers = next(item.layers for item in result.stacks if item.path == stack.path)
            estimate = layers[1].parts[place].similarity
            assert (estimate.mean, estimate.deviation, estimate.margin) == (1.0, 0.0, 0.0)
            assert layers[0].parts[place].similarity.mean < 1


@every_variant
def test_planted_parts_that_do_little_are_found(family, config):
    """Effect: the outputs of two parts are scaled down, and these two come first, in this order."""
    model = tiny(family, **config)
    stack = anatomy(model).stacks[-1]
    planted = [f"{stack.path}.1.{stack.outputs[-1]}", f"{stack.path}.0.{stack.outputs[0]}"]
    for path, factor in zip(planted, (1e-3, 1e-2), strict=True):
        model.get_submodule(path).register_forward_hook(lambda module, inputs, output, f=factor: f * output)
    # Where a norm follows the part, it is the norm's output that counts.
    if stack.norm_position == "after_output":
        for path, norm, factor in zip(planted, reversed(stack.output_norms), (1e-3, 1e-2), strict=True):
            layer = path.split(".")[2]
            with torch.no_grad():
                model.get_submodule(f"{stack.path}.{layer}.{norm}").weight.mul_(factor)
    result = found(model, Samples.of(model))
    ranked = sorted(result.parts(), key=lambda part: -part.similarity.mean)
    assert [part.module for part in ranked[:2]] == planted
    first = f"the {KINDS.get(ranked[0].kind, ranked[0].kind)} of {stack.path}.1 ({ranked[0].similarity})"
    assert result.findings()[0].startswith(f"Parts that change the stream least: {first}, the ")


@every_variant
def test_an_identity_layer_has_exactly_one(family, config):
    """Norms behind sums come with the layer: BERT's is no identity without its parts."""
    model = tiny(family, dtype=torch.float32, **config)
    (stack, *_) = anatomy(model).stacks
    with torch.no_grad():
        for name in stack.outputs:
            for parameter in model.get_submodule(f"{stack.path}.0.{name}").parameters():
                parameter.zero_()
    layer = measure(Similarity(), model, Samples.of(model), cache=False).stacks[0].layers[0]
    assert [part.similarity.mean for part in layer.parts] == [1.0] * len(stack.outputs)
    assert (layer.similarity.mean == 1) == (stack.norm_position != "after_residual")


def test_a_stream_of_zeros_is_like_nothing_but_itself():
    model = tiny("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].self_attn.o_proj.bias.zero_()
    layer = found(model, Samples.of(model)).stacks[0].layers[0]
    assert [part.similarity.mean for part in layer.parts] == [1.0, 0.0]
    assert layer.similarity.mean == 0


@given(family=st.sampled_from(FAMILIES), sizes=st.tuples(st.integers(1, 7), st.integers(1, 7)), seed=st.integers(0, 9))
def test_the_size_of_the_batches_changes_nothing(family, sizes, seed):
    model = tiny(family, dtype=torch.float32)
    one, other = (
        measure(Similarity(), model, Samples.of(model, 7, size, seed), cache=False).model_dump_json() for size in sizes
    )
    pattern = re.compile(r"-?\d+\.\d+(?:e-?\d+)?|null")
    for a, b in zip(pattern.findall(one), pattern.findall(other), strict=True):
        assert a == b or float(a) == pytest.approx(float(b), abs=2e-6)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "vit"])
def test_padding_does_not_count(family):
    """A batch with padding against the same samples, one by one and as long as they are."""
    model = tiny(family)
    whole = inputs(model, batch=3, length=7)
    lengths = [7, 4, 1]
    padded = {**whole, "attention_mask": torch.tensor([[1] * length + [0] * (7 - length) for length in lengths])}
    alone = []
    for n, length in enumerate(lengths):
        row = {name: rows[n : n + 1, :length] for name, rows in whole.items()}
        if family == "t5":
            row["decoder_input_ids"] = whole["decoder_input_ids"][n : n + 1, : n + 2]
        alone.append(numbers(found(model, Samples(row))))
    if family == "t5":
        padded["decoder_attention_mask"] = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    together = numbers(found(model, Samples(padded, batch_size=3)))
    for stack, layers in enumerate(together):
        for number, places in enumerate(layers):
            for place, mean in enumerate(places):
                expected = np.mean([sample[stack][number][place] for sample in alone])
                assert mean == pytest.approx(expected, abs=1e-9), (stack, number, place)


def test_what_a_decoder_is_not_to_write_does_not_count():
    """Labels of -100 are padding of a decoder whose inputs are made of its labels."""
    model = tiny("t5")
    rows = {"input_ids": inputs(model)["input_ids"], "labels": torch.tensor([[3, 4, 5, 1, 1], [6, 1, 1, 1, 1]])}
    masked = {**rows, "labels": torch.tensor([[3, 4, 5, 1, -100], [6, 1, -100, -100, -100]])}
    alone = [
        {"input_ids": rows["input_ids"][n : n + 1], "labels": rows["labels"][n : n + 1, :length]}
        for n, length in enumerate([4, 2])
    ]
    expected = np.mean([numbers(found(model, Samples(row)))[1] for row in alone], axis=0)
    np.testing.assert_allclose(numbers(found(model, Samples(masked)))[1], expected, atol=1e-9)
    assert not np.allclose(numbers(found(model, Samples(rows)))[1], expected, atol=1e-3)


def test_no_hidden_state_outlives_its_batch():
    """Memory is bounded: of what passes through the layers nothing is left when the next batch comes."""
    model, length, alive = tiny("llama"), 13, []

    def is_hidden(item: object) -> bool:
        return type(item) is Tensor and item.is_floating_point() and length in item.shape

    class Watched(Samples):
        def batches(self):
            for batch in super().batches():
                yield batch
                alive.append(sum(is_hidden(item) for item in gc.get_objects()))

    measure(Similarity(), model, Watched(inputs(model, batch=12, length=length), batch_size=1), cache=False)
    # The model's own output of the batch before is still held.
    assert alive == [1] * 12


@pytest.mark.parametrize(
    ("name", "settings"), [("altup", {"blocks": 2}), ("altup", {"blocks": 2, "conversion": "copies"})]
)
def test_a_stream_of_several_blocks_is_refused(name, settings):
    model = tiny("llama")
    apply(method(name).plan(Bench(model), method(name).settings.parse(settings)), model)
    data = Samples.of(model)
    with pytest.raises(PlanError, match="several blocks"):
        measure(Similarity(), model, data, cache=False)
    assert data.passes == 0


def test_layers_of_another_build_are_refused():
    """What is added up from the parts must be what the layer gives."""
    model = tiny("llama")
    model.model.layers[1].register_forward_hook(lambda module, arguments, output: 1.001 * output)
    with pytest.raises(PlanError, match=r"model\.layers\.1 is not built as its architecture.*plus what its parts give"):
        measure(Similarity(), model, Samples.of(model), cache=False)
    strided = tiny("gpt2")
    chosen = method("sequence-altup")
    apply(chosen.plan(Bench(strided), chosen.settings.parse({"stride": 2, "layers": [1]})), strided)
    with pytest.raises(PlanError, match=r"transformer\.h\.1 is not built as its architecture .* gives \(2, 4, 16\)"):
        measure(Similarity(), strided, Samples.of(strided), cache=False)


def test_what_is_not_finite_is_refused_and_the_sample_named():
    model = tiny("llama", dtype=torch.float32)
    ids = torch.tensor([[3, 4], [5, 6], [7, 8], [9, 3]])
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    with pytest.raises(DataError, match=r"Sample 2 \(from 0\) gives a value that is not finite"):
        measure(Similarity(), model, Samples({"input_ids": ids}), cache=False)


def test_masks_that_do_not_fit_are_refused():
    model = tiny("bert")
    rows = inputs(model)
    for mask, words in (
        (torch.ones(2, 1, 7, 7), r"attention_mask has shape \(2, 1, 7, 7\)"),
        (torch.tensor([[1] * 7, [0] * 7]), "a sample has no token, only padding"),
    ):
        with pytest.raises(DataError, match=words):
            measure(Similarity(), model, Samples({**rows, "attention_mask": mask}), cache=False)


def test_a_person_can_read_it():
    for family in ("t5", "llama"):
        model = tiny(family, dtype=torch.float32)
        result = measure(Similarity(), model, Samples.of(model), cache=False)
        assert Similarities.model_validate_json(result.model_dump_json()) == result
        for table, stack in zip(result.tables(), result.stacks, strict=True):
            assert table.title == stack.path
            widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
            assert sum(widths) + 2 * (len(widths) - 1) <= 80
            assert table.rows[1][-1].startswith(f"{stack.layers[1].similarity.mean:.4f} ± ")
        best = max(result.parts(), key=lambda part: part.similarity.mean)
        assert f"least: the {KINDS.get(best.kind, best.kind)} of " in result.findings()[0]
        assert f" ({best.similarity}), the " in result.findings()[0]
        root = ElementTree.fromstring(result.picture("A model"))
        texts = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("}text")]
        assert {"A model", *(stack.path for stack in result.stacks), "attention", "whole layer"} <= set(texts)
        assert ("cross-attention" in texts) == (family == "t5")
        told = [element.text for element in root.iter() if element.tag.endswith("}title")][1:]
        layers = [layer for stack in result.stacks for layer in stack.layers]
        assert len(told) == len(list(result.parts())) + len(layers)


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "granite", "opt"])
def test_whole_layers_are_measured_however_they_are_built(family):
    model = tiny(family)
    data = Samples.of(model, samples=3)
    with InDouble():
        alone = measure(Similarity(parts=False), model, data, cache=False)
    layers = [layer for stack in alone.stacks for layer in stack.layers]
    assert layers
    assert all(not layer.parts for layer in layers)
    if family not in ("granite", "opt"):  # whose parts are scaled, or flattened, on their way to the stream
        whole = [layer for stack in found(model, data).stacks for layer in stack.layers]
        assert [layer.similarity for layer in layers] == [layer.similarity for layer in whole]
    assert len(alone.findings()) == 1
