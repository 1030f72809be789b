"""What a user wants left alone stays, whatever its scores are."""

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import auxin
from auxin.edits.kinds.edit import describe_edit
from auxin.errors import ConfigError, PlanError
from auxin.planning.kept_paths import is_kept
from auxin.planning.pruning import Pruning, prunable
from tiny_models import tiny

IDS = torch.arange(8).view(1, 8)


def removed(plan: Any) -> list[str]:
    """What a plan of a depth method took, in its order."""
    said = next(one for one in plan.findings if one.startswith("Removed, in this order: "))
    return [one.split(" ")[0] for one in said.removeprefix("Removed, in this order: ").rstrip(".").split(", ")]


def test_a_path_keeps_itself_and_what_is_below():
    assert is_kept("model.layers.0", ["model.layers.0"])
    assert is_kept("model.layers.0.self_attn", ["model.layers.0"])
    assert is_kept("model.layers.7.self_attn", ["model.layers.*.self_attn"])
    assert not is_kept("model.layers.10", ["model.layers.1"])
    assert not is_kept("", ["model.layers.1"])


@pytest.mark.parametrize("method", ["finercut", "shortgpt"])
def test_kept_layers_stay_and_all_others_can_go(method):
    model = tiny("llama")
    layers = [name for name, _ in model.named_modules() if name.rpartition(".")[0] == "model.layers"]
    wanted = {"candidates": "layers"} if method == "finercut" else {}
    for kept in layers:
        plan = auxin.plan(model, method, removed=len(layers) - 1, keep=kept, data=[IDS], **wanted)
        assert sorted(removed(plan)) == [layer for layer in layers if layer != kept]
    with pytest.raises(PlanError, match=f"of {len(layers)} candidates is {len(layers)}"):
        auxin.plan(model, method, removed=len(layers), keep=layers[0], data=[IDS], **wanted)


def test_kept_parts_stay_by_a_pattern():
    model = tiny("llama")
    plan = auxin.plan(model, "finercut", removed=2, keep=["model.layers.*.mlp"], data=[IDS])
    assert all(path.endswith("self_attn") for path in removed(plan))
    plan = auxin.plan(model, "finercut", removed=1, keep=["model.layers.0", "model.layers.*.mlp"], data=[IDS])
    assert removed(plan)[0].startswith("model.layers.1.")


@settings(max_examples=15)
@given(kept=st.integers(0, 1), share=st.sampled_from([0.5, 0.6, 0.8]), seed=st.integers(0, 9))
def test_a_kept_layer_keeps_all_units_of_one_ranking(kept, share, seed):
    model = tiny("llama")
    found = prunable(model, Pruning(ffn=share, uniform=False, keep=f"model.layers.{kept}"))
    draw = torch.Generator().manual_seed(seed)
    scores = {place: torch.rand(count, generator=draw).tolist() for place, count in found.units.items()}
    scores["ffn", f"model.layers.{kept}"] = [-1.0] * len(scores["ffn", f"model.layers.{kept}"])  # the first to go
    before = [layer.mlp.up_proj.out_features for layer in model.model.layers]
    with warnings.catch_warnings(action="ignore"):  # of a layer of which hardly anything is left
        auxin.apply(found.plan("by hand", scores), model)
    after = [layer.mlp.up_proj.out_features for layer in model.model.layers]
    assert after[kept] == before[kept]
    assert sum(after) < sum(before)


def test_a_target_is_met_by_the_other_layers():
    model = tiny("llama")
    data = [{"input_ids": IDS, "labels": IDS}]
    wanted = {"target": {"parameters": 0.9}, "uniform": False, "data": data}
    plan = auxin.plan(model, "taylor", keep=["model.layers.0"], **wanted)
    assert plan.settings["keep"] == ["model.layers.0"]
    heads, units = model.config.num_attention_heads, model.model.layers[0].mlp.up_proj.out_features
    auxin.apply(plan, model)
    assert model.model.layers[0].mlp.up_proj.out_features == units
    assert model.model.layers[0].self_attn.q_proj.out_features == heads * model.model.layers[0].self_attn.head_dim


def test_what_can_not_be_kept_is_one_message():
    model = tiny("llama")
    with pytest.raises(ConfigError, match="no layer can keep them all"):
        auxin.plan(model, "magnitude", ffn=0.5, keep="model.layers.0")
    with pytest.raises(PlanError, match=r"keep: 'model.layers.9' names nothing that could go.*model.layers.0"):
        auxin.plan(model, "magnitude", ffn=0.5, uniform=False, keep="model.layers.9")
    with pytest.raises(PlanError, match=r"keep: 'layers.0' names nothing that could go"):
        auxin.plan(model, "shortgpt", removed=1, keep="layers.0", data=[IDS])
    with pytest.raises(ConfigError, match="keep"):
        auxin.plan(model, "magnitude", ffn=0.5, uniform=False, keep="")
    with pytest.raises(PlanError, match="keep: all of the 4 that could go are kept"):
        auxin.plan(model, "magnitude", ffn=0.5, heads=0.5, uniform=False, keep="model.layers.*")
    with pytest.raises(PlanError, match="keep: all of the 2 that could go are kept"):
        auxin.plan(model, "shortgpt", removed=1, keep="model.layers.*", data=[IDS])
    with pytest.raises(PlanError, match="keep: nothing that is to go here is in one layer alone"):
        auxin.plan(model, "magnitude", hidden=0.5, uniform=False, keep="model.layers.0")


@pytest.mark.parametrize(
    ("family", "kept", "values", "words"),
    [
        ("t5", "encoder.block.0", {"heads": 0.5, "ffn": 0.5}, "heads of encoder.block.0 .* or keep encoder.block"),
        ("t5", "*.block.0", {"heads": 0.5, "ffn": 0.5}, "heads of encoder.block.0"),
        (
            "gpt2",
            "transformer.h.0",
            {"heads": 0.5, "ffn": 0.5, "hidden": 0.5},
            "heads of transformer.h.0 .* keep nothing",
        ),
    ],
)
def test_what_can_only_go_in_several_layers_at_once_can_t_be_kept_in_one(family, kept, values, words):
    with pytest.raises(PlanError, match=words):
        auxin.plan(tiny(family), "magnitude", uniform=False, keep=kept, **values)


def test_a_stack_whose_layers_have_as_many_heads_is_kept_as_a_whole():
    model = tiny("t5")
    plan = auxin.plan(model, "magnitude", uniform=False, keep="encoder.block", heads=0.5, ffn=0.5)
    assert not any("encoder.block" in describe_edit(edit) for edit in plan.edits)
