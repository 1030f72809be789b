"""LiGO: the learned operator is the paper's, only the operator learns, and the plan is what was learned."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from auxin.data.tokenizer import train_tokenizer
from auxin.edits import NormalFill, Plan, WrapModule, apply, apply_to_checkpoint
from auxin.errors import PlanError
from auxin.methods.grow.ligo import METHOD, GrowthOperator, LigoGrowth, learn, plan_ligo
from auxin.nn.bricks import Brick, brick
from oracles.ligo import grown_matrices, widening
from tiny_models import FAMILIES, InDouble, change, inputs, labels, logits, tiny


def source(family, seed=0, **values):
    """A tiny model with as many key-value heads as query heads."""
    grouped = family in ("llama", "qwen2", "qwen3", "olmo", "olmo2")
    return tiny(family, seed, **({"num_key_value_heads": 4} if grouped else {}), **values)


def settings_for(model, folder, **values):
    return LigoGrowth.parse({**METHOD.examples(model), "folder": folder, **values})


def batch(model, seed=1):
    return {**inputs(model, seed), "labels": labels(model, seed + 1)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_makes_the_model_that_was_optimised(family, tmp_path):
    model = source(family)
    operator = GrowthOperator(model, settings_for(model, tmp_path))
    learn(operator, [batch(model)], 3, 1e-2)
    plan = Plan.model_validate(json.loads(operator.plan().model_dump_json()))
    optimised = operator.parameters_of_grown()
    apply(plan, model)
    made = dict(model.named_parameters())
    for name, wanted in optimised.items():
        torch.testing.assert_close(made[name].detach(), wanted.detach(), rtol=1e-12, atol=1e-12)
    assert set(made) == set(optimised)


@brick("test_factors_somewhere")
class Factors(Brick):
    """Factors behind a module, or before it."""

    def __init__(self, inner, before=False):
        super().__init__()
        size = inner.weight.shape[1 if before else 0]
        self.inner, self.before, self.factors = inner, before, torch.nn.Parameter(torch.empty(size))

    def roles(self, replaced):
        return {"factors": replaced["weight"].vector(1 if self.before else 0, "scale")}

    def forward(self, x):
        return self.inner(x * self.factors) if self.before else self.inner(x) * self.factors


@pytest.mark.parametrize("head_dim", [4, 6])
def test_parameters_of_one_name_that_are_different_things_are_not_blended(tmp_path, head_dim):
    model = source("qwen3", head_dim=head_dim)
    for layer in (0, 1):
        wrap = WrapModule(
            module=f"model.layers.{layer}.self_attn.o_proj",
            brick="test_factors_somewhere",
            settings={"before": layer == 1},
            fills={"factors": NormalFill(std=1.0)},
        )
        apply(Plan(method="by hand", promise="none", edits=[wrap]), model)
    old = {layer: model.get_parameter(f"model.layers.{layer}.self_attn.o_proj.factors").clone() for layer in (0, 1)}
    operator = GrowthOperator(model, settings_for(model, tmp_path, layers=4))
    wanted = operator.parameters_of_grown()
    apply(operator.plan(), model)
    for name, made in model.named_parameters():
        torch.testing.assert_close(made.detach(), wanted[name].detach(), rtol=1e-12, atol=1e-12)
    for layer in range(4):
        made = model.get_parameter(f"model.layers.{layer}.self_attn.o_proj.factors")
        assert torch.equal(made[: len(old[layer % 2])], old[layer % 2])
        assert len(made) > len(old[layer % 2])


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])  # those without rotary tables, which are in float32
def test_the_grown_model_computes_what_the_operator_was_trained_on(family, tmp_path):
    model = source(family)
    operator = GrowthOperator(model, settings_for(model, tmp_path))
    learn(operator, [batch(model)], 2, 1e-2)
    with torch.no_grad(), InDouble():
        parameters = operator.parameters_of_grown()
        wanted = functional_call(operator.grown, parameters, kwargs=inputs(model)).logits
    apply(operator.plan(), model)
    assert change(wanted, logits(model)) < 1e-12


def matrices_of(model, suffix, transposed=False):
    old = [p.detach().numpy() for name, p in model.named_parameters() if name.endswith(suffix)]
    return [matrix.T for matrix in old] if transposed else old


KINDS = [
    ("self_attn.q_proj", "query", "residual"),
    ("self_attn.k_proj", "key", "residual"),
    ("self_attn.v_proj", "value", "residual"),
    ("self_attn.o_proj", "residual", "value"),
    ("mlp.gate_proj", "ffn", "residual"),
    ("mlp.up_proj", "ffn", "residual"),
    ("mlp.down_proj", "residual", "ffn"),
]


def test_the_operator_is_the_dense_kronecker_product(tmp_path):
    model = source("llama", attention_bias=False, mlp_bias=False)
    grow_to = {"num_attention_heads": 6, "hidden_size": 18, "intermediate_size": 15, "layers": 5}
    operator = GrowthOperator(model, settings_for(model, tmp_path, **grow_to))
    learn(operator, [batch(model)], 3, 3e-2)
    grown = operator.parameters_of_grown()
    rows = {name: parameter.detach().numpy() for name, parameter in operator.S.items()}

    def matrix(stream, layer):
        return widening(rows["residual" if stream == "residual" else f"model/layers/{layer}/0/{stream}"])

    for module, output, read in KINDS:
        w = operator.w[f"model/layers/{module.replace('.', '/')}"].detach().numpy()
        wanted = grown_matrices(
            matrices_of(model, f"{module}.weight"),
            w,
            [matrix(output, layer) for layer in range(5)],
            [matrix(read, layer) for layer in range(5)],
        )
        for layer, one in enumerate(wanted):
            made = grown[f"model.layers.{layer}.{module}.weight"].detach().numpy()
            np.testing.assert_allclose(made, one, rtol=1e-10, atol=1e-10)
    embedding = model.get_input_embeddings().weight.detach().numpy() @ matrix("residual", 0).T
    np.testing.assert_allclose(grown["model.embed_tokens.weight"].detach().numpy(), embedding, atol=1e-12)
    gains = np.stack(matrices_of(model, "input_layernorm.weight"))
    w = operator.w["model/layers/input_layernorm"].detach().numpy()
    for layer in range(5):
        made = grown[f"model.layers.{layer}.input_layernorm.weight"].detach().numpy()
        np.testing.assert_allclose(made, matrix("residual", 0) @ (w @ gains)[layer], atol=1e-12)


@pytest.mark.parametrize(
    ("family", "name", "parts"),
    [
        ("gpt2", "transformer.h.1.attn.c_attn.bias", "concatenated"),
        ("gpt_neox", "gpt_neox.layers.1.attention.query_key_value.bias", "interleaved"),
    ],
)
def test_fused_projections_have_a_matrix_each_for_queries_keys_and_values(family, name, parts, tmp_path):
    model = source(family)
    operator = GrowthOperator(model, settings_for(model, tmp_path, layers=None, num_attention_heads=6))
    learn(operator, [batch(model)], 2, 3e-2)
    old = dict(model.named_parameters())[name].detach().numpy()
    made = operator.parameters_of_grown()[name].detach().numpy()
    stack = name.split(".1.")[0].replace(".", "/")
    size = len(old) // 3
    entries = size // 4  # of a head

    def part(values, place):
        if parts == "concatenated":
            return values[place * len(values) // 3 : (place + 1) * len(values) // 3]
        return values.reshape(-1, 3, entries)[:, place].flatten()

    for place, stream in enumerate(("query", "key", "value")):
        matrix = widening(operator.S[f"{stack}/1/0/{stream}"].detach().numpy())
        np.testing.assert_allclose(part(made, place), matrix @ part(old, place), atol=1e-12)


def test_100_steps_lower_the_loss_and_only_the_operator_learns(tmp_path):
    generator = torch.Generator().manual_seed(0)
    model = source("gpt2", dtype=torch.float32)
    ids = torch.randint(19, (8, 16), generator=generator)
    ids[:, 1::2] = (ids[:, ::2] * 3 + 1) % 19  # something to learn
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    wanted = settings_for(model, tmp_path, layers=3, num_attention_heads=6, intermediate_size=18)
    operator = GrowthOperator(model, wanted)
    start = {name: parameter.detach().clone() for name, parameter in operator.named_parameters()}
    losses = learn(operator, [ids[:4], ids[4:]], 100, 3e-3)
    assert losses[-1] < losses[0] - 0.5
    assert operator.loss(ids).item() < losses[0] - 0.5
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    learned = dict(operator.named_parameters())
    assert {name.partition(".")[0] for name in learned} == {"w", "S"}
    for name, parameter in learned.items():
        assert not torch.equal(parameter, start[name]), name


def test_at_the_start_new_layers_are_stacked_and_new_units_are_old_ones(tmp_path):
    model = source("gpt2")
    values = {"layers": 5, "num_attention_heads": 6, "intermediate_size": 18, "noise": 0.0}
    operator = GrowthOperator(model, settings_for(model, tmp_path, **values))
    old, grown = dict(model.named_parameters()), operator.parameters_of_grown()
    for layer, stacked in enumerate((0, 1, 0, 1, 0)):
        made, was = (
            parameters[f"transformer.h.{number}.mlp.c_fc.bias"].detach()
            for parameters, number in ((grown, layer), (old, stacked))
        )
        assert torch.equal(made[:12], was)
        assert all(entry in was for entry in made[12:])
    interleaved = GrowthOperator(model, settings_for(model, tmp_path, **values, depth_start="interleave"))
    rows = interleaved.w["transformer/h/mlp/c_fc"].argmax(dim=1)
    assert rows.tolist() == [0, 0, 0, 1, 1]
    averaging = GrowthOperator(model, settings_for(model, tmp_path, **values, width_start="average"))
    assert (averaging.S["residual"] > 0).all()
    torch.testing.assert_close(averaging.S["residual"].sum(dim=1), torch.ones(8, dtype=torch.float64))


@settings(max_examples=8)
@given(heads=st.integers(4, 7), layers=st.integers(2, 5), ffn=st.integers(12, 19), seed=st.integers(0, 99))
def test_the_same_seed_gives_the_same_plan(heads, layers, ffn, seed, tmp_path_factory):
    if (heads, layers, ffn) == (4, 2, 12):
        return
    model = source("gpt2")
    values = {"num_attention_heads": heads, "layers": layers, "intermediate_size": ffn, "steps": 2, "seed": seed}
    wanted = settings_for(model, tmp_path_factory.mktemp("ligo"), **values)
    data = [inputs(model)["input_ids"]]
    one, two = (plan_ligo(model, wanted, data) for _ in range(2))
    assert one == two
    apply(one, model)
    assert model.config.n_embd == 4 * heads
    assert model.config.n_layer == layers


def test_the_grown_checkpoint_is_plain(tmp_path):
    model = source("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path / "small")
    plan = plan_ligo(model, settings_for(model, tmp_path / "operator", steps=2), [inputs(model)["input_ids"]])
    apply_to_checkpoint(plan, tmp_path / "small", tmp_path / "large")
    apply(plan, model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "large").eval()
    assert torch.equal(logits(loaded), logits(model))
    assert "quantization_config" not in json.loads((tmp_path / "large" / "config.json").read_text())
    (file,) = (tmp_path / "operator").iterdir()
    assert {edit.file for edit in plan.edits if edit.kind == "project_parameter"} == {str(file)}
    assert load_file(file)["residual"].shape == (model.config.hidden_size, 16)


def test_from_the_command_line_it_learns_from_the_standard_library(tmp_path):
    tokenizer = train_tokenizer(["def f(x): return x\n" * 50], 300, 32)
    model = source("llama", dtype=torch.float32, vocab_size=400)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    values = {
        "corpus": {"context_length": 16, "max_bytes": 90_000, "validation_fraction": 0.3},
        "steps": 2,
        "batch_size": 2,
    }
    plan = plan_ligo(loaded, settings_for(loaded, tmp_path, **values))
    apply(plan, loaded)
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(PlanError, match=r"no data to learn from.*steps = 0"):
        plan_ligo(
            model := AutoModelForCausalLM.from_pretrained(tmp_path / "model"), settings_for(model, tmp_path, **values)
        )


def test_what_can_not_be_done_is_refused_with_the_nearest_that_can(tmp_path):
    def refused(message, model, data=None, **values):
        with pytest.raises(PlanError, match=message):
            plan_ligo(model, LigoGrowth.parse({"folder": tmp_path, **values}), data)

    refused(r"4 query heads share 2.*A_o = B_v.*num_attention_heads = 4, or", tiny("llama"), num_attention_heads=8)
    refused(r"num_attention_heads = 4 with hidden_size = 16", tiny("qwen2"), hidden_size=32)
    refused("There is nothing to grow", source("llama"))
    refused(r"layers = 1 is fewer than the 2", source("llama"), layers=1)
    refused("hold input_ids, token_type_ids and no labels", source("bert"), [inputs(source("bert"))], layers=3)
    refused("batches that have labels", source("bert"), layers=3)
    refused("ended after 0 batches", source("gpt2"), [], layers=3)
    one = inputs(source("gpt2"))["input_ids"]
    refused("ended after 1 batches and can't be read again", source("gpt2"), iter([one]), layers=3, steps=2)
    refused("needs the model's weights", source("gpt2").to("meta"), [one], layers=3)
    broken = source("gpt2")
    broken.transformer.wte.weight.data[:] = float("nan")
    refused("loss is nan at step 0", broken, [one], layers=3)


def test_grouped_heads_that_stay_do_not_stand_in_the_way(tmp_path):
    model = tiny("llama")
    wanted = LigoGrowth.parse({"folder": tmp_path, "layers": 3, "hidden_size": 20, "intermediate_size": 15, "steps": 1})
    apply(plan_ligo(model, wanted, [inputs(model)["input_ids"]]), model)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (3, 20)
