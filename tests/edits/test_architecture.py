"""A plan may make another architecture of a model: Llama's feed-forward parts become Mixtral's experts."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralForCausalLM

from auxin.edits import ChangeArchitecture, MakeParameters, Plan, ScaleParameter, SetConfig, apply, apply_to_checkpoint
from auxin.edits.resolution import resolve
from auxin.errors import PlanError
from tiny_models import inputs, labels, tiny

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def upcycling(promise: str = "exact", **values: object) -> Plan:
    return Plan(
        method="by hand",
        promise=promise,
        edits=[
            ChangeArchitecture(model_type="mixtral", values={**EXPERTS, **values}),
            MakeParameters(module="model.layers.*.mlp", making="expert_copies", settings={"num_experts": 4}),
        ],
    )


def llama() -> LlamaForCausalLM:
    """Mixtral has no biases, and its grouped products no float64."""
    return tiny("llama", attention_bias=False, mlp_bias=False, dtype=torch.float32)


def logits(model):
    with torch.no_grad():
        return model(**inputs(model)).logits


def trained(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(**inputs(model), labels=labels(model)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def test_a_llama_becomes_a_mixtral_in_place_with_its_optimizer(tmp_path):
    model = llama()
    optimizer = trained(model)
    before, held, attention = logits(model), model, model.model.layers[0].self_attn.q_proj.weight
    moment = optimizer.state[attention]["exp_avg"].clone()
    gate = optimizer.state[model.model.layers[0].mlp.gate_proj.weight]
    gate = {key: value.clone() for key, value in gate.items()}
    receipt = apply(upcycling(), model, optimizer)
    assert model is held
    assert type(model) is MixtralForCausalLM
    assert model.config.model_type == "mixtral"
    assert all(m.config is model.config for m in model.modules() if hasattr(m, "config"))
    assert receipt.max_relative_change < 1e-5
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.weight is attention
    assert torch.equal(optimizer.state[attention]["exp_avg"], moment)
    state = optimizer.state[layer.mlp.experts.gate_up_proj]
    units = gate["exp_avg"].shape[0]
    for expert in range(4):
        torch.testing.assert_close(state["exp_avg"][expert, :units], gate["exp_avg"] / 4)
        torch.testing.assert_close(state["exp_avg_sq"][expert, :units], gate["exp_avg_sq"] / 16)
    assert layer.mlp.gate.weight not in optimizer.state, "the router starts anew"
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    model(**inputs(model), labels=labels(model)).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert type(loaded) is MixtralForCausalLM
    assert torch.equal(logits(loaded), logits(model))


def test_a_folder_becomes_the_same(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "old")
    receipt = apply_to_checkpoint(upcycling(), tmp_path / "old", tmp_path / "new")
    assert receipt.max_relative_change < 1e-5
    apply(upcycling(), model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype="auto")
    assert loaded.config.architectures == ["MixtralForCausalLM"]
    wanted = model.state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())


def test_a_failed_change_leaves_a_llama():
    model = llama()
    optimizer = trained(model)
    weights, config = copy.deepcopy(model.state_dict()), model.config
    broken = upcycling()
    broken = broken.model_copy(
        update={"edits": [*broken.edits, ScaleParameter(parameter="model.layers.*.mlp.experts.down_proj", factor=2.0)]}
    )
    with pytest.raises(Exception, match="promised to keep"):
        apply(broken, model, optimizer)
    assert type(model) is LlamaForCausalLM
    assert model.config is config
    assert all(module.config is config for module in model.modules() if hasattr(module, "config"))
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ([ChangeArchitecture(model_type="mixtrel")], r"Unknown architecture 'mixtrel'\. Did you mean 'mixtral'"),
        ([ChangeArchitecture(model_type="vit")], "vit has no model that does what a LlamaForCausalLM does"),
        ([ChangeArchitecture(model_type="mixtral", values={"experts": 3})], "MixtralConfig has no value 'experts'"),
        ([ChangeArchitecture(model_type="mixtral")], r"a parameter model\.layers\.0\.mlp.* no edit provides values"),
        ([ChangeArchitecture(model_type="mixtral")] * 2, "an earlier edit makes a mixtral of it"),
        ([*upcycling().edits, SetConfig(values={"hidden_act": "no"})], "No model can be built|refuses it"),
        ([MakeParameters(module="model.norm", making="expert_copies")], "experts are made of"),
        ([MakeParameters(module="model.layers.*.mlp", making="expert_copies")], "can't be made with the settings"),
        ([MakeParameters(module="model.norm", making="copies")], "Unknown making 'copies'"),
    ],
)
def test_what_can_not_be_is_refused_with_the_reason(edits, words):
    with pytest.raises(PlanError, match=words):
        resolve(edits, llama())


def test_what_the_other_architecture_has_no_place_for_is_refused():
    with pytest.raises(PlanError, match=r"no parameter model\.layers\.0\.self_attn\.q_proj\.bias any more"):
        resolve(upcycling().edits, tiny("llama", mlp_bias=False))
