"""OPTIN on tokens of images: a limit is shared with units as it is asked for, the fewest tokens are merged that meet
it, and the result is one that loads, runs and costs as it says."""

import copy
from typing import Any

import pytest
import torch

import auxin
from auxin.accounting import flops_per_token
from auxin.analysis import measure, run
from auxin.analysis.token_trajectory import TokenTrajectory
from auxin.edits import apply
from auxin.errors import ConfigError, PlanError
from auxin.methods import method
from auxin.objectives.calibration import Calibration
from auxin.planning.bench import Bench
from auxin.planning.merged_tokens import fewer_tokens
from auxin.planning.method import estimate_plan
from auxin.planning.target import Gauge, Target
from tiny_models import inputs, tiny


def images(model: Any) -> Calibration:
    return Calibration.of_batches(model, [{**inputs(model, batch=4), "labels": torch.arange(4) % 3}])


def vit() -> Any:
    return tiny("vit", dtype=torch.float32, image_size=16, num_hidden_layers=3)


def flops(model: Any) -> float:
    return flops_per_token(model, 1).forward


def merged(plan: Any) -> dict[str, int]:
    return {edit.module: edit.settings["merged"] for edit in plan.edits if edit.kind == "replace_module"}


def test_tokens_alone_go_by_their_scores():
    model = vit()
    data = images(model)
    plan = auxin.plan(model, "optin", target={"flops": 0.8}, token_share=1.0, data=data)
    found = measure(TokenTrajectory(together=4), model, data)
    scores = {layer.scope: layer.scores.means for layer in found.layers}
    assert plan.edits == fewer_tokens(Gauge(Target(flops=0.8), model), scores, 1, [], "optin").edits
    smaller = copy.deepcopy(model)
    apply(plan, smaller)
    assert flops(smaller) <= 0.8 * flops(model)
    assert {name: p.shape for name, p in smaller.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }
    assert plan.settings == {"target": {"flops": 0.8}, "token_share": 1.0}
    assert "target.flops = 0.8" in plan.findings[0]
    assert plan.cost.flops > 0


def test_a_limit_is_shared_as_it_is_asked_for(tmp_path):
    model = vit()
    plan = auxin.plan(model, "optin", target={"flops": 0.8}, token_share=0.6, data=images(model))
    units = copy.deepcopy(model)
    apply(plan.model_copy(update={"edits": [edit for edit in plan.edits if edit.kind != "replace_module"]}), units)
    smaller = copy.deepcopy(model)
    apply(plan, smaller)
    have = flops(model)
    # Of 20 % units save 8 %, but for less than what a unit costs in all layers.
    unit = 3 * 2 * 2 * 18 * model.config.hidden_size
    assert 0.92 * have - unit < flops(units) <= 0.92 * have
    assert flops(smaller) <= 0.8 * have
    assert set(merged(plan)) <= {"vit.layers.1", "vit.layers.2"}
    smaller.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs(model)).logits, smaller.eval()(**inputs(model)).logits)


def test_without_a_share_nothing_is_merged():
    model = vit()
    plan = auxin.plan(model, "optin", target={"flops": 0.9}, data=images(model))
    assert merged(plan) == {}


def test_an_outline_has_the_size_of_the_plan():
    model, asked = vit(), {"target": {"flops": 0.8}, "token_share": 0.5}
    found = method("optin")
    outline = estimate_plan(found, Bench(copy.deepcopy(model).to("meta")), found.settings.parse(asked))
    made = copy.deepcopy(model)
    apply(outline.model_copy(update={"estimate": False}), made)
    assert flops(made) <= 0.8 * flops(model)
    assert merged(outline)


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("beit", {}, "adds biases by the distance of patches"),
        ("vit", {"target": {"flops": 0.2}, "token_share": 1.0}, "the smallest that optin can reach here"),
    ],
)
def test_what_can_t_be_is_refused_before_the_model_is_run(family, values, message, monkeypatch):
    model = tiny(family, dtype=torch.float32)
    monkeypatch.setattr(run, "_follow", lambda *_: pytest.fail("it was run"))
    asked = {"target": {"flops": 0.9}, "token_share": 0.5, **values}
    with pytest.raises(PlanError, match=message):
        auxin.plan(model, "optin", data=images(model), **asked)


def test_what_merges_already_is_refused():
    model = vit()
    data = images(model)
    apply(auxin.plan(model, "optin", target={"flops": 0.9}, token_share=1.0, data=data), model)
    with pytest.raises(PlanError, match=r"vit\.layers\.\d merges tokens already\. Start from the model before"):
        auxin.plan(model, "optin", target={"flops": 0.8}, token_share=1.0, data=data)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ffn": 0.5, "token_share": 0.5}, "Give target.flops"),
        ({"target": {"parameters": 0.5}, "token_share": 0.5}, "Give target.flops"),
        ({"target": {"flops": 0.5}, "token_share": 1.0, "uniform": False}, "no units go"),
        ({"target": {"flops": 0.5}, "token_share": 1.5}, "token_share"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        method("optin").settings.parse(values)
