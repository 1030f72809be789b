"""Products of blocks and the guides beside them, as modules."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.pytorch_utils import Conv1D

from auxin.accounting import ExecutedFlops, flops_per_token
from auxin.accounting.flops import forward_flops
from auxin.errors import PlanError
from auxin.nn.block_products import BlockDenseLinear, BlockShuffleConv1D, BlockShuffleLinear
from auxin.nn.bricks import find_brick
from auxin.nn.guide import Guided
from auxin.nn.low_rank import LowRankLinear
from auxin.nn.unmultiplied import Unmultiplied
from oracles import block_products as oracle
from tiny_models import tiny

FORMS = st.sampled_from([("block-dense", BlockDenseLinear), ("block-shuffle", BlockShuffleLinear)])


def a_linear(inputs: int, outputs: int, seed: int = 0, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)


def values_of(form: str, blocks: int, inner: int) -> dict[str, int]:
    return {"blocks": blocks, "rank": blocks * inner} if form == "block-dense" else {"blocks": blocks}


@settings(max_examples=25)
@given(form=FORMS, blocks=st.sampled_from([2, 3]), wide=st.booleans(), inner=st.integers(1, 3), seed=st.integers(0, 99))
def test_it_computes_what_the_definition_says_and_is_the_nearest(form, blocks, wide, inner, seed):
    name, cls = form
    narrow, other = 2 * blocks**2, 4 * blocks**2
    layer = a_linear(*((narrow, other) if wide else (other, narrow)), seed)
    new = cls.replacing(layer, **values_of(name, blocks, inner))
    x = torch.randn(2, 3, layer.in_features, dtype=torch.float64)
    output, given_to = new.output_factor.detach().numpy(), new.input_factor.detach().numpy()
    for place in range(3):
        if name == "block-dense":
            found = oracle.block_dense(x[1, place].numpy(), output, np.split(given_to, blocks))
        else:
            found = oracle.block_shuffle(x[1, place].numpy(), np.split(output, blocks), np.split(given_to, blocks))
        np.testing.assert_allclose(new(x)[1, place].detach().numpy(), found + layer.bias.detach().numpy(), atol=1e-12)
    torch.testing.assert_close(new(x), nn.functional.linear(x, new.weight, layer.bias), rtol=0, atol=1e-10)
    error = float((new.weight - layer.weight).detach().square().sum())
    least = oracle.least_error(layer.weight.detach().numpy(), name, blocks, blocks * inner)
    assert math.isclose(error, least, rel_tol=1e-9, abs_tol=1e-12)
    # What is of the form already is reproduced.
    again = nn.Linear(layer.in_features, layer.out_features, dtype=torch.float64)
    again.weight = nn.Parameter(new.weight.detach())
    torch.testing.assert_close(
        cls.replacing(again, **values_of(name, blocks, inner)).weight, new.weight, rtol=0, atol=1e-10
    )


def test_a_layer_of_gpt2_gives_what_the_linear_of_its_transpose_gives():
    layer = a_linear(8, 16)
    turned = Conv1D(16, 8).double()
    turned.weight, turned.bias = nn.Parameter(layer.weight.detach().mT.contiguous()), layer.bias
    x = torch.randn(5, 8, dtype=torch.float64)
    one, other = BlockShuffleLinear.replacing(layer, blocks=2), BlockShuffleConv1D.replacing(turned, blocks=2)
    torch.testing.assert_close(one(x), other(x))
    assert other.weight.shape == turned.weight.shape


@pytest.mark.parametrize(("cls", "values"), [(BlockDenseLinear, {"rank": 4}), (BlockShuffleLinear, {})])
def test_to_ask_for_the_type_of_a_weight_as_t5_does_on_every_call_costs_no_product(cls, values):
    model = tiny("t5")
    part = model.encoder.block[0].layer[1].DenseReluDense
    before, narrow = flops_per_token(model, 8).forward, part.wo.weight.numel()
    part.wo = cls.replacing(part.wo, blocks=2, **values)
    narrow -= sum(factor.numel() for factor in (part.wo.input_factor, part.wo.output_factor))
    assert flops_per_token(model, 8).forward == before - 2 * narrow
    assert type(part.wo.weight) is Unmultiplied
    x = torch.randn(2, 3, part.wi.in_features, dtype=torch.float64)
    assert torch.equal(torch.compile(part, backend="eager", fullgraph=True)(x), part(x))


@pytest.mark.parametrize("brick", ["block_dense_linear", "block_shuffle_linear"])
def test_drawn_blocks_are_orthonormal_and_follow_from_the_seed(brick):
    layer, cls = a_linear(16, 32), find_brick(brick)
    values = {"blocks": 2} | ({"rank": 8} if "dense" in brick else {})
    torch.manual_seed(1)
    new = cls.replacing(layer, start="orthogonal", **values)
    torch.manual_seed(1)
    assert torch.equal(cls.replacing(layer, start="orthogonal", **values).output_factor, new.output_factor)
    blocks = [*new.input_factor.unflatten(0, (2, -1))]
    blocks += [new.output_factor] if "dense" in brick else [*new.output_factor.unflatten(0, (2, -1))]
    for block in blocks:
        torch.testing.assert_close(
            torch.linalg.svdvals(block), torch.ones(min(block.shape), dtype=block.dtype), rtol=0, atol=1e-12
        )
    assert new.bias is layer.bias


@pytest.mark.parametrize(
    ("cls", "values", "said"),
    [
        (BlockDenseLinear, {"blocks": 3, "rank": 6}, "blocks = 3 does not divide the inputs, 16. Give 2."),
        (BlockDenseLinear, {"blocks": 4, "rank": 6}, "blocks = 4 does not divide the rank, 6. Give 2."),
        (BlockDenseLinear, {"blocks": 2, "rank": 40}, "give 2 to 16"),
        (BlockShuffleLinear, {"blocks": 8}, "multiple of 64. Give 4."),
        (BlockShuffleLinear, {"blocks": 0}, "blocks = 0 does not divide"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(cls, values, said):
    with pytest.raises(PlanError, match=said.replace(".", r"\.")):
        cls.replacing(a_linear(16, 32), **values)


@pytest.mark.parametrize(
    ("layer", "product", "said"),
    [
        (LowRankLinear.replacing(a_linear(8, 12), rank=4), "low_rank_linear", "whole matrix of a linear layer"),
        (nn.LayerNorm(8), "low_rank_linear", "whole matrix of a linear layer"),
        (a_linear(8, 12), "masked", "'masked' is no product of factors"),
        (a_linear(8, 12), "guided", "'guided' is no product of factors"),
    ],
)
def test_what_can_not_be_guided_is_refused(layer, product, said):
    with pytest.raises(PlanError, match=said):
        Guided.replacing(layer, product=product, rank=3)


def guided(layer: nn.Module, guide: str = "weight", **values: object) -> Guided:
    return Guided.replacing(layer, product="low_rank_linear", guide=guide, rank=3, **values)


@given(seed=st.integers(0, 99), strength=st.floats(0, 1))
@settings(max_examples=20)
def test_a_guided_layer_is_the_mix_of_both(seed, strength):
    layer, x = a_linear(8, 12, seed), torch.randn(2, 5, 8, dtype=torch.float64)
    new, product = guided(layer), LowRankLinear.replacing(layer, rank=3)
    assert torch.equal(new(x), layer(x))  # exactly, whatever the product
    new.set_strength(strength)
    torch.testing.assert_close(new(x), strength * layer(x) + (1 - strength) * product(x), rtol=0, atol=1e-12)
    new.set_strength(0)
    assert torch.equal(new(x), new.product(x) + layer.bias)


def test_a_guide_that_begins_as_the_product_makes_no_difference_at_any_strength():
    layer, x = a_linear(8, 12), torch.randn(5, 8, dtype=torch.float64)
    for product, values in (("low_rank_linear", {"rank": 3}), ("block_shuffle_linear", {"blocks": 2})):
        new = Guided.replacing(copy.deepcopy(layer), product=product, guide="product", **values)
        outputs = []
        for strength in (1.0, 0.4, 0.0):
            new.set_strength(strength)
            outputs.append(new(x))
        torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-12)
        torch.testing.assert_close(outputs[0], outputs[2], rtol=0, atol=1e-12)


def test_under_autocast_it_gives_the_type_that_a_linear_layer_gives():
    layer, x = a_linear(8, 12).float(), torch.randn(5, 8)
    for new in (
        guided(layer),
        LowRankLinear.replacing(layer, rank=3),
        BlockDenseLinear.replacing(layer, blocks=2, rank=4),
        BlockShuffleLinear.replacing(layer, blocks=2),
    ):
        for strength in (1.0, 0.5, 0.0):
            if isinstance(new, Guided):
                new.set_strength(strength)
            with torch.autocast("cpu", torch.bfloat16):
                assert new(x).dtype == layer(x).dtype == torch.bfloat16
            assert new(x).dtype == torch.float32


def test_gradients_are_shared_by_the_strength():
    layer, x = a_linear(8, 12), torch.randn(5, 8, dtype=torch.float64)
    new = guided(layer)
    new.set_strength(0.25)
    given_to = torch.randn(5, 12, dtype=torch.float64)
    new(x).backward(given_to)
    torch.testing.assert_close(new.weight.grad, 0.25 * given_to.mT @ x)
    through = x @ new.product.input_factor.mT
    torch.testing.assert_close(new.product.output_factor.grad, 0.75 * given_to.mT @ through)


def test_a_skipped_guide_leaves_the_product_alone_and_costs_half():
    new, x, called = guided(a_linear(8, 12), skip=True), torch.randn(5, 8, dtype=torch.float64), 0
    steps = 400
    torch.manual_seed(0)
    for step in range(steps):
        new.set_strength((1 + math.cos(math.pi * step / steps)) / 2)
        new.weight.grad = None
        new(x).sum().backward()
        called += new.weight.grad is not None
    chances = np.array([(1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)])
    assert abs(called - chances.sum()) < 3 * math.sqrt((chances * (1 - chances)).sum())
    assert math.isclose(chances.sum(), steps / 2, rel_tol=0.01)
    new.eval().set_strength(0.5)  # nothing is left to chance where nothing is learnt
    assert torch.equal(new(x), new(x))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_guide_breaks_the_plateau_of_small_factors(seed):
    """A student of rank 16, its factors drawn with 0.02, learns a random feed-forward part. Alone it stays where it is
    at first: the gradient of each factor is the other one, which is small."""

    def error(steps: int, guide: bool) -> float:
        torch.manual_seed(seed)
        teacher = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        for place in (0, 2):
            nn.init.normal_(teacher[place].weight, std=teacher[place].in_features ** -0.5)
        student = copy.deepcopy(teacher)
        for place in (0, 2):
            nn.init.zeros_(student[place].bias)
            made = Guided.replacing(student[place], product="low_rank_linear", rank=16)
            for factor in made.product.parameters():
                nn.init.normal_(factor, std=0.02)
            with torch.no_grad():
                made.weight.copy_(made.product.weight)
            student[place] = made
        x = torch.randn(4096, 64)
        wanted = teacher(x).detach()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.2, momentum=0.9)
        for step in range(steps):
            for place in (0, 2):
                student[place].set_strength((1 + math.cos(math.pi * step / 300)) / 2 if guide else 0.0)
            rows = torch.randint(4096, (256,))
            optimizer.zero_grad()
            (4 * (student(x[rows]) - wanted[rows]).square().mean()).backward()
            optimizer.step()
        # Of what the biases can't learn alone.
        return float(((student(x) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()).detach())

    assert error(100, guide=False) > 0.95
    assert error(100, guide=True) < 0.55


def in_one_graph(module: nn.Module) -> tuple[nn.Module, CompileCounterWithBackend]:
    """`module` compiled, and a counter of the graphs."""
    torch.compiler.reset()
    counted = CompileCounterWithBackend("aot_eager")
    return torch.compile(module, backend=counted, fullgraph=True), counted


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_guided_layer_compiles_in_one_graph_and_follows_the_strength(dtype):
    new, x = guided(a_linear(8, 12)).to(dtype), torch.randn(5, 8, dtype=dtype)
    with torch.no_grad():
        new.weight.normal_()
    compiled, graphs = in_one_graph(new)
    exact = {"rtol": 0, "atol": 0.05 if dtype == torch.bfloat16 else 1e-12}  # eager bfloat16 rounds thrice
    counts = []
    for strength in (1.0, 0.75, 0.3, 0.01):
        new.set_strength(strength)
        torch.testing.assert_close(compiled(x), new(x), **exact)
        counts.append(graphs.frame_count)
    assert counts == counts[:1] * 4  # compiled at the first call, and not again
    new.set_strength(0)
    assert torch.equal(compiled(x), new(x))
    assert graphs.frame_count > counts[0]
    other = copy.deepcopy(new)
    other.set_strength(0.5)
    new.load_state_dict(other.state_dict())  # the strength has come back by another way
    torch.testing.assert_close(compiled(x), other(x), **exact)
    assert (new(x) - new.product(x) - new.bias).abs().max() > 0.01
    compiled(x).sum().backward()
    assert all(parameter.grad is not None for parameter in new.parameters())


def test_a_compiled_guide_is_skipped_by_the_same_chance():
    new, x = guided(a_linear(8, 12), skip=True), torch.randn(5, 8, dtype=torch.float64)
    with torch.no_grad():
        new.weight.normal_()
    compiled, graphs = in_one_graph(new)
    new.set_strength(0.25)
    torch.manual_seed(0)
    outputs = [compiled(x)]
    first = graphs.frame_count
    outputs += [compiled(x) for _ in range(399)]
    assert graphs.frame_count == first
    mixed, alone = copy.deepcopy(new).eval()(x), new.product(x) + new.bias
    counted = [bool(torch.isclose(output, mixed, atol=1e-12).all()) for output in outputs]
    assert all(
        torch.allclose(output, mixed if with_guide else alone)
        for output, with_guide in zip(outputs, counted, strict=True)
    )
    assert abs(sum(counted) - 100) < 3 * math.sqrt(400 * 0.25 * 0.75)


def test_a_guide_that_has_faded_is_neither_computed_nor_counted():
    new = guided(a_linear(8, 12))
    x, product = torch.randn(5, 8, dtype=torch.float64), 2 * 3 * (8 + 12)

    def counted() -> float:
        return forward_flops(new, {"x": x}) / len(x)

    def executed() -> float:
        with ExecutedFlops() as counter:
            new(x)
        return counter.total / len(x)

    new.set_strength(0.5)
    assert counted() == executed() == product + 2 * 8 * 12
    new.set_strength(0)
    assert counted() == executed() == product
    again = copy.deepcopy(new)
    again.reset_buffers()
    assert forward_flops(again, {"x": x}) / len(x) == product + 2 * 8 * 12
