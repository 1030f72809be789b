"""Clipped softmax as a plan: its gamma, its ramp, what it warns of and refuses."""

import warnings
from typing import Any

import pytest
import torch

import auxin
from auxin.edits import apply
from auxin.errors import ConfigError, PlanError
from auxin.methods.restructure.clipped_softmax import GammaRamp
from auxin.models.loading import load_model
from auxin.nn.clipped_softmax import ClippedSoftmax, clipped
from auxin.planning.hooks import hooks_of
from auxin.recipes import Recipe, run_recipe
from corpora import small_corpus, write_documents
from tiny_models import inputs, output, tiny

NAME = "clipped-softmax"


@torch.no_grad()
def said(model: Any) -> torch.Tensor:
    return output(model(**inputs(model)))


def modules(model: Any) -> list[ClippedSoftmax]:
    return [module for module in model.modules() if isinstance(module, ClippedSoftmax)]


def test_gamma_is_alpha_over_the_length_in_the_layers_that_are_named():
    model = tiny("bert")
    plan = auxin.plan(model, NAME, alpha=0.8, length=32, layers=[1])
    assert plan.promise == "none"
    assert plan.notes == []
    assert plan.findings == [
        "1 attentions are clipped with gamma = -0.025: a weight below 0.02439 is nothing, so that a head averages "
        "fewer than 41 tokens."
    ]
    auxin.apply(plan, model)
    assert [(module.gamma, module.zeta) for module in modules(model)] == [(-0.025, 1.0)]
    assert isinstance(model.bert.encoder.layer[1].attention.self, ClippedSoftmax)


@pytest.mark.parametrize(("alpha", "dead"), [(0.9, False), (1.0, False), (32 / 31, True), (4.0, True)])
def test_a_start_is_called_dead_where_a_row_of_all_tokens_is_nothing(alpha, dead):
    row = clipped(torch.full((32,), 1 / 32, dtype=torch.float64), -alpha / 32)
    assert bool((row.abs() < 1e-12).all()) == dead
    for ramp in (None, 10):
        plan = auxin.plan(tiny("llama"), NAME, alpha=alpha, length=32, ramp_steps=ramp)
        told = any("may never begin to learn. Set ramp_steps" in note for note in plan.notes)
        assert told == (dead and ramp is None)


def test_a_ramp_begins_exactly_and_ends_where_the_guard_left_updates_out():
    model, plain = tiny("llama", dtype=torch.float32), tiny("llama", dtype=torch.float32)
    plan = auxin.plan(model, NAME, alpha=4, length=16, zeta=1.1, ramp_steps=4)
    assert plan.promise == "exact"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        receipt = apply(plan, model)
    assert torch.equal(said(model), said(plain))
    (ramp,) = hooks_of(plan, receipt)
    assert isinstance(ramp, GammaRamp)
    ramp.attach(model, torch.optim.SGD(model.parameters()))
    seen = []
    for number in range(6):
        ramp.before_step(number)
        seen.append(modules(model)[0].limits())
        if number != 3:  # which the guard leaves out
            ramp.after_step(number)
    assert seen == [(-0.25 * share, pytest.approx(1 + 0.1 * share)) for share in (0, 0.25, 0.5, 0.75, 1, 1)]
    at_once = tiny("llama", dtype=torch.float32)
    with pytest.warns(UserWarning, match="may never begin to learn"):
        apply(auxin.plan(at_once, NAME, alpha=4, length=16, zeta=1.1), at_once)
    assert torch.equal(said(model), said(at_once))
    with pytest.raises(
        PlanError, match=r"no attention of the LlamaForCausalLM is clipped. Change it with clipped-softmax"
    ):
        GammaRamp(2).attach(plain, torch.optim.SGD(plain.parameters()))


def test_a_recipe_ramps_it_and_what_it_wrote_is_clipped(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    values = {
        "name": "quiet",
        "title": "Quiet",
        "seed": 3,
        "data": small_corpus(write_documents(tmp_path / "corpus")),
        "training": {"batch_size": 4, "steps": 4, "decay_fraction": 0.0, "tensorboard": False},
        "branches": [
            {
                "name": "main",
                "title": "main",
                "stages": [
                    {"kind": "build", "model_type": "llama", "config": {**sizes, "max_position_embeddings": 16}},
                    {"kind": "change", "method": NAME, "settings": {"alpha": 2, "length": 16, "ramp_steps": 2}},
                    {"kind": "train", "name": "train"},
                ],
            }
        ],
        "main_branch": "main",
    }
    run_recipe(Recipe.model_validate(values), tmp_path / "run", "", lambda line: None)
    model = load_model(max((tmp_path / "run" / "branches" / "main" / "03-train" / "checkpoints").glob("step-*")))
    assert [module.limits() for module in modules(model)] == [(-0.125, 1.0)] * 2


def test_a_clipped_model_can_have_another_gamma():
    model, fresh = tiny("llama"), tiny("llama")
    auxin.apply(auxin.plan(model, NAME, alpha=0.9, length=16), model)
    for one in (model, fresh):
        auxin.apply(auxin.plan(one, NAME, alpha=0.5, length=16), one)
    assert torch.equal(said(model), said(fresh))
    with pytest.raises(PlanError, match=r"is clipped already, and a ramp begins without. Leave ramp_steps out"):
        auxin.plan(model, NAME, alpha=0.5, length=16, ramp_steps=3)
    with pytest.raises(PlanError, match=r"are clipped with gamma = -0\.03125 and zeta = 1 already"):
        auxin.plan(model, NAME, alpha=0.5, length=16)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"alpha": 2}, r"length"),
        ({"length": 16}, r"alpha"),
        ({"alpha": 0, "length": 16}, "alpha"),
        ({"alpha": -1, "length": 16}, "alpha"),
        ({"alpha": 16, "length": 16}, r"a row of two equal weights would be nothing. Give an alpha far below"),
        ({"alpha": 2, "length": 16, "zeta": 0.9}, "zeta"),
        ({"alpha": 2, "length": 16, "ramp_steps": 0}, "ramp_steps"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        auxin.plan(tiny("llama"), NAME, **values)


def test_models_whose_weights_can_t_be_had_are_refused():
    for family in ("tokenformer", "falcon", "resnet"):
        with pytest.raises(PlanError, match="no attention that reads its own stack is known to hand its queries"):
            auxin.plan(tiny(family), NAME, alpha=2, length=16)
    flash = tiny("llama")
    flash.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        PlanError, match=r"'flash_attention_2' does not give. Call model.set_attn_implementation\('sdpa'\)"
    ):
        auxin.plan(flash, NAME, alpha=2, length=16)
    gates = tiny("llama")
    auxin.apply(auxin.plan(gates, "gated-attention"), gates)
    with pytest.raises(PlanError, match="is gated_attention already"):
        auxin.plan(gates, NAME, alpha=2, length=16)
