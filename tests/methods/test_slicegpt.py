"""SliceGPT with one rotation: what is cut is what a projection of the stream says, and it loses less than units do."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import auxin
from auxin.accounting import count_parameters
from auxin.edits import apply, apply_to_checkpoint
from auxin.edits.structure import structural_edits
from auxin.errors import ConfigError, PlanError
from auxin.methods import method
from auxin.methods.prune.slicegpt import components, covariance
from auxin.objectives.calibration import Calibration
from auxin.planning.bench import Bench
from auxin.planning.rotation import rotatable
from byte_language import CONTEXT, byte_model, held_out_loss, library, loss_after, train
from oracles import slicing as oracle
from tiny_models import InDouble, inputs, logits, tiny

WRITERS = [f"model.layers.{layer}.{path}" for layer in (0, 1) for path in ("self_attn.o_proj", "mlp.down_proj")]
NORMS = [
    *(f"model.layers.{layer}.{name}_layernorm" for layer in (0, 1) for name in ("input", "post_attention")),
    "model.norm",
]


@pytest.fixture(autouse=True)
def _plans_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the files that belong to them."""
    monkeypatch.chdir(tmp_path)


def texts(model: Any, **more: Any) -> Calibration:
    return Calibration.of_batches(model, [{**inputs(model, seed=seed, batch=4), **more} for seed in (1, 2)])


@pytest.mark.parametrize("hidden", [4, 8, 12])
def test_what_is_cut_is_what_a_projection_of_the_stream_says(hidden):
    model = tiny("llama")
    batches = [inputs(model, seed=seed, batch=4) for seed in (1, 2)]
    with InDouble():
        stay = oracle.components(model, NORMS, batches, model.config.rms_norm_eps)[:, :hidden]
        plan = auxin.plan(model, "slicegpt", hidden=hidden, data=texts(model))
    smaller = copy.deepcopy(model)
    apply(plan, smaller)
    assert smaller.config.hidden_size == hidden
    assert not structural_edits(smaller.config)
    expected = logits(oracle.projected(model, stay, WRITERS))
    torch.testing.assert_close(logits(smaller), expected, rtol=0, atol=1e-9 * expected.abs().max().item())


def test_padding_does_not_count():
    model = tiny("llama")
    mask = torch.ones_like(inputs(model, batch=4)["input_ids"])
    mask[:2, -2:] = 0
    batches = [{**inputs(model, seed=seed, batch=4), "attention_mask": mask} for seed in (1, 2)]
    with InDouble():
        expected = oracle.components(model, NORMS, batches, model.config.rms_norm_eps)
        _, vectors = components(covariance(rotatable(model), texts(model, attention_mask=mask)))
    np.testing.assert_allclose(np.abs(np.diag(expected.T @ vectors.numpy())), 1, atol=1e-8)


@settings(max_examples=4)
@given(size=st.sampled_from([4, 8, 12]), seed=st.integers(0, 99), tied=st.booleans())
def test_a_stream_that_has_no_more_dimensions_is_cut_to_them_without_a_change(size, seed, tied, tmp_path_factory):
    """Whichever they are: no unit of it is zero, so that no method that takes units as they are could."""
    model = tiny("llama", seed=seed, tie_word_embeddings=tied)
    generator = torch.Generator().manual_seed(seed)
    onto = torch.linalg.qr(torch.randn(16, size, dtype=torch.float64, generator=generator))[0].numpy()
    model = oracle.projected(model, onto, WRITERS)
    before = logits(model)
    with InDouble():
        chosen = method("slicegpt")
        bench = Bench(model, texts(model), folder=tmp_path_factory.mktemp("plan"))
        apply(chosen.plan(bench, chosen.settings.parse({"hidden": size})), model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-8 * before.abs().max().item())


def test_components_are_the_largest_and_their_signs_are_nobodys_choice():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 6, dtype=torch.float64, generator=generator)
    values, vectors = components(rows.mT @ rows)
    assert (values.diff() <= 0).all()
    assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()
    for size in (1, 3):
        kept = (rows @ vectors[:, :size]).square().sum()
        assert kept == pytest.approx(values[:size].sum())
        other = torch.linalg.qr(torch.randn(6, size, dtype=torch.float64, generator=generator))[0]
        assert kept > (rows @ other).square().sum()
    with pytest.raises(PlanError, match="not finite"):
        components(torch.full((2, 2), math.nan))


def test_a_tied_head_gets_a_table_of_its_own_and_counts_in_the_target():
    model = tiny("gemma", dtype=torch.float32)
    whole = count_parameters(model).total
    plan = auxin.plan(model, "slicegpt", target={"parameters": 0.9}, data=texts(model))
    smaller = copy.deepcopy(model)
    apply(plan, smaller)
    assert "gets a table of its own" in plan.notes[-1]
    assert f"Reached: parameters {whole:,} -> {count_parameters(smaller).total:,}" in plan.findings[0]
    assert count_parameters(smaller).total <= 0.9 * whole
    one_more = copy.deepcopy(model)
    more = smaller.config.hidden_size + 1
    apply(auxin.plan(model, "slicegpt", hidden=more, data=texts(model)), one_more)
    assert count_parameters(one_more).total > 0.9 * whole


def test_a_folder_becomes_what_the_model_becomes(tmp_path):
    """With the rotation's file beside it, and without any code of ours to load it."""
    model = tiny("gemma", dtype=torch.float32)
    model.save_pretrained(tmp_path / "old")
    plan = auxin.plan(model, "slicegpt", hidden=12, data=texts(model))
    apply_to_checkpoint(plan, tmp_path / "old", tmp_path / "new")
    apply(plan, model)
    found = type(model).from_pretrained(tmp_path / "new").eval()
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=1e-5)
    assert [path.name for path in (tmp_path / "new").rglob("rotation*")] == [plan.files[0].name]


def test_the_share_that_stays_is_told():
    model = tiny("llama", dtype=torch.float32)
    plan = auxin.plan(model, "slicegpt", hidden=12, data=texts(model))
    values, _ = components(covariance(rotatable(model), texts(model)))
    share = float(values[:12].sum() / values.sum())
    assert plan.findings[-1] == (
        f"The 12 components that stay hold {share:.2%} of the sum of squares of what norms give."
    )
    assert plan.promise == "none"


def test_what_can_t_be_is_refused_before_the_model_is_run(monkeypatch):
    model = tiny("llama", dtype=torch.float32)
    data = texts(model)
    monkeypatch.setattr("auxin.methods.prune.slicegpt.covariance", lambda *_: pytest.fail("it was run"))
    with pytest.raises(PlanError, match="nothing to prune"):
        auxin.plan(model, "slicegpt", hidden=1.0, data=data)
    with pytest.raises(PlanError, match=r"smallest that .* can reach"):
        auxin.plan(model, "slicegpt", target={"parameters": 0.01}, data=data)
    with pytest.raises(PlanError, match=r"hidden size is heads x head dimension.*Take magnitude or minitron"):
        auxin.plan(tiny("olmoe", dtype=torch.float32), "slicegpt", hidden=0.5, data=data)
    # Qwen2's config can say a head dimension.
    assert auxin.plan(tiny("qwen2", dtype=torch.float32), "slicegpt", hidden=0.5, data=data).edits
    with pytest.raises(ConfigError, match="give hidden"):
        auxin.plan(model, "slicegpt", data=data)
    with pytest.raises(ConfigError, match="is no share"):
        auxin.plan(model, "slicegpt", hidden=1.5, data=data)


def test_components_are_missed_less_than_units():
    learnt, held_out = library("argparse", "ast", "datetime", "difflib", "doctest"), library("typing")
    model = byte_model(seed=0)
    train(model, learnt, 150)
    ids = learnt[(torch.arange(16) * 900)[:, None] + torch.arange(CONTEXT)]
    data = Calibration.of_batches(model, [ids])
    losses = {"whole": held_out_loss(model, held_out)}
    for name in ("slicegpt", "minitron", "magnitude"):
        samples = {} if name == "magnitude" else {"data": data}
        losses[name] = loss_after(auxin.plan(model, name, hidden=0.25, **samples), model, held_out)
    print(losses)
    lost = {name: loss - losses["whole"] for name, loss in losses.items()}
    assert lost["slicegpt"] < min(lost["minitron"], lost["magnitude"]) / 2
