"""What pruning costs a trained model: more, the more is taken away; magnitude is measured beside chance."""

import copy

from auxin.edits import apply
from auxin.methods import method
from auxin.planning.bench import Bench
from byte_language import byte_model, held_out_loss, library, train


def test_the_loss_grows_with_what_is_removed():
    """Nothing is claimed of magnitude against chance; both are printed."""
    learnt, held_out = library("argparse", "ast", "datetime", "difflib", "doctest", "inspect"), library("typing")
    model = byte_model(seed=0)
    train(model, learnt, 160)
    dense = held_out_loss(model, held_out)

    def loss(name, share):
        pruned, found = copy.deepcopy(model), method(name)
        asked = found.settings.parse({"ffn": share, "heads": share})
        apply(found.plan(Bench(pruned), asked), pruned)
        return held_out_loss(pruned, held_out)

    losses = {name: [loss(name, share) for share in (0.5, 0.25)] for name in ("magnitude", "random")}
    print({"dense": dense, **losses})
    for half, quarter in losses.values():
        assert dense < half < quarter
