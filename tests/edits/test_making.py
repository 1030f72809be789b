"""A brick's tensors come from those of the module that it replaces, in memory and on the disk alike, and back."""

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.edits import (
    ArrangeLayers,
    MergeModule,
    PadParameter,
    Plan,
    ReplaceModule,
    ScaleParameter,
    SetConfig,
    SliceParameter,
    apply,
    apply_to_checkpoint,
    inverse_plan,
)
from auxin.edits.resolution import resolve
from auxin.edits.structure import structural_edits
from auxin.errors import PlanError, PromiseError
from auxin.models.loading import load_model
from auxin.nn.bricks import Brick, Making, Shapes, Tensors, brick
from outputs import output
from tiny_models import inputs, labels, tiny


class SumAndDifference(Making):
    """Two matrices of one, whose mean it is: (1 + s) W and (1 - s) W."""

    def shapes(self, old: Shapes, **settings: Any) -> Shapes:
        if "weight" not in old:
            raise PlanError("a linear layer has a weight")
        return {"plus": old["weight"], "minus": old["weight"]}

    def keeps(self, old: Shapes, **settings: Any) -> set[str]:
        return {"bias"}

    def values(self, old: Tensors, draw: torch.Generator, share: float = 0.5) -> dict[str, Tensor]:
        return {"plus": old["weight"] * (1 + share), "minus": old["weight"] * (1 - share)}

    def moments(self, old: Tensors, moments: Tensors, order: int, share: float = 0.5) -> dict[str, Tensor] | None:
        return dict.fromkeys(("plus", "minus"), moments["weight"] / 2**order) if "weight" in moments else None

    def back(self, new: Tensors, share: float = 0.5) -> dict[str, Tensor] | None:
        return {"weight": (new["plus"] + new["minus"]) / 2}

    def moments_back(self, new: Tensors, moments: Tensors, order: int, share: float = 0.5) -> dict[str, Tensor] | None:
        return {"weight": moments["plus"] * 2**order} if "plus" in moments else None


@brick("test_twofold")
class Twofold(Brick):
    """y = (plus + minus) x / 2 + b."""

    making = SumAndDifference()

    @classmethod
    def replacing(cls, module: nn.Linear, share: float = 0.5) -> "Twofold":
        self = cls()
        for name in ("plus", "minus"):
            self.register_parameter(name, nn.Parameter(torch.empty_like(module.weight)))
        self.register_parameter("bias", module.bias)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.plus + self.minus) / 2, self.bias)


@brick("test_one_way")
class OneWay(Twofold):
    """A brick without a way back."""

    class Making(SumAndDifference):
        def back(self, new: Tensors, share: float = 0.5) -> None:
            return None

    making = Making()


UP = "model.layers.*.mlp.up_proj"


def plan(*edits: Any, promise: str = "exact") -> Plan:
    return Plan(method="by hand", promise=promise, edits=list(edits))


def into(module: str = UP, **settings: Any) -> ReplaceModule:
    return ReplaceModule(module=module, brick="test_twofold", settings=settings)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(**inputs(model)).logits


def trained(model: PreTrainedModel) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, amsgrad=True)
    model(**inputs(model), labels=labels(model)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def states_of(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    return {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}


def test_values_and_moments_are_what_the_brick_says():
    model = tiny("llama")
    optimizer = trained(model)
    old = model.model.layers[1].mlp.up_proj
    weight, bias, state = old.weight.detach().clone(), old.bias, copy.deepcopy(optimizer.state[old.weight])
    assert apply(plan(into(share=0.25)), model, optimizer).max_relative_change < 1e-15
    new = model.model.layers[1].mlp.up_proj
    assert torch.equal(new.plus, 1.25 * weight)
    assert torch.equal(new.minus, 0.75 * weight)
    assert new.bias is bias
    for name in ("plus", "minus"):
        found = optimizer.state[getattr(new, name)]
        assert found.keys() == state.keys()
        assert torch.equal(found["exp_avg"], state["exp_avg"] / 2)
        assert torch.equal(found["exp_avg_sq"], state["exp_avg_sq"] / 4)
        assert torch.equal(found["max_exp_avg_sq"], state["max_exp_avg_sq"] / 4)
        assert found["step"] == state["step"]
        assert found["step"] is not state["step"]
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in model.parameters()]


WIDER: list[Any] = [
    SetConfig(values={"intermediate_size": 50}),
    *(
        PadParameter(parameter=f"model.layers.*.mlp.{part}_proj.{name}", size=50, fill={"kind": "normal"})
        for part in ("gate", "up")
        for name in ("weight", "bias")
    ),
    PadParameter(parameter="model.layers.*.mlp.down_proj.weight", axis=1, size=50, fill={"kind": "zeros"}),
]
# Every plan is carried through a model in memory and through its folder, and must give the same bits.
CARRIED = {
    "replace": plan(into()),
    "replace one": plan(into("model.layers.1.mlp.up_proj", share=0.1)),
    "replace and merge": plan(into(), MergeModule(module=UP)),
    "merge one of several": plan(into(), MergeModule(module="model.layers.0.mlp.up_proj")),
    "edits before": plan(*WIDER, into()),
    "edits after": plan(
        into(),
        ScaleParameter(parameter=f"{UP}.plus", factor=0.5),
        SliceParameter(parameter=f"{UP}.minus", index=[47, *range(47)]),
        promise="none",
    ),
    "copied layers": plan(into(), ArrangeLayers(layers="model.layers", order=[0, 0, 1, 1]), promise="none"),
    "layers copied before": plan(ArrangeLayers(layers="model.layers", order=[1, 0, 1]), into(), promise="none"),
    "the tied head": plan(into("lm_head")),
}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint with AdamW's state, and model and optimizer themselves."""
    model = tiny("llama", intermediate_size=48)
    optimizer = trained(model)
    model.save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "training").mkdir()
    tensors = {f"optimizer.{k}.{name}": v for name, s in states_of(model, optimizer).items() for k, v in s.items()}
    save_file(tensors, tmp_path / "old" / "training" / "optimizer.safetensors")
    return tmp_path, model, optimizer


@pytest.mark.parametrize("name", CARRIED)
def test_memory_and_disk_give_the_same_bits(folder, name):
    path, model, optimizer = folder
    receipt = apply_to_checkpoint(CARRIED[name], path / "old", path / "new")
    assert receipt.max_relative_change == apply(CARRIED[name], model, optimizer).max_relative_change
    loaded = load_model(path / "new")
    wanted = model.state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    assert [key for key, tensor in loaded.state_dict().items() if not torch.equal(tensor, wanted[key])] == []
    assert torch.equal(logits(loaded), logits(model))
    states = {f"optimizer.{k}.{n}": v for n, s in states_of(model, optimizer).items() for k, v in s.items()}
    stored = load_file(path / "new" / "training" / "optimizer.safetensors")
    assert stored.keys() == states.keys()
    assert [key for key, tensor in stored.items() if not torch.equal(tensor, states[key])] == []


@pytest.mark.parametrize("name", CARRIED)
def test_a_failed_plan_leaves_everything_as_it_was(folder, name):
    _, model, optimizer = folder
    tensors = dict(model.named_parameters(remove_duplicate=False))
    values = {key: value.detach().clone() for key, value in tensors.items()}
    states = copy.deepcopy(states_of(model, optimizer))
    groups = [list(group["params"]) for group in optimizer.param_groups]
    broken = CARRIED[name].model_copy(
        update={
            "promise": "exact",
            "edits": [*CARRIED[name].edits, ScaleParameter(parameter="model.norm.weight", factor=2.0)],
        }
    )
    with pytest.raises(PromiseError):
        apply(broken, model, optimizer)
    now = dict(model.named_parameters(remove_duplicate=False))
    assert {key: id(value) for key, value in now.items()} == {key: id(value) for key, value in tensors.items()}
    assert all(torch.equal(value, values[key]) for key, value in now.items())
    assert structural_edits(model.config) == []
    found = states_of(model, optimizer)
    assert found.keys() == states.keys()
    for key, state in states.items():
        assert all(torch.equal(found[key][which], tensor) for which, tensor in state.items())
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
        [id(p) for p in g] for g in groups
    ]


def test_what_is_merged_is_an_ordinary_model_again(tmp_path):
    model = tiny("llama")
    optimizer = trained(model)
    before, weights, states = (
        logits(model),
        copy.deepcopy(model.state_dict()),
        copy.deepcopy(states_of(model, optimizer)),
    )
    apply(plan(into()), model, optimizer)
    model.save_pretrained(tmp_path / "replaced")
    loaded = load_model(tmp_path / "replaced")
    assert torch.equal(logits(loaded), logits(model))
    apply(plan(MergeModule(module=UP)), loaded)
    apply(plan(MergeModule(module=UP)), model, optimizer)
    for merged in (loaded, model):
        assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear
        assert not hasattr(merged.config, "quantization_config")
        assert {k: v.shape for k, v in merged.state_dict().items()} == {k: v.shape for k, v in weights.items()}
        torch.testing.assert_close(logits(merged), before, rtol=0, atol=1e-14)
    for name, state in states_of(model, optimizer).items():
        torch.testing.assert_close(dict(state), dict(states[name]), rtol=1e-15, atol=0)


def test_the_inverse_of_a_replacement_is_a_merge():
    model = tiny("llama")
    made = plan(into(share=0.5))
    back = inverse_plan(made, model)
    weights = copy.deepcopy(model.state_dict())
    apply(made, model)
    apply(back, model)
    assert back.edits == [MergeModule(module=UP)]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(PlanError, match="has no inverse"):
        inverse_plan(plan(ReplaceModule(module=UP, brick="test_one_way")), model)


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ([into("model.norm"), into("model.rotary_emb")], "a linear layer has a weight"),
        ([into(parts=3)], "refuses a Linear with|can't be made with the settings"),
        ([MergeModule(module=UP)], "is no brick that was put there by an edit"),
        ([ReplaceModule(module=UP, brick="test_one_way"), MergeModule(module=UP)], "can't be merged"),
        ([into(), ScaleParameter(parameter=f"{UP}.weight", factor=2.0)], "used up by edit 1"),
    ],
)
def test_what_can_not_be_is_refused_with_the_reason(edits, words):
    with pytest.raises(PlanError, match=words):
        resolve(edits, tiny("llama"))


def test_the_table_says_what_is_made_of_what():
    model = tiny("llama")
    table = plan(into()).table(model)
    assert "model.layers.*.mlp.up_proj.plus" in table
    assert "made of weight, bias" in table


def low_rank(module: str, rank: int) -> ReplaceModule:
    return ReplaceModule(module=module, brick="low_rank_linear", settings={"rank": rank})


def test_what_is_used_up_is_gone_for_later_edits_of_the_plan():
    """Replacing and merging in one plan is the same as in two."""
    one, two = tiny("llama"), tiny("llama")
    apply(plan(low_rank(UP, 1), MergeModule(module=UP), promise="none"), one)
    apply(plan(low_rank(UP, 1), promise="none"), two)
    apply(plan(MergeModule(module=UP)), two)
    assert torch.linalg.matrix_rank(one.model.layers[0].mlp.up_proj.weight) == 1
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    split = ReplaceModule(module="model.layers.*.mlp", brick="split_feed_forward", settings={"num_experts": 2})
    assert apply(plan(split, MergeModule(module="model.layers.*.mlp")), tiny("llama")).max_relative_change < 1e-14


def test_a_second_replacement_changes_the_settings():
    model = tiny("llama")
    apply(plan(low_rank(UP, 4), promise="none"), model)
    apply(plan(low_rank(UP, 2), promise="none"), model)
    assert model.model.layers[0].mlp.up_proj.output_factor.shape[1] == 2
    assert len(structural_edits(model.config)) == 1


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_tied_head_may_be_replaced_saved_and_loaded(family, tmp_path):
    model = tiny(family, tie_word_embeddings=True)
    apply(plan(low_rank("lm_head", 3), promise="none"), model)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(PlanError, match=r"are one tensor in the edited model \(tied\).*Untie them first"):
        apply(plan(MergeModule(module="lm_head"), promise="none"), loaded)


def test_what_files_hold_in_one_tensor_is_replaced_together_or_not_at_all(tmp_path):
    model, layer = tiny("dinov2 gated"), "dinov2.encoder.layer.1.mlp"
    gate, up = low_rank(f"{layer}.gate_proj", 3), low_rank(f"{layer}.up_proj", 3)
    with pytest.raises(PlanError, match=r"up_proj.weight and others in one tensor .*mlp.weights_in.weight.*or none"):
        apply(plan(gate, promise="none"), model)
    apply(plan(gate, up, promise="none"), model)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(load_model(tmp_path)(**inputs(model))), output(model(**inputs(model))))
    with pytest.raises(PlanError, match=r"up_proj.weight and others in one tensor"):
        apply(plan(MergeModule(module=f"{layer}.up_proj")), model)


def test_states_that_can_not_follow_are_refused_before_anything_changes():
    model = tiny("llama")
    optimizer = torch.optim.Adafactor(model.parameters())
    model(**inputs(model), labels=labels(model)).loss.backward()
    optimizer.step()
    kept = dict(model.named_parameters())
    with pytest.raises(PlanError, match="it can't follow"):
        apply(plan(low_rank(UP, 4), promise="none"), model, optimizer)
    assert dict(model.named_parameters()).keys() == kept.keys()


def test_groups_and_training_follow_the_tensor_that_each_comes_from():
    model = tiny("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("down_proj.weight" in name)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=1e-3)
    split = ReplaceModule(module="model.layers.*.mlp", brick="split_feed_forward", settings={"num_experts": 2})
    for edits in ([split], [MergeModule(module="model.layers.*.mlp")]):
        apply(plan(*edits), model, optimizer)
        names = {id(p): name for name, p in model.named_parameters()}
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert all("down_proj" in name and "bias" not in name for name in trained), trained
        groups = [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]
        assert all("bias" in name or "norm" in name for name in groups[1]), groups[1]
        assert not any("bias" in name for name in groups[0]), groups[0]


def test_what_was_made_can_not_be_blended_or_filled():
    arranged = ArrangeLayers(layers="model.layers", order=[0, 1], blend={"mlp.up_proj.plus": [[0.5, 0.5], [0.0, 1.0]]})
    with pytest.raises(PlanError, match="was changed or made by an earlier edit"):
        resolve([into(), arranged], tiny("llama"))
    filled = into().model_copy(update={"fills": {"plus": {"kind": "zeros"}}})
    with pytest.raises(PlanError, match="plus is made by the brick test_twofold; leave its fill out"):
        resolve([ReplaceModule.model_validate(filled.model_dump())], tiny("llama"))
