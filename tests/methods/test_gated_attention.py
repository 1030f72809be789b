"""Gates put into models that are there: nothing changes, to the last bit, and training goes on."""

import copy
import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import auxin
from auxin.edits import MergeModule, Plan, ReplaceModule, apply_to_checkpoint, inverse_plan
from auxin.errors import ConfigError, PlanError
from auxin.models.loading import load_model
from auxin.nn.gated_attention import GatedAttention
from covering import families
from tiny_models import FAMILIES, inputs, labels, output, tiny

NAME = "gated-attention"
MORE = ("opt", "gpt_oss", "deepseek_v3", "phi", "bart", "whisper", "clip", "segformer")
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@torch.no_grad()
def said(model: Any) -> torch.Tensor:
    return output(model(**inputs(model)))


def gated(model: Any, optimizer: Any = None, **values: Any) -> Plan:
    plan = auxin.plan(model, NAME, **values)
    auxin.apply(plan, model, optimizer=optimizer)
    return plan


@pytest.mark.parametrize("family", families(dict.fromkeys([*FAMILIES, *MORE]), "llama", "gpt2", "bert", "t5", "opt"))
def test_gates_change_no_bit_where_they_are_put_in(family):
    if family == "tokenformer":
        with pytest.raises(PlanError, match="no attention that reads its own stack is known to hand its queries"):
            auxin.plan(tiny(family), NAME)
        return
    for dtype in DTYPES if family in ("llama", "gpt2", "bert") else DTYPES[:1]:
        for gate in ("all-heads", "elementwise"):
            model = tiny(family, dtype=dtype)
            before = said(model)
            plan = gated(model, gate=gate, **({"opening": 0.25} if gate == "all-heads" else {}))
            assert plan.promise == "exact"
            assert torch.equal(said(model), before), (dtype, gate)


@pytest.mark.parametrize("gate", ["per-head", "mlp"])
@pytest.mark.parametrize("family", ["llama", "bert", "vit"])
def test_gates_of_slices_change_no_bit_either(family, gate):
    model = tiny(family, dtype=torch.float32)
    before = said(model)
    gated(model, gate=gate, opening=0.25)
    assert torch.equal(said(model), before)


def test_an_opening_of_no_power_of_two_is_exact_up_to_rounding():
    model = tiny("llama")
    before = said(model)
    gated(model, opening=0.7)
    torch.testing.assert_close(said(model), before, rtol=1e-12, atol=1e-12)


def test_the_matrix_behind_the_heads_is_divided_and_its_bias_is_not():
    for family, output_of in (
        ("llama", "model.layers.{}.self_attn.o_proj"),
        ("bert", "bert.encoder.layer.{}.attention.output.dense"),
    ):
        old = tiny(family)
        new = copy.deepcopy(old)
        gated(new, opening=0.25, layers=[1])
        for name, value in old.named_parameters():
            factor = 4 if name == f"{output_of.format(1)}.weight" else 1
            assert torch.equal(new.get_parameter(name), factor * value), name
        added = {name for name, _ in new.named_parameters()} - {name for name, _ in old.named_parameters()}
        assert {name.rpartition(".")[2] for name in added} == {"gate_weight", "gate_bias"}
        assert all(".1." in name for name in added)


def step(model: Any, optimizer: Any) -> float:
    loss = model(**inputs(model), labels=labels(model)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def test_moments_follow_and_gates_learn_at_once(tmp_path):
    model = tiny("llama", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step(model, optimizer)
    name = "model.layers.0.self_attn.o_proj.weight"
    before = {key: value.clone() for key, value in optimizer.state[model.get_parameter(name)].items()}
    plan = auxin.plan(model, NAME, opening=0.25)
    back = inverse_plan(plan, model)
    weights = copy.deepcopy(model.state_dict())
    auxin.apply(plan, model, optimizer=optimizer)
    after = optimizer.state[model.get_parameter(name)]
    # The gradient of 4 W is a fourth of that of W.
    assert torch.equal(4 * after["exp_avg"], before["exp_avg"])
    assert torch.equal(16 * after["exp_avg_sq"], before["exp_avg_sq"])
    undone = copy.deepcopy(model)
    auxin.apply(back, undone)
    assert undone.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in undone.state_dict().items())
    gate = model.get_parameter("model.layers.0.self_attn.gate_weight")
    losses = [step(model, optimizer)]
    assert gate.abs().min() > 0
    losses += [step(model, optimizer) for _ in range(5)]
    assert losses[-1] < losses[0]
    auxin.save(model, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(said(loaded), said(model.eval()))
    loaded.set_attn_implementation("eager")
    torch.testing.assert_close(said(loaded), said(model), rtol=1e-4, atol=1e-5)
    assert type(loaded.model.layers[0].self_attn).__name__ == "LlamaAttention"


def test_a_folder_is_changed_as_a_model_is(tmp_path):
    model = tiny("bert", dtype=torch.float32)
    model.save_pretrained(tmp_path / "plain")
    plan = auxin.plan(model, NAME, gate="mlp", hidden=2, opening=0.25)
    apply_to_checkpoint(plan, tmp_path / "plain", tmp_path / "gated")
    auxin.apply(plan, model)
    loaded = load_model(tmp_path / "gated")
    assert torch.equal(said(loaded), said(model))
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    stored = json.loads((tmp_path / "gated" / "config.json").read_text())["quantization_config"]["edits"]
    assert [edit["brick"] for edit in stored] == ["gated_attention"]


def test_cached_decoding_and_padding_are_as_without_a_cache_and_alone():
    model = tiny("llama", dtype=torch.float32, max_position_embeddings=64)
    gated(model)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "gate_" in name:
            torch.nn.init.normal_(parameter)
    ids = inputs(model, batch=2, length=9)["input_ids"]
    with torch.no_grad():
        whole, cache, steps = model(ids).logits, None, []
        for token in ids.split(1, dim=1):
            result = model(token, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            steps.append(result.logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-5)
        padded, mask = torch.cat([torch.full((2, 3), 3), ids], dim=1), torch.tensor([[0] * 3 + [1] * 9] * 2)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        beside = model(padded, attention_mask=mask, position_ids=places).logits[:, 3:]
        torch.testing.assert_close(beside, whole, rtol=0, atol=1e-5)


def low_rank() -> Any:
    model = tiny("llama")
    product: Any = ReplaceModule(
        module="model.layers.*.self_attn.o_proj", brick="low_rank_linear", settings={"rank": 4}
    )
    auxin.apply(Plan(method="by hand", promise="none", edits=[product]), model)
    return model


def already(**values: Any) -> Any:
    model = tiny("llama")
    gated(model, **values)
    return model


def shared() -> Any:
    model = tiny("llama")
    model.model.layers[1].self_attn.o_proj = model.model.layers[0].self_attn.o_proj
    return model


def clipped() -> Any:
    model = tiny("llama")
    auxin.apply(auxin.plan(model, "clipped-softmax", alpha=0.5, length=16), model)
    return model


@pytest.mark.parametrize(
    ("make", "values", "words"),
    [
        (lambda: tiny("llama"), {"layers": [2]}, r"has the layers 0 to 1, and no 2. Name some of these"),
        (lambda: tiny("llama"), {"part": "encoder"}, "names no layers of this model"),
        (lambda: tiny("qwen3"), {"gate": "per-head"}, "4 heads of 6 are no input of 16. Take all-heads"),
        (lambda: tiny("gemma", head_dim=2), {"gate": "mlp"}, "no hidden unit"),
        (lambda: already(layers=[1]), {}, r"model.layers.1.self_attn has gates already. Name other layers"),
        (
            low_rank,
            {},
            r"o_proj, which reads the heads of model.layers.0.self_attn, is no matrix that could be divided",
        ),
        (clipped, {}, r"is clipped_softmax already.*Merge that brick back first"),
        (shared, {}, r"layers.0.self_attn.o_proj and .*layers.1.self_attn.o_proj are one module"),
    ],
)
def test_what_can_t_have_gates_is_refused(make, values, words):
    with pytest.raises(PlanError, match=words):
        auxin.plan(make(), NAME, **values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"opening": 0}, "opening"),
        ({"opening": 1}, "opening"),
        ({"opening": 1e-320}, "opening: must be 0.001 or more"),
        ({"layers": [True]}, "layers.0: must be a number .received true"),
        ({"gate": "sum"}, "gate"),
        ({"hidden": 3}, "hidden is of gate = mlp, and the gate is all-heads. Leave hidden out"),
        ({"gate": "elementwise", "opening": 0.25}, "has no bias and begins at 0.5. Leave opening out"),
        ({"layers": []}, "layers"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        auxin.plan(tiny("llama"), NAME, **values)


def test_other_layers_can_have_gates_later_and_widths_stay():
    model = already(layers=[1])
    before = said(model)
    gated(model, layers=[0], opening=0.25)
    assert torch.equal(said(model), before)
    assert sum(isinstance(module, GatedAttention) for module in model.modules()) == 2
    with pytest.raises(PlanError, match=r"attentions have gates of the old size. Take the gates out first, by"):
        auxin.plan(model, "hypercloning", factor=2)
    paths = [name for name, module in model.named_modules() if isinstance(module, GatedAttention)]
    auxin.apply(Plan(method="x", promise="none", edits=[MergeModule(module=path) for path in paths]), model)
    assert not any(isinstance(module, GatedAttention) for module in model.modules())
    whole, left = tiny("llama").state_dict(), model.state_dict()
    behind = [f"model.layers.{n}.self_attn.o_proj.weight" for n in (0, 1)]
    assert [(left[name] / whole[name]).mean().item() for name in behind] == pytest.approx([4, 2]), "still divided"
