"""Grafts on every architecture: exact, growable, and an ordinary model to everything else."""

import json
import math

import peft
import pytest
import torch

from auxin.edits import apply
from auxin.edits.structure import edited_skeleton
from auxin.errors import ConfigError, PlanError
from auxin.methods.adapt.graft import METHOD, Graft, freeze_all_but_branches, graft, plan_graft
from auxin.models.loading import load_model, skeleton
from auxin.nn.graft import Grafted
from tiny_models import FAMILIES, inputs, labels, tiny

DENSE = [family for family in FAMILIES if family != "tokenformer"]
every_family = pytest.mark.parametrize("family", DENSE)


def outputs(model, seed=1):
    with torch.no_grad():
        return model.eval()(**inputs(model, seed)).logits


def branches(model):
    return {name: module.branch for name, module in model.named_modules() if isinstance(module, Grafted)}


def train(model, optimizer=None, steps=3, hooks=(), rate=1e-2):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=rate, weight_decay=0.1)
    for hook in hooks:
        hook.attach(model, optimizer)
    for step in range(steps):
        for hook in hooks:
            hook.before_step(step)
        model.train()(**inputs(model, 10 + step), labels=labels(model, 20 + step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for hook in hooks:
            hook.after_step(step)
    return optimizer


@every_family
def test_a_graft_changes_no_bit_and_learns_from_the_first_step(family):
    model = tiny(family, dtype=torch.float32)
    before, count = outputs(model), sum(p.numel() for p in model.parameters())
    receipt = graft(model, tokens=4)
    assert receipt.max_relative_change == 0.0
    assert torch.equal(outputs(model), before)
    added = sum(branch.key_tokens.numel() + branch.value_tokens.numel() for branch in branches(model).values())
    assert receipt.parameters_after - receipt.parameters_before == added
    assert sum(p.numel() for p in model.parameters()) == count + added
    for name, branch in branches(model).items():
        assert branch.group_sizes == (4,), name
        assert branch.tau.tolist() == [2.0], name
        assert not branch.value_tokens.any(), name
        assert branch.key_tokens.abs().min() > 0, name
    model(**inputs(model), labels=labels(model)).loss.backward()
    for name, branch in branches(model).items():
        assert branch.value_tokens.grad.isfinite().all(), name
        assert branch.value_tokens.grad.any(), name
        assert not branch.key_tokens.grad.any(), name
    train(model)
    assert not torch.equal(outputs(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_graft_is_exact_in_16_bits_too(dtype):
    model = tiny("gpt2", dtype=dtype)
    assert graft(model, tokens=4).max_relative_change == 0.0
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_graft_grows_again_and_again(family):
    model = tiny(family)
    optimizer = None
    for stage, (tokens, sizes) in enumerate([(4, [4]), (6, [4, 6]), (3, [4, 6, 3])]):
        before = outputs(model)
        old = {name: branch.key_tokens.detach().clone() for name, branch in branches(model).items()}
        receipt = graft(model, tokens=tokens, optimizer=optimizer)
        assert receipt.max_relative_change < 1e-12
        torch.testing.assert_close(outputs(model), before, rtol=1e-11, atol=1e-11)
        for name, branch in branches(model).items():
            assert list(branch.group_sizes) == sizes
            assert branch.tau.tolist() == pytest.approx([math.sqrt(size) for size in sizes])
            if stage:
                assert torch.equal(branch.key_tokens[: len(old[name])], old[name])
                scale = [part.square().mean().sqrt().item() for part in (branch.key_tokens[-tokens:], old[name])]
                assert scale[0] == pytest.approx(scale[1], rel=0.6)
                for parameter in (branch.key_tokens, branch.value_tokens):
                    assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
        if optimizer is None:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        train(model, optimizer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_scales_are_in_the_type_of_the_weights_or_finer(dtype, tmp_path):
    model = tiny("gpt2", dtype=dtype)
    for tokens in (3, 5):
        graft(model, tokens=tokens)
    model.save_pretrained(tmp_path)
    wanted = torch.tensor([3, 5], dtype=torch.float64).sqrt()
    for again in (model, load_model(tmp_path), load_model(tmp_path, dtype=torch.float64)):
        scale = torch.promote_types(again.dtype, torch.float32)
        for name, branch in branches(again).items():
            assert branch.tau.dtype == scale, name
            assert torch.equal(branch.tau, wanted.to(scale)), name


def test_a_group_may_be_grown_at_some_layers_only():
    model = tiny("llama")
    graft(model, tokens=4, targets=["q_proj", "mlp.*"])
    assert {name.rpartition(".")[2] for name in branches(model)} == {"q_proj", "gate_proj", "up_proj", "down_proj"}
    train(model)
    before = outputs(model)
    graft(model, tokens=2, targets=["layers.1.mlp.up_proj"])
    # Some layers have two groups now, some one, some none: one plan serves them all.
    plan = plan_graft(edited_skeleton(model.config, type(model)), Graft(tokens=3))
    assert apply(plan, model).max_relative_change < 1e-12
    torch.testing.assert_close(outputs(model), before, rtol=1e-11, atol=1e-11)
    sizes = {name: branch.group_sizes for name, branch in branches(model).items()}
    assert sizes["model.layers.1.mlp.up_proj"] == (4, 2, 3)
    assert sizes["model.layers.0.mlp.up_proj"] == (4, 3)
    assert sizes["model.layers.0.self_attn.k_proj"] == (3,)


def test_the_plan_needs_no_weights_and_says_one_thing_once():
    model = tiny("llama")
    plan = plan_graft(skeleton(model.config, type(model)), Graft(tokens=4))
    assert len(plan.edits) == 7
    assert plan.promise == "exact"
    assert plan == plan_graft(model, Graft(tokens=4))
    assert "grafted_linear" in str(plan)
    assert METHOD.examples(model) == {"tokens": 4}


def test_what_was_loaded_is_grown_and_saved_again(tmp_path):
    model = tiny("gpt2", dtype=torch.float32)
    for tokens in (4, 3):
        graft(model, tokens=tokens)
        train(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "auxin"
    loaded = type(model).from_pretrained(tmp_path)
    before = outputs(loaded)
    graft(loaded, tokens=2)
    loaded.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again")
    assert next(iter(branches(again).values())).group_sizes == (4, 3, 2)
    torch.testing.assert_close(outputs(again), before, rtol=1e-5, atol=1e-5)


def gradients(model):
    model.zero_grad()
    model.train()(**inputs(model), labels=labels(model)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(frozen):
    model = tiny("llama")
    graft(model, tokens=4)
    train(model)
    if frozen:
        freeze_all_but_branches(model)
    plain = gradients(model)
    model.gradient_checkpointing_enable()
    checkpointed = gradients(model)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-10, atol=1e-12)


def test_compiled_it_is_the_same_function():
    model = tiny("gpt2", dtype=torch.float32)
    graft(model, tokens=4)
    train(model)
    compiled = torch.compile(model.eval(), backend="aot_eager")
    torch.testing.assert_close(outputs(compiled), outputs(model), rtol=1e-4, atol=1e-4)


def test_adapters_come_off_first():
    model = tiny("llama")
    graft(model, tokens=4)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert not any("branch" in name for name, p in adapted.named_parameters() if p.requires_grad)
    with pytest.raises(PlanError, match="Merge or remove them"):
        plan_graft(model, Graft())
    graft(adapted.merge_and_unload(), tokens=4)


def test_only_branches_are_trained_when_all_else_is_frozen():
    model = tiny("bert")
    graft(model, tokens=4)
    hooks = freeze_all_but_branches(model)
    assert hooks == []
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = train(model)
    for name, parameter in model.named_parameters():
        assert ("branch" in name) == parameter.requires_grad
        assert torch.equal(parameter, before[name]) != ("branch" in name)
    assert len(optimizer.state) == 2 * len(branches(model))


def test_the_newest_group_can_be_trained_alone():
    model = tiny("llama")
    graft(model, tokens=4)
    train(model)
    graft(model, tokens=3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    hooks = freeze_all_but_branches(model, "newest")
    train(model, hooks=hooks)
    for name, parameter in model.named_parameters():
        if "branch" in name:
            assert torch.equal(parameter[:4], before[name][:4]), name
            assert (parameter[4:] != before[name][4:]).any(dim=1).all(), name
        else:
            assert torch.equal(parameter, before[name]), name


def test_freezing_says_when_it_can_not_know():
    model = tiny("llama")
    with pytest.raises(PlanError, match=r"has no branches\. Apply the method 'graft' first"):
        freeze_all_but_branches(model)
    graft(model, tokens=4)
    graft(model, tokens=4, targets=["q_proj"])
    with pytest.raises(PlanError, match=r"different numbers of groups \(1 at .*, 2 at .*q_proj\)"):
        freeze_all_but_branches(model, "newest")
    assert freeze_all_but_branches(model, "all") == []


def test_impossible_grafts_are_refused_with_the_mend():
    with pytest.raises(PlanError, match="grows by the method 'tokenformer'"):
        plan_graft(tiny("tokenformer"), Graft())
    model = tiny("llama")
    with pytest.raises(PlanError, match=r"no linear layer is called 'q_prj'\. The nearest: .*q_proj"):
        plan_graft(model, Graft(targets=["q_prj"]))
    with pytest.raises(PlanError, match="lm_head is the output head"):
        plan_graft(model, Graft(targets=["lm_head"]))
    with pytest.raises(ConfigError, match=r"tokens.*2 or more"):
        Graft.parse({"tokens": 1})
    graft(model, tokens=4)
    with pytest.raises(PlanError, match=r"branch of model\.layers\.\*\.self_attn\.q_proj has 'l2_norm_gelu'"):
        plan_graft(model, Graft(score_function="softmax"))
    assert apply(plan_graft(tiny("llama"), Graft(score_function="softmax")), tiny("llama")).max_relative_change == 0.0
