"""A curve of removals is that of passes without the first ones, and what goes first is what does least alone."""

from typing import Any

import numpy as np
import pytest
import torch

from analysis.samples import Samples
from auxin.analysis import measure
from auxin.analysis.removal import Removal
from auxin.analysis.removal_curve import Curve, RemovalCurve
from auxin.errors import ConfigError
from oracles import removal as oracle
from tiny_models import EPSILON, InDouble, inputs, labels, tiny


def found(model: Any, data: Samples, **settings: Any) -> Curve:
    with InDouble():
        return measure(RemovalCurve(**settings), model, data, cache=False)


def labelled(model: Any, samples: int = 4, batch_size: int = 2) -> Samples:
    data = Samples.of(model, samples, batch_size)
    data.rows["labels"] = labels(model, batch=samples)
    return data


@pytest.mark.parametrize("name", ["js", "norm", "perplexity"])
def test_it_is_the_curve_of_a_model_written_out(name):
    model = tiny("llama", num_hidden_layers=3)
    data = Samples.of(model, samples=3)
    ids = data.rows["input_ids"]
    data.rows["labels"] = ids
    w = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    heads, keys = model.config.num_attention_heads, model.config.num_key_value_heads

    def far(gates: set[tuple[int, str]]) -> list[float]:
        """By sample, without some parts."""
        pairs = [
            [oracle.llama(w, row, heads, keys, EPSILON, 3, closed) for closed in (set(), gates)] for row in ids.tolist()
        ]
        return [oracle.distances(*pair, row)[name] for pair, row in zip(pairs, ids.tolist(), strict=True)]

    gates = [(number, part) for number in range(3) for part in ("self_attn", "mlp")]
    order = sorted(gates, key=lambda gate: np.mean(far({gate})))
    curve = found(model, data, distance=name, share=1.0)
    assert curve.candidates == len(curve.steps) == 6
    for count, ((number, part), step) in enumerate(zip(order, curve.steps, strict=True), start=1):
        assert step.effect.path == f"model.layers.{number}.{part}"
        expected = far(set(order[:count]))
        assert step.together.mean == pytest.approx(np.mean(expected), rel=1e-6)
        assert step.together.deviation == pytest.approx(np.std(expected, ddof=1), rel=1e-5)


@pytest.mark.parametrize("candidates", ["all", "layers", "attention"])
def test_its_first_step_is_the_least_removal_and_the_model_stays(candidates):
    model, data = tiny("llama", num_hidden_layers=4), labelled(tiny("llama", num_hidden_layers=4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    curve = found(model, data, candidates=candidates)
    assert data.passes == 1
    with InDouble():
        alone = measure(Removal(candidates=candidates, distances=["js"]), model, data, cache=False).ranking("js")
    assert [step.effect for step in curve.steps] == alone[: len(alone) // 2]
    first = curve.steps[0]
    assert first.together.mean == pytest.approx(first.effect.distances["js"].mean, rel=1e-12)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_parts_that_add_nothing_come_first_and_cost_nothing():
    model = tiny("llama", num_hidden_layers=3)
    with torch.no_grad():
        for part in (model.model.layers[2].mlp.down_proj, model.model.layers[0].self_attn.o_proj):
            for parameter in part.parameters():
                parameter.zero_()
    curve = found(model, labelled(model))
    assert [step.together.mean == 0 for step in curve.steps] == [True, True, False]
    assert {step.effect.path for step in curve.steps[:2]} == {"model.layers.0.self_attn", "model.layers.2.mlp"}
    last = curve.steps[2]
    assert (
        f"without 3 of 6 candidates. Each alone, they add up to {last.effect.distances['js'].mean:.3g}."
        in (curve.findings()[0])
    )
    assert last.effect.words in curve.findings()[1]


@pytest.mark.parametrize("batch_size", [1, 3, 6])
def test_the_size_of_batches_changes_nothing(batch_size):
    model = tiny("llama")
    whole, parts = (found(model, labelled(model, 6, size), share=1.0) for size in (6, batch_size))
    for one, other in zip(whole.steps, parts.steps, strict=True):
        assert other.effect.path == one.effect.path
        assert other.together.mean == pytest.approx(one.together.mean, rel=1e-9)
        assert other.together.deviation == pytest.approx(one.together.deviation, rel=1e-7)


def test_a_share_is_rounded_down_and_one_goes_at_least():
    model = tiny("llama")
    assert [len(found(model, labelled(model), share=share).steps) for share in (0.01, 0.5, 0.7, 1.0)] == [1, 2, 2, 4]
    with pytest.raises(ConfigError, match="share"):
        RemovalCurve.parse({"share": 0})


def test_the_picture_has_a_mark_with_its_interval_for_every_step():
    model = tiny("t5", dtype=torch.float32)
    data = Samples({**inputs(model, batch=4), "labels": labels(model, batch=4)})
    curve = found(model, data, share=0.6)
    (table,) = curve.tables()
    assert [row[0] for row in table.rows] == [str(number) for number in range(1, len(curve.steps) + 1)]
    assert all("±" in row[2] and "±" in row[3] for row in table.rows)
    picture = curve.picture("A curve")
    assert picture.count("<circle") == len(curve.steps) == picture.count("± ")
    for step in curve.steps:  # an encoder's layer 0 is none of the decoder's
        letter = {"attention": "A", "cross-attention": "X", "feed-forward": "F"}[step.effect.kind]
        assert f"{letter} {step.effect.stack[0]}{step.effect.number} last" in picture
