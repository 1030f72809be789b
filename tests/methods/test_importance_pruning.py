"""Pruning by importance takes the units that the measurement ranks lowest, and beats chance."""

import copy
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

import auxin
from auxin.analysis import measure, run
from auxin.analysis.importance import Importance
from auxin.edits import apply
from auxin.errors import DataError, PlanError
from auxin.methods import methods
from auxin.objectives.calibration import Calibration
from auxin.planning.bench import Bench
from auxin.planning.method import estimate_plan
from auxin.planning.pruning_settings import Pruning
from byte_language import CONTEXT, byte_model, held_out_loss, library, loss_after, train
from oracles.importance import entering, moments
from tiny_models import inputs, labels, tiny

SCORES = {"taylor": "taylor", "fisher": "fisher", "wanda-structured": "output", "fluctuation": "fluctuation"}
every_method = pytest.mark.parametrize("name", SCORES)


@pytest.fixture(autouse=True)
def _plans_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the files that belong to them."""
    monkeypatch.chdir(tmp_path)


def planned(name: str, model: Any, data: Calibration, **settings: Any) -> Any:
    found = methods()[name]
    return found.plan(Bench(model, data), found.settings.parse(settings))


def texts(model: Any) -> Calibration:
    return Calibration.of_batches(model, [{**inputs(model, batch=4), "labels": labels(model, batch=4)}])


def fluctuation_ranking(model: Any, batch: Any, groups: int) -> list[tuple[str, int, int]]:
    """FLAP's ranking of a Llama, the lowest first: variances of what enters output matrices times squared lengths of
    columns, standardised in each layer's heads and units; a group has the mean of its entries. What stays in every
    layer, the best of it, is left out."""
    scored: list[tuple[float, str, int, int]] = []
    for layer in range(model.config.num_hidden_layers):
        for kind, name, parts in (("group", "self_attn.o_proj", groups), ("unit", "mlp.down_proj", None)):
            path = f"model.layers.{layer}.{name}"
            _, variance = moments(entering(model, path, batch))
            scores = variance * model.get_parameter(f"{path}.weight").detach().square().sum(0)
            standard = (scores - scores.mean()) / scores.std(unbiased=False)
            found = standard.view(parts or len(standard), -1).mean(1)
            order = found.argsort().tolist()[:-1]
            scored += [(found[place].item(), kind, layer, place) for place in order]
    return [(kind, layer, place) for _, kind, layer, place in sorted(scored)]


@every_method
def test_the_units_that_stay_are_those_of_the_highest_scores(name):
    model = tiny("llama", dtype=torch.float32, intermediate_size=8)
    data = texts(model)
    measured = measure(Importance(score=SCORES[name]), model, data)
    smaller = copy.deepcopy(model)
    apply(planned(name, model, data, ffn=0.5), smaller)
    for layer in range(2):
        means = measured.of("ffn", f"model.layers.{layer}").scores.means
        best = sorted(sorted(range(8), key=lambda unit: means[unit])[4:])
        for matrix in ("gate_proj", "up_proj"):
            path = f"model.layers.{layer}.mlp.{matrix}.weight"
            assert torch.equal(smaller.get_parameter(path), model.get_parameter(path)[best])
    assert smaller.config.intermediate_size == 4


@every_method
def test_heads_go_by_their_groups(name):
    model = tiny("llama", dtype=torch.float32)
    data = texts(model)
    measured = measure(Importance(score=SCORES[name]), model, data)
    smaller = copy.deepcopy(model)
    apply(planned(name, model, data, heads=0.5), smaller)
    assert (smaller.config.num_attention_heads, smaller.config.num_key_value_heads) == (2, 1)
    for layer in range(2):
        means = measured.of("query", f"model.layers.{layer}").scores.means
        best = max((0, 1), key=lambda group: sum(means[2 * group : 2 * group + 2]))
        size = model.config.head_dim or model.config.hidden_size // 4
        path = f"model.layers.{layer}.self_attn.k_proj.weight"
        kept = model.get_parameter(path)[best * size : (best + 1) * size]
        assert torch.equal(smaller.get_parameter(path), kept)


@pytest.mark.parametrize("steps", [3, 9, 15])
def test_fluctuation_ranks_heads_and_units_of_all_layers_in_one_list_where_layers_may_differ(steps):
    model = tiny("llama", intermediate_size=16, mlp_bias=False, attention_bias=False)
    data = texts(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, 3] *= 100  # far above the others
    ranking = fluctuation_ranking(model, {**inputs(model, batch=4)}, groups=2)
    assert {kind for kind, *_ in ranking[:15]} == {"group", "unit"}
    gone = ranking[:steps]
    size, dim, heads = model.config.hidden_size, model.config.head_dim or model.config.hidden_size // 4, 4
    costs = {"unit": 3 * size, "group": 2 * size * dim * (heads + 2) // 2}
    left = model.num_parameters() - sum(costs[kind] for kind, *_ in gone)
    plan = planned("fluctuation", model, data, target={"parameters": left}, uniform=False, bias=False)
    smaller = copy.deepcopy(model)
    apply(plan, smaller)
    assert smaller.num_parameters() == left
    for layer in range(2):
        units = [unit for unit in range(16) if ("unit", layer, unit) not in gone]
        path = f"model.layers.{layer}.mlp.up_proj.weight"
        assert torch.equal(smaller.get_parameter(path), model.get_parameter(path)[units])
        groups = [group for group in range(2) if ("group", layer, group) not in gone]
        rows = [group * dim + row for group in groups for row in range(dim)]
        path = f"model.layers.{layer}.self_attn.k_proj.weight"
        assert torch.equal(smaller.get_parameter(path), model.get_parameter(path)[rows])


def test_the_residual_goes_by_gradients_alone():
    model = tiny("llama", dtype=torch.float32)
    data = texts(model)
    plan = planned("taylor", model, data, hidden=0.5)
    before = model.num_parameters()
    apply(plan, model)
    assert model.num_parameters() < before
    for name in ("wanda-structured", "fluctuation"):
        with pytest.raises(PlanError, match=f"hidden: {name} scores what enters one output matrix"):
            planned(name, tiny("llama", dtype=torch.float32), data, hidden=0.5)
        with pytest.raises(PlanError, match=f"hidden: {name} scores what enters one output matrix"):  # before any work
            estimate_plan(methods()[name], Bench(tiny("llama")), methods()[name].settings.parse({"hidden": 0.5}))


def test_gradients_need_labels():
    model = tiny("vit", dtype=torch.float32)
    with pytest.raises(DataError, match="labels"):
        auxin.plan(model, "taylor", ffn=0.5, data=[inputs(model)])


@pytest.mark.parametrize("name", ["taylor", "wanda-structured"])
def test_what_matters_least_is_missed_less_than_what_is_drawn(name):
    learnt, held_out = library("argparse", "ast", "datetime", "difflib", "doctest"), library("typing")
    model = byte_model(seed=0)
    train(model, learnt, 150)
    ids = learnt[(torch.arange(16) * 900)[:, None] + torch.arange(CONTEXT)]
    data = Calibration.of_batches(model, [ids])

    scored = loss_after(planned(name, model, data, ffn=0.75), model, held_out)
    drawn = [loss_after(auxin.plan(model, "random", ffn=0.75, seed=seed), model, held_out) for seed in range(5)]
    print(name, scored, sorted(drawn), held_out_loss(model, held_out))
    assert scored < statistics.median(drawn)


LOOKING = [name for name, found in methods().items() if issubclass(found.settings, Pruning) and found.calibration]


@pytest.mark.parametrize("name", LOOKING)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target": {"parameters": 0.01}}, "smallest that .* can reach"),
        ({"target": {"parameters": 10**7}}, "nothing has to go"),
        ({"share": 1.0}, "nothing to prune"),
        ({"share": 99}, r"= 99: the model has only \d+ .*\. Give at most \d+, or a share"),
    ],
    ids=str,
)
def test_what_can_t_be_is_refused_before_the_model_is_run(name, values, message, monkeypatch):
    model = tiny("mixtral", dtype=torch.float32)
    monkeypatch.setattr(run, "_follow", lambda *_: pytest.fail("it was run"))
    part = "experts" if name == "expert-dropping" else "ffn"
    settings = {part if field == "share" else field: value for field, value in values.items()}
    with pytest.raises(PlanError, match=message):
        auxin.plan(model, name, data=texts(model), **settings)
