"""OPTIN: a limit is shared between heads and feed-forward units as by trying every number of heads; what it leaves out
is missed far less than what magnitude or chance take."""

import copy
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import auxin
from auxin.accounting import count_parameters, flops_per_token
from auxin.analysis import measure, run
from auxin.analysis.trajectory import Trajectory
from auxin.edits import apply
from auxin.edits.structure import structural_edits
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.objectives.calibration import Calibration
from auxin.planning.pruning import Pruning, prunable
from auxin.planning.shared_limit import States, least_lost
from byte_language import CONTEXT, byte_model, held_out_loss, library, loss_after, train
from oracles import trajectory as oracle
from tiny_models import change, inputs, labels, logits, tiny

LENGTH = 9


def texts(model: Any) -> Calibration:
    return Calibration.of_batches(model, [{**inputs(model, batch=4), "labels": labels(model, batch=4)}])


def flops(model: Any) -> float:
    return flops_per_token(model, LENGTH).forward


def wide_llama() -> Any:
    """With room for a choice, and a config that takes any number of heads."""
    return tiny("qwen3", num_attention_heads=10, num_key_value_heads=5, intermediate_size=24)


@given(
    heads=st.lists(st.floats(0.01, 9), min_size=1, max_size=6),
    units=st.lists(st.floats(0.01, 3), min_size=1, max_size=12),
    costs=st.tuples(st.integers(1, 30), st.integers(1, 5)),
    share=st.floats(0.01, 1),
)
def test_the_search_is_that_of_all_pairs(heads, units, costs, share):
    most = (len(heads) - 1) * costs[0] + (len(units) - 1) * costs[1]
    save = max(1, int(share * most))

    def states(scores: list[float], cost: int) -> States:
        ordered = sorted(scores)
        return States(
            [cost * gone for gone in range(len(scores))], [sum(ordered[:gone]) for gone in range(len(scores))]
        )

    of_heads, of_units = states(heads, costs[0]), states(units, costs[1])
    got = least_lost(of_heads, of_units, save)
    if most < save:
        assert got == len(heads) - 1
        return
    h, u = oracle.least_lost(heads, units, *costs, save)
    partner = next(n for n, saved in enumerate(of_units.saved) if saved >= save - of_heads.saved[got])
    assert of_heads.lost[got] + of_units.lost[partner] == pytest.approx(of_heads.lost[h] + of_units.lost[u], rel=1e-9)


def of_ranking(by_layer: list[list[float]], layer: int, gone: int) -> int:
    """How many of a layer stay when so many of the lowest of all layers go, of each layer all but its best one."""
    lowest = sorted((score, number) for number, scores in enumerate(by_layer) for score in sorted(scores)[:-1])[:gone]
    return len(by_layer[layer]) - sum(number == layer for _, number in lowest)


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize(("head", "unit"), [(40.0, 0.2), (0.5, 3.0), (6.0, 1.0)])
def test_a_limit_is_shared_so_that_what_stays_is_worth_most_and_one_more_would_miss_it(uniform, head, unit):
    """Over all numbers of heads, with what a head and a unit cost by hand; as many in all layers, or one ranking."""
    model, share = wide_llama(), 0.5
    asked = {"target": {"flops": share, "sequence_length": LENGTH}, "uniform": uniform, "normalised": False}
    found = prunable(model, Pruning.parse(asked))
    generator = torch.Generator().manual_seed(5)
    scores = {
        place: ((head if place[0] == "query" else unit) * torch.rand(units, generator=generator)).tolist()
        for place, units in found.units.items()
    }
    smaller = copy.deepcopy(model)
    apply(found.plan("by hand", scores, split="worth"), smaller)
    have, reached = flops(model), flops(smaller)
    dim, hidden, layers = model.config.head_dim, model.config.hidden_size, 2 if uniform else 1
    # A group has two query heads with a key and a value, which are multiplied with those of all tokens.
    costs = layers * (2 * hidden * dim * 6 + 2 * 2 * 2 * LENGTH * dim), layers * 2 * 3 * hidden
    by_layer = [[sorted(scores[name, f"model.layers.{n}"]) for n in (0, 1)] for name in ("query", "ffn")]
    if uniform:
        heads, units = ([sum(pair) for pair in zip(*both, strict=True)] for both in by_layer)
        left = smaller.config.num_key_value_heads, smaller.config.intermediate_size
    else:  # in every layer the best one stays
        heads, units = ([*both[0][:-1], *both[1][:-1], 1e9] for both in by_layer)
        sizes = anatomy(smaller, scopes=[f"model.layers.{n}" for n in (0, 1)]).sizes
        at = [sizes.at(f"model.layers.{n}") for n in (0, 1)]
        left = sum(one.key_value_heads for one in at) - 1, sum(one.ffn for one in at) - 1
    gone = oracle.least_lost(heads, units, *costs, (1 - share) * have)
    assert left == (len(heads) - gone[0], len(units) - gone[1])
    if not uniform:  # which layer they stay in is told by their scores
        of_layers = [(one.key_value_heads, one.ffn) for one in at]
        assert of_layers == [(of_ranking(by_layer[0], n, gone[0]), of_ranking(by_layer[1], n, gone[1])) for n in (0, 1)]
    # Heads alone go in their own steps.
    assert reached <= share * have < reached + (costs[1] if gone[1] else costs[0])


@pytest.mark.parametrize("family", ["t5", "deepseek_v3"])
def test_stacks_and_experts_of_several_sizes_come_under_one_limit(family):
    """Which has more of something where it is worth more."""
    model = tiny(family)
    found = prunable(model, Pruning.parse({"target": {"parameters": 0.8}, "uniform": False, "normalised": False}))

    def smaller(head: float) -> Any:
        scores = {
            place: [(head if place[0] == "query" else 1.0) * (1 + unit) for unit in range(units)]
            for place, units in found.units.items()
        }
        made = copy.deepcopy(model)
        apply(found.plan("by hand", scores, split="worth"), made)
        assert count_parameters(made).total <= 0.8 * count_parameters(model).total
        return sum(
            parameter.numel() for name, parameter in made.named_parameters() if "ttention" in name or "attn" in name
        )

    assert smaller(1000.0) > smaller(0.001)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_units_that_stay_are_those_that_move_most(family):
    model = tiny(family, dtype=torch.float32)
    data = texts(model)
    found = prunable(model, Pruning(ffn=0.5))
    measured = measure(Trajectory(streams=["ffn"]), model, data)
    scores = {(group.stream, group.scope): group.scores.means for group in measured.groups}
    plan = auxin.plan(model, "optin", ffn=0.5, data=data)
    assert plan.edits == found.plan("optin", scores).edits
    assert plan.promise == "none"


@pytest.mark.parametrize("uniform", [True, False])
def test_what_is_cut_is_as_masked(uniform):
    model = tiny("llama")
    plan = auxin.plan(model, "optin", heads=0.5, ffn=0.5, uniform=uniform, data=texts(model))
    smaller, silent = copy.deepcopy(model), copy.deepcopy(model)
    apply(plan, smaller)
    assert bool(structural_edits(smaller.config)) <= (not uniform)
    kept = {
        name: {tuple(row.tolist()) for row in smaller.get_parameter(name).mT}
        for name, _ in smaller.named_parameters()
        if name.endswith(("down_proj.weight", "o_proj.weight"))
    }
    with torch.no_grad():
        for name, columns in kept.items():
            for column in silent.get_parameter(name).mT:
                if tuple(column.tolist()) not in columns:
                    column.zero_()
    assert change(logits(silent), logits(smaller)) < 1e-10 < change(logits(model), logits(smaller))


def test_the_seed_is_the_plan_s():
    model = tiny("llama", dtype=torch.float32)
    plan = auxin.plan(model, "optin", ffn=0.5, tokens=4, seed=7, data=texts(model))
    assert plan.seed == 7
    assert plan.settings == {"ffn": 0.5, "tokens": 4, "seed": 7}


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_where_heads_can_t_go_alone_units_go_and_the_plan_says_so(family):
    model = tiny(family, dtype=torch.float32)
    plan = auxin.plan(model, "optin", target={"parameters": 0.9}, data=texts(model))
    assert "hidden size = heads x dimension" in plan.notes[0]
    before = count_parameters(model).total
    assert apply(plan, model).parameters_after <= 0.9 * before
    with pytest.raises(PlanError, match="hidden size = heads x dimension"):
        auxin.plan(model, "optin", heads=0.5, data=texts(model))


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("llama", {"hidden": 0.5}, "hidden: optin masks heads and feed-forward units alone"),
        ("llama", {"target": {"parameters": 0.01}}, "smallest that optin can reach"),
        ("llama", {"target": {"parameters": 10**6}}, "nothing has to go"),
        ("llama", {"ffn": 1.0}, "nothing to prune"),
        ("tokenformer", {"target": {"parameters": 0.5}}, "Nothing of what a target takes from"),
    ],
)
def test_what_can_t_be_is_refused_before_the_model_is_run(family, values, message, monkeypatch):
    model = tiny(family, dtype=torch.float32)
    monkeypatch.setattr(run, "_follow", lambda *_: pytest.fail("it was run"))
    with pytest.raises(PlanError, match=message):
        auxin.plan(model, "optin", data=texts(model), **values)


@pytest.fixture(scope="module")
def trained() -> Any:
    """A small language model of bytes, samples, and bytes that it was not trained on."""
    learnt = library("argparse", "ast", "datetime", "difflib", "doctest", "inspect", "typing")
    model = byte_model(seed=0, intermediate_size=128, num_hidden_layers=4)
    train(model, learnt, 600)
    ids = learnt[(torch.arange(4) * 1900)[:, None] + torch.arange(CONTEXT)]
    return model.eval(), Calibration.of_batches(model, [ids]), library("pdb")


def test_what_moves_little_is_missed_far_less_than_what_is_small_or_drawn(trained):
    """Effect: at 0.7 of the FLOPs, with as many units in all layers, alone and in groups, and by one ranking."""
    model, data, held_out = trained
    dense = held_out_loss(model, held_out)

    def lost(name: str, share: float = 0.7, uniform: bool = True, **values: Any) -> float:
        target = {"flops": share, "sequence_length": CONTEXT}
        plan = auxin.plan(model, name, target=target, uniform=uniform, **values)
        return loss_after(plan, model, held_out) - dense

    alone, grouped = (lost("optin", data=data, group_size=size) for size in (1, 8))
    magnitude, drawn = lost("magnitude"), statistics.median(lost("random", seed=seed) for seed in range(3))
    ranked = [lost(name, uniform=False, **more) for name, more in (("optin", {"data": data}), ("magnitude", {}))]
    half = lost("optin", 0.5, data=data)
    print(dense, {"optin": alone, "in groups": grouped, "magnitude": magnitude, "random": drawn}, ranked, half)
    assert 0 < max(alone, grouped) < 0.5 * min(magnitude, drawn)
    assert 0 < ranked[0] < 0.5 * ranked[1]
    assert half > alone
