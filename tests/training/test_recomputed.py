"""Training whose backward pass computes layers again: the same bits, and the books say it."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import auxin
from auxin.accounting import training_memory
from auxin.accounting.recomputation import RECOMPUTATION_NOTE
from auxin.errors import ConfigError
from auxin.recipes import load_recipe
from auxin.recipes.price import price_recipe
from auxin.training import TrainingResult, train
from training.tiny import (
    TinyData,
    checkpoint_bits,
    read_metrics,
    tiny_gpt2,
    tiny_llama,
    tiny_settings,
    tiny_tokenformer,
    weights,
)


def altup() -> PreTrainedModel:
    model = tiny_llama()
    auxin.apply(auxin.plan(model, "altup", blocks=2), model)
    return model


MODELS = {"dropout": tiny_gpt2, "tokenformer": tiny_tokenformer, "altup": altup}
AGAIN = {"activation_checkpointing": True}


def run(
    model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32, stop: int | None = None, **changes: object
) -> TrainingResult:
    settings = tiny_settings(**{"steps": 8, "micro_batch_size": 2, "log_interval": 1, **changes})
    return train(model.to(dtype), TinyData(), settings, folder, progress=False, stop_after=stop)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float64, "float32"), (torch.float32, "float32"), (torch.float32, "bfloat16")]
)
def test_losses_weights_and_moments_are_the_same_to_the_bit(tmp_path, name, dtype, precision):
    model = MODELS[name]()
    before = [dict(vars(module)) for module in model.modules()]
    plain = run(MODELS[name](), tmp_path / "plain", dtype, precision=precision)
    again = run(model, tmp_path / "again", dtype, precision=precision, **AGAIN)
    assert read_metrics(tmp_path / "plain") == read_metrics(tmp_path / "again")
    assert checkpoint_bits(plain.checkpoint) == checkpoint_bits(again.checkpoint)
    assert plain.flops == again.flops
    assert again.ledger.stages[-1].notes == [RECOMPUTATION_NOTE]
    assert [module.keys() for module in before] == [vars(module).keys() for module in model.modules()]


def test_a_run_may_go_on_with_the_other(tmp_path):
    """It is what is kept in memory, and not what is learnt."""
    whole = run(tiny_gpt2(), tmp_path / "whole")
    run(tiny_gpt2(), tmp_path / "pieces", stop=3)
    pieces = run(tiny_gpt2(), tmp_path / "pieces", **AGAIN)
    assert checkpoint_bits(whole.checkpoint) == checkpoint_bits(pieces.checkpoint)
    notes = ["resumed with settings.activation_checkpointing True instead of False", RECOMPUTATION_NOTE]
    assert pieces.ledger.stages[-1].notes == notes


def test_compiled_models_learn_alike(tmp_path, monkeypatch):
    compile_model = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_model(model, backend="eager"))
    plain, again = tiny_llama(), tiny_llama()
    run(plain, tmp_path / "plain", steps=3)
    run(again, tmp_path / "again", steps=3, compile=True, **AGAIN)
    torch.testing.assert_close(weights(plain), weights(again), atol=1e-5, rtol=1e-4)


def test_what_would_learn_something_else_is_refused_before_anything_is_written(tmp_path):
    model = tiny_llama()
    model.model.layers[0].mlp.norm = nn.BatchNorm1d(4)
    with pytest.raises(ConfigError, match="norm is a batch norm"):
        run(model, tmp_path / "run", **AGAIN)
    assert not (tmp_path / "run").exists()


def test_the_price_has_less_memory_and_the_same_flops():
    """By what is computed of the model."""
    plain, again = (
        price_recipe(load_recipe("demo", [f"training.activation_checkpointing={how}"])).stages
        for how in ("false", "true")
    )
    pairs = [(one, other) for one, other in zip(plain, again, strict=True) if one.memory_bytes]
    assert pairs
    assert all(other.memory_bytes < one.memory_bytes and other.flops == one.flops for one, other in pairs)
    model = tiny_llama()
    assert training_memory(model, 2, 16, recompute=True).weights == training_memory(model, 2, 16).weights
