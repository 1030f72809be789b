"""What goes by fluctuation leaves its mean in a bias: the parts give, on average, what they gave."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

import auxin
from auxin.edits import Plan, apply
from auxin.errors import PlanError
from auxin.models.loading import load_model
from auxin.objectives.calibration import Calibration
from byte_language import CONTEXT, byte_model, held_out_loss, library, loss_after, train
from capabilities import labelled
from oracles.importance import entering
from tiny_models import InDouble, change, inputs, labels, logits, tiny

OUTPUTS = {
    "llama": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
    "gpt2": ("transformer.h.{}.mlp.c_proj",),
    "bert": ("bert.encoder.layer.{}.output.dense",),
    "opt": ("model.decoder.layers.{}.fc2",),
    "gpt_neox": ("gpt_neox.layers.{}.mlp.dense_4h_to_h",),
}
NO_BIASES = {"attention_bias": False, "mlp_bias": False}


@pytest.fixture(autouse=True)
def _plans_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the files that belong to them."""
    monkeypatch.chdir(tmp_path)


def data_of(model: Any) -> Calibration:
    return Calibration.of_batches(model, [{**inputs(model, batch=4), "labels": labels(model, batch=4)}])


def given(module: torch.nn.Module, entered: Tensor) -> Tensor:
    """The mean of what a linear layer gives for what entered it, over all tokens."""
    weight = module.weight.detach() if isinstance(module, Conv1D) else module.weight.detach().T
    return (entered.flatten(0, -2) @ weight + module.bias.detach()).mean(0)


def unbiased(model: Any, path: str) -> None:
    """Let the bias of a linear layer be zeros where there is none, for the oracle."""
    module = model.get_submodule(path)
    if module.bias is None:
        module.bias = torch.nn.Parameter(torch.zeros(len(module.weight), dtype=module.weight.dtype))


@pytest.mark.parametrize(("family", "config"), [("llama", NO_BIASES), *((family, {}) for family in OUTPUTS)])
def test_every_part_gives_on_average_what_it_gave(family, config):
    model = tiny(family, **config)
    smaller, data = copy.deepcopy(model), data_of(model)
    batch = inputs(model, batch=4)
    amounts = {"ffn": 0.5, "heads": 0.5} if family == "llama" else {"ffn": 0.5}
    with InDouble():
        plan = auxin.plan(model, "fluctuation", data=data, **amounts)
    apply(plan, smaller)
    assert not plan.notes
    for path in (pattern.format(layer) for layer in range(2) for pattern in OUTPUTS[family]):
        with InDouble():
            entered = entering(model, path, batch)
        old, new = model.get_submodule(path), smaller.get_submodule(path)
        unbiased(model, path)
        read = old.weight.T if isinstance(old, Conv1D) else old.weight
        left = new.weight.T if isinstance(new, Conv1D) else new.weight
        # Which columns stay, by what they hold.
        kept = [next(i for i, column in enumerate(read.T) if torch.equal(column, other)) for other in left.T]
        assert len(kept) < entered.shape[-1]
        before, after = given(old, entered), given(new, entered[..., kept])
        assert (before - after).abs().max() / before.abs().max() < 1e-10
        gone = [i for i in range(entered.shape[-1]) if i not in kept]
        shift = read.detach()[:, gone] @ entered.flatten(0, -2).mean(0)[gone]
        assert torch.allclose(new.bias.detach() - old.bias.detach(), shift, rtol=1e-10, atol=1e-12)


def test_without_the_bias_weights_are_the_same_and_no_bias_moves():
    model = tiny("llama")
    data, found = data_of(model), {}
    for bias in (True, False):
        found[bias] = copy.deepcopy(model)
        apply(auxin.plan(model, "fluctuation", ffn=0.5, bias=bias, data=data), found[bias])
    moved = {
        name
        for (name, one), (_, other) in zip(found[True].named_parameters(), found[False].named_parameters(), strict=True)
        if not torch.equal(one, other)
    }
    assert moved == {f"model.layers.{layer}.mlp.down_proj.bias" for layer in range(2)}


def constant(model: Any) -> None:
    """Let the last feed-forward unit and the last key-value group of every layer give the same for every token."""
    with torch.no_grad():
        for layer in model.model.layers:
            for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj):
                matrix.weight[-1] = 0
            size = len(layer.self_attn.v_proj.weight) // model.config.num_key_value_heads
            layer.self_attn.v_proj.weight[-size:] = 0


@pytest.mark.parametrize("uniform", [True, False])
def test_what_is_constant_goes_without_a_change(uniform):
    model = tiny("llama", intermediate_size=8)
    constant(model)
    asked = {"ffn": 7 / 8, "heads": 0.5, "uniform": uniform, "normalised": False}
    without = copy.deepcopy(model)
    before, data = logits(model), data_of(model)
    with InDouble():
        plans = [auxin.plan(model, "fluctuation", bias=bias, data=data, **asked) for bias in (False, True)]
    for plan, edited in zip(plans, (without, model), strict=True):
        apply(plan, edited)
    assert change(before, logits(model)) < 1e-10
    assert change(before, logits(without)) > 1e-2
    assert (model.config.intermediate_size, model.config.num_key_value_heads) == (7, 1)


def test_llamas_config_says_the_biases(tmp_path):
    model = tiny("llama", dtype=torch.float32, **NO_BIASES)
    plan = auxin.plan(model, "fluctuation", ffn=0.5, data=data_of(model))
    apply(plan, model)
    assert (model.config.mlp_bias, model.config.attention_bias) == (True, False)
    for layer in model.model.layers:
        assert not layer.mlp.gate_proj.bias.any()
        assert not layer.mlp.up_proj.bias.any()
        assert layer.mlp.down_proj.bias.any()
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(tmp_path)), logits(model))


def test_a_plan_keeps_its_file(tmp_path):
    model = tiny("llama", **NO_BIASES)
    plan = auxin.plan(model, "fluctuation", heads=0.5, data=data_of(model))
    plan.to_yaml(tmp_path / "plan.yaml")
    twin = copy.deepcopy(model)
    apply(plan, model)
    apply(Plan.from_yaml(tmp_path / "plan.yaml"), twin)
    assert torch.equal(logits(model), logits(twin))


def test_a_target_counts_the_biases():
    model = tiny("llama", **NO_BIASES)
    before = model.num_parameters()
    plan = auxin.plan(model, "fluctuation", target={"parameters": 0.8}, data=data_of(model))
    apply(plan, model)
    assert model.num_parameters() <= 0.8 * before


def test_where_no_bias_can_be_said_that_is_said():
    model = tiny("qwen2")
    plan = auxin.plan(model, "fluctuation", ffn=0.5, data=data_of(model))
    assert "model.layers.*.mlp.down_proj: the mean of what goes is not given back there" in plan.notes[0]
    assert not plan.files
    with pytest.raises(PlanError, match="bias = true: no output matrix"):
        auxin.plan(model, "fluctuation", ffn=0.5, bias=True, data=data_of(model))
    mixture = tiny("gpt_oss")
    plan = auxin.plan(mixture, "fluctuation", ffn=0.5, data=data_of(mixture))
    assert "every expert sees tokens of its own" in plan.notes[0]
    pooled = tiny("siglip images")  # whose head has a feed-forward part, behind all layers
    plan = auxin.plan(pooled, "fluctuation", ffn=0.5, data=Calibration.of_batches(pooled, [labelled(pooled)]))
    assert plan.notes[0].startswith("vision_model.head.mlp.fc2: the mean of what goes is not given back there")


def test_the_loss_is_lower_with_the_mean_than_without():
    learnt, held_out = library("argparse", "ast", "datetime", "difflib", "doctest"), library("typing")
    model = byte_model(seed=0, hidden_size=32, intermediate_size=96, num_hidden_layers=2)
    train(model, learnt, 100)
    ids = learnt[(torch.arange(16) * 900)[:, None] + torch.arange(CONTEXT)]
    data, losses = Calibration.of_batches(model, [ids]), {}
    for bias in (True, False):
        plan = auxin.plan(model, "fluctuation", ffn=0.5, heads=0.5, bias=bias, data=data)
        losses[bias] = loss_after(plan, model, held_out)
    print(losses, held_out_loss(model, held_out))
    assert losses[True] < losses[False]
