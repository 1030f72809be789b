"""Applying plans to models in memory."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import auxin
from auxin.edits import NormalFill, PadParameter, Plan, ScaleParameter, SetConfig, ZeroFill, apply
from auxin.edits.promise import relative_change
from auxin.errors import PlanError, PromiseError
from auxin.methods.grow.tokenformer import TokenGrowth, plan_token_growth
from edits.models import assert_same, everything, tiny_model, token_ids, trained, training_step

FFN = "model.layers.*.mlp"


def ffn_plan(size=30, promise="exact", keys=None, values=None, sizes=None):
    return Plan(
        method="by hand",
        promise=promise,
        edits=[
            SetConfig(values={"ffn_tokens": sizes or [20, size - 20]}),
            PadParameter(parameter=f"{FFN}.key_tokens", size=size, fill=keys or NormalFill()),
            PadParameter(parameter=f"{FFN}.value_tokens", size=size, fill=values or ZeroFill()),
        ],
    )


def test_apply_grows_in_place_and_leaves_the_rest_alone():
    model = tiny_model()
    optimizer = trained(model)
    before = everything(model, optimizer)
    receipt = apply(ffn_plan(), model, optimizer)
    after = everything(model, optimizer)
    assert receipt.parameters_after - receipt.parameters_before == 2 * 2 * 10 * 32
    assert receipt.parameters_after == model.config.num_parameters()
    assert receipt.max_relative_change <= 1e-6
    for name, parameter in model.named_parameters():
        if ".mlp." in name:
            assert parameter.shape == (30, 32)
            (old, identity, _, _), (_, new_identity, _, _) = before[name], after[name]
            assert torch.equal(parameter[:20], old)
            assert parameter.grad is None
            assert new_identity == identity
        else:
            assert_same(after[name], before[name])
    assert model.model.layers[1].mlp.group_sizes == (20, 10)
    assert after["groups"] == before["groups"]
    assert model.training


def test_new_keys_have_the_scale_of_the_old_ones_and_differ_between_tensors_and_growths():
    model = tiny_model()
    apply(ffn_plan(20 + 400), model)
    layers = [layer.mlp.key_tokens.detach() for layer in model.model.layers]
    assert (layers[0][20:].pow(2).mean().sqrt() / layers[0][:20].pow(2).mean().sqrt()).item() == pytest.approx(
        1, abs=0.03
    )
    assert not torch.allclose(layers[0][20:], layers[1][20:], atol=0.1)
    again = PadParameter(parameter=f"{FFN}.key_tokens", size=820, fill=NormalFill(std=1.0))
    apply(Plan(method="x", promise="none", edits=[
        SetConfig(values={"ffn_tokens": [20, 400, 400]}), again,
        PadParameter(parameter=f"{FFN}.value_tokens", size=820, fill=ZeroFill()),
    ]), model)  # fmt: skip
    keys = model.model.layers[0].mlp.key_tokens.detach()
    first, second = keys[20:420], keys[420:]
    correlation = (first * second).mean() / (first.pow(2).mean() * second.pow(2).mean()).sqrt()
    assert abs(correlation) < 0.05


def test_the_same_seed_gives_the_same_bits_in_any_order_of_the_edits():
    plan = ffn_plan()
    models = [tiny_model() for _ in range(3)]
    apply(plan, models[0])
    apply(plan.model_copy(update={"edits": plan.edits[::-1]}), models[1])
    apply(plan.model_copy(update={"seed": 1}), models[2])
    keys = [model.model.layers[0].mlp.key_tokens for model in models]
    assert torch.equal(keys[0], keys[1])
    assert not torch.equal(keys[0], keys[2])


@pytest.mark.parametrize("regime", ["grouped", "zero_keys", "duplicate", "official"])
@pytest.mark.parametrize("failure", ["in the weights", "in the moments", "in the promise"])
def test_a_failed_apply_leaves_model_and_optimizer_as_they_were(regime, failure, monkeypatch):
    model = tiny_model()
    optimizer = trained(model)
    model.model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    ids = token_ids(7)
    model(input_ids=ids, labels=ids).loss.backward()
    noise = 0.3 if regime == "duplicate" else 0.0
    settings = TokenGrowth(qkv_tokens=36, proj_tokens=36, ffn_tokens=60, regime=regime, noise=noise)
    plan = plan_token_growth(model.config, settings).model_copy(update={"promise": "exact"})
    if failure == "in the promise":
        # One number in a new value row of a plan that is otherwise right (or the regime that keeps no promise).
        original, error = PadParameter.map_parameter, PromiseError

        def spoiled(self, old, seed, name):
            new = original(self, old, seed, name)
            if name == "model.layers.1.attention.proj.value_tokens":
                new[-1, 3] += 1.0
                new[0, 5] += 0.1
            return new

        monkeypatch.setattr(PadParameter, "map_parameter", spoiled)
    else:
        attribute, error = ("map_parameter" if failure == "in the weights" else "map_moment"), MemoryError
        original, calls = getattr(PadParameter, attribute), []

        def failing(self, *arguments):
            calls.append(arguments)
            if len(calls) == 8:
                raise MemoryError("no room")
            return original(self, *arguments)

        monkeypatch.setattr(PadParameter, attribute, failing)
    before = everything(model, optimizer)
    with pytest.raises(error):
        apply(plan, model, optimizer)
    assert_same(everything(model, optimizer), before)
    monkeypatch.undo()
    training_step(model, optimizer, 50)


def test_a_broken_promise_names_change_and_tolerance():
    model = tiny_model()
    plan = ffn_plan(values=NormalFill(std=1.0))
    with pytest.raises(PromiseError, match=r"by hand promised .* moved by .* \(allowed: 1e-05\)"):
        apply(plan, model)
    assert model.config.ffn_tokens == [20]
    assert apply(plan.model_copy(update={"promise": "approximate"}), model).max_relative_change > 1e-3


def test_weights_that_are_not_finite_are_refused_by_name():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].attention.key.value_tokens[3, 2] = float("nan")
    before = everything(model)
    with pytest.raises(PlanError, match=r"model\.layers\.1\.attention\.key\.value_tokens holds 1 value"):
        apply(ffn_plan(), model)
    assert model.config.to_dict() == before["config"]
    assert model.model.layers[0].mlp.key_tokens.shape == (20, 32)


def test_the_global_random_numbers_are_left_alone():
    model = tiny_model()
    before = torch.get_rng_state()
    apply(ffn_plan(), model)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_probe_can_be_given_and_flags_come_back():
    model = tiny_model()
    model.model.layers[0].eval()
    model.model.layers[1].mlp.train()
    flags = [module.training for module in model.modules()]
    assert apply(ffn_plan(), model, probe=token_ids(3, 1, 5)).max_relative_change <= 1e-6
    assert [module.training for module in model.modules()] == flags


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_stay_tied_and_a_tied_weight_can_be_meant_by_either_name(tied):
    model = tiny_model(tie_word_embeddings=tied)
    name = "lm_head.weight" if tied else "model.embed_tokens.weight"
    edits = [SetConfig(values={"vocab_size": 100}), PadParameter(parameter=name, size=100, fill=ZeroFill())]
    if not tied:
        edits.append(PadParameter(parameter="lm_head.weight", size=100, fill=ZeroFill()))
    apply(Plan(method="by hand", promise="none", edits=edits), model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.lm_head.weight.shape == model.model.embed_tokens.weight.shape == (100, 32)
    assert model.model.embed_tokens.num_embeddings == model.lm_head.out_features == 100
    assert model(input_ids=token_ids()).logits.shape[-1] == 100


def test_on_the_meta_device_only_the_structure_changes():
    with torch.device("meta"):
        model = tiny_model_on_meta()
    receipt = apply(ffn_plan(), model)
    assert receipt.max_relative_change is None
    assert model.model.layers[0].mlp.key_tokens.shape == (30, 32)
    assert model.model.layers[0].mlp.key_tokens.is_meta


def tiny_model_on_meta():
    return type(tiny_model())(tiny_model().config)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_tolerance_follows_the_data_type(dtype):
    model = tiny_model(dtype=dtype)
    receipt = apply(ffn_plan(), model)
    assert receipt.tolerance == {torch.float64: 1e-5, torch.bfloat16: 2**-4, torch.float16: 2**-7}[dtype]
    assert receipt.max_relative_change <= receipt.tolerance
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_two_plans_in_a_row_equal_a_model_loaded_from_disk(tmp_path):
    model = tiny_model()
    auxin.grow(model, ffn_tokens=30)
    auxin.grow(model, qkv_tokens=20, regime="zero_keys")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids=token_ids()).logits, model(input_ids=token_ids()).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("fails", [False, True])
def test_a_loss_that_is_still_alive_does_not_disturb_training_on(fails, dtype):
    model = tiny_model(dtype=dtype)
    optimizer = trained(model, eps=1e-3)
    fired = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    ids = token_ids()
    kept = model(input_ids=ids, labels=ids).loss
    kept.backward(retain_graph=True)
    if fails:
        with pytest.raises(PromiseError):
            apply(ffn_plan(values=NormalFill(std=1.0)), model, optimizer)
    else:
        auxin.grow(model, qkv_tokens=30, ffn_tokens=40, optimizer=optimizer)
    fired.clear()
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert sorted(fired) == sorted(name for name, _ in model.named_parameters())
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())
    assert kept.isfinite()


def test_growing_under_autocast_or_with_short_products_is_exact_and_leaves_the_settings():
    model = tiny_model()
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        backends[0].fp32_precision, backends[1].fp32_precision = "tf32", "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            receipt = auxin.grow(model, 30, 30, 50)
            assert torch.is_autocast_enabled("cpu")
        assert [backend.fp32_precision for backend in backends] == ["tf32", "bf16"]
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
    assert 0 <= receipt.max_relative_change <= 1e-6


def test_what_is_computed_under_the_callers_autocast_is_of_the_weights_after_the_edit():
    model, ids = tiny_model(), torch.arange(10)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=ids).logits.sum().backward()
        auxin.apply(ffn_plan(values=NormalFill(std=1.0), promise="none"), model)
        within = model(input_ids=ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(within, model(input_ids=ids).logits)


def test_growing_in_inference_mode_leaves_a_model_that_trains():
    model = tiny_model()
    optimizer = trained(model)
    with torch.inference_mode():
        auxin.grow(model, 20, 20, 30, optimizer=optimizer)
        small = model.truncate_groups(1)
    training_step(model, optimizer, 20)
    training_step(small, torch.optim.AdamW(small.parameters()), 20)
    tensors = [*model.parameters(), *model.buffers(), *small.parameters(), *small.buffers()]
    assert not any(tensor.is_inference() for tensor in tensors)


@pytest.mark.parametrize("applied_within", [True, False])
def test_a_model_that_was_made_in_inference_mode_is_refused_and_a_copy_of_it_grows(applied_within):
    with torch.inference_mode():
        model = tiny_model()
    before = everything(model)
    for plan in (ffn_plan(), ffn_plan(promise="none")):
        with (
            pytest.raises(PlanError, match=r"\(model\.embed_tokens\.weight, .* within torch\.inference_mode.*deepcopy"),
            torch.inference_mode(applied_within),
        ):
            apply(plan, model)
    assert_same(everything(model), before)
    model = copy.deepcopy(model)
    optimizer = trained(model)
    assert apply(ffn_plan(), model, optimizer).max_relative_change <= 1e-6
    training_step(model, optimizer, 20)


def test_a_sharded_model_is_refused():
    model = tiny_model()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(PlanError, match=r"model\.embed_tokens\.weight is distributed"):
            auxin.grow(model, ffn_tokens=30)
    finally:
        torch.distributed.destroy_process_group()


def test_the_change_of_nothing_is_nothing():
    zeros, ones = torch.zeros(2, 3), torch.ones(2, 3)
    assert relative_change(zeros, zeros) == 0
    assert relative_change(ones, 3 * ones) == 2
    for broken in ((zeros, ones), (ones, ones * float("nan")), (ones * float("inf"), ones), (ones, ones[:1])):
        assert relative_change(*broken) == float("inf")


def test_growing_needs_no_more_memory_than_the_new_model_and_one_tensor():
    script = Path(__file__).parents[2] / "benchmarks" / "growth_memory.py"
    command = [sys.executable, str(script), "--megabytes", "200", "--check", "--modes", "memory", "optimizer"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def overflowing(promise: str) -> Plan:
    scale = ScaleParameter(parameter="model.embed_tokens.weight", factor=1e38)
    return Plan(method="by hand", promise=promise, edits=[scale])


@pytest.mark.parametrize("promise", ["exact", "approximate", "none"])
def test_logits_that_are_not_finite_afterwards_are_an_error_whatever_was_promised(promise):
    model = tiny_model()
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(PromiseError, match=r"\d+ of \d+ logits are not finite on the probe after the edits of by hand"):
        apply(overflowing(promise), model)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_logits_that_are_not_finite_before_are_the_model_s_fault():
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e38)
    plan = Plan(method="x", promise="none", edits=[ScaleParameter(parameter="model.embed_tokens.weight", factor=1e-38)])
    with pytest.raises(PlanError, match="not finite on the probe before the edits of x"):
        apply(plan, model)


def test_outputs_of_another_shape_are_compared_by_plans_that_promise_nothing_only():
    edits = [
        SetConfig(values={"vocab_size": 100}),
        PadParameter(parameter="model.embed_tokens.weight", size=100, fill=ZeroFill()),
        PadParameter(parameter="lm_head.weight", size=100, fill=ZeroFill()),
    ]
    model = tiny_model()
    edits = edits[: 2 if model.config.tie_word_embeddings else 3]
    with pytest.raises(PromiseError, match=r"promises 'approximate', but the outputs have shape .* and had"):
        apply(Plan(method="x", promise="approximate", edits=edits), model)
    assert apply(Plan(method="x", promise="none", edits=edits), model).max_relative_change is None
