"""What a removal does to the output is what forward passes without it give, on every architecture."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from analysis.samples import Samples
from auxin.analysis import measure
from auxin.analysis.distances import DISTANCES, distance
from auxin.analysis.removal import Candidate, PrefixedRuns, Removal, Removals, candidates
from auxin.errors import ConfigError, PlanError
from auxin.models.sublayers import sublayers
from oracles import removal as oracle
from tiny_models import EPSILON, FAMILIES, InDouble, inputs, labels, tiny

MORE = ("olmo2", "mixtral", "gptj", "bart", "opt", "modernbert", "falcon", "gemma2")
every_family = pytest.mark.parametrize("family", dict.fromkeys([*FAMILIES, *MORE]))


def labelled(model: Any, samples: int = 5, batch_size: int = 2) -> Samples:
    data = Samples.of(model, samples, batch_size)
    data.rows["labels"] = labels(model, batch=samples)
    if model.config.model_type == "bart":  # whose decoder reads as much as its labels say
        data.rows.pop("decoder_input_ids", None)
    return data


def found(model: Any, data: Samples, **settings: Any) -> Removals:
    with InDouble():
        return measure(Removal(**settings), model, data, cache=False)


def test_effects_are_those_of_a_model_written_out():
    model = tiny("llama")
    data = Samples.of(model, samples=3)
    ids = data.rows["input_ids"]
    data.rows["labels"] = ids
    w = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    heads, keys = model.config.num_attention_heads, model.config.num_key_value_heads
    result = found(model, data)
    assert [effect.path for effect in result.effects] == [
        f"model.layers.{n}.{part}" for n in range(2) for part in ("self_attn", "mlp")
    ]
    for effect in result.effects:
        gate = (effect.number, effect.path.rpartition(".")[2])
        expected = [
            oracle.distances(
                oracle.llama(w, row, heads, keys, EPSILON, 2, set()),
                oracle.llama(w, row, heads, keys, EPSILON, 2, {gate}),
                row,
            )
            for row in ids.tolist()
        ]
        for name in DISTANCES:
            of_samples = [one[name] for one in expected]
            # The frequencies of Llama's rotation are float32 whatever the model's type.
            assert effect.distances[name].mean == pytest.approx(np.mean(of_samples), rel=1e-7)
            assert effect.distances[name].deviation == pytest.approx(np.std(of_samples, ddof=1), rel=1e-6)


@every_family
def test_from_its_layer_on_is_the_whole_way(family):
    """Runs that begin with what earlier layers gave are whole runs, to the bit."""
    model = tiny(family, dtype=torch.float32)
    data = labelled(model, samples=2)
    (batch,) = data.batches()
    batch = dict(batch)
    every = candidates(model, "all")
    runs = PrefixedRuns(model, list(dict.fromkeys(one.layer for one in every)))
    with torch.no_grad():
        for gone in ([], [every[-1]]):
            runs.start(batch, gone)
            for one in every:
                if one not in gone:
                    whole = PrefixedRuns(model, []).start(batch, [*gone, one])
                    assert torch.equal(runs.without(batch, gone, one), whole)
    assert all("forward" not in vars(module) for module in model.modules())


@every_family
def test_every_sublayer_has_an_effect_and_the_model_stays(family):
    model = tiny(family, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = labelled(model)
    names = ["js", "kl", "angular", "norm", "perplexity"]
    result = found(model, data, distances=names)
    assert len(result.effects) == len(sublayers(model))
    for effect in result.effects:
        assert 0 < effect.distances["js"].mean <= math.log(2)
        assert 0 < effect.distances["angular"].mean <= math.pi / 2 + 1e-6
    assert result.loss is not None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert data.passes == 1


def test_one_more_removal_is_told_from_the_whole_model():
    model, data = tiny("llama"), labelled(tiny("llama"))
    first, second = "model.layers.0.mlp", "model.layers.1.self_attn"
    one = found(model, data, removed=[first], distances=["js"])
    other = found(model, data, removed=[second], distances=["js"])
    assert [effect.path for effect in one.effects] == [s.path for s in sublayers(model) if s.path != first]
    both = [
        next(effect for effect in result.effects if effect.path == path).distances["js"].mean
        for result, path in ((one, second), (other, first))
    ]
    assert both[0] == pytest.approx(both[1], rel=1e-12)


@given(batch_size=st.integers(1, 6))
def test_the_size_of_batches_changes_nothing(batch_size):
    model = tiny("llama")
    whole = found(model, labelled(model, samples=6, batch_size=6), distances=["js", "norm"])
    parts = found(model, labelled(model, samples=6, batch_size=batch_size), distances=["js", "norm"])
    for one, other in zip(whole.effects, parts.effects, strict=True):
        for name in ("js", "norm"):
            assert other.distances[name].mean == pytest.approx(one.distances[name].mean, rel=1e-9)
            assert other.distances[name].deviation == pytest.approx(one.distances[name].deviation, rel=1e-7)


def test_padding_counts_for_nothing():
    model = tiny("llama")
    data = labelled(model, samples=3, batch_size=3)
    ids = data.rows["input_ids"]
    padded = Samples(
        {
            "input_ids": torch.cat([ids, ids[:, :2]], dim=1),
            "attention_mask": torch.cat([torch.ones_like(ids), torch.zeros_like(ids[:, :2])], dim=1),
            "labels": torch.cat([data.rows["labels"], ids[:, :2]], dim=1),
        }
    )
    plain, other = found(model, data), found(model, padded)
    for one, two in zip(plain.effects, other.effects, strict=True):
        for name in DISTANCES:
            assert two.distances[name].mean == pytest.approx(one.distances[name].mean, rel=1e-9)


def test_a_part_that_adds_nothing_is_not_missed():
    model = tiny("llama")
    with torch.no_grad():
        for parameter in model.model.layers[1].mlp.down_proj.parameters():
            parameter.zero_()
    result = found(model, labelled(model))
    effect = next(effect for effect in result.effects if effect.path == "model.layers.1.mlp")
    assert all(estimate.mean == 0 for estimate in effect.distances.values())
    assert result.ranking("js")[0] is effect
    assert "without the feed-forward part of model.layers.1 (0 ± 0)" in result.findings()[0]


@given(seed=st.integers(0, 2**16), scale=st.floats(1e-4, 30))
def test_divergences_are_those_of_their_definitions(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    one = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    other = one + scale * torch.randn(4, 7, generator=generator, dtype=torch.float64)
    p, q = one.softmax(-1), other.softmax(-1)
    js = np.mean([jensenshannon(a, b) ** 2 for a, b in zip(p.numpy(), q.numpy(), strict=True)])
    assert distance("js", one, other, None) == pytest.approx(js, rel=1e-6, abs=1e-12)
    assert 0 <= distance("js", one, other, None) <= math.log(2)
    assert distance("js", one, other, None) == pytest.approx(distance("js", other, one, None), rel=1e-6, abs=1e-15)
    kl = torch.nn.functional.kl_div(q.log(), p, reduction="sum").item() / 4
    assert distance("kl", one, other, None) == pytest.approx(kl, rel=1e-6, abs=1e-12)
    assert distance("angular", one, 3 * one, None) == pytest.approx(0, abs=1e-15)


def test_masked_classes_do_no_harm():
    one, other = torch.randn(3, 5), torch.randn(3, 5)
    one[:, 2] = other[:, 2] = -math.inf
    rest = [0, 1, 3, 4]
    for name in ("js", "kl"):
        assert distance(name, one, other, None) == pytest.approx(distance(name, one[:, rest], other[:, rest], None))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"removed": ["model.layers.9.mlp"]}, "no sublayer and no layer 'model.layers.9.mlp'"),
        ({"removed": [f"model.layers.{n}" for n in range(2)], "candidates": "layers"}, "nothing is left to remove"),
    ],
)
def test_what_is_none_is_refused(settings, words):
    model = tiny("llama")
    with pytest.raises(PlanError, match=words):
        found(model, labelled(model), **settings)


def test_perplexity_asks_for_labels():
    model = tiny("llama")
    with pytest.raises(ConfigError, match="perplexity looks at labels"):
        found(model, Samples(inputs(model, batch=2)), distances=["perplexity"])
    assert found(model, Samples(inputs(model, batch=2)), distances=["js"]).loss is None


def test_shared_layers_are_refused():
    with pytest.raises(PlanError):
        candidates(tiny("albert"), "all")


def test_tables_and_picture_show_every_layer():
    model = tiny("llama")
    result = found(model, labelled(model), distances=["js"])
    (table,) = result.tables()
    assert table.header == ["layer", "attention", "feed-forward"]
    assert [row[0] for row in table.rows] == ["0", "1"]
    picture = result.picture("Removal")
    assert picture is not None
    assert picture.count("<title>attention") == 2
    assert isinstance(candidates(model, "layers")[0], Candidate)
