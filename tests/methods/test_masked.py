"""Masked structural growth: exact at strength 0 whatever the norms, the plain model at strength 1, and all between."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from auxin.edits import apply, apply_to_checkpoint
from auxin.edits.runtimes import about_runtimes
from auxin.errors import ConfigError, PlanError
from auxin.methods import method
from auxin.methods.grow.masked import METHOD, MaskedGrowth, MaskRamp, plan_masked, plan_unmask
from auxin.models.anatomy import anatomy
from auxin.nn.masked import Masked, MaskedNorm
from auxin.planning.bench import Bench
from oracles.masked import bert_logits, gpt2_logits
from tiny_models import FAMILIES, InDouble, change, inputs, labels, logits, tiny

EXACT = 1e-12
EVERY = [*FAMILIES, "gemma"]


def grown(family, model=None, optimizer=None, **values):
    """A tiny model after masked growth."""
    model = tiny(family) if model is None else model
    values = values or METHOD.examples(model)
    with InDouble():
        apply(plan_masked(model, MaskedGrowth.parse(values)), model, optimizer)
    return model


def plain(model):
    """The plain grown model with the weights of `model`, its masks thrown away."""
    model = copy.deepcopy(model)
    MaskRamp.set_strength(model, 1.0)
    with InDouble():
        apply(plan_unmask(model), model)
    return model


@pytest.mark.parametrize("family", EVERY)
def test_at_strength_0_the_function_is_the_old_one(family):
    model = tiny(family)
    before = logits(model)
    grown(family, model)
    # Gemma keeps the root of its hidden size, here of 18, in float32 whatever the weights' type.
    assert change(before, logits(model)) < (1e-6 if family == "gemma" else EXACT)
    assert any(isinstance(module, Masked) for module in model.modules())


@pytest.mark.parametrize("family", EVERY)
def test_at_strength_1_the_masks_do_nothing_and_come_off(family):
    model = grown(family)
    at_0 = logits(model)
    MaskRamp.set_strength(model, 1.0)
    at_1 = logits(model)
    assert change(at_0, at_1) > 1e-3
    stripped = plain(model)
    assert not any(isinstance(module, Masked) for module in stripped.modules())
    assert getattr(stripped.config, "quantization_config", None) is None
    assert change(at_1, logits(stripped)) < EXACT
    # The plain architecture, built from its config alone, has the same parameters.
    again = type(stripped)(stripped.config).double().eval()
    again.load_state_dict(stripped.state_dict())
    assert change(at_1, logits(again)) < EXACT


ONE_AT_A_TIME = [
    ("llama", {"hidden_size": 20}),
    ("llama", {"num_attention_heads": 8}),
    ("llama", {"num_attention_heads": 8, "num_key_value_heads": 2}),
    ("llama", {"num_attention_heads": 16, "num_key_value_heads": 4}),
    ("llama", {"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 24}),
    ("llama", {"intermediate_size": 13}),
    ("llama", {"layers": 5, "new_layers": "copies"}),
    ("llama", {"layers": 4, "new_layers": "random"}),
    ("olmo2", {"num_attention_heads": 8, "hidden_size": 32}),
    ("qwen3", {"num_attention_heads": 6}),
    ("gemma", {"hidden_size": 25}),
    ("gemma", {"num_attention_heads": 8, "intermediate_size": 13, "layers": 3}),
    ("gpt2", {"hidden_size": 24}),
    ("t5", {"hidden_size": 24}),
    ("t5", {"num_attention_heads": 7}),
    ("t5", {"layers": 3, "part": "decoder"}),
    ("bert", {"hidden_size": 20}),
    ("bert", {"layers": 4}),
    ("vit", {"intermediate_size": 17}),
]


@pytest.mark.parametrize(("family", "values"), ONE_AT_A_TIME)
def test_each_dimension_alone_is_exact_at_strength_0(family, values):
    model = tiny(family)
    before = logits(model)
    grown(family, model, **values)
    assert change(before, logits(model)) < EXACT
    MaskRamp.set_strength(model, 1.0)
    assert change(before, logits(model)) > 1e-3
    assert change(logits(model), logits(plain(model))) < EXACT


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen2"])
def test_tied_heads_stay_tied(family):
    model = tiny(family, tie_word_embeddings=True)
    before = logits(model)
    grown(family, model)
    assert change(before, logits(model)) < EXACT
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_scaled_embeddings_and_gains_stored_less_one_are_told_apart_from_what_reads_them():
    """Gemma multiplies embeddings by the root of the hidden size, 4 before and 5 after. A head of its own sees nothing
    of it; one that is the embedding needs the last norm's gains, of which 1 is not stored, 5/4 times as large."""
    for tied in (True, False):
        model = tiny("gemma", tie_word_embeddings=tied)
        before, table, gain = logits(model), model.model.embed_tokens.weight.clone(), model.model.norm.weight.clone()
        grown("gemma", model, hidden_size=25)
        assert change(before, logits(model)) < EXACT
        torch.testing.assert_close(model.model.embed_tokens.weight[:, :16], table * 4 / 5)
        wanted = (gain + 1) * 5 / 4 - 1 if tied else gain
        torch.testing.assert_close(model.model.norm.inner.weight[:16], wanted)


def test_a_tied_head_behind_a_norm_without_gain_can_not_follow_a_scaled_embedding(monkeypatch):
    model = tiny("gemma")
    body = replace(anatomy(model), final_norm=None)
    monkeypatch.setattr("auxin.methods.grow.masked.anatomy", lambda model: body)
    with pytest.raises(PlanError, match=r"hidden_size = 25: .* no gain .* Untie the head first"):
        plan_masked(model, MaskedGrowth(hidden_size=25))
    assert plan_masked(model, MaskedGrowth(intermediate_size=13)).edits


@settings(max_examples=10)
@given(heads=st.integers(4, 7), ffn=st.integers(12, 20), layers=st.integers(2, 4), seed=st.integers(0, 9))
def test_any_sizes_are_exact_after_the_residual_sum(heads, ffn, layers, seed):
    if (heads, ffn, layers) == (4, 12, 2):
        return
    model = tiny("bert", seed)
    before = logits(model)
    grown("bert", model, num_attention_heads=heads, intermediate_size=ffn, layers=layers, seed=seed)
    assert change(before, logits(model)) < EXACT


@pytest.mark.parametrize("strength", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_every_strength_computes_what_the_paper_says(family, strength):
    model = tiny(family)
    old = anatomy(model).sizes
    grown(family, model, num_attention_heads=5, intermediate_size=15, layers=3)
    MaskRamp.set_strength(model, strength)
    sizes = {
        "hidden": (old.residual, old.residual + old.head_dim),
        "ffn": (old.ffn, 15),
        "layers": (2, 3),
        "head_dim": old.head_dim,
        "eps": 1e-2,
    }
    weights = {name: tensor.numpy() for name, tensor in plain(model).state_dict().items()}
    given_inputs = inputs(model)
    ids = given_inputs["input_ids"].numpy()
    if family == "bert":
        wanted = bert_logits(weights, ids, given_inputs["token_type_ids"].numpy(), sizes, strength)
    else:
        wanted = gpt2_logits(weights, ids, sizes, strength)
    assert change(torch.from_numpy(wanted), logits(model)) < EXACT


def test_plain_statistics_would_not_be_exact():
    model = tiny("bert")
    before = logits(model)
    grown("bert", model, num_attention_heads=5)
    for module in model.modules():
        if isinstance(module, MaskedNorm):
            module.forward = lambda x, module=module: module.inner(x) * module.mask
    assert change(before, logits(model)) > 0.05


def test_the_ramp_is_a_function_of_the_step_and_resumes_to_the_bit():
    def train(model, optimizer, hook, steps):
        for step in steps:
            hook.before_step(step)
            ids = inputs(model, 50 + step)["input_ids"]
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            hook.after_step(step)

    def strength(model):
        (found,) = {float(value) for m in model.modules() if isinstance(m, Masked) for value in m.strengths()}
        return found

    model = grown("gpt2").float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    hook = MaskRamp(4)
    hook.attach(model, optimizer)
    assert strength(model) == 0
    train(model, optimizer, hook, range(2))
    assert strength(model) == 0.5
    saved = copy.deepcopy((model, optimizer.state_dict(), hook.state_dict()))
    train(model, optimizer, hook, range(2, 6))
    assert strength(model) == 1

    resumed, state, hook_state = saved
    again = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
    again.load_state_dict(state)
    hook = MaskRamp(99)
    hook.attach(resumed, again)
    hook.load_state_dict(json.loads(json.dumps(hook_state)))
    train(resumed, again, hook, range(2, 6))
    for (name, one), (_, two) in zip(model.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(one, two), name


def test_new_weights_wake_up_once_the_masks_rise():
    model = grown("llama", layers=3, intermediate_size=15)
    down = model.model.layers[0].mlp.down_proj.inner

    def gradients():
        ids = inputs(model)["input_ids"]
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        new_layer = [p.grad.abs().max() for p in model.model.layers[2].parameters()]
        return down.weight.grad[:, 12:].abs().max(), max(new_layer), down.weight.grad[:, :12].abs().max()

    new_units, new_layer, old_units = gradients()
    assert new_units == new_layer == 0 < old_units
    MaskRamp.set_strength(model, 0.01)
    new_units, new_layer, old_units = gradients()
    assert min(new_units, new_layer, old_units) > 0


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_checkpoint_on_the_way_loads_with_its_masks_and_the_last_one_is_plain(family, tmp_path):
    auto = {"llama": AutoModelForCausalLM, "bert": AutoModelForMaskedLM}[family]
    model = grown(family).float()
    MaskRamp.set_strength(model, 0.25)
    model.save_pretrained(tmp_path / "middle")
    loaded = auto.from_pretrained(tmp_path / "middle").eval()
    assert torch.equal(logits(model), logits(loaded))
    assert {float(v) for m in loaded.modules() if isinstance(m, Masked) for v in m.strengths()} == {0.25}

    MaskRamp.set_strength(loaded, 1.0)
    apply(plan_masked(loaded, MaskedGrowth(finish=True)), loaded)
    loaded.save_pretrained(tmp_path / "last")
    assert "quantization_config" not in json.loads((tmp_path / "last" / "config.json").read_text())
    assert torch.equal(logits(auto.from_pretrained(tmp_path / "last").eval()), logits(loaded))


def test_on_disk_it_comes_out_as_in_memory(tmp_path):
    model = tiny("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path / "small")
    plan = plan_masked(model, MaskedGrowth.parse(METHOD.examples(model)))
    apply_to_checkpoint(plan, tmp_path / "small", tmp_path / "large")
    apply(plan, model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "large").eval()
    assert torch.equal(logits(loaded), logits(model))
    assert "finish = true" in about_runtimes(loaded.config)
    MaskRamp.set_strength(loaded, 1.0)
    loaded.save_pretrained(tmp_path / "ramped")
    apply_to_checkpoint(plan_unmask(loaded), tmp_path / "ramped", tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_moments_of_old_entries_stay_where_they_are():
    model = tiny("gpt2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = inputs(model)["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    layer = model.transformer.h[0]
    before = {key: optimizer.state[layer.attn.c_attn.weight][key].clone() for key in ("exp_avg", "exp_avg_sq")}
    old_fc = optimizer.state[layer.mlp.c_fc.weight]["exp_avg"].clone()
    grown("gpt2", model, optimizer, num_attention_heads=5, intermediate_size=15)
    layer = model.transformer.h[0].inner
    state = optimizer.state[layer.attn.c_attn.inner.weight]
    for part in range(3):  # query, key, value: 20 entries each, the first 16 of them old
        for key, old in before.items():
            assert torch.equal(state[key][:16, 20 * part : 20 * part + 16], old[:, 16 * part : 16 * part + 16])
        assert (state["exp_avg"][:, 20 * part + 16 : 20 * part + 20] == 0).all()
    moment = optimizer.state[layer.mlp.c_fc.weight]["exp_avg"]
    assert torch.equal(moment[:16, :12], old_fc)
    assert (moment[16:] == 0).all()
    assert (moment[:, 12:] == 0).all()


def test_new_weights_are_as_large_as_the_old_ones():
    model = tiny("llama", hidden_size=64, num_attention_heads=16, num_key_value_heads=8)
    old = model.model.layers[0].mlp.gate_proj.weight.std()
    grown("llama", model, hidden_size=128, intermediate_size=64)
    new = model.model.layers[0].inner.mlp.gate_proj.weight[12:, 64:].std()
    assert new.item() == pytest.approx(old.item(), rel=0.1)


def test_a_masked_model_generates_and_checkpoints_gradients():
    model = grown("llama").float()
    MaskRamp.set_strength(model, 0.5)
    ids = inputs(model)["input_ids"]
    asked = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **asked)
    step_by_step = ids
    for _ in range(3):
        token = model(input_ids=step_by_step, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        step_by_step = torch.cat([step_by_step, token], dim=1)
    assert torch.equal(out, step_by_step)

    def gradient():
        model.zero_grad()
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    ordinary = gradient()
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradient(), ordinary)


def test_training_through_the_ramp_learns():
    model = tiny("gpt2", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.randint(19, (8, 16), generator=torch.Generator().manual_seed(3))
    grown("gpt2", model, optimizer, num_attention_heads=6, intermediate_size=24, layers=3)
    hook = MaskRamp(40)
    hook.attach(model, optimizer)
    losses = []
    for step in range(80):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hook.after_step(step)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert max(losses) < losses[0] + 0.5


def test_labels_work_through_the_masks():
    model = grown("t5")
    loss = model(**inputs(model), labels=labels(model)).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_what_can_not_be_done_is_refused_with_the_nearest_that_can():
    def refused(message, family, **values):
        with pytest.raises(PlanError, match=message):
            plan_masked(tiny(family), MaskedGrowth.parse(values))

    refused("There is nothing to grow", "llama")
    refused(r"layers = 1 is fewer than the 2 of model\.layers.*at least 2", "llama", layers=1)
    refused(r"hidden_size = 15 is less than the 16", "llama", hidden_size=15)
    refused(
        r"would change the head dimension from 4 to 5.*hidden_size = 20", "gpt2", hidden_size=20, num_attention_heads=4
    )
    refused(r"norms without a module.*method tokenformer", "tokenformer", hidden_size=64)
    refused(
        r"1 query heads would share.*num_attention_heads = 8", "llama", num_attention_heads=4, num_key_value_heads=4
    )
    with pytest.raises(ConfigError, match="leave out layers"):
        MaskedGrowth.parse({"finish": True, "layers": 3})
    with pytest.raises(PlanError, match="no masks that could be taken off"):
        plan_unmask(tiny("llama"))
    with pytest.raises(PlanError, match="has no masks"):
        MaskRamp(3).attach(tiny("llama"), None)
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        MaskRamp(0)


def test_masks_on_the_way_are_in_the_way():
    model = grown("llama")
    with pytest.raises(PlanError, match="masks of an earlier growth"):
        plan_masked(model, MaskedGrowth(layers=5))
    for name, values in (
        ("hypercloning", {"factor": 2}),
        ("lemon", {"intermediate_size": 20}),
        ("net2net", {"intermediate_size": 20}),
        ("ligo", {"steps": 0, "intermediate_size": 20}),
    ):
        other = method(name)
        with pytest.raises(PlanError, match=r"masks of an earlier growth.*finish = true"):
            other.plan(Bench(model), other.settings.parse(values))
    MaskRamp.set_strength(model, 0.5)
    with pytest.raises(PlanError, match=r"is at 0\.5; without it"):
        plan_unmask(model)
