"""bert2BERT: random maps on all streams, units from the layer above, stacks of layers."""

import numpy as np
import pytest
import torch

from auxin.edits import JoinAbove, Plan, apply, apply_to_checkpoint, inverse_plan
from auxin.edits.structure import config_values
from auxin.errors import PlanError
from auxin.methods.grow.bert2bert import METHOD, plan_bert2bert
from auxin.planning.depth import stacked_order
from oracles import width as oracle
from tiny_models import FAMILIES, change, inputs, logits, tiny

WIDE = {"hidden_size": 24, "num_attention_heads": 6, "intermediate_size": 17}


def plan_for(model, **settings):
    return plan_bert2bert(model, METHOD.settings.parse(settings))


def state(model):
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def slices(plan):
    """The index of each sliced parameter by its name and axis, written out entry by entry."""
    found = {}
    for edit in plan.edits:
        if edit.kind == "slice_parameter":
            entries = [unit * edit.unit + dim for unit in edit.index for dim in range(edit.unit)]
            found[edit.parameter, edit.axis] = entries
    return found


def test_fpi_is_r_w_c_with_shared_maps():
    model = tiny("gpt2")
    old = state(model)
    plan = plan_for(model, **WIDE, initialisation="fpi", seed=1)
    assert plan.promise == "approximate"
    index = slices(plan)
    residual = index["transformer.wte.weight", 1]
    ffn = index["transformer.h.*.mlp.c_fc.weight", 1]
    heads = [entry // 4 for entry in index["transformer.h.*.attn.c_proj.weight", 0][::4]]
    assert residual[:16] == list(range(16))
    assert residual[16:] != list(range(8))
    assert heads[:4] == [0, 1, 2, 3]
    apply(plan, model, probe=inputs(model))
    sizes = {"d": 16, "heads": 4, "keys": 4, "dim": 4, "ffn": 12}
    expected = oracle.gpt2(old, oracle.Maps(residual, heads, heads, ffn, sizes), tied=True)
    new = state(model)
    for name, weight in expected.items():
        assert np.allclose(new[name], weight, rtol=1e-13, atol=1e-13), name


def test_fpi_keeps_the_function_where_the_residual_stays():
    model = tiny("llama")
    plan = plan_for(model, intermediate_size=31, num_attention_heads=8, initialisation="fpi")
    assert plan.promise == "exact"
    before = logits(model)
    apply(plan, model, probe=inputs(model))
    assert change(before, logits(model)) < 1e-12


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_aki_takes_further_outputs_from_the_layer_above(family):
    names = {
        "llama": ("model.layers", "mlp.up_proj", 0),
        "gpt2": ("transformer.h", "mlp.c_fc", 1),
        "bert": ("bert.encoder.layer", "intermediate.dense", 0),
    }
    stack, module, axis = names[family]
    states = {}
    for rule in ("fpi", "aki"):
        model = tiny(family, **({"num_key_value_heads": 4} if family == "llama" else {}))
        plan = plan_for(model, **WIDE, initialisation=rule, seed=2)
        apply(plan, model, probe=inputs(model))
        states[rule] = state(model)
    assert plan.promise == "none"
    for last in ("weight", "bias"):
        along = axis if last == "weight" else 0
        fpi = [np.moveaxis(states["fpi"][f"{stack}.{layer}.{module}.{last}"], along, 0) for layer in (0, 1)]
        aki = [np.moveaxis(states["aki"][f"{stack}.{layer}.{module}.{last}"], along, 0) for layer in (0, 1)]
        assert np.array_equal(aki[0][:12], fpi[0][:12])
        assert np.array_equal(aki[0][12:], fpi[1][12:])  # of the layer above, widened on its inputs
        assert np.array_equal(aki[1], fpi[1])  # there is none above the top
    outside = [name for name in states["fpi"] if stack not in name]
    assert all(np.array_equal(states["fpi"][name], states["aki"][name]) for name in outside)


def test_aki_takes_whole_heads_of_a_fused_projection():
    model = tiny("gpt2")
    old = state(model)
    plan = plan_for(model, **WIDE, seed=3)
    index = slices(plan)["transformer.h.*.attn.c_attn.weight", 1]
    residual = slices(plan)["transformer.wte.weight", 1]
    apply(plan, model, probe=inputs(model))
    both = np.concatenate([old[f"transformer.h.{layer}.attn.c_attn.weight"] for layer in (0, 1)], axis=1)
    expected = oracle.decoder(residual, 16).T @ both[:, index]
    assert np.allclose(state(model)["transformer.h.0.attn.c_attn.weight"], expected, atol=1e-14)
    for part in range(3):
        columns = index[24 * part :][:24]
        assert columns[:16] == list(range(16 * part, 16 * part + 16))
        assert all(48 + 16 * part <= column < 48 + 16 * part + 16 for column in columns[16:])


def test_stacks_go_up_whole_and_then_from_the_top():
    assert stacked_order(3, 6) == [0, 1, 2, 0, 1, 2]
    assert stacked_order(3, 8) == [0, 1, 2, 0, 1, 2, 1, 2]
    assert stacked_order(3, 3) == [0, 1, 2]
    with pytest.raises(PlanError, match="less than the 3"):
        stacked_order(3, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_runs_on_after_it(family):
    model = tiny(family)
    settings = {**METHOD.examples(model), "num_hidden_layers": 5}
    apply(plan_for(model, **settings), model, probe=inputs(model))
    assert torch.isfinite(logits(model)).all()


def test_a_plan_survives_its_file_and_a_checkpoint_is_changed_alike(tmp_path):
    model = tiny("llama", dtype=torch.float32)
    plan = plan_for(model, hidden_size=32, num_hidden_layers=3)
    assert "joined along axis 0" in str(plan)
    plan.to_yaml(tmp_path / "plan.yaml")
    assert Plan.from_yaml(tmp_path / "plan.yaml") == plan
    model.save_pretrained(tmp_path / "old")
    apply_to_checkpoint(plan, tmp_path / "old", tmp_path / "new")
    apply(plan, model, probe=inputs(model))
    again = type(model).from_pretrained(tmp_path / "new")
    assert all(np.array_equal(value, state(again)[name]) for name, value in state(model).items())


def test_joining_has_no_way_back_and_is_checked():
    model = tiny("llama")
    with pytest.raises(PlanError, match="has no inverse"):
        inverse_plan(plan_for(model, hidden_size=32), model)
    values = config_values(model.config)
    wrong = JoinAbove(layers="model.layers", parameter="mlp.nothing.weight")
    with pytest.raises(PlanError, match=r"no parameter has this path|nearest"):
        apply(Plan(method="x", promise="none", edits=[wrong], made_for=values), model)
    alone = JoinAbove(layers="model.layers", parameter="mlp.up_proj.weight")
    with pytest.raises(PlanError, match="shape"):
        apply(Plan(method="x", promise="none", edits=[alone], made_for=values), model)
    beyond = JoinAbove(layers="model.layers", parameter="mlp.up_proj.weight", axis=2)
    with pytest.raises(PlanError, match="does not fit"):
        apply(Plan(method="x", promise="none", edits=[beyond], made_for=values), model)


REFUSALS = [
    ("llama", {}, "nothing to widen"),
    ("llama", {"hidden_size": 10}, "less than the 16"),
    ("llama", {"num_hidden_layers": 1}, "less than the 2"),
    ("gpt2", {"hidden_size": 18}, "The nearest possible: 16 or 20"),
]


@pytest.mark.parametrize(("family", "settings", "words"), REFUSALS, ids=str)
def test_what_is_impossible_is_refused(family, settings, words):
    with pytest.raises(PlanError, match=words):
        plan_for(tiny(family), **settings)


def test_a_tied_head_behind_a_norm_without_gain_is_refused():
    with pytest.raises(PlanError, match="no norm with a gain"):
        plan_for(tiny("olmo", tie_word_embeddings=True), hidden_size=32)
