"""What a mask moves is what copies without the unit's weights move, run from the first layer on, pair by pair."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.samples import Samples
from auxin.analysis import measure, trajectory
from auxin.analysis.layer_outputs import LayerOutputs
from auxin.analysis.trajectory import Trajectories, Trajectory
from auxin.errors import ConfigError, PlanError
from oracles import trajectory as oracle
from tiny_models import InDouble, inputs, labels, tiny

STAGES, BLOCKS = "segformer.stages", "resnet.encoder.stages"
LLAMA, BERT, GPT2 = "model.layers", "bert.encoder.layer", "transformer.h"


def columns(name: str, size: int, axis: int = -1) -> Any:
    """The entries of unit n of a parameter that reads units of `size` entries."""
    return lambda n: {name: (axis, range(n * size, (n + 1) * size))}


def both(*parts: Any) -> Any:
    return lambda n: {name: entries for part in parts for name, entries in part(n).items()}


UNITS: dict[str, dict[tuple[str, str], tuple[int, Any]]] = {
    "llama": {
        ("key_value", f"{LLAMA}.0"): (2, columns(f"{LLAMA}.0.self_attn.o_proj.weight", 8)),
        ("key_value", f"{LLAMA}.2"): (2, columns(f"{LLAMA}.2.self_attn.o_proj.weight", 8)),
        ("ffn", f"{LLAMA}.1"): (12, columns(f"{LLAMA}.1.mlp.down_proj.weight", 1)),
    },
    "bert": {
        ("query", f"{BERT}.1"): (4, columns(f"{BERT}.1.attention.output.dense.weight", 4)),
        ("ffn", f"{BERT}.0"): (12, columns(f"{BERT}.0.output.dense.weight", 1)),
        ("ffn", f"{BERT}.2"): (12, columns(f"{BERT}.2.output.dense.weight", 1)),
    },
    "gpt2": {("ffn", f"{GPT2}.1"): (12, columns(f"{GPT2}.1.mlp.c_proj.weight", 1, axis=0))},
    "mixtral": {("ffn", f"{LLAMA}.0"): (12, columns(f"{LLAMA}.0.mlp.experts.down_proj", 1))},
    "vit": {("query", "vit.layers.0"): (4, columns("vit.layers.0.attention.o_proj.weight", 4))},
    "segformer": {
        ("query", f"{STAGES}.1.blocks.0"): (3, columns(f"{STAGES}.1.blocks.0.attention.o_proj.weight", 4)),
        ("ffn", f"{STAGES}.0.blocks.1"): (16, columns(f"{STAGES}.0.blocks.1.mlp.fc2.weight", 1)),
    },
    "resnet": {
        ("ffn", f"{BLOCKS}.0.layers.0"): (8, columns(f"{BLOCKS}.0.layers.0.layer.1.convolution.weight", 1, axis=1)),
        ("ffn", f"{BLOCKS}.1.layers.0"): (12, columns(f"{BLOCKS}.1.layers.0.layer.1.convolution.weight", 1, axis=1)),
    },
    "resnet bottlenecks": {
        ("ffn", f"{BLOCKS}.0.layers.1"): (2, columns(f"{BLOCKS}.0.layers.1.layer.2.convolution.weight", 1, axis=1)),
    },
    "t5": {
        ("query", "encoder.block.1"): (4, columns("encoder.block.1.layer.0.SelfAttention.o.weight", 5)),
        # A layer's heads of a number go together, of both of its attentions.
        ("query", "decoder.block.0"): (
            4,
            both(
                columns("decoder.block.0.layer.0.SelfAttention.o.weight", 5),
                columns("decoder.block.0.layer.1.EncDecAttention.o.weight", 5),
            ),
        ),
        ("ffn", "decoder.block.1"): (12, columns("decoder.block.1.layer.2.DenseReluDense.wo.weight", 1)),
    },
}
"""By architecture some groups of units: how many, and what reads unit n."""


def layered(family: str) -> Any:
    """A tiny model, of three layers where that says more than two."""
    return tiny(family, num_hidden_layers=3) if family in ("llama", "bert") else tiny(family)


def data_of(model: Any, samples: int = 4, batch_size: int = 4) -> Samples:
    """Samples, of which some end in padding where the model takes a mask."""
    rows = inputs(model, batch=samples)
    if model.config.model_type in ("llama", "bert", "gpt2", "t5"):
        mask = torch.ones_like(rows["input_ids"])
        for row in range(0, samples, 2):
            mask[row, -1 - row % 3 :] = 0
        rows["attention_mask"] = mask
    return Samples(rows, batch_size)


def found(model: Any, data: Samples, **values: Any) -> Trajectories:
    with InDouble():
        result = measure(Trajectory(**values), model, data, cache=False)
    assert isinstance(result, Trajectories)
    return result


def kept_of(model: Any, layers: list[str], rows: dict[str, Any]) -> tuple[list[Any], Any]:
    """Which tokens count, by layer, and of the logits."""
    streams, logits = oracle.run(model, layers, rows)
    kept = [np.ones(stream.shape[:2], bool) for stream in streams]
    if "attention_mask" in rows:
        mask = rows["attention_mask"].numpy().astype(bool)
        kept = [all_ if "decoder" in path else mask for path, all_ in zip(layers, kept, strict=True)]
    return kept, kept[-1] if "attention_mask" in rows else np.ones(logits.shape[:-1], bool)


def paths(model: Any) -> list[str]:
    """All layers, in the order in which they run."""
    family = model.config.model_type
    if family == "t5":
        return [f"{side}.block.{n}" for side in ("encoder", "decoder") for n in range(2)]
    if family in ("segformer", "resnet"):
        stacks = [f"{STAGES}.{n}.blocks" if family == "segformer" else f"{BLOCKS}.{n}.layers" for n in range(2)]
        return [f"{stack}.{n}" for stack, depth in zip(stacks, model.config.depths, strict=True) for n in range(depth)]
    stack = {"bert": BERT, "gpt2": GPT2, "vit": "vit.layers"}.get(family, LLAMA)
    return [f"{stack}.{n}" for n in range(model.config.num_hidden_layers)]


@pytest.mark.parametrize("family", UNITS)
def test_scores_are_those_of_copies_without_the_unit(family):
    model = layered(family)
    data, layers = data_of(model), paths(model)
    result = found(model, data, together=2, logits_weight=0.7, temperature=2.0)
    for (kind, scope), (count, weights) in UNITS[family].items():
        got = result.of(kind, scope).scores
        assert got.samples == 2
        assert len(got.means) == count
        for unit in {0, count - 1}:
            values = []
            for start in (0, 2):
                rows = {name: tensor[start : start + 2] for name, tensor in data.rows.items()}
                with InDouble():
                    kept, kept_logits = kept_of(model, layers, rows)
                    args = (model, layers, layers.index(scope), rows, kept, kept_logits, weights(unit), 0.7, 2.0)
                    values.append(oracle.score(*args))
            np.testing.assert_allclose(got.means[unit], np.mean(values), rtol=1e-8, atol=1e-14)
            np.testing.assert_allclose(got.deviations[unit], np.std(values, ddof=1), rtol=1e-7, atol=1e-14)
        assert max(got.means) > 1e-6


def test_later_layers_count_and_the_temperature_divides():
    """What would be found without them is another number."""
    model = layered("llama")
    data = data_of(model)
    rows, layers = data.rows, paths(model)
    kept, kept_logits = kept_of(model, layers, rows)
    weights = UNITS["llama"]["ffn", f"{LLAMA}.1"][1](3)
    args = (model, layers, 1, rows, kept, kept_logits, weights)

    def got(**values: Any) -> float:
        return found(model, data, **values).of("ffn", f"{LLAMA}.1").scores.means[3]

    with InDouble():
        streams, others = (oracle.run(one, layers, rows)[0] for one in (model, oracle.without(model, weights)))
        expected = {t: oracle.score(*args, 1.0, t) - oracle.score(*args, 0.0, t) for t in (1.0, 4.0)}
    own = oracle.manifold(streams[1][kept[1]], others[1][kept[1]])
    assert got(logits_weight=0.0) > 1.1 * own
    only = {t: got(logits_weight=1.0, temperature=t) - got(logits_weight=0.0) for t in expected}
    for t, value in only.items():
        assert value == pytest.approx(expected[t], rel=1e-7)
    assert only[4.0] != pytest.approx(16 * only[1.0], rel=1e-2)
    assert only[4.0] != pytest.approx(only[1.0], rel=1e-2)


def test_from_its_layer_on_and_side_by_side_is_the_whole_way_alone(monkeypatch):
    for family in ("llama", "t5", "mixtral"):
        model = layered(family)
        data = data_of(model)
        together = found(model, data)
        with monkeypatch.context() as patched:
            patched.setattr(trajectory, "AT_ONCE", 1)
            patched.setattr(LayerOutputs, "given_before", lambda *_: torch.no_grad())
            alone = found(model, data)
        for one, other in zip(together.groups, alone.groups, strict=True):
            np.testing.assert_allclose(one.scores.means, other.scores.means, rtol=1e-9)


@settings(max_examples=5, deadline=None)
@given(batch_size=st.integers(1, 6), together=st.integers(1, 6))
def test_the_size_of_batches_changes_nothing(batch_size, together):
    model = tiny("llama")
    whole = found(model, data_of(model, 6, 6), together=together, tokens=5)
    parts = found(model, data_of(model, 6, batch_size), together=together, tokens=5)
    for one, other in zip(whole.groups, parts.groups, strict=True):
        assert one.scores.samples == -(-6 // together)
        np.testing.assert_allclose(one.scores.means, other.scores.means, rtol=1e-9)
        np.testing.assert_allclose(one.scores.deviations or 0, other.scores.deviations or 0, rtol=1e-6, atol=1e-12)


def test_padding_is_never_drawn():
    model = tiny("llama")
    data = data_of(model, samples=3)
    data.rows.pop("attention_mask")
    ids = data.rows["input_ids"]
    padded = Samples(
        {
            "input_ids": torch.cat([ids, ids[:, :4]], dim=1),
            "attention_mask": torch.cat([torch.ones_like(ids), torch.zeros_like(ids[:, :4])], dim=1),
        }
    )
    for tokens in (6, 768):
        plain, other = found(model, data, tokens=tokens), found(model, padded, tokens=tokens)
        for one, two in zip(plain.groups, other.groups, strict=True):
            np.testing.assert_allclose(one.scores.means, two.scores.means, rtol=1e-9)


def test_copies_of_a_unit_score_alike_wherever_they_are_and_layers_in_any_order():
    """With few tokens drawn: they are the same ones for all units, and no mask stays."""
    model = layered("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            mlp, kept = layer.mlp, layer.mlp.down_proj.weight
            for other in (5, 11):
                for matrix in (mlp.gate_proj, mlp.up_proj):
                    matrix.weight[other] = matrix.weight[0]
                    matrix.bias[other] = matrix.bias[0]
                kept[:, other] = kept[:, 0]
            mlp.down_proj.weight[:, 7] = 0
            layer.self_attn.o_proj.weight[:, 8:] = 0
    data = data_of(model)
    result = found(model, data, tokens=5)
    for layer in range(3):
        means = result.of("ffn", f"{LLAMA}.{layer}").scores.means
        assert means[5] == pytest.approx(means[0], rel=1e-9)
        assert means[11] == pytest.approx(means[0], rel=1e-9)
        assert means[7] < 1e-20 < min(means[:7])
        assert result.of("key_value", f"{LLAMA}.{layer}").scores.means[1] < 1e-20
    alone = [found(model, data, tokens=5, streams=[name]) for name in ("ffn", "heads")]
    for group in (*alone[0].groups, *alone[1].groups):
        np.testing.assert_allclose(group.scores.means, result.of(group.stream, group.scope).scores.means, rtol=1e-9)
    backwards = trajectory.TrajectoryObserver(model, Trajectory(tokens=5))
    backwards._groups = backwards._groups[::-1]
    with torch.no_grad(), InDouble():
        backwards.before(data.rows)
        for group in backwards.result().groups:
            np.testing.assert_allclose(group.scores.means, result.of(group.stream, group.scope).scores.means, rtol=1e-9)


@given(seed=st.integers(0, 2**16), width=st.integers(2, 6))
def test_the_manifold_knows_no_rotation_and_no_length(seed, width):
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, 5, width, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    long = one @ turn * torch.rand(5, 1, generator=generator, dtype=torch.float64).add(0.1)

    def apart(a: torch.Tensor, b: torch.Tensor) -> float:
        grams = [trajectory._gram([F.normalize(rows, dim=-1)[None]]) for rows in (a, b)]
        return (grams[0] - grams[1]).square().sum().item()

    assert apart(one, long) < 1e-24
    assert apart(one, other) == pytest.approx(oracle.manifold(one.numpy(), other.numpy()), rel=1e-9)
    assert apart(long, other) == pytest.approx(apart(one, other), rel=1e-9)


def test_the_seed_draws_the_tokens():
    model = tiny("llama")
    first, same, other = (found(model, data_of(model), tokens=4, seed=seed, logits_weight=0.0) for seed in (0, 0, 1))
    assert first == same != other


def test_groups_share_a_score_and_are_neighbours_by_what_they_give():
    model = layered("llama")
    with torch.no_grad():  # every third unit is silent
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, ::3] = 0
    result = found(model, data_of(model), group_size=4, streams=["ffn"])
    for group in result.groups:
        means = group.scores.means
        assert max(means[::3]) < 1e-20
        assert len({round(mean, 12) for mean in means}) == 3
        assert min(mean for unit, mean in enumerate(means) if unit % 3) > 1e-6
    seven = found(model, data_of(model), group_size=7, streams=["ffn"])
    assert sorted({seven.groups[0].scores.means.count(mean) for mean in seven.groups[0].scores.means}) == [5, 7]
    # What a group moves is what its units move at once.
    rows, layers = data_of(model).rows, paths(model)
    kept, kept_logits = kept_of(model, layers, rows)
    means = seven.groups[1].scores.means
    units = [unit for unit, mean in enumerate(means) if mean == means[1]]
    weights = {f"{LLAMA}.1.mlp.down_proj.weight": (1, units)}
    with InDouble():
        value = oracle.score(model, layers, 1, rows, kept, kept_logits, weights, 0.1, 4.0)
    assert means[1] == pytest.approx(value / len(units), rel=1e-8)


def test_query_heads_of_a_single_key_value_head_are_scored_one_by_one():
    model = tiny("llama", num_key_value_heads=1)
    result = found(model, data_of(model))
    assert [(group.stream, len(group.scores.means)) for group in result.groups][:2] == [("query", 4)] * 2


def test_no_gradients_are_asked_for_and_the_model_stays_as_it_is():
    model = tiny("llama", dtype=torch.float32).train()
    before = copy.deepcopy(model.state_dict())
    data = data_of(model, samples=3)
    with torch.inference_mode():
        one = measure(Trajectory(together=2), model, data, cache=False)
    assert measure(Trajectory(together=2), model, data, cache=False) == one
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def test_a_model_without_a_head_is_measured_by_its_layers():
    whole = tiny("bert")
    without_logits = found(whole, data_of(whole), logits_weight=0.0)
    body = found(whole.bert, data_of(whole), logits_weight=0.0)
    assert without_logits.logits_share == 0.0
    for one, other in zip(without_logits.groups, body.groups, strict=True):
        assert one.scope == f"bert.{other.scope}"
        np.testing.assert_allclose(one.scores.means, other.scores.means, rtol=1e-9)
    with pytest.raises(PlanError, match=r"gives no logits to compare.*or set logits_weight = 0"):
        found(whole.bert, data_of(whole))


def test_a_decoder_whose_inputs_are_its_labels_is_measured():
    model = tiny("t5")
    rows = inputs(model, batch=2)
    del rows["decoder_input_ids"]
    rows["labels"] = labels(model, batch=2)
    rows["labels"][0, -2:] = -100
    result = found(model, Samples(rows))
    assert all(min(group.scores.means) >= 0 < max(group.scores.means) for group in result.groups)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("albert", r"share their parameters.*Ask for the measurement importance"),
        ("clip", "several towers.*Load one of them"),
        ("tokenformer", "streams = ffn: the TokenFormerForCausalLM has no such units"),
    ],
)
def test_what_cannot_be_measured_is_refused(family, message):
    model = tiny(family)
    with pytest.raises(PlanError, match=message):
        measure(Trajectory(streams=["ffn"]), model, Samples.of(model), cache=False)


def test_logits_that_are_no_classes_are_refused():
    model = tiny("vit", num_labels=1)
    with pytest.raises(PlanError, match=r"logits of shape \[2, 1\], which are no classes.*Set logits_weight = 0"):
        found(model, Samples.of(model))
    assert found(model, Samples.of(model), logits_weight=0.0).groups


@pytest.mark.parametrize(
    ("name", "value"),
    [("tokens", 1), ("together", 0), ("temperature", 0.0), ("group_size", 0), ("streams", ["hidden"])],
)
def test_settings_that_mean_nothing_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        Trajectory.parse({name: value})


def test_a_person_can_read_it():
    model = tiny("llama", dtype=torch.float32)
    result = measure(Trajectory(together=2), model, data_of(model), cache=False)
    assert Trajectories.model_validate_json(result.model_dump_json()) == result
    assert [table.title for table in result.tables()] == [
        "model.layers: key-value groups",
        "model.layers: feed-forward units",
    ]
    assert all(row[-1].startswith("± ") for table in result.tables() for row in table.rows)
    said = result.findings()
    assert said[0].startswith("Key-value groups that matter least by trajectory: number ")
    assert said[-1].startswith("Of the sum of all scores ")
    assert "trajectory" in result.picture("A model")
