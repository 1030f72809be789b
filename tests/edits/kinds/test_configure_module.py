"""Modules built with other values of the config: structure, what goes with them, coming back, and what is refused."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import auxin
from auxin.edits import (
    ArrangeLayers,
    ConfigureModule,
    Plan,
    RemoveModule,
    ReplaceModule,
    SetConfig,
    SliceParameter,
    WrapModule,
    apply,
    apply_to_checkpoint,
    inverse_plan,
)
from auxin.edits.kinds.module_edits import shortest
from auxin.edits.structure import structural_edits
from auxin.errors import PlanError, PromiseError
from auxin.methods import method
from auxin.models.scoped_config import config_at
from auxin.models.weight_files import first_file
from auxin.planning.bench import Bench
from cut_models import FFN, KEPT, layer, narrow_edits, narrow_plan, silence, state
from edits.models import assert_same
from tiny_models import change, inputs, labels, logits, tiny

RELOAD = Path(__file__).resolve().parents[2] / "reload.py"
EXACT = 1e-12
AUTO = {"t5": "AutoModelForSeq2SeqLM", "bert": "AutoModelForMaskedLM", "vit": "AutoModelForImageClassification"}


def plan(*edits, promise="none"):
    return Plan(method="test", promise=promise, edits=list(edits))


def configured(module, **values):
    return ConfigureModule(module=module, values=values)


def cut(family, number=1, dtype=torch.float32, **config):
    """A tiny model with six of twelve feed-forward units in one layer."""
    model = tiny(family, dtype=dtype, **config)
    apply(narrow_plan(family, number), model, probe=inputs(model))
    return model


def trained(model, steps=2):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        step(model, optimizer)
    return optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    model(**inputs(model), labels=labels(model)).loss.backward()
    optimizer.step()


def same(now, then):
    if isinstance(then, tuple | list):
        for one, other in zip(now, then, strict=True):
            same(one, other)
    elif isinstance(then, dict):
        assert now.keys() == then.keys()
        for key in then:
            same(now[key], then[key])
    else:
        assert_same(now, then)


def edits_of(model):
    return {edit.module: edit.values for edit in structural_edits(model.config)}


# Structure -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FFN)
def test_one_layer_is_narrower_and_exact_where_nothing_read_what_is_gone(family):
    model = tiny(family)
    silence(model, family)
    before, config = logits(model), copy.deepcopy(model.config.to_dict())
    receipt = apply(narrow_plan(family, promise="exact"), model, probe=inputs(model))
    assert change(before, logits(model)) < EXACT
    assert receipt.parameters_after < receipt.parameters_before
    reader, axis = FFN[family][4]
    widths = [model.get_parameter(reader.format(layer(family, number))).shape[axis] for number in (0, 1)]
    assert widths == [12, 6]
    del model.config.quantization_config
    assert model.config.to_dict() == config


@pytest.mark.parametrize("module", ["decoder", "decoder.block.*", "decoder.block.*.layer.2"])
def test_a_whole_stack_is_configured_at_any_of_its_modules(module):
    edits = [configured(module, d_ff=6), *narrow_edits("t5", "*")[1:]]
    model = tiny("t5")
    receipt = apply(plan(*edits), model, probe=inputs(model))
    assert edits_of(model) == {module: {"d_ff": 6}}
    assert receipt.parameters_before - receipt.parameters_after == 2 * 2 * 6 * 16
    # The first layer alone holds the relative positions; its number and it are found again.
    attention = model.decoder.block[0].layer[0].SelfAttention
    assert (attention.has_relative_attention_bias, attention.layer_idx) == (True, 0)
    assert model.decoder.block[1].layer[0].SelfAttention.layer_idx == 1


def test_an_argument_of_the_class_is_a_value_too():
    model = tiny("gpt2")
    edits = narrow_edits("gpt2")[1:]
    apply(plan(configured("transformer.h.1.mlp", intermediate_size=6), *edits), model)
    assert model.transformer.h[1].mlp.c_fc.weight.shape == (16, 6)
    apply(plan(configured("transformer.h.0.mlp", resid_pdrop=0.5)), model)
    assert [block.mlp.dropout.p for block in model.transformer.h] == [0.5, 0.0]
    assert model.config.resid_pdrop == 0.0


def test_heads_of_one_layer_need_not_divide_the_hidden_size():
    model = tiny("llama", num_key_value_heads=4)
    kept = [0, 1, 3]
    names = [f"{name}.{kind}" for name in ("q_proj", "k_proj", "v_proj") for kind in ("weight", "bias")]
    path = "model.layers.0.self_attn"
    with torch.no_grad():
        model.get_parameter(f"{path}.o_proj.weight")[:, 8:12] = 0
    before = logits(model)
    apply(
        plan(
            configured(path, num_attention_heads=3, num_key_value_heads=3),
            *(SliceParameter(parameter=f"{path}.{name}", axis=0, index=kept, unit=4) for name in names),
            SliceParameter(parameter=f"{path}.o_proj.weight", axis=1, index=kept, unit=4),
            promise="exact",
        ),
        model,
    )
    assert change(before, logits(model)) < EXACT
    greedy = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    written = [model.generate(**inputs(model), **greedy, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*written)


@pytest.mark.parametrize(("family", "module"), [("llama", "model.layers.1.self_attn"), ("t5", "decoder")])
def test_what_is_changed_later_in_the_models_config_holds_for_the_part(family, module, tmp_path):
    model = tiny(family, dtype=torch.float32)
    field = "attention_dropout" if family == "llama" else "dropout_rate"
    apply(plan(configured(module, **{field: 0.25})), model, probe=inputs(model))
    model.save_pretrained(tmp_path)
    for either in (model, type(model).from_pretrained(tmp_path, dtype="auto"), copy.deepcopy(model)):
        for implementation in ("eager", "sdpa"):
            either.set_attn_implementation(implementation)
            holders = [part for part in either.modules() if hasattr(part, "config")]
            assert {part.config._attn_implementation for part in holders} == {implementation}
        assert getattr(config_at(either, module), field) == 0.25
        assert getattr(either.config, field) == 0.0
        either.config.use_cache = False
        if family == "llama":
            assert config_at(either, module).use_cache is False
    assert model.config is not copy.deepcopy(model).config


def test_a_configured_model_compiles_whole():
    model = cut("llama", dtype=torch.float64)
    apply(plan(configured("model.layers.0.self_attn", attention_dropout=0.5)), model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert change(model(**inputs(model)).logits, compiled(**inputs(model)).logits) < EXACT


# With an optimizer, into files and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FFN)
def test_the_optimizer_follows_and_training_goes_on(family):
    model = tiny(family, dtype=torch.float32)
    optimizer = trained(model)
    name, axis = FFN[family][4]
    weight = model.get_parameter(name.format(layer(family)))
    moment = optimizer.state[weight]["exp_avg"].clone()
    apply(narrow_plan(family), model, optimizer, probe=inputs(model))
    assert model.get_parameter(name.format(layer(family))) is weight
    assert torch.equal(optimizer.state[weight]["exp_avg"], moment.index_select(axis, torch.tensor(KEPT)))
    step(model, optimizer)


@pytest.mark.parametrize("stage", ["promise", "tree"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_failed_apply_leaves_everything_as_it_was(family, stage, monkeypatch):
    model = tiny(family, dtype=torch.float32)
    optimizer = trained(model)
    before, said = state(model, optimizer), logits(model)
    if stage == "promise":
        with pytest.raises(PromiseError):
            apply(narrow_plan(family, promise="exact"), model, optimizer, probe=inputs(model))
    else:

        def fail(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr("auxin.edits.executor.measured_change", fail)
        with pytest.raises(KeyboardInterrupt):
            apply(narrow_plan(family), model, optimizer, probe=inputs(model))
    same(state(model, optimizer), before)
    assert torch.equal(logits(model), said)
    step(model, optimizer)


def save(model, folder):
    model.save_pretrained(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        expected = model.eval()(**inputs(model)).logits.contiguous()
    save_file({**inputs(model), "expected": expected}, folder / "probe.safetensors")
    auto = AUTO.get(model.config.model_type, "AutoModelForCausalLM")
    return {"folder": str(folder), "model_class": auto}


def test_it_loads_in_a_new_process_and_after_a_second_edit_bit_by_bit(tmp_path):
    cases = []
    for family in FFN:
        model = cut(family)
        cases.append(save(model, tmp_path / family))
        for name, settings in (("llama-pro", {"group_size": 1}), ("hypercloning", {"factor": 2})):
            if (name, family) == ("llama-pro", "bert"):
                continue
            found = method(name)
            apply(found.plan(Bench(model), found.settings.parse(settings)), model, probe=inputs(model))
            cases.append(save(model, tmp_path / f"{family}-{name}"))
    task = tmp_path / "cases.json"
    task.write_text(json.dumps({"plain": [], "replayed": cases}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, str(RELOAD), str(task)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {case["folder"]: error for case, error in zip(cases, found, strict=True) if error} == {}


@pytest.mark.parametrize("family", FFN)
def test_a_checkpoint_is_changed_as_the_model_in_memory(family, tmp_path):
    model = tiny(family, dtype=torch.float32)
    model.save_pretrained(tmp_path / "old")
    for place, edits in enumerate((narrow_edits(family), narrow_edits(family, 0, kept=[3, 4]))):
        source, target = (tmp_path / ("old" if not number else f"new{number}") for number in (place, place + 1))
        apply(plan(*edits), model, probe=inputs(model))
        apply_to_checkpoint(plan(*edits), source, target)
        auxin.save(model, tmp_path / f"ours{place}")
        ours, theirs = (load_file(first_file(folder)) for folder in (tmp_path / f"ours{place}", target))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
        told = json.loads((target / "config.json").read_text())["quantization_config"]
        assert told.pop("weights") == "edited_model.safetensors"
        assert told == model.config.to_dict()["quantization_config"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_loaded_in_the_type_it_was_saved_in(dtype, tmp_path):
    for family in ("llama", "t5"):
        cut(family).to(dtype).save_pretrained(tmp_path / family)
        again = type(tiny(family)).from_pretrained(tmp_path / family, dtype=dtype)
        plain = tiny(family, dtype=dtype)
        plain.save_pretrained(tmp_path / f"{family}-plain")
        plain = type(plain).from_pretrained(tmp_path / f"{family}-plain", dtype=dtype)
        types = [{name: p.dtype for name, p in model.named_parameters()} for model in (again, plain)]
        assert types[0] == types[1]


def test_buffers_that_no_checkpoint_holds_are_right_after_loading(tmp_path):
    model = tiny("llama", dtype=torch.float32)
    rope = {"rope_type": "default", "rope_theta": 100.0}
    apply(plan(configured("model.rotary_emb", rope_parameters=rope)), model)
    expected = 1 / 100 ** (torch.arange(0, 4, 2) / 4)
    model.save_pretrained(tmp_path)
    for either in (model, type(model).from_pretrained(tmp_path, dtype="auto")):
        assert torch.allclose(either.model.rotary_emb.inv_freq, expected)


# What goes on top ----------------------------------------------------------------------------------------------------


def test_layers_take_their_values_along():
    model = cut("llama", dtype=torch.float64)
    apply(plan(ArrangeLayers(layers="model.layers", order=[1, 0, None, 1])), model)
    assert edits_of(model) == {f"model.layers.{place}.mlp": {"intermediate_size": 6} for place in (0, 3)}
    assert [block.mlp.up_proj.out_features for block in model.model.layers] == [6, 12, 12, 6]
    assert [block.mlp.intermediate_size for block in model.model.layers] == [6, 12, 12, 6]


def test_a_fresh_layer_of_a_configured_stack_is_like_the_others():
    model = cut("t5", number="*")
    apply(plan(ArrangeLayers(layers="decoder.block", order=[0, None, 1])), model, probe=inputs(model))
    assert [block.layer[2].DenseReluDense.wi.out_features for block in model.decoder.block] == [6, 6, 6]


def test_a_fresh_layer_can_be_configured_at_once():
    model = tiny("llama")
    there = [
        ArrangeLayers(layers="model.layers", order=[0, None, 1]),
        configured("model.layers.1", intermediate_size=6),
    ]
    apply(plan(*there), model)
    assert [block.mlp.up_proj.out_features for block in model.model.layers] == [12, 6, 12]
    assert edits_of(model) == {"model.layers.1": {"intermediate_size": 6}}


def test_width_growth_on_top_is_exact_and_says_no_more_than_it_must():
    model = cut("llama", dtype=torch.float64)
    before = logits(model)
    found = method("net2net")
    apply(found.plan(Bench(model), found.settings.parse({"intermediate_size": 24})), model)
    assert change(before, logits(model)) < EXACT
    # Both layers have the config's width now, and the checkpoint loads without us.
    assert structural_edits(model.config) == []
    assert not hasattr(model.config, "quantization_config")
    assert "config" in vars(model.model.layers[1].mlp)
    assert model.model.layers[1].mlp.config is model.config


@pytest.mark.parametrize("family", FFN)
def test_the_inverse_plan_restores_values_and_config(family):
    model = tiny(family)
    silence(model, family)
    before, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config.to_dict())
    with pytest.raises(PlanError, match="has no inverse"):
        inverse_plan(narrow_plan(family), model)  # dropped units can't be had back
    grow = plan(*(wider(edit) for edit in narrow_edits(family)))
    back = inverse_plan(grow, model)
    (said,) = [edit for edit in back.edits if isinstance(edit, ConfigureModule)]
    assert list(said.values.values()) == [12]
    apply(grow, model, probe=inputs(model))
    apply(back, model, probe=inputs(model))
    assert_same(dict(model.state_dict()), dict(before))
    assert model.config.to_dict() == config


def wider(edit):
    """The edit for every unit twice instead of six of them."""
    if isinstance(edit, ConfigureModule):
        return edit.model_copy(update={"values": dict.fromkeys(edit.values, 24)})
    return edit.model_copy(update={"index": [*range(12), *range(12)]})


def test_the_inverse_of_a_layers_edit_restores_what_its_parts_had():
    model = tiny("llama")
    inner = configured("model.layers.1.self_attn", attention_dropout=0.5)
    apply(plan(inner), model)
    outer = plan(configured("model.layers.1", attention_dropout=0.25, rms_norm_eps=0.5))
    back = inverse_plan(outer, model)
    told = copy.deepcopy(model.config.to_dict())
    apply(outer, model)
    assert edits_of(model) == {"model.layers.1": {"attention_dropout": 0.25, "rms_norm_eps": 0.5}}
    assert model.model.layers[1].self_attn.attention_dropout == 0.25
    apply(back, model)
    assert model.model.layers[1].self_attn.attention_dropout == 0.5
    assert model.model.layers[1].input_layernorm.variance_epsilon == 1e-2
    assert model.config.to_dict() == told


# With bricks and with each other -------------------------------------------------------------------------------------


def test_edits_of_one_module_are_one_and_the_later_ones_win_there_and_below():
    first = configured("m.layers.1.mlp", a=1, b=1)
    assert shortest([first, configured("m.layers.1.mlp", b=2, c=2)]) == [configured("m.layers.1.mlp", a=1, b=2, c=2)]
    assert shortest([first, configured("m.layers.*.mlp", a=3)]) == [
        configured("m.layers.1.mlp", b=1),
        configured("m.layers.*.mlp", a=3),
    ]
    assert shortest([first, configured("m.layers.1", a=3, b=3)]) == [configured("m.layers.1", a=3, b=3)]
    assert shortest([configured("m.layers.1", a=3), first]) == [configured("m.layers.1", a=3), first]
    # What is configured later is built first where it holds the other.
    assert shortest([first, configured("m.layers.1", c=3)]) == [configured("m.layers.1", c=3), first]
    wrap = WrapModule(module="m.layers.*.mlp.up", brick="masked")
    assert shortest([wrap, first]) == [first, wrap]
    above = ReplaceModule(module="m.layers.*", brick="altup_layer")
    assert shortest([above, first]) == [above, first]


def test_a_layer_is_configured_around_a_part_that_was_before(tmp_path):
    model = cut("gpt2")
    apply(plan(configured("transformer.h.1", resid_pdrop=0.25)), model)
    assert edits_of(model) == {"transformer.h.1": {"n_inner": 6, "resid_pdrop": 0.25}}
    apply(plan(configured("transformer.h.*", layer_norm_epsilon=0.5)), model)
    model.save_pretrained(tmp_path)
    for either in (model, type(model).from_pretrained(tmp_path, dtype="auto")):
        blocks = either.transformer.h
        assert [block.mlp.c_fc.nf for block in blocks] == [12, 6]
        assert [block.ln_1.eps for block in blocks] == [0.5, 0.5]
        assert [block.mlp.dropout.p for block in blocks] == [0.0, 0.25]


def test_bricks_stay_on_what_is_configured_after_them(tmp_path):
    model = tiny("llama", dtype=torch.float64)
    graft = method("graft")
    apply(graft.plan(Bench(model), graft.settings.parse({"tokens": 4})), model)
    before = logits(model)
    names = [name for name, _ in model.named_parameters() if name.startswith("model.layers.1.self_attn.")]
    assert any("branch" in name for name in names)
    apply(plan(configured("model.layers.1.self_attn", attention_dropout=0.25), promise="exact"), model)
    assert [name for name, _ in model.named_parameters() if name.startswith("model.layers.1.self_attn.")] == names
    assert torch.equal(before, logits(model))
    model.float().save_pretrained(tmp_path)
    for either in (model, type(model).from_pretrained(tmp_path, dtype="auto")):
        assert [block.self_attn.attention_dropout for block in either.model.layers] == [0.0, 0.25]


def test_layers_with_alternating_updates_have_parts_that_are_configured():
    model = tiny("llama")
    altup = method("altup")
    apply(altup.plan(Bench(model), altup.settings.parse({"blocks": 2})), model)
    silence(model, "llama")
    before = logits(model)
    apply(narrow_plan("llama", promise="exact"), model)
    assert change(before, logits(model)) < EXACT
    assert type(model.model.layers[1]).__mro__[1].__name__ == "AltUpLayer"


def test_a_masked_growth_on_top_ends_as_the_plain_model(tmp_path):
    model = cut("llama", dtype=torch.float64)
    found, before = method("masked"), logits(model)
    apply(found.plan(Bench(model), found.settings.parse({"intermediate_size": 14})), model)
    assert change(before, logits(model)) < EXACT
    copy.deepcopy(model).float().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype="auto")
    assert change(before, logits(again)) < 1e-5
    for module in model.modules():
        if hasattr(module, "set_strength"):
            module.set_strength(1.0)
    grown = logits(model)
    apply(found.plan(Bench(model), found.settings.parse({"finish": True})), model)
    assert change(grown, logits(model)) < EXACT
    assert structural_edits(model.config) == []


# Refusals ------------------------------------------------------------------------------------------------------------


ANEW = "model.layers.1.mlp"


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([configured(ANEW, intermediate_siz=6)], r"Edit 1 .*LlamaConfig has no value 'intermediate_siz'"),
        ([configured("model.layers.1.mpl", intermediate_size=6)], r"nearest is model\.layers\.1\.mlp"),
        ([configured(f"{ANEW}.up_proj", intermediate_size=6)], r"up_proj is a Linear.*holds it"),
        ([configured("model.layers", intermediate_size=6)], r"ModuleList, which is not built from a config"),
        ([configured(ANEW, intermediate_size="six")], r"the config refuses intermediate_size = 'six'"),
        ([configured(ANEW, intermediate_size=-6)], r"no LlamaMLP can be built with .*-6"),
        ([configured(ANEW, num_hidden_layers=3)], r"Edit 1 .*num_hidden_layers = 3 has no effect"),
        ([configured(ANEW, num_attention_heads=2)], r"num_attention_heads = 2 has no effect"),
        ([configured(ANEW, use_cache=False)], r"use_cache = False has no effect"),
        ([configured(ANEW, intermediate_size=6, num_attention_heads=2)], r"num_attention_heads = 2 has no effect"),
        ([configured(ANEW, intermediate_size=12)], r"intermediate_size = 12 has no effect"),
        ([configured(ANEW, intermediate_size=6)], r"No edit: .* has shape \[12, 16\] .*asks for \[6, 16\]"),
        ([configured(ANEW, intermediate_size=6)] * 2, r"Edit 2 .*set by an earlier edit; merge the two"),
        ([configured(ANEW, mlp_bias=False)], r"no parameter model\.layers\.1\.mlp\.\w+\.bias any more"),
        ([configured(ANEW, rms_norm_eps=0.5)], r"rms_norm_eps = 0.5 has no effect"),
        ([configured(ANEW, hidden_act="relu")], r"hidden_act = relu in .*act_fn would be ReLU instead of SiLU"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_nothing_changes(edits, message):
    model = tiny("llama")
    before = state(model)
    with pytest.raises(PlanError, match=message):
        apply(plan(*edits), model)
    same(state(model), before)


def test_bricks_themselves_are_refused_with_a_reason():
    model = tiny("llama")
    apply(plan(RemoveModule(module=ANEW, leaves="zeros")), model)
    with pytest.raises(PlanError, match=r"mlp is Zeros, a brick of an earlier edit"):
        apply(plan(configured(ANEW, intermediate_size=6)), model)
    altup = method("altup")
    model = tiny("llama")
    apply(altup.plan(Bench(model), altup.settings.parse({"blocks": 2})), model)
    with pytest.raises(PlanError, match=r"layers\.1 is LlamaDecoderLayer, a brick.*Name modules beside it or in it"):
        apply(plan(configured("model.layers.1", intermediate_size=6)), model)


def test_what_was_said_before_has_no_effect_a_second_time():
    model = cut("llama")
    with pytest.raises(PlanError, match=r"intermediate_size = 6 has no effect"):
        apply(plan(configured(ANEW, intermediate_size=6)), model)
    # Nor has the config's value once every layer has its own.
    apply(plan(*narrow_edits("llama", 0)), model)
    with pytest.raises(PlanError, match=r"intermediate_size = 24 has no effect.*each has its own"):
        apply(plan(SetConfig(values={"intermediate_size": 24})), model)


def test_the_module_lives_on_with_its_hooks_and_what_was_put_on_it():
    model = tiny("llama")
    mlp, seen = model.model.layers[1].mlp, []
    mlp.label = "mine"
    mlp.register_forward_hook(lambda module, args, output: seen.append(module))
    apply(narrow_plan("llama"), model)
    seen.clear()
    logits(model)
    assert seen == [mlp]
    assert model.model.layers[1].mlp is mlp
    assert (mlp.label, mlp.intermediate_size) == ("mine", 6)


def test_it_survives_yaml_and_shows_in_the_table(tmp_path):
    model = tiny("llama")
    made = narrow_plan("llama")
    made.to_yaml(tmp_path / "plan.yaml")
    assert Plan.from_yaml(tmp_path / "plan.yaml") == made
    table = made.table(model)
    assert "model.layers.1.mlp" in table
    assert "is built with intermediate_size = 6" in table
