"""Pruned widths: which units go, that they really go, and what is said where they can't."""

import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import auxin
from auxin import cli
from auxin.accounting import count_parameters, flops_per_token
from auxin.edits import SliceParameter, apply
from auxin.edits.resolution import resolve
from auxin.edits.structure import structural_edits
from auxin.errors import ConfigError, PlanError
from auxin.methods import method
from auxin.models.anatomy import anatomy
from auxin.planning.bench import Bench
from auxin.planning.method import estimate_plan
from auxin.planning.pruning import Pruning, prunable
from auxin.planning.unit_order import alike, line, ranked
from capabilities import logits as plain_logits
from oracles.pruning import feed_forward_norms, group_norms, largest, pruned, residual_norms
from tiny_models import change, inputs, labels, logits, tiny

READERS = {
    "llama": {"query": "model.layers.{}.self_attn.o_proj.weight", "ffn": "model.layers.{}.mlp.down_proj.weight"},
    "qwen3": {"query": "model.layers.{}.self_attn.o_proj.weight", "ffn": "model.layers.{}.mlp.down_proj.weight"},
    "mixtral": {"query": "model.layers.{}.self_attn.o_proj.weight", "ffn": "model.layers.{}.mlp.experts.down_proj"},
    "deepseek_v3": {
        "query": "model.layers.{}.self_attn.o_proj.weight",
        "ffn": "model.layers.0.mlp.down_proj.weight",
        "expert_ffn": "model.layers.1.mlp.experts.down_proj",
        "shared": "model.layers.1.mlp.shared_experts.down_proj.weight",
    },
    "gpt2": {"ffn": "transformer.h.{}.mlp.c_proj.weight"},
    "gpt_neox": {"ffn": "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight"},
    "bert": {"ffn": "bert.encoder.layer.{}.output.dense.weight"},
    "albert": {"ffn": "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output.weight"},
    "vit": {"ffn": "vit.layers.{}.mlp.fc2.weight"},
    "t5": {
        "encoder": "encoder.block.{}.layer.1.DenseReluDense.wo.weight",
        "decoder": "decoder.block.{}.layer.2.DenseReluDense.wo.weight",
        "encoder_heads": "encoder.block.{}.layer.0.SelfAttention.o.weight",
        "decoder_heads": "decoder.block.{}.layer.0.SelfAttention.o.weight",
        "cross_heads": "decoder.block.{}.layer.1.EncDecAttention.o.weight",
    },
}
"""What reads the units that can go, by family; both layers of each."""
CASES = [(family, uniform, torch.float64, 1e-10) for family in READERS for uniform in (True, False)]
CASES += [(family, True, torch.float32, 1e-5) for family in ("llama", "gpt2", "bert", "t5", "vit", "mixtral")]


def scored(model, scores, name="by hand", **values):
    """The plan for scores of one's own: a function (place, units) -> a list."""
    found = prunable(model, Pruning.parse(values))
    return found.plan(name, {place: scores(place, units) for place, units in found.units.items()})


def kept(plan, parameter, axis):
    """The entries of a parameter that a plan leaves along an axis; None: all."""
    for edit in plan.edits:
        if isinstance(edit, SliceParameter) and edit.axis == axis and edit.matches(parameter):
            return [unit * edit.unit + entry for unit in edit.index for entry in range(edit.unit)]
    return None


def silence(model, plan, family):
    """Set to zero whatever reads the units that the plan takes away, by the family's names."""
    seen = 0
    for pattern in READERS[family].values():
        for name in dict.fromkeys(pattern.format(layer) for layer in (0, 1)):
            parameter = model.get_parameter(name)
            axis = 0 if family == "gpt2" else parameter.dim() - 1
            if (stay := kept(plan, name, axis)) is not None:
                gone = [entry for entry in range(parameter.shape[axis]) if entry not in stay]
                with torch.no_grad():
                    parameter.index_fill_(axis, torch.tensor(gone), 0)
                seen += len(gone)
    assert seen


# Which units ---------------------------------------------------------------------------------------------------------


def test_magnitude_is_the_oracle_s_choice_and_the_model_and_its_moments_are_taken_apart_as_by_hand():
    model = tiny("llama", seed=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(**inputs(model), labels=labels(model)).loss.backward()
    optimizer.step()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    moments = {name: optimizer.state[p]["exp_avg_sq"].clone() for name, p in model.named_parameters()}
    config = model.config.__class__(**model.config.to_dict())
    groups = [largest(group_norms(weights, layer, config), 1) for layer in (0, 1)]
    units = [largest(feed_forward_norms(weights, layer), 6) for layer in (0, 1)]
    residual = largest(residual_norms(weights), 12)
    assert groups[0] != groups[1] or units[0] != units[1]
    plan = auxin.plan(model, "magnitude", heads=0.5, ffn=0.5, hidden=12)
    assert plan.promise == "none"
    receipt = auxin.apply(plan, model, optimizer=optimizer)
    made, values = pruned(weights, config, groups, units, residual)
    expected = LlamaForCausalLM(type(config)(**{**config.to_dict(), **values})).double().eval()
    expected.load_state_dict(made)
    assert change(logits(expected), logits(model)) < 1e-12
    assert {name: value.shape for name, value in model.state_dict().items()} == {n: v.shape for n, v in made.items()}
    assert receipt.parameters_after == count_parameters(expected).total
    of_moments, _ = pruned(moments, config, groups, units, residual)
    for name, parameter in model.named_parameters():
        if "norm" not in name:  # whose gains were scaled
            assert torch.equal(optimizer.state[parameter]["exp_avg_sq"], of_moments[name]), name


@pytest.mark.parametrize("normalised", [True, False])
def test_one_ranking_over_all_layers_is_the_oracle_s(normalised):
    model = tiny("llama", seed=6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers.1.mlp" in name:
                parameter.mul_(3)  # so that not to normalise would take all from the other layer
    norms = torch.stack([feed_forward_norms(model.state_dict(), layer) for layer in (0, 1)])
    centred = norms - norms.mean(1, keepdim=True)
    ranked = centred / centred.pow(2).mean(1, keepdim=True).sqrt() if normalised else norms
    last = ranked.flatten().argsort()[:10]
    gone = [[int(at) % 12 for at in last if int(at) // 12 == layer] for layer in (0, 1)]
    plan = auxin.plan(model, "magnitude", ffn=14 / 24, uniform=False, normalised=normalised)
    for layer in (0, 1):
        stay = kept(plan, f"model.layers.{layer}.mlp.down_proj.weight", 1) or list(range(12))
        assert stay == [unit for unit in range(12) if unit not in gone[layer]]
    assert (len(gone[1]) == 0) == (not normalised)
    apply(plan, model)
    assert anatomy(model).sizes.units("ffn", "model.layers.0") == 12 - len(gone[0])


OUTLIERS = {
    # Mean 2, standard deviation sqrt(2 / 3).
    "layers.0": [1.0, 1.0, 2.0, 2.0, 3.0, 3.0],
    # One far above the others. Mean 18.5, deviations -17.5 (five times) and 87.5, standard deviation 17.5 sqrt(5).
    # Over the root of their mean square, 43.3, the five would be 0.02 and below all of layer 0, where it is 2.2.
    "layers.1": [1.0, 1.0, 106.0, 1.0, 1.0, 1.0],
}


def test_a_layer_with_one_unit_far_above_the_others_is_not_emptied():
    scores = {("ffn", scope): found for scope, found in OUTLIERS.items()}
    lines = [line(place, scores, 6, 6) for place in scores]
    root = math.sqrt(2 / 3)
    # Of equal ones the last goes first; the best of a layer is in no block.
    np.testing.assert_allclose(lines[0].standings, [-1 / root, -1 / root, 0, 0, 1 / root], atol=1e-12)
    np.testing.assert_allclose(lines[1].standings, [-1 / math.sqrt(5)] * 5)
    made = ranked("ffn", "ffn", lines, standardised=True)
    kept = [{scope: len(units) for (_, scope), units in made.keep(state).items()} for state in range(11)]
    fewest = [(found["layers.0"], found["layers.1"]) for found in kept]
    assert fewest == [(6, 6), (5, 6), (4, 6), (4, 5), (4, 4), (4, 3), (4, 2), (4, 1), (3, 1), (2, 1), (1, 1)]


def test_scores_by_entry_are_standardised_over_entries_and_a_group_has_the_mean_of_its_own():
    # Two groups of two heads of two entries: mean 2, standard deviation 1.
    scores = {("query", "layers.0"): [3.0, 3, 3, 1, 1, 1, 1, 3]}
    made = line(("query", "layers.0"), scores, 2, 4)
    assert made.blocks == ((2, 3),)
    assert made.scores == (6.0,)
    assert made.standings == (-0.5,)
    # What is added up from narrower scopes is standardised after that.
    inner = {("query", "layers.0.a"): [1.0] * 8, ("query", "layers.0.b"): [2.0, 2, 2, 0, 0, 0, 0, 2]}
    assert line(("query", "layers.0"), inner, 2, 4) == made
    # As finely as all of them say it: over heads, 6, 4, 2 and 4.
    coarse = inner | {("query", "layers.0.a"): [2.0] * 4}
    assert line(("query", "layers.0"), coarse, 2, 4).standings == (pytest.approx(-1 / math.sqrt(2)),)
    with pytest.raises(
        PlanError, match=r"There are 6 scores for the units of query of layers\.0, of which there are 2"
    ):
        line(("query", "layers.0"), {("query", "layers.0"): [1.0] * 6}, 2, 4)


def test_equal_scores_stand_at_the_mean_and_moves_have_standings():
    even = line(("ffn", "layers.0"), {("ffn", "layers.0"): [0.1] * 3}, 3, 3)
    assert even.standings == (0.0, 0.0)
    other = line(("ffn", "layers.1"), {("ffn", "layers.1"): [1.0, 3.0]}, 2, 2)
    made = ranked("ffn", "ffn", [even, other], standardised=True)
    assert made.scores() == [-1.0, 0.0, 0.0]
    assert ranked("ffn", "ffn", [even, other], standardised=False).scores() == [0.1, 0.1, 1.0]


@given(
    scores=st.lists(st.lists(st.integers(0, 50), min_size=6, max_size=6), min_size=2, max_size=4),
    factors=st.lists(st.tuples(st.sampled_from([0.25, 1.0, 8.0]), st.integers(-4, 4)), min_size=4, max_size=4),
)
def test_the_standardised_ranking_does_not_know_a_layer_s_unit_nor_its_zero(scores, factors):
    def made(of_layers):
        given = {("ffn", f"layers.{number}"): found for number, found in enumerate(of_layers)}
        return [line(place, given, 6, 6) for place in given]

    # Numbers of few binary digits, so that the same units are tied.
    moved = [[float(s) * factor + add for s in found] for found, (factor, add) in zip(scores, factors, strict=False)]
    for one, other in zip(made(scores), made(moved), strict=True):
        assert one.blocks == other.blocks
        np.testing.assert_allclose(one.standings, other.standings, atol=1e-9)


def test_a_layer_of_which_less_than_a_tenth_is_left_is_named():
    model = tiny("llama", intermediate_size=32)
    low = {"model.layers.0": [float(unit) for unit in range(32)], "model.layers.1": [100.0 + u for u in range(32)]}
    asked = {"ffn": 35 / 64, "uniform": False, "normalised": False}
    plan = scored(model, lambda place, units: low[place[1]], **asked)
    assert plan.notes == [
        "The ranking leaves less than a tenth of some layers: model.layers.0 3 of 32 (intermediate_size). Compare the "
        "loss with that of uniform = true."
    ]
    # A tenth and more: 4 of 32; as many in every layer, as was asked for; alike by standardised scores.
    for more in ({"ffn": 36 / 64}, {"ffn": 1 / 32, "uniform": True}, {"normalised": True}):
        assert not scored(model, lambda place, units: low[place[1]], **{**asked, **more}).notes


def test_scores_of_query_heads_are_added_up_over_a_group_and_those_of_layers_over_a_stack():
    model = tiny("llama")
    # Heads 0 and 1 read key-value head 0.
    plan = scored(model, lambda place, units: [9.0, 0.0, 5.0, 5.0], heads=2)
    assert kept(plan, "model.layers.0.self_attn.k_proj.weight", 0) == [4, 5, 6, 7]
    model = tiny("t5")
    found = prunable(model, Pruning(heads=1))
    assert dict(found.units) == {("query", "encoder.block"): 4, ("query", "decoder.block"): 4}
    layers = {("query", f"encoder.block.{layer}"): [3.0, 1, 0, 0] for layer in (0,)}
    layers[("query", "encoder.block.1")] = [0.0, 1, 3.5, 0]
    layers |= {("query", f"decoder.block.{layer}"): [0.0, 0, 0, 1] for layer in (0, 1)}
    plan = found.plan("by hand", layers)
    assert kept(plan, "encoder.block.1.layer.0.SelfAttention.q.weight", 0) == list(range(10, 15))
    assert kept(plan, "decoder.block.0.layer.1.EncDecAttention.q.weight", 0) == list(range(15, 20))


def test_query_heads_go_alone_where_all_read_one_key_value_head():
    model = tiny("llama", num_key_value_heads=1)
    before = logits(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, :8] = 0
    silent = logits(model)
    plan = scored(model, lambda place, units: [0.0, 1, 2, 3][:units], heads=2)
    apply(plan, model)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 1)
    assert change(silent, logits(model)) < 1e-12 < change(before, silent)


def test_the_seed_decides_what_goes_at_random():
    model = tiny("llama")
    one, same, other = (auxin.plan(model, "random", ffn=0.5, seed=seed).edits for seed in (1, 1, 2))
    assert one == same != other


def course(ranks, uniform, multiple=1, normalised=True, layers=2):
    """The course of 12 feed-forward units in layers of which every second one has the ranks the other way round."""
    scores = {("ffn", f"layers.{n}"): [float(r) for r in (ranks, ranks[::-1])[n % 2]] for n in range(layers)}
    lines = [line(place, scores, 12, 12, multiple) for place in scores]
    return (alike("ffn", "ffn", lines) if uniform else ranked("ffn", "ffn", lines, normalised)), scores


@given(
    ranks=st.lists(st.integers(0, 3), min_size=12, max_size=12),
    shares=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    multiple=st.integers(1, 12),
    uniform=st.booleans(),
    normalised=st.booleans(),
)
def test_what_goes_goes_at_every_smaller_share_too_in_multiples_and_the_same_each_time(
    ranks, shares, multiple, uniform, normalised
):
    made, scores = course(ranks, uniform, multiple, normalised, layers=3)
    assert made.keep(len(made.left) - 1) == course(ranks, uniform, multiple, normalised, 3)[0].keep(len(made.left) - 1)
    assert made.keep(0) == {place: list(range(12)) for place in scores}
    few, many = (made.keep(made.state(share)) for share in shares)
    layers = 1 if uniform else 3
    for share, keep in zip(shares, (few, many), strict=True):
        counts = [len(units) for units in keep.values()]
        assert all(count % multiple == 0 or count == 12 for count in counts)
        assert min(counts) >= 1
        assert sum(counts) / 3 * layers >= round(share * 12 * layers, 6)
        # No state below serves.
        below = made.state(share) + 1
        assert below == len(made.left) or made.left[below] < share * 12 * layers + 1e-4
        assert not uniform or len(set(counts)) == 1
        for place, units in keep.items():
            gone = [scores[place][unit] for unit in range(12) if unit not in units]
            assert not gone or max(gone) <= min(scores[place][unit] for unit in units)
    for place, units in few.items():
        assert set(units) <= set(many[place])


def test_of_equal_units_the_last_goes_first():
    made, scores = course([1] * 12, uniform=True)
    assert made.keep(3) == {place: list(range(9)) for place in scores}


@pytest.mark.parametrize("streams", [["ffn"], ["heads", "ffn"], ["heads", "ffn", "hidden"]])
@pytest.mark.parametrize("uniform", [True, False])
def test_a_target_is_met_and_a_unit_more_would_miss_it(streams, uniform):
    model = tiny("qwen3")  # whose heads and hidden size go alone
    total = count_parameters(model).total
    plan = auxin.plan(model, "random", target={"parameters": 0.8}, streams=streams, uniform=uniform)
    sizes = dict.fromkeys(("model.layers.0", "model.layers.1"))
    receipt = apply(plan, model)
    assert receipt.parameters_after <= 0.8 * total
    body = anatomy(model, scopes=sizes).sizes
    residual = body.residual
    # A unit of each stream, in one layer or in both.
    whole = uniform and model.config.intermediate_size == 12
    units = [] if whole else [3 * residual * (2 if uniform else 1)]
    if "hidden" in streams:
        units.append(2 * 19 + sum(p.numel() // residual for n, p in model.named_parameters() if ".layers." in n))
    if "heads" in streams:
        units.append((2 if uniform else 1) * (2 * 2 + 2) * 6 * residual)
    assert receipt.parameters_after + min(units) > 0.8 * total
    assert f"{total:,} -> {receipt.parameters_after:,}" in plan.findings[0]
    assert "asked for: target.parameters = 0.8" in plan.findings[0]


def widths(heads, units):
    return {"num_attention_heads": heads, "num_key_value_heads": heads, "intermediate_size": units}


@pytest.mark.parametrize("feed_forward", [256, 12])
def test_a_target_that_coarse_steps_overshoot_is_told_with_what_comes_nearer(feed_forward):
    """BERT's heads go with their share of the residual, in all layers. Where feed-forward units are few, they alone
    can't do it, and are not named."""
    model = tiny("bert", hidden_size=min(64, feed_forward), num_attention_heads=4, intermediate_size=feed_forward)
    have, asked = model.num_parameters(), {"target": {"parameters": 0.8}}
    plan = auxin.plan(model, "magnitude", **asked, streams=["heads", "ffn", "hidden"])
    left = resolve(plan.edits, model).after.num_parameters()
    assert 0.8 - left / have > 0.02
    assert f"{left:,} ({left / have:.1%}) are left, since heads and ffn and hidden go in large" in plan.findings[-1]
    if feed_forward == 12:
        assert "streams" not in plan.findings[-1]
        with pytest.raises(PlanError, match="the smallest that"):
            auxin.plan(model, "magnitude", **asked, streams=["ffn"])
        return
    assert plan.findings[-1].endswith("Feed-forward units alone come nearer: streams = [ffn].")
    nearer = auxin.plan(model, "magnitude", **asked, streams=["ffn"])
    assert 0 <= 0.8 - resolve(nearer.edits, model).after.num_parameters() / have <= 0.02
    assert "in large steps" not in " ".join(nearer.findings)


def test_a_target_of_flops_takes_from_all_streams_alike():
    model = tiny("qwen3", **widths(8, 32))
    before = flops_per_token(model, 9).forward
    plan = auxin.plan(model, "random", target={"flops": 0.6, "sequence_length": 9})
    apply(plan, model)
    assert 0.5 * before < flops_per_token(model, 9).forward <= 0.6 * before
    # As alike as can be where no unit more may stay; every head, and every unit, costs as much as the next.
    head = before - flops_per_token(tiny("qwen3", **widths(7, 32)), 9).forward
    unit = before - flops_per_token(tiny("qwen3", **widths(8, 31)), 9).forward
    unlike = {}
    for heads, units in itertools.product(range(1, 9), range(1, 33)):
        if before - (8 - heads) * head - (32 - units) * unit <= 0.6 * before:
            unlike[heads] = abs(heads / 8 - units / 32), units
    heads = min(unlike, key=lambda heads: unlike[heads])
    assert (model.config.num_attention_heads, model.config.intermediate_size) == (heads, unlike[heads][1])
    assert "at 9 tokens" in plan.findings[0]


# That they go --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "uniform", "dtype", "allowed"), CASES)
def test_removed_is_as_silenced_and_loads_again(family, uniform, dtype, allowed, tmp_path):
    model = tiny(family, dtype=dtype)
    values = {"ffn": 0.5, "uniform": uniform}
    if any("heads" in name or name == "query" for name in READERS[family]):
        values["heads"] = 0.5
    if "experts" in str(READERS[family].values()):
        values["multiple_of"] = 4  # torch's grouped products take rows of whole 16 bytes
    say = logits if dtype == torch.float64 else plain_logits
    plan = auxin.plan(model, "random", **values)
    dense = say(model)
    silence(model, plan, family)
    silent = say(model)
    told = plan.findings[0]
    receipt = apply(plan, model)
    assert change(silent, say(model)) < allowed < change(dense, silent)
    assert f"-> {receipt.parameters_after:,} " in told
    assert receipt.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    if dtype != torch.float64:
        return
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    different = bool(structural_edits(model.config))
    assert different is ("quantization_config" in said)
    assert not (uniform and different)
    loaded = type(model).from_pretrained(tmp_path, dtype="auto").eval()
    if hasattr(model.config, "num_local_experts") or hasattr(model.config, "n_routed_experts"):
        loaded.set_experts_implementation("eager")  # the others know no float64
    assert torch.equal(plain_logits(loaded), plain_logits(model))


@pytest.mark.parametrize("family", ["llama", "t5", "mixtral"])
def test_a_model_whose_layers_differ_generates_with_a_cache_as_without(family):
    """Those whose layers are alike do in `test_every_method.py`."""
    model = tiny(family)
    apply(auxin.plan(model, "random", heads=0.5, ffn=0.5, uniform=False, seed=3), model)
    ids = inputs(model)["input_ids"]
    asked = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    asked["attention_mask"] = torch.ones_like(ids)
    assert torch.equal(model.generate(ids, use_cache=True, **asked), model.generate(ids, use_cache=False, **asked))
    # Padding on the left changes nothing of the text beside it, which is written on as alone.
    asked["attention_mask"][0, :2] = 0
    alone = {**asked, "attention_mask": asked["attention_mask"][:1, 2:]}
    written = model.generate(ids, use_cache=True, **asked)[0, -6:]
    assert torch.equal(written, model.generate(ids[:1, 2:], use_cache=True, **alone)[0, -6:])


def test_a_model_whose_layers_differ_is_brought_to_one_size_again():
    model = tiny("llama")

    def scores(place, units):
        kept = 9 if place[1].endswith("0") else 4
        return [1.0] * kept + [0.0] * (units - kept)

    uneven = scored(model, scores, ffn=13 / 24, uniform=False)
    apply(uneven, model)
    assert structural_edits(model.config)
    assert [anatomy(model).sizes.units("ffn", f"model.layers.{layer}") for layer in (0, 1)] == [9, 4]
    apply(auxin.plan(model, "random", ffn=4), model)
    assert not structural_edits(model.config)
    assert model.config.intermediate_size == 4


def test_sizes_are_known_before_the_weights_are():
    with torch.device("meta"):
        shapes = tiny("llama", dtype=torch.float32)
    model = tiny("llama")
    found = method("magnitude")
    for values in ({"ffn": 0.5, "heads": 0.5}, {"target": {"parameters": 0.8}}):
        chosen = found.settings.parse(values)
        guess = estimate_plan(found, Bench(shapes), chosen)
        assert guess.estimate
        assert guess.findings == found.plan(Bench(model), chosen).findings


def test_the_command_line_prunes_a_checkpoint(tmp_path):
    def call(*arguments):
        done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
        return done.output

    model = tiny("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    asked = ("--set", "target.parameters=0.7", "--set", "multiple_of=2")
    told = call("plan", tmp_path / "model", "magnitude", *asked, "-o", tmp_path / "plan.yaml")
    assert "asked for: target.parameters = 0.7" in told.replace("\n", " ")
    call("apply", tmp_path / "model", tmp_path / "plan.yaml", "-o", tmp_path / "smaller")
    smaller = LlamaForCausalLM.from_pretrained(tmp_path / "smaller")
    assert count_parameters(smaller).total <= 0.7 * count_parameters(model).total
    assert smaller.config.intermediate_size % 2 == 0
    apply(auxin.plan(model, "magnitude", target={"parameters": 0.7}, multiple_of=2), model)
    assert torch.equal(plain_logits(smaller), plain_logits(model))


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("llama", {}, "give what stays .* or a target"),
        ("llama", {"target": {"parameters": 0.9}, "ffn": 0.5}, "give target, or ffn, not both"),
        ("llama", {"ffn": 1.5}, "ffn = 1.5 is no share"),
        ("llama", {"ffn": 0.0}, "ffn"),
        ("llama", {"ffn": -3}, "ffn"),
        ("llama", {"ffn": True}, "ffn"),
        ("llama", {"ffn": "half"}, "ffn"),
        ("llama", {"multiple_of": 0, "ffn": 0.5}, "multiple_of"),
        ("llama", {"ffn": 0.5, "streams": ["ffn"]}, "there is no target"),
        ("llama", {"target": {"parameters": 0.9}, "streams": ["vocabulary"]}, "streams"),
        ("llama", {"target": {"parameters": 0.9}, "streams": ["ffn", "ffn"]}, "more than once"),
        ("llama", {"target": 0.5}, "target: a size of what. Give target.parameters, or .*latency_ms .received 0.5"),
        ("llama", {"target": {}}, "exactly one of parameters, flops, memory, latency and latency_ms, not none"),
        ("llama", {"ffn": 6, "uniform": False}, "Give a share, or uniform = true"),
        ("llama", {"ffn": 1.0}, "nothing to prune: all of 12 intermediate_size would stay .the next possible: 11"),
        ("llama", {"ffn": 0.99}, "nothing to prune"),
        ("llama", {"ffn": 12}, "nothing to prune"),
        ("llama", {"ffn": 0.5, "multiple_of": 12}, "no other number is possible"),
        ("llama", {"ffn": 13}, "ffn = 13: the model has only 12 intermediate_size. Give at most 12"),
        ("llama", {"ffn": 5, "multiple_of": 2}, "since multiple_of is 2. The nearest possible: 4 or 6"),
        ("llama", {"heads": 3}, "heads = 3: .* groups of 2 that share keys and values.* nearest possible: 2"),
        ("llama", {"heads": 5}, "heads = 5: the model has only 4 num_attention_heads. Give at most 4"),
        ("llama", {"target": {"parameters": 0.01}}, r"It takes from heads and ffn, .* = \[heads, ffn, hidden\]"),
        ("gpt2", {"target": {"parameters": 0.01}, "streams": ["ffn"]}, r"takes from ffn, .* lose heads or hidden, too"),
        ("llama", {"hidden": 10}, "10 units of the residual are no multiple of the 4 heads.* Keep 8 or 12"),
        ("llama", {"hidden": 10, "heads": 4}, "hidden = 10 does not go with these heads.* nearest possible: 12"),
        ("llama", {"target": {"parameters": 0.01}}, "smallest that random can reach here is 1,652"),
        ("llama", {"target": {"parameters": 10**6}}, "nothing has to go"),
        ("llama", {"ffn": 0.5, "part": "text"}, "no model of several towers"),
        ("gpt2", {"heads": 0.5}, "hidden size = heads x dimension"),
        ("gpt2", {"heads": 0.5, "hidden": 0.75}, "hidden size = heads x dimension"),
        ("gpt2", {"target": {"parameters": 0.5}, "streams": ["heads"]}, "hidden size = heads x dimension"),
        ("gpt2", {"target": {"parameters": 0.5}}, "smallest .* heads stay: .* hidden size = heads x dimension"),
        ("bloom", {"ffn": 0.5}, "works it out from the hidden size"),
        ("bloom", {"heads": 0.5, "hidden": 0.5}, "slopes of ALiBi"),
        ("qwen2_moe", {"ffn": 5}, r"several sizes of it \(\[10, 12, 14\]\)"),
        ("tokenformer", {"ffn": 0.5}, "no such units"),
        ("tokenformer", {"target": {"parameters": 0.5}}, "Nothing of what a target takes from .* heads stay"),
        ("clip", {"ffn": 0.5}, "several towers.*Choose it"),
    ],
)  # fmt: skip
def test_what_can_t_be_is_refused_and_nothing_is_changed(family, values, message):
    model = tiny(family)
    config, weights = model.config.to_dict(), {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((ConfigError, PlanError), match=f"(?s){message}"):
        auxin.plan(model, "random", **values)
    assert model.config.to_dict() == config
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_what_nobody_named_and_can_t_go_stays_with_a_note():
    model = tiny("gpt2")
    plan = auxin.plan(model, "random", target={"parameters": 0.9})
    assert len(plan.notes) == 1
    assert plan.notes[0].startswith("heads stay: 16 units of the residual with 3 heads of dimension 4")
    assert model.config.n_head == 4


def test_what_is_advised_instead_of_a_number_of_heads_is_taken():
    model = tiny("llama", hidden_size=16, num_attention_heads=8, num_key_value_heads=8, head_dim=2)
    with pytest.raises(PlanError, match="heads = 6: that many of 8") as refused:
        auxin.plan(model, "magnitude", heads=6)
    said = re.search(
        r"nearest possible: (\d+) or (\d+)\. .*hidden = (\d+)\).*heads = ([\d.]+) with uniform = false",
        str(refused.value),
    )
    assert said is not None
    for settings in (
        {"heads": int(said[1])},
        {"heads": int(said[2])},
        {"heads": 6, "hidden": int(said[3])},
        {"heads": float(said[4]), "uniform": False},
    ):
        assert auxin.plan(model, "magnitude", **settings).edits


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda units: [0.0] * (units - 1), "There are 11 scores for the units of ffn of model.layers.0"),
        (lambda units: [float("nan")] * units, "not finite"),
        (lambda units: [float("inf")] * units, "not finite"),
    ],
)
def test_scores_that_rank_nothing_are_refused(scores, message):
    with pytest.raises(PlanError, match=message):
        scored(tiny("llama"), lambda place, units: scores(units), ffn=0.5)
    with pytest.raises(PlanError, match="no scores for the units of ffn"):
        prunable(tiny("llama"), Pruning(ffn=0.5)).plan("by hand", {})


def test_layers_that_are_one_tensor_lose_the_same_units_or_none():
    """Tied by hand: different units of one tensor can't go."""
    model = tiny("llama")
    tie = auxin.Plan(
        method="tie",
        promise="none",
        edits=[
            {
                "kind": "tie_parameters",
                "parameter": "model.layers.1.mlp.down_proj.weight",
                "to": "model.layers.0.mlp.down_proj.weight",
            }
        ],
    )
    apply(tie, model)
    first, second = (layer.mlp for layer in model.model.layers)
    assert first.down_proj.weight is second.down_proj.weight
    before = logits(model)
    with pytest.raises(PlanError, match=r"one tensor \(tied\), and of its units \(ffn\) others would stay"):
        auxin.plan(model, "random", ffn=0.5)
    assert torch.equal(logits(model), before)
    plan = scored(model, lambda place, units: [float(unit) for unit in range(units)], ffn=0.5)
    silence(model, plan, "llama")
    silent = logits(model)
    apply(plan, model)
    assert change(silent, logits(model)) < 1e-12
