"""What growing in depth is for: at equal work, a grown model is better than one trained from scratch."""

import copy
import sysconfig
from pathlib import Path

import pytest
import torch

from auxin.edits import apply
from auxin.methods.grow.llama_pro import BlockExpansion, plan_block_expansion
from auxin.methods.grow.stacking import LayerStacking, plan_stacking
from oracles.depth import byte_model

CONTEXT, BATCH = 48, 8
SMALL, GROWN, SCRATCH = 120, 90, 150
"""Steps: 120 of 3 layers and 90 of 6 are as many layer-steps as 150 of 6."""


def library(stems):
    """Bytes of some modules of the standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join((folder / f"{stem}.py").read_bytes() for stem in stems)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


@pytest.fixture(scope="module")
def data():
    train = library(["argparse", "ast", "datetime", "difflib", "doctest", "inspect", "optparse", "pdb", "tarfile"])
    return train, library(["typing"])


def train(model, data, steps, optimizer=None, first=0):
    """Warm up, hold, decay over the last fifth; batches follow from the step's number."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        decay = min(1.0, (steps - step) / (0.2 * steps)) if first + steps >= SCRATCH else 1.0
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * decay
        generator = torch.Generator().manual_seed(first + step)
        starts = torch.randint(len(data) - CONTEXT, (BATCH,), generator=generator)
        ids = data[starts[:, None] + torch.arange(CONTEXT)]
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return optimizer


def held_out_loss(model, data):
    rows = data[: len(data) // CONTEXT * CONTEXT].view(-1, CONTEXT)[::16]
    with torch.no_grad():
        return model(input_ids=rows, labels=rows).loss.item()


def test_grown_models_beat_one_from_scratch_at_equal_work(data):
    learnt, held_out = data
    scratch = byte_model(6, seed=1)
    train(scratch, learnt, SCRATCH)
    model = byte_model(3, seed=0)
    small = model, train(model, learnt, SMALL)
    before = held_out_loss(model, held_out)
    losses = {}
    for name, plan in {
        "stack": lambda model: plan_stacking(model, LayerStacking(factor=2)),
        "identity": lambda model: plan_block_expansion(model, BlockExpansion(group_size=1)),
    }.items():
        model, optimizer = copy.deepcopy(small)
        receipt = apply(plan(model), model, optimizer)
        jump = held_out_loss(model, held_out) - before
        assert (jump == 0) == (receipt.plan.promise == "exact")
        train(model, learnt, GROWN, optimizer, first=SMALL)
        losses[name] = held_out_loss(model, held_out)
    baseline = held_out_loss(scratch, held_out)
    print({**losses, "scratch": baseline})
    assert max(losses.values()) < baseline - 0.05
