"""What growing in width is for: at equal work, a grown model is better than one trained from scratch."""

import copy

from auxin.edits import apply
from auxin.methods.grow.hypercloning import METHOD as HYPERCLONING
from auxin.methods.grow.lemon import METHOD as LEMON
from auxin.planning.bench import Bench
from byte_language import byte_model, held_out_loss, library, train

NARROW = {"hidden_size": 32, "intermediate_size": 86, "num_attention_heads": 2, "num_key_value_heads": 2}
WIDE = {"hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 4, "num_key_value_heads": 4}
SMALL, GROWN, SCRATCH = 160, 80, 120
"""Steps: 160 of the narrow model, each a quarter of the work, and 80 of the wide one are as much as 120 of that."""


def test_wider_models_beat_one_from_scratch_at_equal_work():
    learnt = library("argparse", "ast", "datetime", "difflib", "doctest", "inspect", "optparse", "pdb", "tarfile")
    held_out = library("typing")
    scratch = byte_model(seed=1, **WIDE)
    train(scratch, learnt, SCRATCH)
    model = byte_model(seed=0, **NARROW)
    small = model, train(model, learnt, SMALL, decay=False)
    before = held_out_loss(model, held_out)
    losses = {}
    for method, settings in ((HYPERCLONING, {"factor": 2, "variant": "noisy"}), (LEMON, WIDE)):
        model, optimizer = copy.deepcopy(small)
        apply(method.plan(Bench(model), method.settings.parse(settings)), model, optimizer)
        assert abs(held_out_loss(model, held_out) - before) < 1e-5
        train(model, learnt, GROWN, optimizer, first=SMALL)
        losses[method.name] = held_out_loss(model, held_out)
    baseline = held_out_loss(scratch, held_out)
    print({**losses, "small": before, "scratch": baseline})
    assert max(losses.values()) < baseline - 0.05
