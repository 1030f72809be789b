"""How far outputs moved, and what of them can be held against each other."""

import pytest
import torch

from auxin.edits import Plan
from auxin.edits.promise import measured_change
from auxin.errors import PromiseError

NOTHING = Plan(method="hand", promise="exact", edits=[])


def test_outputs_are_compared_each_with_its_own_largest_value():
    before = {"large": torch.tensor([100.0]), "small": torch.tensor([1e-3])}
    after = {"large": torch.tensor([100.0]), "small": torch.tensor([2e-3])}
    plan = Plan(method="hand", promise="approximate", edits=[])
    assert measured_change(plan, before, after, 1e-5) == pytest.approx(1)
    assert measured_change(plan, before, before, 1e-5) == 0
    with pytest.raises(PromiseError, match=r"but the values of small moved by 1 of the largest one"):
        measured_change(NOTHING, before, after, 1e-5)


def test_outputs_that_appear_vanish_or_change_shape_can_not_be_compared():
    one, two = torch.ones(1), torch.ones(2)
    plan = Plan(method="hand", promise="approximate", edits=[])
    cases = [
        ({"logits": one, "pooler_output": one}, {"logits": one}, "outputs are logits and were logits, pooler_output"),
        ({"logits": one}, {"last_hidden_state": one}, "outputs are last_hidden_state and were logits"),
        ({"logits": one, "embeds": one}, {"logits": one, "embeds": two}, r"\(embeds\) have shape \[2\] and had \[1\]"),
        ({"embeds": 0 * one}, {"embeds": one}, r"\(embeds\) were all zero"),
    ]
    for before, after, message in cases:
        with pytest.raises(PromiseError, match=message):
            measured_change(plan, before, after, 1e-5)
        assert measured_change(plan.model_copy(update={"promise": "none"}), before, after, 1e-5) is None
    with pytest.raises(PromiseError, match=r"1 of 2 values of embeds are not finite on the probe after"):
        measured_change(plan, {"embeds": two}, {"embeds": two / torch.tensor([0, 1])}, 1e-5)
