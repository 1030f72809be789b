"""What torchao computes in integers, beside the simulation: it is what its grids give by hand, and the model stays."""

import copy
import importlib.util
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

import auxin
from analysis.samples import Samples
from auxin.analysis import measure, quantized_real
from auxin.analysis.quantized import QuantizationLoss, QuantizedMeasurement
from auxin.edits import apply
from auxin.errors import ConfigError, PlanError
from auxin.export import export_gguf
from tiny_models import change, inputs, labels, logits, tiny
from tiny_tokenizers import tiny_tokenizer

quantization = pytest.importorskip("torchao.quantization", reason="`make test-torchao` installs it")


def measured(model: PreTrainedModel, **values: Any) -> QuantizationLoss:
    rows = {**inputs(model, batch=6), "labels": labels(model, batch=6)}
    asked = QuantizedMeasurement(alone="nothing", schemes=["w8"], calibration_samples=2, **values)
    return measure(asked, model, Samples(rows, 2, "six"), cache=False)


def on_grid(x: Tensor) -> Tensor:
    """Each row on 256 steps of its own, from -128 to 127, its largest entry at 127.5: what torchao calls symmetric."""
    step = x.abs().amax(-1, keepdim=True) / 127.5
    return step * (x * (1 / step)).round().clamp(-128, 127)


STAY = {
    "llama": {"lm_head"},
    "bert": {"cls.predictions.decoder"},
    "vit": {"classifier"},
    "qwen2_moe": {"lm_head", "model.layers.1.mlp.shared_expert_gate"},
}
"""Heads and gates, which are in floating point in the simulation, too."""


def by_hand(model: PreTrainedModel, family: str, activations: bool) -> PreTrainedModel:
    made = copy.deepcopy(model)
    for path, module in made.named_modules():
        if isinstance(module, nn.Linear) and path not in STAY[family]:
            module.weight = nn.Parameter(on_grid(module.weight.detach()))
            if activations:
                module.register_forward_pre_hook(lambda module, args: (on_grid(args[0]),))
    return made


def quantized(model: PreTrainedModel, config: str) -> PreTrainedModel:
    quantization.quantize_(model, getattr(quantization, config)())
    return model


@pytest.mark.parametrize("scheme", ["w8", "w8a8"])
@pytest.mark.parametrize("family", STAY)
def test_it_is_what_grids_for_outputs_and_tokens_give(family, scheme):
    model = tiny(family, dtype=torch.float32)
    if family == "qwen2_moe":
        model.set_experts_implementation("eager")  # the others want wider experts in this type
    found = measured(model, real=[scheme])
    (real,) = found.real
    batch = {**inputs(model, batch=6), "labels": labels(model, batch=6)}
    with torch.no_grad():
        whole, expected = (
            made(**{name: x[2:] for name, x in batch.items()}).logits
            for made in (model, by_hand(model, family, "a8" in scheme))
        )
    errors = (expected - whole).flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1)
    assert real.what == scheme
    # A token's largest entry lies halfway between two steps when it is negative, and falls by a hair to either.
    assert real.error.mean == pytest.approx(errors.mean().item(), rel=0.1 if "a8" in scheme else 1e-3)
    assert real.error.mean > 1e-4
    assert found.float_loss is not None
    assert real.loss is not None
    assert real.change is not None
    assert real.loss.mean - found.float_loss.mean == pytest.approx(real.change.mean, abs=1e-5)


def test_times_and_rows_are_told_and_the_model_stays():
    model = tiny("llama", dtype=torch.float32)
    before, kinds = logits(model), [type(parameter) for parameter in model.parameters()]
    found = measured(model, real=["w8", "w8a8"])
    assert found.seconds.keys() == {"nothing", "w8", "w8a8"}
    assert all(seconds > 0 for seconds in found.seconds.values())
    (table,) = (table for table in found.tables() if table.title == "in integers, by torchao")
    assert [row[0] for row in table.rows] == ["nothing", "w8", "w8a8"]
    linear = sum(isinstance(module, nn.Linear) for module in model.modules()) - 1  # the head stays
    assert found.real_weights == linear
    assert f"weights, {linear} by torchao; of activations" in found.findings()[-1]
    assert any(told.startswith("W8A8 of torchao changes the loss by") for told in found.findings())
    assert torch.equal(logits(model), before)
    assert [type(parameter) for parameter in model.parameters()] == kinds


def test_it_is_left_out_unless_asked_for():
    found = measured(tiny("llama", dtype=torch.float32))
    assert (found.real, found.seconds, found.real_weights) == ([], {}, 0)
    assert "in integers, by torchao" not in [table.title for table in found.tables()]


def test_what_it_can_not_do_is_refused(monkeypatch):
    with pytest.raises(PlanError, match=r"GPT2LMHeadModel has none beside its head.*Leave real out"):
        measured(tiny("gpt2", dtype=torch.float32), real=["w8"])
    with pytest.raises(PlanError, match=r"has weights in torch\.float64.*leave real out"):
        measured(tiny("llama"), real=["w8"])
    with pytest.raises(ValidationError, match="real names w8 more than once"):
        QuantizedMeasurement(real=["w8", "w8"])
    found = importlib.util.find_spec
    monkeypatch.setattr(quantized_real, "find_spec", lambda name: None if name == "torchao" else found(name))
    with pytest.raises(ConfigError, match=r'needs torchao: pip install "auxin\[torchao\]"'):
        measured(tiny("llama", dtype=torch.float32), real=["w8"])


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_what_torchao_has_packed_is_refused_by_name(config, tmp_path):
    plan = auxin.plan(tiny("llama", dtype=torch.float32), "stacking", layers=4)
    model = quantized(tiny("llama", dtype=torch.float32), config)
    before = logits(model)
    for asked in (
        lambda: auxin.plan(model, "stacking", layers=4),
        lambda: auxin.plan(model, "magnitude", ffn=0.5),
        lambda: apply(plan, model),
        lambda: measured(model),
        lambda: export_gguf(model, tmp_path / "m.gguf", tokenizer=tiny_tokenizer("byte_level")),
    ):
        with pytest.raises(PlanError, match=r"quantized \(torchao\.quantization.*Int8Tensor\).*Dequantize it first"):
            asked()
    assert torch.equal(logits(model), before)
    assert 0 < change(logits(tiny("llama", dtype=torch.float32)), before) < 0.2
    assert not list(tmp_path.iterdir())
