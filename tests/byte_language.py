"""Small language models on the bytes of the standard library: what growth is for, in seconds."""

import copy
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from auxin.edits import Plan, apply
from tiny_models import fresh_llama

CONTEXT, BATCH = 48, 8


def byte_model(seed: int, **values: Any) -> nn.Module:
    """A small Llama on bytes; `values` of its config differ from the usual ones."""
    usual = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return fresh_llama(seed, **{**usual, **values})


def library(*stems: str) -> Tensor:
    """Bytes of some modules of the standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join((folder / f"{stem}.py").read_bytes() for stem in stems)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def train(
    model: nn.Module, data: Tensor, steps: int, optimizer: Any = None, first: int = 0, decay: bool = True
) -> torch.optim.Optimizer:
    """Warm up, hold, and if asked decay over the last fifth; batches follow from the step's number, from `first` on."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        left = min(1.0, (steps - step) / (0.2 * steps)) if decay else 1.0
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * left
        generator = torch.Generator().manual_seed(first + step)
        starts = torch.randint(len(data) - CONTEXT, (BATCH,), generator=generator)
        ids = data[starts[:, None] + torch.arange(CONTEXT)]
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return optimizer


def held_out_loss(model: nn.Module, data: Tensor) -> float:
    """The mean loss of a byte on every sixteenth stretch of `data`."""
    rows = data[: len(data) // CONTEXT * CONTEXT].view(-1, CONTEXT)[::16]
    with torch.no_grad():
        return model(input_ids=rows, labels=rows).loss.item()


def loss_after(plan: Plan, model: Any, data: Tensor) -> float:
    """`held_out_loss` of a copy of `model` to which a plan is applied."""
    changed = copy.deepcopy(model)
    apply(plan, changed)
    return held_out_loss(changed, data)
