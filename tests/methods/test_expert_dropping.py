"""Experts that go: the router's scores without them, and nothing else of the model, change."""

import copy
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MixtralConfig, MixtralForCausalLM

import auxin
from auxin.analysis import measure
from auxin.analysis.expert_use import ExpertUse
from auxin.edits import Plan, apply
from auxin.errors import ConfigError, PlanError
from auxin.models.anatomy import anatomy
from auxin.models.loading import load_model
from auxin.objectives.calibration import Calibration
from auxin.planning.cutting import cut
from auxin.planning.target import Target
from byte_language import CONTEXT, held_out_loss, library, loss_after, train
from mixtures import EXPERTS, SHARES, TWO_GROUPS, experts_at, mixture, router_of
from oracles.experts import MaskedRouters
from tiny_models import InDouble, change, inputs, labels, logits, tiny

every_family = pytest.mark.parametrize("family", EXPERTS)


def without(model: Any, kept: dict[str, list[int]]) -> Any:
    """A copy of the model with these experts of each layer alone."""
    smaller = copy.deepcopy(model)
    edits = cut(model, {("expert", layer): units for layer, units in kept.items()}).edits
    apply(Plan(method="cut", promise="none", edits=edits), smaller)
    return smaller


def masked_logits(model: Any, kept: dict[str, list[int]]) -> torch.Tensor:
    """The logits where routers give minus infinity to the other experts, and choose none for what is added to it."""
    masked, gone = copy.deepcopy(model), []
    for layer, units in kept.items():
        router = router_of(masked, layer)
        rest = [unit for unit in range(len(router.weight)) if unit not in units]
        gone.append((router.weight, rest))
        for owner in (router, getattr(router, "moe_statics", None)):
            if (correction := getattr(owner, "e_score_correction_bias", None)) is not None:
                correction.data[..., rest] = -torch.inf
    with MaskedRouters(gone) as routers:
        found = logits(masked)
    assert routers.met == len(kept)
    return found


@pytest.mark.parametrize(
    ("family", "count"),
    # Two groups keep at least two each where these say how good a group is.
    [(family, count) for family in EXPERTS for count in (6, 4, 2) if count > 2 or family not in TWO_GROUPS[1:]],
)
def test_a_model_without_experts_is_one_whose_router_never_scores_them(family, count):
    model = mixture(family)
    of_layers = {6: ([0, 1, 3, 4, 5, 7], [1, 2, 3, 4, 6, 7]), 4: ([1, 2, 4, 7], [0, 3, 5, 6]), 2: ([2, 5], [0, 7])}[
        count
    ]
    kept = dict(zip(experts_at(model), of_layers, strict=False))
    assert change(masked_logits(model, kept), logits(without(model, kept))) < 1e-10


@given(
    st.lists(st.sets(st.integers(0, 7), min_size=1, max_size=7), min_size=2, max_size=2),
    st.sampled_from(["mixtral", "gpt_oss", "olmoe"]),
)
@settings(max_examples=8, deadline=None)
def test_layers_may_keep_other_numbers_of_experts(chosen, family):
    model = mixture(family)
    kept = {f"model.layers.{layer}": sorted(units) for layer, units in enumerate(chosen)}
    smaller = without(model, kept)
    assert {layer: experts.num_experts for layer, experts in experts_at(smaller).items()} == {
        layer: len(units) for layer, units in kept.items()
    }
    assert change(masked_logits(model, kept), logits(smaller)) < 1e-10


@pytest.mark.parametrize("family", SHARES)
def test_experts_that_no_token_gets_are_not_missed(family):
    model = mixture(family, experts=12)
    few = {name: tensor[:1, :2] for name, tensor in inputs(model).items()}  # two tokens get at most four
    data = Calibration.of_batches(model, [few])
    used = measure(ExpertUse(), model, data).of("frequency")
    assert all(values.count(0.0) >= 8 for values in used.values())
    smaller = copy.deepcopy(model)
    # Of each of two groups those that are used may all be in one of them.
    plan = auxin.plan(model, "expert-dropping", experts=8 if family in TWO_GROUPS else 4, score="frequency", data=data)
    apply(plan, smaller)
    with torch.no_grad(), InDouble():
        assert change(model(**few).logits, smaller(**few).logits) < 1e-10
    assert smaller.num_parameters() < model.num_parameters()


@every_family
@pytest.mark.parametrize("score", ["reap", "gate", "frequency"])
def test_the_experts_of_the_highest_scores_stay(family, score):
    model = mixture(family)
    data = Calibration.of_batches(model, [inputs(model, batch=4)])
    scores = measure(ExpertUse(), model, data).of(score)
    smaller = copy.deepcopy(model)
    apply(auxin.plan(model, "expert-dropping", experts=0.5, score=score, data=data), smaller)
    for layer, values in scores.items():
        stretches = [range(4), range(4, 8)] if family in TWO_GROUPS else [range(8)]
        best = [e for part in stretches for e in sorted(part, key=lambda e: (-values[e], e))[: len(part) // 2]]
        old, new = (dict(m.get_submodule(layer).named_parameters()) for m in (model, smaller))
        for name in old:
            along = 1 if "moe_statics" in name else 0
            if name.startswith(("mlp.experts.", "mlp.gate.", "mlp.router.", "block_sparse_moe.")):
                assert torch.equal(new[name], old[name].index_select(along, torch.tensor(sorted(best)))), name
            else:
                assert torch.equal(new[name], old[name]), name
        buffers = dict(smaller.get_submodule(layer).named_buffers())
        for name, buffer in model.get_submodule(layer).named_buffers():
            if name.endswith("e_score_correction_bias"):
                assert torch.equal(buffers[name], buffer[sorted(best)])
    assert getattr(smaller.config, EXPERTS[family]) == 4


def test_a_token_gets_no_more_experts_than_there_are():
    model = mixture("mixtral")
    with pytest.warns(UserWarning, match="num_experts_per_tok goes from 2 to 1"):
        apply(auxin.plan(model, "expert-dropping", experts=1, data=[inputs(model)]), model)
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (1, 1)
    # Four experts of one group of two: a token gets both of a group.
    grouped = mixture("deepseek_v2", experts=8, num_experts_per_tok=3)
    plan = auxin.plan(grouped, "expert-dropping", experts=4, data=[inputs(grouped)])
    assert "num_experts_per_tok goes from 3 to 2" in plan.notes[0]


def test_groups_lose_equally_many():
    model = mixture("deepseek_v3")
    with pytest.raises(PlanError, match=r"of the 2 groups of 4 experts .* would stay"):
        cut(model, {("expert", ""): [0, 1, 2, 3]})
    with pytest.raises(PlanError, match=r"experts = 2: that many of 8 .*The nearest possible: 4"):
        auxin.plan(model, "expert-dropping", experts=2, data=[inputs(model)])
    small = mixture("deepseek_v3", experts=4)
    with pytest.raises(PlanError, match="2 groups must keep at least 2 each"):
        auxin.plan(small, "expert-dropping", experts=0.5, data=[inputs(small)])


def test_what_goes_is_said_or_refused():
    model, dense = mixture("mixtral"), tiny("llama")
    with pytest.raises(ConfigError, match="give experts"):
        auxin.plan(model, "expert-dropping", data=[inputs(model)])
    with pytest.raises(ConfigError, match=r"experts = 1.5 is no share"):
        auxin.plan(model, "expert-dropping", experts=1.5, data=[inputs(model)])
    with pytest.raises(PlanError, match="There are no experts among which a router chooses"):
        auxin.plan(dense, "expert-dropping", experts=0.5, data=[inputs(dense)])
    with pytest.raises(ConfigError, match=r"Give target\.parameters"):
        auxin.plan(model, "expert-dropping", target={"flops": 0.9}, data=[inputs(model)])
    with pytest.raises(PlanError, match="the smallest that expert-dropping can reach"):
        auxin.plan(model, "expert-dropping", target={"parameters": 0.05}, data=[inputs(model)])


def test_memory_is_a_target_since_experts_lie_in_it():
    model, target = mixture("mixtral"), Target(memory=0.7)
    limit = target.limit(target.of(model))
    plan = auxin.plan(model, "expert-dropping", target={"memory": 0.7}, data=[inputs(model)])
    apply(plan, model)
    assert target.of(model) <= limit
    one_expert = sum(p[0].nbytes for p in experts_at(model)["model.layers.0"].parameters())
    assert target.of(model) + 3 * one_expert > limit, "of both layers, with the rows of their routers"


def test_a_target_takes_the_fewest_experts_that_reach_it():
    model = mixture("mixtral")
    before = model.num_parameters()
    plan = auxin.plan(model, "expert-dropping", target={"parameters": 0.7}, data=[inputs(model)])
    apply(plan, model)
    assert model.num_parameters() <= 0.7 * before
    one_expert = sum(p[0].numel() for p in experts_at(model)["model.layers.0"].parameters()) + model.config.hidden_size
    assert model.num_parameters() + 2 * one_expert > 0.7 * before


def test_layers_that_differ_are_kept_in_the_checkpoint(tmp_path):
    model = mixture("mixtral").float()
    data = [inputs(model)]
    plan = auxin.plan(model, "expert-dropping", experts=0.4, uniform=False, normalised=False, score="gate", data=data)
    with pytest.warns(UserWarning, match="Layers have different numbers of experts"):
        apply(plan, model)
    assert len({experts.num_experts for experts in experts_at(model).values()}) == 2
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    again.set_experts_implementation("eager")
    assert torch.equal(logits(model), logits(again))
    assert {width.stream for width in anatomy(again).sizes.scoped} == {"expert"}
    balanced = mixture("mixtral", output_router_logits=True).float()
    with pytest.raises(PlanError, match="the loss that balances them"):
        auxin.plan(balanced, "expert-dropping", experts=0.4, uniform=False, normalised=False, score="gate", data=data)


@pytest.mark.parametrize(
    ("name", "asked"), [("net2net", {"intermediate_size": 20}), ("hypercloning", {"factor": 2, "variant": "diagonal"})]
)
def test_a_model_whose_layers_have_other_numbers_of_experts_grows(name, asked):
    model = without(mixture("mixtral"), {"model.layers.0": [1, 2, 5], "model.layers.1": [0, 1, 2, 3, 7]})
    before = logits(model)
    plan = auxin.plan(model, name, **asked)
    apply(plan, model)
    assert plan.promise == "exact"
    assert change(before, logits(model)) < 1e-12
    assert [experts.num_experts for experts in experts_at(model).values()] == [3, 5]


@pytest.mark.parametrize("name", ["magnitude", "random", "taylor", "wanda-structured"])
def test_other_scores_take_experts_beside_units(name):
    model = mixture("qwen3_moe").float()
    data = {} if name in ("magnitude", "random") else {"data": [{**inputs(model), "labels": labels(model)}]}
    apply(auxin.plan(model, name, experts=0.5, ffn=0.8, **data), model)
    assert (model.config.num_experts, model.config.moe_intermediate_size) == (4, 8)
    logits(model)


def test_magnitude_is_the_norm_of_all_that_is_an_experts_own():
    model = mixture("gpt_oss")
    smaller = copy.deepcopy(model)
    apply(auxin.plan(model, "magnitude", experts=5), smaller)
    for layer, experts in experts_at(model).items():
        router = router_of(model, layer)
        tensors = [*experts.parameters(), router.weight, router.bias]
        norms = sum(
            tensor.detach().flatten(1).square().sum(1) if tensor.dim() > 1 else tensor.detach().square()
            for tensor in tensors
        )
        best = sorted(norms.argsort(descending=True)[:5].tolist())
        assert torch.equal(router_of(smaller, layer).weight, router.weight[best])


def test_what_routers_use_least_is_missed_less_than_what_is_drawn():
    learnt, held_out = library("argparse", "ast", "datetime", "difflib", "doctest"), library("typing")
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = MixtralForCausalLM(config)
    train(model, learnt, 100)
    ids = learnt[(torch.arange(16) * 900)[:, None] + torch.arange(CONTEXT)]
    data = Calibration.of_batches(model, [ids])

    scored = {
        s: loss_after(auxin.plan(model, "expert-dropping", experts=5, score=s, data=data), model, held_out)
        for s in ("reap", "gate", "frequency")
    }
    drawn = [loss_after(auxin.plan(model, "random", experts=5, seed=seed), model, held_out) for seed in range(5)]
    print(scored, sorted(drawn), held_out_loss(model, held_out))
    assert scored["reap"] < statistics.median(drawn)
