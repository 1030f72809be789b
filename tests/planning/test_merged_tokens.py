"""How many tokens each layer merges: those whose loss for what they save lies below a bound, whatever the bound."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from auxin.accounting import flops_per_token
from auxin.edits import Plan, apply
from auxin.errors import PlanError
from auxin.planning.merged_tokens import fewer_tokens, merged_counts, tokens_of_layers
from auxin.planning.target import Gauge, Target
from tiny_models import tiny


@given(
    layers=st.integers(1, 5),
    patches=st.integers(2, 12),
    seed=st.integers(0, 999),
    share=st.floats(0, 1),
)
def test_they_are_those_below_a_bound(layers, patches, seed, share):
    scores = np.random.default_rng(seed).exponential(size=(layers, patches))
    states = merged_counts(scores.tolist())
    each = scores / np.arange(layers, 0, -1)[:, None]
    bound = np.quantile(each, share)
    leaves = [[layer for layer in range(layers) if each[layer, j] <= bound] for j in range(patches)]
    expected = [sum(bool(found) and found[0] <= layer for found in leaves) for layer in range(layers)]
    if 0 < expected[-1] < 0.9 * patches:
        assert expected in states
    for before, after in zip([[0] * layers, *states], states, strict=False):
        assert sum(after) > sum(before)
        assert all(one <= other for one, other in zip(before, after, strict=True)), "nothing comes back"
    for counts in states:
        assert counts == sorted(counts), "who has left is not there later"
        assert patches - counts[-1] > 0.1 * patches
    assert states[-1][0] == states[-1][-1], "in the end all that can go go at once"


def test_a_position_goes_earlier_where_that_loses_less_for_what_it_saves():
    # Of the first position at layer 1 (of 2 layers): 2 / 2 is less than the second's 1.5 / 1.
    assert merged_counts([[2.0, 9.0, 9.0], [0.5, 1.5, 8.0]]) == [[0, 1], [1, 1], [1, 2], [2, 2]]
    # Equal ones: later layers and positions first.
    assert merged_counts([[0.0] * 3] * 2) == [[0, 1], [0, 2], [1, 2], [2, 2]]


@pytest.mark.parametrize(("family", "first", "share"), [("vit", 1, 0.7), ("dinov2_with_registers", 5, 0.9)])
def test_the_limit_is_met_and_one_step_less_would_miss_it(family, first, share):
    model = tiny(family, image_size=16, num_hidden_layers=3)
    stack = next(name for name, module in model.named_modules() if name.endswith(("layers", "encoder.layer")))
    patches = tokens_of_layers(model, stack) - first
    assert patches == 16
    scores = np.random.default_rng(3).exponential(size=(2, patches)).tolist()
    by_path = {f"{stack}.{number}": of_layer for number, of_layer in enumerate(scores, start=1)}
    gauge = Gauge(Target(flops=share), model)
    done = fewer_tokens(gauge, by_path, first, [], "by hand")
    counts = [next((e.settings["merged"] for e in done.edits if e.module == path), 0) for path in by_path]
    states = merged_counts(scores)
    assert counts in states

    def flops(counts: list[int]) -> float:
        made = tiny(family, image_size=16, num_hidden_layers=3)
        edits = [
            {
                "kind": "replace_module",
                "module": path,
                "brick": "token_merging_layer",
                "settings": {"merged": count, "kept": first},
            }
            for path, count in zip(by_path, counts, strict=True)
        ]
        apply(Plan(method="by hand", promise="none", edits=edits), made)
        return flops_per_token(made, 1).forward

    have = flops_per_token(model, 1).forward
    place = states.index(counts)
    assert flops(counts) <= share * have
    assert flops(states[place - 1] if place else [0, 0]) > share * have
    assert done.gauge is gauge


def test_what_can_t_be_met_is_refused():
    model = tiny("vit", image_size=16)
    scores = {"vit.layers.1": [1.0] * 16}
    with pytest.raises(PlanError, match="the smallest that by hand can reach here"):
        fewer_tokens(Gauge(Target(flops=0.3), model), scores, 1, [], "by hand")
    with pytest.raises(PlanError, match=r"images of 4 patches, and FLOPs are counted on images of 16"):
        fewer_tokens(Gauge(Target(flops=0.9), model), {"vit.layers.1": [1.0] * 4}, 1, [], "by hand")
