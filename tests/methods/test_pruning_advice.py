"""What a refusal of a method that prunes widths advises is obeyed, or refused for its size alone."""

import re
from typing import Any

import pytest
from transformers import PreTrainedModel

from auxin.errors import PlanError
from auxin.methods import methods
from auxin.planning.bench import Bench
from auxin.planning.method import estimate_plan
from capabilities import built_in
from tiny_models import tiny

OF_WIDTHS = {
    "expert-dropping",
    "fisher",
    "fluctuation",
    "magnitude",
    "minitron",
    "optin",
    "random",
    "slicegpt",
    "taylor",
    "vtrans",
    "wanda-structured",
}
TAKE_HIDDEN = {"fisher", "magnitude", "minitron", "random", "taylor", "vtrans"}
MORE_OF_EXPERTS = {"fluctuation", "wanda-structured"}
"""They score no residual, and whole experts beside what a target takes from by itself."""
FAMILIES = ("albert", "bert", "gpt2", "llama", "mixtral", "olmo", "opt")
"""Layers that are one, plain ones, several towers of names, experts, norms without gains, heads bound to the width."""
BEYOND = "Ask for at least that"
"""What is said to someone who asks for less than there can be."""


def refusal(name: str, model: PreTrainedModel, values: dict[str, Any]) -> str:
    """Why a method can't do what settings of it ask for; empty where it can."""
    method = methods()[name]
    settings = method.settings.parse(values)
    try:
        estimate_plan(method, Bench(model), settings)
    except PlanError as error:
        return str(error)
    return ""


def test_they_are_all_tried():
    pruning = {name: method for name, method in built_in().items() if method.intent == "prune"}
    others = {"axformer", "finercut", "shortgpt", "vocabulary-pruning"}
    assert pruning.keys() == OF_WIDTHS | others


@pytest.mark.parametrize("name", sorted(OF_WIDTHS))
def test_the_streams_that_a_target_out_of_reach_advises_are_taken(name):
    advised = []
    for family in FAMILIES:
        reason = refusal(name, tiny(family), {"target": {"parameters": 0.001}})
        if found := re.search(r"streams = \[(.*?)\]", reason):
            advised.append(family)
            again = refusal(name, tiny(family), {"target": {"parameters": 0.001}, "streams": found[1].split(", ")})
            assert BEYOND in again, f"{family}: {reason} Then: {again}"
            assert "streams = " not in again, f"{family}: {again}"
    assert bool(advised) == (name in TAKE_HIDDEN | MORE_OF_EXPERTS)


@pytest.mark.parametrize("name", sorted(OF_WIDTHS - {"expert-dropping", "slicegpt"}))
def test_hidden_is_advised_beside_heads_where_the_method_takes_it(name):
    """Llama's number of heads has to divide the hidden size."""
    model = tiny("llama", hidden_size=16, num_attention_heads=8, num_key_value_heads=8, head_dim=2)
    reason = refusal(name, model, {"heads": 6})
    assert "heads = 6: that many of 8" in reason
    found = re.search(r"hidden = (\d+)", reason)
    assert (found is not None) == (name in TAKE_HIDDEN)
    if found is not None:
        assert refusal(name, model, {"heads": 6, "hidden": int(found[1])}) == ""
    share = re.search(r"heads = ([\d.]+) with uniform = false", reason)[1]
    assert refusal(name, model, {"heads": float(share), "uniform": False}) == ""


@pytest.mark.parametrize("values", [{"heads": 3}, {"target": {"parameters": 0.9}, "streams": ["heads"]}])
@pytest.mark.parametrize("name", sorted(OF_WIDTHS - {"expert-dropping", "slicegpt"}))
def test_heads_that_go_with_the_residual_alone_are_refused_by_what_takes_none_of_it(name, values):
    """BERT's hidden size is heads x dimension."""
    reason = refusal(name, tiny("bert"), values)
    assert ("such as magnitude" in reason) == (name not in TAKE_HIDDEN)
    assert ("12 units" in reason) == (name in TAKE_HIDDEN)
    if name in TAKE_HIDDEN and "heads" in values:
        assert refusal(name, tiny("bert"), {**values, "hidden": 12}) == ""
