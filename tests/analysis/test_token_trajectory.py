"""What a dropped token moves is what a model does whose layers are run by hand without it, sample by sample."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.samples import Samples
from auxin.analysis import measure, token_trajectory
from auxin.analysis.layer_outputs import LayerOutputs
from auxin.analysis.token_trajectory import TokenTrajectories, TokenTrajectory
from auxin.errors import PlanError
from oracles import trajectory as oracle
from tiny_models import InDouble, inputs, tiny


def found(model: Any, data: Samples, **values: Any) -> TokenTrajectories:
    with InDouble():
        return measure(TokenTrajectory(**values), model, data, cache=False)


def data_of(model: Any, samples: int = 4, batch_size: int = 4) -> Samples:
    return Samples(inputs(model, batch=samples), batch_size)


def deep(**config: Any) -> Any:
    return tiny("vit", num_hidden_layers=3, **config)


def test_scores_are_those_of_layers_run_by_hand():
    model = deep()
    data = data_of(model)
    result = found(model, data, together=2, logits_weight=0.7, temperature=2.0)
    assert (result.first, len(result.layers)) == (1, 2)
    assert [layer.scope for layer in result.layers] == ["vit.layers.1", "vit.layers.2"]

    def head(hidden: Any) -> Any:
        return model.classifier(model.vit.layernorm(hidden)[:, 0])

    for number, layer in enumerate(result.layers, start=1):
        assert len(layer.scores.means) == 4
        for place, mean in enumerate(layer.scores.means):
            values = []
            for start in (0, 2):
                rows = {name: tensor[start : start + 2] for name, tensor in data.rows.items()}
                with InDouble():
                    values.append(oracle.token_score(model.vit, head, rows, number, place + 1, 0.7, 2.0))
            np.testing.assert_allclose(mean, np.mean(values), rtol=1e-8, atol=1e-14)
            np.testing.assert_allclose(layer.scores.deviations[place], np.std(values, ddof=1), rtol=1e-6, atol=1e-13)


def test_later_layers_and_logits_count():
    model = deep()
    data = data_of(model)
    whole = found(model, data).layers[0].scores.means
    layers = found(model, data, logits_weight=0.0).layers[0].scores.means
    assert all(one > other > 0 for one, other in zip(whole, layers, strict=True))
    with torch.no_grad():
        for name, parameter in model.vit.layers[2].named_parameters():
            if "o_proj" in name or "fc2" in name:
                parameter.zero_()
    # The last layer now gives what it gets, and counts as much as the one before it.
    twice = found(model, data, logits_weight=0.0).layers[0].scores.means
    model.vit.layers.__delitem__(2)
    once = found(model, data, logits_weight=0.0).layers[0].scores.means
    np.testing.assert_allclose(twice, 2 * np.array(once), rtol=1e-9)


def test_from_its_layer_on_and_side_by_side_is_the_whole_way_alone(monkeypatch):
    for family in ("vit", "dinov2_with_registers"):
        model = tiny(family)
        together = found(model, data_of(model))
        with monkeypatch.context() as patched:
            patched.setattr(token_trajectory, "AT_ONCE", 1)
            patched.setattr(LayerOutputs, "given_before", lambda *_: torch.no_grad())
            alone = found(model, data_of(model))
        for one, other in zip(together.layers, alone.layers, strict=True):
            np.testing.assert_allclose(one.scores.means, other.scores.means, rtol=1e-9)


@settings(max_examples=5, deadline=None)
@given(batch_size=st.integers(1, 6), together=st.integers(2, 6))
def test_the_size_of_batches_changes_nothing(batch_size, together):
    model = tiny("vit")
    whole, parts = (found(model, data_of(model, 6, size), together=together) for size in (6, batch_size))
    for one, other in zip(whole.layers, parts.layers, strict=True):
        assert one.scores.samples == -(-6 // together)
        np.testing.assert_allclose(one.scores.means, other.scores.means, rtol=1e-9)


def test_a_token_that_nobody_reads_moves_the_layers_alone():
    """Without attention tokens know nothing of each other, so that the class token stays as it is."""
    model = deep()
    with torch.no_grad():
        for layer in model.vit.layers:
            layer.attention.o_proj.weight.zero_()
    data = data_of(model)
    with_logits, without = found(model, data), found(model, data, logits_weight=0.0)
    for one, other in zip(with_logits.layers, without.layers, strict=True):
        np.testing.assert_allclose(one.scores.means, other.scores.means, rtol=1e-9)
        assert min(one.scores.means) > 0


@pytest.mark.parametrize(("family", "first"), [("deit", 2), ("dinov2_with_registers", 5), ("dinov2", 1)])
def test_tokens_before_patches_are_never_dropped(family, first):
    result = found(tiny(family), data_of(tiny(family)))
    assert result.first == first
    assert {len(layer.scores.means) for layer in result.layers} == {4}


def test_it_reads_as_a_table_a_sentence_and_a_picture():
    result = found(deep(image_size=28), data_of(deep(image_size=28)))
    (table,) = result.tables()
    assert [row[:2] for row in table.rows] == [["1", "49"], ["2", "49"]]
    assert result.findings()[0].startswith("Tokens that matter least by trajectory: number ")
    assert "position" in result.picture("Tokens")


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("llama", r"llama is no encoder of patches \(vit, deit.*Leave tokens as they are"),
        ("clip", "clip is no encoder of patches"),
        ("beit", "adds biases by the distance of patches"),
        ("vit base", "gives no logits to compare"),
    ],
)
def test_other_models_are_refused(family, message):
    model = tiny(family)
    with pytest.raises(PlanError, match=message):
        found(model, data_of(model))


def test_a_single_layer_needs_all_tokens():
    model = tiny("vit", num_hidden_layers=1)
    with pytest.raises(PlanError, match="has a single layer"):
        found(model, data_of(model))
