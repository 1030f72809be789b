"""What growing in depth is for: at equal work, a grown model is better than one trained from scratch."""

import copy

import pytest

from auxin.edits import apply
from auxin.methods.grow.llama_pro import BlockExpansion, plan_block_expansion
from auxin.methods.grow.stacking import LayerStacking, plan_stacking
from byte_language import byte_model, held_out_loss, library, train

SMALL, GROWN, SCRATCH = 120, 90, 150
"""Steps: 120 of 3 layers and 90 of 6 are as many layer-steps as 150 of 6."""


@pytest.fixture(scope="module")
def data():
    train = library("argparse", "ast", "datetime", "difflib", "doctest", "inspect", "optparse", "pdb", "tarfile")
    return train, library("typing")


def test_grown_models_beat_one_from_scratch_at_equal_work(data):
    learnt, held_out = data
    scratch = byte_model(seed=1, num_hidden_layers=6)
    train(scratch, learnt, SCRATCH)
    model = byte_model(seed=0)
    small = model, train(model, learnt, SMALL, decay=False)
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
