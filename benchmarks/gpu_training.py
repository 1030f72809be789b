"""The part of `gpu.py` that trains: what a step takes, by `auxin.training.train` itself, and what memory."""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from excerpt import Excerpt
from products import Products
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedConfig, PreTrainedModel

from auxin.data import SampleForm
from auxin.models import TokenFormerConfig, TokenFormerForCausalLM
from auxin.models.loading import skeleton
from auxin.models.tokenformer.presets import preset_config
from auxin.objectives.causal import Causal
from auxin.recipes.library import load_recipe
from auxin.recipes.price import pass_memory
from auxin.training import TrainingSettings, train
from auxin.training.gradients import BatchGradients
from auxin.training.metrics import metrics_in
from auxin.training.ranks import ALONE
from auxin.training.strategies import Copies

RECIPE = "tokenformer-124m-to-1.4b"
"""Whose settings the trainings have, but for what is said in `settings_of`."""
WARM_UP = 5
"""Steps that are not counted: kernels are chosen and compiled, memory is asked for."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """A model to be trained."""

    name: str
    config: Callable[[], PreTrainedConfig]
    kind: type[PreTrainedModel]
    batch: int
    """Contexts in a step, and in a forward pass; fewer where they don't fit."""
    context: int = 1024


def _gpt2() -> GPT2Config:
    """GPT-2's own size, 124M, without dropout, with a vocabulary that tensor cores divide."""
    return GPT2Config(vocab_size=50304, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)


def _tiny() -> TokenFormerConfig:
    """A model for a rehearsal."""
    return TokenFormerConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16,
        qkv_tokens=8, proj_tokens=8, ffn_tokens=32,
    )  # fmt: skip


MODELS = (
    Trained("TokenFormer 124M", partial(preset_config, "124m"), TokenFormerForCausalLM, 64),
    Trained("TokenFormer 354M", partial(preset_config, "354m"), TokenFormerForCausalLM, 32),
    Trained("GPT-2 124M", _gpt2, GPT2LMHeadModel, 64),
)
"""The last one is dense, for comparison. What is told of the memory of these batches is half of an H200's."""
TINY = (Trained("tiny TokenFormer", _tiny, TokenFormerForCausalLM, 4, 16),)


def settings_of(batch: int, steps: int, compiled: bool, device: str) -> TrainingSettings:
    """Those of the recipe, with a whole batch in one pass, a warm-up that ends, and nothing written on the way."""
    changes = {
        "steps": steps,
        "batch_size": batch,
        "micro_batch_size": None,
        "warmup_steps": WARM_UP,
        "evaluation_interval": None,
        "evaluation_batches": 1,
        "checkpoint_interval": None,
        "log_interval": 1,
        "tensorboard": False,
        "device": device,
        "compile": compiled,
    }
    return TrainingSettings.parse({**load_recipe(RECIPE).training, **changes})


def training_rows(device: str, quick: bool, seed: int) -> Iterator[Row]:
    """Every model, eager and compiled: time and memory of a step, and the share of the device's peak."""
    steps = WARM_UP + (3 if quick else 20)
    for one in TINY if quick else MODELS:
        alone: dict[int, float] = {}
        for compiled in (False, True):
            yield fitting_row(one, compiled, device, steps, seed, alone)


def fitting_row(one: Trained, compiled: bool, device: str, steps: int, seed: int, alone: dict[int, float]) -> Row:
    """The row of a model and the largest batch that has room: half of it, and half of that, where memory ends.

    Args:
        one: the model.
        compiled: whether it is compiled.
        device: where.
        steps: of the training.
        seed: of weights and data.
        alone: seconds of the products of matrices alone by batch, found and remembered.
    """
    batch, tried = one.batch, []
    while True:
        _free(device)
        try:
            row = training_row(one, batch, compiled, device, steps, seed)
            _free(device)
            if batch not in alone:
                alone[batch] = products_alone(one, batch, device)
            row["products_alone"] = alone[batch] / row["step_seconds"]
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            tried.append(batch)
            batch //= 2
        else:
            return {**row, "out_of_memory_at": tried}


def training_row(one: Trained, batch: int, compiled: bool, device: str, steps: int, seed: int) -> Row:
    """Train a fresh model, and read what the engine wrote."""
    model, rng = _made(one, seed), np.random.default_rng(seed)
    rows = rng.integers(0, model.config.vocab_size, (4 * batch, one.context), dtype=np.int64)
    data = Excerpt(rows, rows[:batch], model.config.vocab_size)
    settings = settings_of(batch, steps, compiled, device)
    objective = settings.objective.bind(model.config, data.form)
    told = pass_memory(skeleton(model.config, one.kind), objective, batch)
    began = time.perf_counter()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        train(model, data, settings, folder, progress=False)
        lines = [line for line in metrics_in(Path(folder)) if "units_per_second" in line]
    warm = lines[WARM_UP:]
    per_step = batch * one.context
    speed = statistics.median(line["units_per_second"] for line in warm)
    shares = [line["mfu"] for line in warm if "mfu" in line]
    return {
        "model": one.name,
        "kind": "compiled" if compiled else "eager",
        "parameters": model.num_parameters(),
        "batch": batch,
        "context": one.context,
        "precision": settings.precision,
        "steps": len(warm),
        "step_seconds": per_step / speed,
        "first_step_seconds": per_step / lines[0]["units_per_second"],
        "tokens_per_second": speed,
        "flops_per_second": statistics.median(line["flops_per_second"] for line in warm),
        "mfu": statistics.median(shares) if shares else None,
        "data_share": statistics.median(line["data_share"] for line in warm),
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "reserved_bytes": torch.cuda.max_memory_reserved() if device == "cuda" else None,
        "told_bytes": told.total,
        "told_activations": told.activations,
        "whole_seconds": time.perf_counter() - began,
    }


def products_alone(one: Trained, batch: int, device: str) -> float:
    """Seconds that the products of matrices of a step take by themselves, those of attention left out."""
    model = _made(one, 0)
    torch.nn.Module.to(model, device).train()
    settings = settings_of(batch, 1, compiled=False, device=device)
    ids = torch.zeros(batch, one.context, dtype=torch.long, device=device)
    form = SampleForm("token", one.context, ("input_ids",), length=one.context, vocab_size=model.config.vocab_size)
    gradients = BatchGradients(model, Causal().bind(model.config, form), settings, Copies(ALONE))
    products = Products.of(partial(gradients.add, {"input_ids": ids, "labels": ids}, 1.0))
    del model, gradients  # they and their gradients would stand in the way of large factors
    return products.seconds(device)


def _free(device: str) -> None:
    """Give back the memory of what nobody needs any more, compiled code and its constants among it."""
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _made(one: Trained, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return one.kind(one.config())
