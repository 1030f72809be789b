"""SegFormers and ResNets: what is cut is what is masked, layer by layer, and costs what the formulas say."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auxin.accounting import flops_per_token
from auxin.edits import Plan, apply
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.planning.cutting import cut
from oracles import trajectory as oracle
from tiny_models import InDouble, logits, tiny

SEGFORMER, RESNET = "segformer.stages.{}.blocks.{}", "resnet.encoder.stages.{}.layers.{}"


def cut_of(model: Any, keep: dict[tuple[str, str], list[int]]) -> Any:
    made = copy.deepcopy(model)
    apply(Plan(method="cut", promise="none", edits=cut(model, keep).edits), made)
    return made


def gone(kept: list[int], units: int, entries: int = 1) -> list[int]:
    return [unit * entries + one for unit in range(units) if unit not in kept for one in range(entries)]


@st.composite
def some(draw: Any, units: int) -> list[int]:
    return sorted(draw(st.sets(st.integers(0, units - 1), min_size=1)))


@settings(max_examples=8)
@given(
    heads=st.tuples(some(2), some(3)),
    units=st.tuples(some(16), some(12)),
)
def test_a_segformer_without_units_is_the_one_that_reads_the_others_alone(heads, units):
    model = tiny("segformer")
    keep, zeros = {}, {}
    for stage, (of_heads, of_units) in enumerate(zip(heads, units, strict=True)):
        layer = SEGFORMER.format(stage, 0)
        keep |= {("query", layer): of_heads, ("ffn", layer): of_units}
        zeros[f"{layer}.attention.o_proj.weight"] = (1, gone(of_heads, (2, 3)[stage], 4))
        zeros[f"{layer}.mlp.fc2.weight"] = (1, gone(of_units, (16, 12)[stage]))
    if all(len(kept) == count for kept, count in zip((*heads, *units), (2, 3, 16, 12), strict=True)):
        return
    made = cut_of(model, keep)
    with InDouble():
        masked = oracle.without(model, {name: found for name, found in zeros.items() if found[1]})
        torch.testing.assert_close(logits(made), logits(masked), rtol=0, atol=1e-11)
    sizes = anatomy(made).sizes
    for stage in range(2):
        assert sizes.units("query", SEGFORMER.format(stage, 0)) == len(heads[stage])
        assert sizes.units("ffn", SEGFORMER.format(stage, 0)) == len(units[stage])
    assert made.get_submodule(f"{SEGFORMER.format(0, 0)}.mlp.dwconv.dwconv").groups == len(units[0])


@settings(max_examples=8)
@given(kept=some(12), bottleneck=st.booleans())
def test_a_resnet_without_channels_is_the_one_that_reads_the_others_alone(kept, bottleneck):
    model = tiny("resnet bottlenecks" if bottleneck else "resnet")
    layer, last, units = RESNET.format(1, 0), 2 if bottleneck else 1, 3 if bottleneck else 12
    kept = [unit for unit in kept if unit < units] or [0]
    if len(kept) == units:
        return
    made = cut_of(model, {("ffn", layer): kept})
    zeros = {f"{layer}.layer.{last}.convolution.weight": (1, gone(kept, units))}
    torch.testing.assert_close(logits(made), logits(oracle.without(model, zeros)), rtol=0, atol=1e-12)
    norm, old = (one.get_submodule(f"{layer}.layer.{last - 1}.normalization") for one in (made, model))
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(norm, name), getattr(old, name)[kept])
    # Of the other blocks, and of what a bottleneck has before, nothing goes.
    same = [name for name, tensor in made.named_parameters() if tensor.shape == model.get_parameter(name).shape]
    assert len(list(made.parameters())) - len(same) == 4


def test_the_flops_of_a_resnet_are_those_of_its_convolutions():
    model = tiny("resnet")
    made = cut_of(model, {("ffn", RESNET.format(0, 1)): [0, 1, 5]})
    # 16 pixels, 8 behind the first convolution, 4 behind the pooling, in the first stage and 2 in the second one.
    blocks = [(8, 8, 5, 4), (8, 3, 8, 4), (12, 12, 8, 2)]
    products = 5 * 3 * 7 * 7 * 8 * 8 + sum(9 * side**2 * hidden * (read + out) for out, hidden, read, side in blocks)
    shortcuts = 8 * 5 * 4 * 4 + 12 * 8 * 2 * 2
    assert flops_per_token(made, 1).forward == 2 * (products + shortcuts + 12 * 3)


def test_stages_have_widths_of_their_own():
    body = anatomy(tiny("segformer"))
    first, second = (stack.path for stack in body.stacks)
    assert [body.sizes.at(scope).residual for scope in (first, second)] == [8, 12]
    assert [body.sizes.at(scope).query_heads for scope in (first, second)] == [2, 3]
    assert body.sizes.units("ffn", f"{first}.1") == 16
    # Alike or not, every stage has a stream of its own.
    alike = tiny("segformer", hidden_sizes=[8, 8], num_attention_heads=[2, 2])
    assert set(anatomy(alike).scopes("residual")) == {first, second}


@pytest.mark.parametrize("family", ["segformer", "resnet"])
def test_the_streams_between_stages_stay(family):
    with pytest.raises(PlanError, match="each stage has a residual stream of its own"):
        cut(tiny(family), {("residual", ""): [0, 1, 2, 3]})
