"""Differences: of two checkpoints, tensor by tensor, and of two plans, edit by edit."""

import math

import pytest
import torch

from auxin.edits import NormalFill, PadParameter, Plan, SetConfig, ZeroFill, apply
from auxin.edits.diff import diff_checkpoints, diff_plans
from auxin.errors import CheckpointError
from auxin.methods.grow.tokenformer import TokenGrowth, plan_token_growth
from edits.models import tiny_model


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def test_equal_checkpoints_differ_in_nothing(tmp_path):
    found = diff_checkpoints(saved(tiny_model(), tmp_path / "a"), saved(tiny_model(), tmp_path / "b"))
    assert found.rows() == []
    assert found.equal == len(list(tiny_model().parameters())), "a tied head is not saved twice"


def test_growth_is_seen_as_other_shapes_with_the_old_block_kept(tmp_path):
    model = tiny_model()
    saved(model, tmp_path / "a")
    apply(plan_token_growth(model.config, TokenGrowth(ffn_tokens=30)), model)
    found = diff_checkpoints(tmp_path / "a", saved(model, tmp_path / "b"))
    assert found.config == {"ffn_tokens": ([20], [20, 10])} or found.config == {"ffn_tokens": (20, [20, 10])}
    assert [item.name for item in found.reshaped] == [
        f"model.layers.{layer}.mlp.{name}" for layer in (0, 1) for name in ("key_tokens", "value_tokens")
    ]
    assert all(item.kept for item in found.reshaped)
    assert (found.reshaped[0].old, found.reshaped[0].new) == ("float32 [20, 32]", "float32 [30, 32]")
    assert (found.removed, found.added, found.changed) == ({}, {}, [])
    # The layers to which the same happened are one row.
    row = ["reshaped", "model.layers.{0,1}.mlp.key_tokens", "float32 [20, 32]", "float32 [30, 32], old block kept"]
    assert row in found.rows()


def test_values_are_measured_against_the_largest(tmp_path):
    model = tiny_model()
    saved(model, tmp_path / "a")
    keys = model.model.layers[1].mlp.key_tokens
    largest = float(keys.detach().abs().max())
    with torch.no_grad():
        keys[3, 4] += 0.5
        model.model.layers[0].mlp.key_tokens.zero_()
    found = diff_checkpoints(tmp_path / "a", saved(model, tmp_path / "b"))
    assert [item.name for item in found.changed] == ["model.layers.0.mlp.key_tokens", "model.layers.1.mlp.key_tokens"]
    assert [item.change for item in found.changed] == pytest.approx([1, 0.5 / largest], rel=1e-5)
    back = diff_checkpoints(tmp_path / "b", tmp_path / "a")
    assert back.changed[0].change == math.inf, "from zero, any change is infinitely large"


def test_layers_and_types_that_only_one_has(tmp_path):
    saved(tiny_model(), tmp_path / "a")
    found = diff_checkpoints(tmp_path / "a", saved(tiny_model(num_hidden_layers=3), tmp_path / "b"))
    assert found.config == {"num_hidden_layers": (2, 3)}
    assert found.added
    assert all(name.startswith("model.layers.2.") for name in found.added)
    assert diff_checkpoints(tmp_path / "b", tmp_path / "a").removed == found.added
    halved = diff_checkpoints(tmp_path / "a", saved(tiny_model(dtype=torch.bfloat16), tmp_path / "c"))
    assert {item.new.split()[0] for item in halved.reshaped} == {"bfloat16"}
    assert all(item.kept for item in halved.reshaped), "rounding is no difference beside the data type"


def test_a_folder_without_weights_is_refused(tmp_path):
    model = tiny_model()
    saved(model, tmp_path / "a")
    model.config.save_pretrained(tmp_path / "b")
    with pytest.raises(CheckpointError, match="there are no weights to compare"):
        diff_checkpoints(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="can't be read"):
        diff_checkpoints(tmp_path / "a", tmp_path / "b")


KEYS = PadParameter(parameter="model.layers.*.mlp.key_tokens", size=30, fill=NormalFill())
VALUES = PadParameter(parameter="model.layers.*.mlp.value_tokens", size=30, fill=ZeroFill())
CONFIG = SetConfig(values={"ffn_tokens": [20, 10]})


def plan(*edits, **fields) -> Plan:
    return Plan(**{"method": "by hand", "promise": "exact", "edits": list(edits), **fields})


def test_plans_are_compared_edit_by_edit():
    assert diff_plans(plan(CONFIG, KEYS), plan(CONFIG, KEYS)).rows() == []
    other = KEYS.model_copy(update={"fill": NormalFill(std=0.1)})
    found = diff_plans(plan(CONFIG, KEYS), plan(CONFIG, VALUES, other, seed=3, settings={"a": 1}))
    assert found.fields == {"seed": (0, 3), "settings.a": (None, 1)}
    assert found.removed == []
    assert len(found.added) == 1
    assert "mlp.value_tokens" in found.added[0]
    ((old, new),) = found.changed
    assert "std of the old" in old
    assert "std 0.1" in new
    assert not found.reordered
    back = diff_plans(plan(CONFIG, VALUES, other), plan(CONFIG, KEYS))
    assert (back.removed, back.added) == (found.added, [])


def test_another_order_of_the_same_edits_is_another_plan():
    found = diff_plans(plan(CONFIG, KEYS, VALUES), plan(CONFIG, VALUES, KEYS))
    assert found.reordered
    assert (found.removed, found.added, found.changed) == ([], [], [])
    assert found.rows()


def test_of_two_edits_of_one_thing_the_equal_ones_are_paired():
    longer = KEYS.model_copy(update={"size": 40})
    found = diff_plans(plan(KEYS, longer), plan(longer))
    assert len(found.removed) == 1
    assert (found.added, found.changed) == ([], [])
