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

from auxin.accounting import flops_per_token
from auxin.data.tokenizer import train_tokenizer
from auxin.edits import NormalFill, Plan, WrapModule, apply, apply_to_checkpoint, planned_config
from auxin.edits.structure import edited_skeleton
from auxin.errors import DataError, PlanError
from auxin.methods.grow.ligo import METHOD, GrowthOperator, LigoGrowth, learn, plan_ligo
from auxin.nn.bricks import Brick, brick
from auxin.objectives.calibration import Calibration
from auxin.planning.bench import Bench
from auxin.planning.method import estimate_plan, make_plan, plan_for
from oracles.ligo import grown_matrices, widening
from tiny_models import FAMILIES, InDouble, change, inputs, labels, logits, tiny


def source(family, seed=0, **values):
    """A tiny model with as many key-value heads as query heads."""
    grouped = family in ("llama", "qwen2", "qwen3", "olmo", "olmo2")
    return tiny(family, seed, **({"num_key_value_heads": 4} if grouped else {}), **values)


def settings_for(model, **values):
    return LigoGrowth.parse({**METHOD.examples(model), **values})


def one_batch(model, seed=1):
    """One batch of the model's inputs and labels."""
    return Calibration.of_batches(model, [{**inputs(model, seed), "labels": labels(model, seed + 1)}])


def learned(model, wanted, folder, batches):
    """The plan of an operator that learned from `batches`."""
    return plan_ligo(Bench(model, Calibration.of_batches(model, batches), folder=folder), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_makes_the_model_that_was_optimised(family, tmp_path):
    model = source(family)
    operator = GrowthOperator(model, settings_for(model))
    learn(operator, one_batch(model), 3, 1e-2)
    plan = Plan.model_validate(json.loads(operator.plan(tmp_path).model_dump_json())).beside(tmp_path)
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
    operator = GrowthOperator(model, settings_for(model, layers=4))
    wanted = operator.parameters_of_grown()
    apply(operator.plan(tmp_path), model)
    for name, made in model.named_parameters():
        torch.testing.assert_close(made.detach(), wanted[name].detach(), rtol=1e-12, atol=1e-12)
    for layer in range(4):
        made = model.get_parameter(f"model.layers.{layer}.self_attn.o_proj.factors")
        assert torch.equal(made[: len(old[layer % 2])], old[layer % 2])
        assert len(made) > len(old[layer % 2])


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])  # those without rotary tables, which are in float32
def test_the_grown_model_computes_what_the_operator_was_trained_on(family, tmp_path):
    model = source(family)
    operator = GrowthOperator(model, settings_for(model))
    learn(operator, one_batch(model), 2, 1e-2)
    with torch.no_grad(), InDouble():
        parameters = operator.parameters_of_grown()
        wanted = functional_call(operator.grown, parameters, kwargs=inputs(model)).logits
    apply(operator.plan(tmp_path), model)
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
    operator = GrowthOperator(model, settings_for(model, **grow_to))
    learn(operator, one_batch(model), 3, 3e-2)
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
    operator = GrowthOperator(model, settings_for(model, layers=None, num_attention_heads=6))
    learn(operator, one_batch(model), 2, 3e-2)
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
    wanted = settings_for(model, layers=3, num_attention_heads=6, intermediate_size=18)
    operator = GrowthOperator(model, wanted)
    start = {name: parameter.detach().clone() for name, parameter in operator.named_parameters()}
    losses = learn(operator, Calibration.of_batches(model, [ids[:4], ids[4:]]), 100, 3e-3)
    assert losses[-1] < losses[0] - 0.5
    assert operator.loss({"input_ids": ids, "labels": ids}).item() < losses[0] - 0.5
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
    operator = GrowthOperator(model, settings_for(model, **values))
    old, grown = dict(model.named_parameters()), operator.parameters_of_grown()
    for layer, stacked in enumerate((0, 1, 0, 1, 0)):
        made, was = (
            parameters[f"transformer.h.{number}.mlp.c_fc.bias"].detach()
            for parameters, number in ((grown, layer), (old, stacked))
        )
        assert torch.equal(made[:12], was)
        assert all(entry in was for entry in made[12:])
    interleaved = GrowthOperator(model, settings_for(model, **values, depth_start="interleave"))
    rows = interleaved.w["transformer/h/mlp/c_fc"].argmax(dim=1)
    assert rows.tolist() == [0, 0, 0, 1, 1]
    averaging = GrowthOperator(model, settings_for(model, **values, width_start="average"))
    assert (averaging.S["residual"] > 0).all()
    torch.testing.assert_close(averaging.S["residual"].sum(dim=1), torch.ones(8, dtype=torch.float64))


@settings(max_examples=8)
@given(heads=st.integers(4, 7), layers=st.integers(2, 5), ffn=st.integers(12, 19), seed=st.integers(0, 99))
def test_the_same_seed_gives_the_same_plan(heads, layers, ffn, seed, tmp_path_factory):
    if (heads, layers, ffn) == (4, 2, 12):
        return
    model = source("gpt2")
    values = {"num_attention_heads": heads, "layers": layers, "intermediate_size": ffn, "steps": 2, "seed": seed}
    folder, data = tmp_path_factory.mktemp("ligo"), [inputs(model)["input_ids"]]
    one, two = (learned(model, settings_for(model, **values), folder, data) for _ in range(2))
    assert one == two
    apply(one, model)
    assert model.config.n_embd == 4 * heads
    assert model.config.n_layer == layers


def test_the_grown_checkpoint_is_plain(tmp_path):
    model = source("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path / "small")
    plan = learned(model, settings_for(model, steps=2), tmp_path / "operator", [inputs(model)["input_ids"]])
    apply_to_checkpoint(plan, tmp_path / "small", tmp_path / "large")
    apply(plan, model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "large").eval()
    assert torch.equal(logits(loaded), logits(model))
    assert "quantization_config" not in json.loads((tmp_path / "large" / "config.json").read_text())
    (file,) = (tmp_path / "operator").iterdir()
    assert {edit.file for edit in plan.edits if edit.kind == "project_parameter"} == {file.name}
    assert load_file(file)["residual"].shape == (model.config.hidden_size, 16)


@pytest.fixture
def saved(tmp_path):
    """A llama's folder with a tokenizer of its own."""
    model = source("llama", dtype=torch.float32, vocab_size=400)
    model.save_pretrained(tmp_path / "model")
    train_tokenizer(["def f(x): return x\n" * 50], 300, 32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


CORPUS = {"context_length": 16, "max_bytes": 90_000, "validation_fraction": 0.3}


def test_on_the_command_line_it_learns_from_the_standard_library_and_the_books_say_what_it_saw(saved, tmp_path):
    data = {"corpus": {**CORPUS, "context_length": 48}, "length": 16, "batch_size": 2}
    plan = plan_for(METHOD, saved, {"layers": 3, "steps": 5}, data, tmp_path)
    assert (plan.cost.samples, plan.cost.units) == (5 * 2, 5 * 2 * 16), "not the 48 tokens of a context"
    assert plan.cost.seconds > 0
    apply_to_checkpoint(plan, saved, tmp_path / "larger")
    (saved / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"no data to look at.*Save the model with its tokenizer"):
        plan_for(METHOD, saved, {"layers": 3, "steps": 5}, data, tmp_path)


def test_the_flops_in_the_books_are_those_of_the_steps(tmp_path):
    """Of a growth in depth alone: the grown model's passes, but for the gradients of its weights' other factors. A
    blend of layers is no product, so nothing is added."""
    model = source("llama", dtype=torch.float32)
    ids = inputs(model)["input_ids"]
    bench = Bench(model, Calibration.of_batches(model, [ids]), folder=tmp_path)
    plan = make_plan(METHOD, bench, LigoGrowth(layers=4, steps=3))
    apply(plan, model)
    per_token = flops_per_token(model, ids.shape[1])
    # Embedding and head don't learn: the head's product has one product behind it, not two.
    head = 2 * model.config.hidden_size * model.config.vocab_size
    assert plan.cost.units == 3 * ids.numel()
    assert plan.cost.flops == 3 * ids.numel() * (per_token.training - head)


def test_the_outline_has_the_sizes_of_the_plan_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for family in FAMILIES:
        if family in ("vit", "tokenformer"):
            continue
        model = source(family)
        wanted = settings_for(model)
        skeleton = edited_skeleton(model.config, type(model))
        estimate = estimate_plan(METHOD, Bench(skeleton), wanted)
        assert not list(tmp_path.iterdir())
        assert estimate.estimate
        made = planned_config(estimate.edits, model.config)
        (tmp_path / family).mkdir()
        real = planned_config(plan_ligo(Bench(model, folder=tmp_path / family), wanted).edits, model.config)
        assert made.to_dict() == real.to_dict()
        with pytest.raises(PlanError, match="is an estimate"):
            apply(estimate, model)
        for path in (tmp_path / family).iterdir():
            path.unlink()
        (tmp_path / family).rmdir()


def test_an_encoder_decoder_learns_span_corruption_from_text(tmp_path):
    model = source("t5", dtype=torch.float32, vocab_size=400)
    model.save_pretrained(tmp_path / "model")
    train_tokenizer(["def f(x): return x\n" * 50], 300, 32).save_pretrained(tmp_path / "model")
    plan = plan_for(METHOD, tmp_path / "model", {"layers": 3, "steps": 2}, {"corpus": CORPUS}, tmp_path)
    assert plan.cost.units == 2 * 8 * 16, "tokens of text, also of those that are cut out"
    apply_to_checkpoint(plan, tmp_path / "model", tmp_path / "larger")


def test_what_can_not_be_done_is_refused_with_the_nearest_that_can(tmp_path):
    def refused(message, model, batches=None, **values):
        data = None if batches is None else Calibration.of_batches(model, batches)
        with pytest.raises(PlanError, match=message):
            plan_ligo(Bench(model, data, folder=tmp_path), LigoGrowth.parse(values))

    refused(r"4 query heads share 2.*A_o = B_v.*num_attention_heads = 4, or", tiny("llama"), num_attention_heads=8)
    refused(r"num_attention_heads = 4 with hidden_size = 16", tiny("qwen2"), hidden_size=32)
    refused("There is nothing to grow", source("llama"))
    refused(r"layers = 1 is fewer than the 2", source("llama"), layers=1)
    refused(r"steps = 100.*there is none. Give the bench a Calibration, or set steps = 0", source("bert"), layers=3)
    one = inputs(source("gpt2"))["input_ids"]
    refused("needs the model's weights", source("gpt2").to("meta"), [one], layers=3)
    broken = source("gpt2")
    broken.transformer.wte.weight.data[:] = float("nan")
    refused("loss is nan at step 0", broken, [one], layers=3)


def test_data_is_read_again_when_it_ends(tmp_path):
    model = source("gpt2")
    one, two = (inputs(model, seed)["input_ids"] for seed in (1, 2))
    bench = Bench(model, Calibration.of_batches(model, [one, two]), folder=tmp_path)
    plan_ligo(bench, LigoGrowth(layers=3, steps=5))
    assert (bench.spent.samples, bench.spent.units) == (5 * len(one), 5 * one.numel())


def test_grouped_heads_that_stay_do_not_stand_in_the_way(tmp_path):
    model = tiny("llama")
    wanted = LigoGrowth(layers=3, hidden_size=20, intermediate_size=15, steps=1)
    apply(learned(model, wanted, tmp_path, [inputs(model)["input_ids"]]), model)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (3, 20)
