"""Minitron's pruning takes the units whose activations are smallest, of the residual too, and beats chance."""

import copy
import statistics
from typing import Any

import pytest
import torch

import auxin
from auxin.analysis import measure
from auxin.analysis.activations import Activations
from auxin.edits import apply
from auxin.errors import PlanError
from auxin.objectives.calibration import Calibration
from byte_language import CONTEXT, byte_model, held_out_loss, library, loss_after, train
from tiny_models import inputs, logits, tiny


def texts(model: Any) -> Calibration:
    return Calibration.of_batches(model, [inputs(model, batch=4)])


def best(scores: Any, count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda unit: scores[unit])[-count:])


@pytest.mark.parametrize("over", [{}, {"over_tokens": "variance", "over_samples": "mean"}], ids=str)
def test_the_units_that_stay_are_those_of_the_largest_activations(over):
    model = tiny("qwen3", dtype=torch.float32)
    data = texts(model)
    measured = measure(Activations(**over), model, data)
    smaller = copy.deepcopy(model)
    apply(auxin.plan(model, "minitron", heads=0.5, ffn=0.5, hidden=0.5, data=data, **over), smaller)
    hidden = best(measured.of("residual", "").scores.means, 8)
    assert torch.equal(smaller.get_input_embeddings().weight, model.get_input_embeddings().weight[:, hidden])
    size = model.config.head_dim
    for layer in ("model.layers.0", "model.layers.1"):
        ffn = best(measured.of("ffn", layer).scores.means, 6)
        (group,) = best(measured.of("key_value", layer).scores.means, 1)
        for path, units in (("mlp.up_proj", ffn), ("self_attn.v_proj", range(group * size, (group + 1) * size))):
            whole, cut = (one.get_parameter(f"{layer}.{path}.weight") for one in (model, smaller))
            assert torch.equal(cut, whole[list(units)][:, hidden])


def test_a_unit_of_the_residual_that_is_always_nothing_goes_without_a_change():
    """The norms divide by the mean square of fewer units, and their gains make up for it."""
    model = tiny("llama", tie_word_embeddings=False)
    silent = [3, 7, 8, 12]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias")):
                parameter[silent] = 0
            if name.endswith("embed_tokens.weight"):
                parameter[:, silent] = 0
    smaller = copy.deepcopy(model)
    apply(auxin.plan(model, "minitron", hidden=12, data=texts(model)), smaller)
    torch.testing.assert_close(logits(smaller), logits(model), rtol=1e-10, atol=1e-10)


def test_a_residual_without_scores_is_refused_with_the_reason():
    model = tiny("olmo", dtype=torch.float32)
    with pytest.raises(PlanError, match=r"hidden: The norms of its layers have no gains.*Leave it out, or"):
        auxin.plan(model, "minitron", heads=0.5, hidden=0.5, data=texts(model))


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any, Calibration]:
    """A small language model of bytes, held-out bytes, and samples of what it was trained on."""
    learnt = library("argparse", "ast", "datetime", "difflib", "doctest")
    model = byte_model(seed=0)
    train(model, learnt, 150)
    ids = learnt[(torch.arange(16) * 900)[:, None] + torch.arange(CONTEXT)]
    return model, library("typing"), Calibration.of_batches(model, [ids])


@pytest.mark.parametrize("part", ["ffn", "hidden"])
def test_what_does_least_is_missed_less_than_what_is_drawn(trained, part):
    model, held_out, data = trained
    share = {part: 0.5}
    scored = loss_after(auxin.plan(model, "minitron", data=data, **share), model, held_out)
    drawn = [loss_after(auxin.plan(model, "random", seed=seed, **share), model, held_out) for seed in range(5)]
    print(part, scored, sorted(drawn), held_out_loss(model, held_out))
    assert scored < statistics.median(drawn)
