"""A plan for one model is refused for another, in words about the two."""

import pytest
import torch

import auxin
from auxin.edits import ArrangeLayers, Plan, ScaleParameter, apply
from auxin.edits.folder_executor import apply_to_checkpoint
from auxin.errors import AuxinError, PlanError
from tiny_models import logits, tiny


@pytest.mark.parametrize(
    ("method", "settings", "other", "reason"),
    [
        ("bert2bert", {"hidden_size": 32}, {"hidden_size": 32}, r"for hidden_size = 16, and this model has 32\."),
        ("stacking", {"factor": 2}, {"num_hidden_layers": 3}, r"for num_hidden_layers = 2, and this model has 3\."),
        ("hypercloning", {"factor": 2}, {"intermediate_size": 24}, r"intermediate_size = 12, and this model has 24\."),
    ],
)
def test_a_plan_for_another_size_is_refused_where_it_changes_the_size(method, settings, other, reason, tmp_path):
    plan, model = auxin.plan(tiny("llama"), method, **settings), tiny("llama", **other)
    before = logits(model)
    with pytest.raises(PlanError, match=reason):
        apply(plan, model)
    assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(PlanError, match=reason):
        apply_to_checkpoint(plan, tmp_path / "other", tmp_path / "grown")
    assert not (tmp_path / "grown").exists()


def test_a_plan_applied_twice_is_refused_the_second_time():
    model = tiny("llama")
    plan = auxin.plan(model, "hypercloning", factor=2)
    apply(plan, model)
    with pytest.raises(PlanError, match=r"for hidden_size = 16, and this model has 32\. Make one for this model\."):
        apply(plan, model)


def test_a_plan_for_another_architecture_is_refused():
    with pytest.raises(PlanError, match=r"was made for a llama, and this is a qwen2\."):
        apply(auxin.plan(tiny("llama"), "stacking", factor=2), tiny("qwen2"))


def test_what_a_plan_leaves_alone_may_differ():
    model = tiny("llama", intermediate_size=20)
    apply(auxin.plan(tiny("llama"), "llama-pro", layers=4), model)
    assert len(model.model.layers) == 4


def test_a_plan_written_by_hand_is_for_any_model_that_it_fits():
    edits = [ArrangeLayers(layers="model.layers", order=[0, 1, 1]), ScaleParameter(parameter="lm_head.*", factor=1.0)]
    apply(Plan(method="hand", promise="none", edits=edits), tiny("llama"))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model_type": "lama"}, r"made_for: model_type: Unknown architecture 'lama'\. Did you mean 'llama'"),
        ({"hidden_size": 16}, r"made_for: model_type: Unknown architecture 'None'"),
        ({"model_type": "llama", "hidden_size": "x"}, r"made_for: llama refuses its config: .*hidden_size"),
        ({"model_type": "llama", "hidden_size": 16, "num_attention_heads": 3}, r"made_for: llama refuses its config"),
        ({"model_type": "llama", "num_hidden_layers": 10**12}, r"made_for: num_hidden_layers = 1000000000000"),
    ],
)
def test_what_a_plan_was_made_for_may_be_written_wrongly(values, reason):
    plan = Plan(method="by hand", promise="none", edits=[], made_for=values)
    for use in (lambda: apply(plan, tiny("llama")), lambda: str(plan)):
        with pytest.raises(AuxinError, match=reason):
            use()
