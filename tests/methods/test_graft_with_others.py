"""Grafted models grow like others: keys read what their layer reads, values write what it writes."""

import json

import pytest
import torch

from auxin.edits import Plan, apply
from auxin.methods import method
from auxin.methods.adapt.graft import graft
from auxin.methods.grow.ligo import GrowthOperator, LigoGrowth, learn
from auxin.methods.grow.masked import MaskRamp
from auxin.models.anatomy import anatomy
from auxin.nn.graft import Grafted
from auxin.nn.masked import Masked
from auxin.objectives.calibration import Calibration
from auxin.planning.bench import Bench
from tiny_models import FAMILIES, InDouble, change, inputs, labels, logits, tiny

EXACT = 1e-12
DENSE = [family for family in FAMILIES if family != "tokenformer"]


def grafted(family, targets=(), **values):
    """A tiny model with branches, as after training."""
    model = tiny(family, seed=3, **values)
    graft(model, tokens=4, targets=targets)
    graft(model, tokens=3, targets=targets)
    generator = torch.Generator().manual_seed(5)
    before = logits(model)
    with torch.no_grad():
        for branch in branches(model):
            for parameter in branch.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.3 * noise)
    assert change(before, logits(model)) > 1e-2
    return model


def branches(model):
    return [module.branch for module in model.modules() if isinstance(module, Grafted)]


def grown(name, model, optimizer=None, **values):
    found = method(name)
    values = values or found.examples(model)
    with InDouble():
        return apply(found.plan(Bench(model), found.settings.parse(values)), model, optimizer, inputs(model)).plan


WIDER = [
    *((family, name, {}) for family in DENSE for name in ("hypercloning", "lemon")),
    *((family, "hypercloning", {"factor": 2, "variant": "diagonal"}) for family in ("llama", "gpt2", "t5")),
    *((family, "hypercloning", {"factor": 3, "variant": "symmetric"}) for family in ("llama", "gpt2", "t5")),
    *((family, "net2net", {"intermediate_size": 17}) for family in ("llama", "gpt2", "t5")),
]


@pytest.mark.parametrize(("family", "name", "values"), WIDER, ids=str)
def test_wider_grafted_models_are_exact(family, name, values):
    model = grafted(family)
    before, tokens = logits(model), [branch.group_sizes for branch in branches(model)]
    assert grown(name, model, **values).promise == "exact"
    assert change(before, logits(model)) < EXACT
    # And again, branches included; tokens are no width.
    graft(model, tokens=2)
    grown("hypercloning", model, factor=2)
    assert change(before, logits(model)) < EXACT
    if name != "lemon":  # which makes it deeper too
        assert [branch.group_sizes for branch in branches(model)] == [(*sizes, 2) for sizes in tokens]


@pytest.mark.parametrize("family", ["llama", "olmo2", "gpt2", "gpt_neox", "t5"])
def test_identity_blocks_silence_the_branch_and_leave_it_something_to_learn_from(family):
    model = grafted(family)
    before, count = logits(model), len(branches(model))
    grown("llama-pro", model, group_size=1)
    assert change(before, logits(model)) < EXACT
    assert len(branches(model)) == 2 * count
    model(**inputs(model), labels=labels(model)).loss.backward()
    for branch in branches(model):
        # Silenced are values; their keys can learn as soon as they are awake.
        assert all(parameter.detach().any() or parameter.grad.any() for parameter in branch.parameters())
    if family != "olmo2":  # its norms behind the outputs are silenced instead
        silent = [branch for branch in branches(model) if not all(p.detach().any() for p in branch.parameters())]
        assert len(silent) == 10 if family == "t5" else 4
        assert all(sum(not p.detach().any() for p in branch.parameters()) == 1 for branch in silent)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "t5", "bert"])
def test_masks_lie_around_the_layer_and_its_branch(family):
    model = grafted(family)
    before = logits(model)
    settings = method("masked").examples(model)
    grown("masked", model, **{**settings, "new_layers": "copies"})
    assert change(before, logits(model)) < EXACT
    masked = [module for module in model.modules() if isinstance(module, Masked)]
    assert any(isinstance(module.wrapped, Grafted) for module in masked)
    assert not any(isinstance(module.wrapped, type(branches(model)[0])) for module in masked)
    MaskRamp.set_strength(model, 1.0)
    at_1 = logits(model)
    assert change(before, at_1) > 1e-3
    grown("masked", model, finish=True)
    assert change(at_1, logits(model)) < EXACT
    assert branches(model)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["hypercloning", "lemon", "llama-pro", "masked"])
def test_a_branch_in_one_layer_alone_grows_too(family, name):
    model = grafted(family, ["h.1.mlp.c_proj"] if family == "gpt2" else ["layers.1.mlp.down_proj"])
    before = logits(model)
    settings = method(name).examples(model)
    grown(name, model, **(settings | ({"new_layers": "copies"} if name == "masked" else {})))
    assert change(before, logits(model)) < EXACT


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
@pytest.mark.parametrize("name", ["bert2bert", "stacking", "solar"])
def test_methods_without_a_promise_take_branches_along(family, name):
    model = grafted(family)
    count = len(branches(model))
    grown(name, model)
    assert len(branches(model)) >= count
    assert torch.isfinite(logits(model)).all()
    anatomy(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
def test_ligo_maps_branches_with_their_layers(family, tmp_path):
    """The plan makes the model that was optimised, and both have the branches."""
    model = grafted(family, **({"num_key_value_heads": 4} if family == "llama" else {}))
    settings = LigoGrowth.parse(method("ligo").examples(model))
    operator = GrowthOperator(model, settings)
    learn(operator, Calibration.of_batches(model, [{**inputs(model), "labels": labels(model)}]), 2, 1e-2)
    plan = Plan.model_validate(json.loads(operator.plan(tmp_path).model_dump_json())).beside(tmp_path)
    optimised = operator.parameters_of_grown()
    old = {tuple(p.shape) for name, p in model.named_parameters() if ".branch." in name}
    apply(plan, model)
    made = dict(model.named_parameters())
    assert set(made) == set(optimised)
    assert {tuple(p.shape) for name, p in made.items() if ".branch." in name} != old
    for name, wanted in optimised.items():
        torch.testing.assert_close(made[name].detach(), wanted.detach(), rtol=1e-12, atol=1e-12)


def test_moments_of_branches_follow():
    model = grafted("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(3):
        model(**inputs(model, step), labels=labels(model, step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moments = {
        name: optimizer.state[parameter]["exp_avg"].clone()
        for name, parameter in model.named_parameters()
        if ".branch." in name
    }
    grown("hypercloning", model, optimizer, factor=2)
    for name, parameter in model.named_parameters():
        if name in moments:
            old, new = moments[name], optimizer.state[parameter]["exp_avg"]
            copies = new.unflatten(1, (2, -1)) if new.shape[1] == 2 * old.shape[1] else None
            assert copies is not None
            # Values are copied and their gradient is shared; keys are divided, so that each share has the whole one.
            parts = [moment * (1 if copies[:, 0].equal(old) else 2) for moment in copies.unbind(1)]
            assert all(torch.allclose(part, old, rtol=1e-12) for part in parts), name
