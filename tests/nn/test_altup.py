"""The bricks of AltUp alone: the equations, blocks that stay equal to the bit, Gemma 3n's form, and modules that stay
what they are."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Gemma3nTextConfig
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextAltUp

from auxin.errors import ConfigError
from auxin.nn.altup_layer import AltUpLayer
from auxin.nn.altup_updates import AltUp, DynamicAltUp, mixed_by_product, mixed_by_sums
from auxin.nn.extension import extended, extended_class
from auxin.nn.wide_stream import (
    BlockNorm,
    CollapsedInput,
    ParallelEmbeddings,
    WideEmbedding,
    WideLinear,
    as_streams,
    block_distance,
    collapsed,
)
from oracles import altup as oracle
from tiny_models import InDouble

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


class Layer(nn.Module):
    """A layer with its residual sum; a token sees those before it. Counts its calls."""

    def __init__(self, width: int, seed: int, as_tuple: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(numbers(width, width, seed=seed) / width**0.5)
        self.as_tuple, self.calls = as_tuple, []

    def forward(self, x, scale=1.0):
        self.calls.append(tuple(x.shape))
        y = x + scale * torch.tanh(x.cumsum(-2) @ self.weight)
        return (y, "cache") if self.as_tuple else y

    def of_lists(self, block: oracle.Block) -> oracle.Block:
        with torch.no_grad():
            x = torch.tensor(block, dtype=torch.float64)
            return (x + torch.tanh(x.cumsum(-2) @ self.weight)).tolist()


def stack_of(count, blocks, width, seed, same=False, coefficients="static", scale=0.5, split=False):
    """Layers with random mixing and gains."""
    layers = []
    for number in range(count):
        layer = AltUpLayer.replacing(
            Layer(width, seed + number), blocks, 0 if same else number % blocks, split, coefficients, width
        ).double()
        with torch.no_grad():
            for key, parameter in enumerate(layer.altup.parameters()):
                parameter.add_(scale * numbers(*parameter.shape, seed=100 * seed + 10 * number + key))
        layers.append(layer)
    return layers


def run(layers, x):
    for layer in layers:
        x = layer(x)
    return x


@given(
    blocks=st.integers(2, 5),
    count=st.integers(1, 6),
    same=st.booleans(),
    split=st.booleans(),
    coefficients=st.sampled_from(["static", "dynamic"]),
    tokens=st.integers(1, 4),
    width=st.integers(1, 6),
    seed=st.integers(0, 2**20),
)
def test_a_stack_is_what_the_equations_say(blocks, count, same, split, coefficients, tokens, width, seed):
    layers = stack_of(count, blocks, width, seed, same, coefficients, split=split)
    embedded = numbers(1, tokens, blocks * width if split else width, seed=seed + 7)
    with torch.no_grad():
        got = run(layers, embedded)
    assert got.shape == (blocks, 1, tokens, width)
    if split:
        streams = [embedded[0, :, i * width : (i + 1) * width].tolist() for i in range(blocks)]
    else:
        streams = [embedded[0].tolist() for _ in range(blocks)]
    for layer in layers:
        mix, plain = layer.altup, layer.of_lists
        if coefficients == "static":
            p = (torch.eye(blocks, dtype=torch.float64) + mix.prediction).tolist()
            streams = oracle.static_layer(streams, plain, mix.active, p, (1 + mix.correction).tolist())
        else:
            weights = [module.weight.tolist() for module in (mix.router_norm, mix.router, mix.prediction)]
            streams = oracle.dynamic_layer(
                streams, plain, mix.active, *weights, mix.correction.weight.tolist(), mix.eps
            )
    expected = torch.tensor(streams, dtype=torch.float64)
    error = (got[:, 0] - expected).abs().max() / expected.abs().max().clamp_min(1)
    assert error <= 1e-10
    mean = torch.tensor(oracle.mean_of_blocks(streams), dtype=torch.float64)
    torch.testing.assert_close(collapsed(got, "mean")[0], mean, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("coefficients", ["static", "dynamic"])
@pytest.mark.parametrize("blocks", [2, 3, 4, 5, 7])
def test_equal_blocks_stay_equal_to_the_bit(blocks, coefficients, dtype):
    """At the identity each block is what the layers alone make, and so is the mean, also where 1/K is rounded."""
    layers = [layer.to(dtype) for layer in stack_of(6, blocks, 8, 3, coefficients=coefficients, scale=0.0)]
    x = numbers(2, 5, 8, seed=1, dtype=dtype)
    plain = x
    with torch.no_grad():
        for layer in layers:
            plain = Layer.forward(layer, plain)
        got = run(layers, x)
        for block in got:
            assert torch.equal(block, plain)
        assert torch.equal(collapsed(got, "mean"), plain)
        assert block_distance(got) < 1e-7


@pytest.mark.parametrize("coefficients", ["static", "dynamic"])
def test_the_order_of_the_equations_would_round(coefficients):
    """Where a layer takes most of the stream away, x + (y - x) is not y."""
    (layer,) = stack_of(1, 3, 1, 0, coefficients=coefficients, scale=0.0)
    streams, output = torch.ones(3, 1, 1, 1), torch.full((1, 1, 1), 1e-9)
    assert not torch.equal(streams[0] + (output - streams[0]), output)
    assert torch.equal(layer.float().altup.correct(streams, output), output.expand(3, 1, 1, 1))


@pytest.mark.parametrize("scale", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_is_the_same(dtype, scale):
    torch.compiler.reset()
    mix = AltUp(3, 1, dtype=torch.float64)
    with torch.no_grad():
        mix.prediction.copy_(scale * numbers(3, 3, seed=1))
        mix.correction.copy_(scale * numbers(3, seed=2))
    mix.to(dtype)
    streams, output = numbers(3, 2, 4, 8, dtype=dtype), numbers(2, 4, 8, seed=3, dtype=dtype)
    if not scale:
        streams = streams[:1].expand(3, 2, 4, 8)
    branches = []

    def correct(streams, output):
        branches.append(torch.compiler.is_compiling())
        return mix.correct(streams, output)

    compiled = torch.compile(correct, backend="aot_eager", fullgraph=False)(streams, output)
    eager = mix.correct(streams, output)
    assert branches
    torch.testing.assert_close(compiled, eager, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
    if not scale:
        assert torch.equal(compiled, output.expand(3, 2, 4, 8))
        assert torch.equal(eager, compiled)
    gradients = []
    for result in (compiled, eager):
        mix.zero_grad()
        result.float().square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in mix.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-4)


def test_compiled_layers_are_the_same_function():
    torch.compiler.reset()
    layers = nn.Sequential(*stack_of(3, 3, 4, 5))
    x = numbers(2, 3, 4, seed=2)
    compiled = torch.compile(layers, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layers(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("coefficients", ["static", "dynamic"])
def test_gradients(coefficients):
    layers = stack_of(3, 3, 2, 1, coefficients=coefficients)
    parameters = [p for layer in layers for p in layer.parameters()]

    def function(x, *values):
        result = x
        for layer, start in zip(layers, range(0, len(values), len(values) // 3), strict=True):
            names = [name for name, _ in layer.named_parameters()]
            named = dict(zip(names, values[start : start + len(names)], strict=True))
            result = torch.func.functional_call(layer, named, (result,))
        return collapsed(result, "mean")

    x = numbers(1, 2, 2, seed=5).requires_grad_()
    with InDouble():
        assert torch.autograd.gradcheck(function, (x, *parameters), atol=1e-6)


@pytest.mark.parametrize("blocks", [2, 4])
def test_each_layer_is_called_once_on_one_block(blocks):
    layers = stack_of(5, blocks, 4, 0)
    run(layers, numbers(3, 2, 4))
    assert [layer.calls for layer in layers] == [[(3, 2, 4)]] * 5


def test_what_a_layer_takes_and_gives_beside_streams_goes_through():
    layer = AltUpLayer.replacing(Layer(4, 0, as_tuple=True).double(), 2, 0)
    x = numbers(1, 3, 4)
    streams, cache = layer(x, scale=0.0)
    assert cache == "cache"
    assert torch.equal(streams, x.expand(2, 1, 3, 4))


def gemma(blocks=4, width=16, active=0, clip=120.0, spread=1.0):
    """transformers' module with random weights, and ours with the same."""
    config = Gemma3nTextConfig(
        hidden_size=width, altup_num_inputs=blocks, altup_active_idx=active, altup_coef_clip=clip, rms_norm_eps=1e-5
    )
    theirs = Gemma3nTextAltUp(config).double()
    theirs.router_input_scale = torch.tensor(width**-1.0, dtype=torch.float64)
    ours = DynamicAltUp(blocks, active, width, eps=1e-5, clip=clip).double()
    pairs = [
        (ours.router_norm, theirs.router_norm),
        (ours.router, theirs.modality_router),
        (ours.prediction, theirs.prediction_coefs),
        (ours.correction, theirs.correction_coefs),
    ]
    with torch.no_grad():
        for seed, (one, other) in enumerate(pairs):
            value = numbers(*other.weight.shape, seed=seed)
            value = value if seed != 1 else width * value  # so that tanh is far from linear
            value = value if seed < 2 else spread * value
            other.weight.copy_(value)
            one.weight.copy_(value)
    return ours, theirs


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("blocks", "active", "spread"), [(4, 0, 1.0), (3, 2, 1.0), (4, 0, 100.0)])
def test_dynamic_coefficients_are_those_of_gemma_3n(blocks, active, spread, training):
    ours, theirs = (module.train(training) for module in gemma(blocks, 16, active, spread=spread))
    streams, output = numbers(blocks, 2, 5, 16, seed=8), numbers(2, 5, 16, seed=9)
    clipped = max(ours.prediction.weight.abs().max(), ours.correction.weight.abs().max()) > 120
    assert clipped == (spread > 1)
    with torch.no_grad(), InDouble():
        expected = theirs.predict(streams)
        state, seen = ours.predict(streams)
        corrected, expected_corrected = ours.correct(expected, output), theirs.correct(expected, output)
    same = [(state, expected), (seen, expected[active]), (corrected, expected_corrected)]
    for got, wanted in same:
        error = ((got - wanted).abs().max() / wanted.abs().max()).item()
        if clipped and not training:
            # There transformers clips in training alone, here wherever they are used.
            assert error > 1e-3
        else:
            assert error <= 1e-12


def test_the_clip_is_of_what_is_used_not_of_what_is_stored():
    ours, _ = gemma(spread=100.0)
    before = ours.prediction.weight.clone()
    ours.train().predict(numbers(4, 1, 2, 16))
    assert torch.equal(ours.prediction.weight, before)


@pytest.mark.parametrize("blocks", [2, 3, 4])
def test_the_numbers_of_parameters(blocks):
    width = 6
    count = [
        sum(p.numel() for p in module.parameters()) for module in (AltUp(blocks, 0), DynamicAltUp(blocks, 0, width))
    ]
    assert count == [blocks**2 + blocks, blocks**3 + blocks**2 + width * (blocks + 1)]


def test_decay_of_what_is_stored_pulls_to_the_identity():
    (layer,) = stack_of(1, 3, 4, 0)
    optimizer = torch.optim.AdamW(layer.altup.parameters(), lr=1.0, weight_decay=0.1)
    before = [parameter.detach().clone() for parameter in layer.altup.parameters()]
    for parameter in layer.altup.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, old in zip(layer.altup.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), 0.9 * old)
    with torch.no_grad():
        for parameter in layer.altup.parameters():
            parameter.zero_()
    x = numbers(3, 1, 2, 4)
    added = Layer.forward(layer, x[0]) - x[0]
    torch.testing.assert_close(layer(x), x + added)


@pytest.mark.parametrize("blocks", [2, 3])
def test_with_all_gains_1_the_gradient_of_mixing_sums_to_zero(blocks):
    """x'_i = xh_i - xh_a + y: what is added to all rows of p changes nothing, so that sum_i dLoss/dp_ij = 0."""
    layers = stack_of(3, blocks, 3, 2)
    with torch.no_grad():
        for layer in layers:
            layer.altup.correction.zero_()
    result = run(layers, numbers(blocks, 2, 3, 3, seed=4))
    (numbers(blocks, 2, 3, 3, seed=5) * torch.tanh(result)).sum().backward()
    for layer in layers:
        assert layer.altup.prediction.grad.abs().max() > 1e-2
        sums = layer.altup.prediction.grad.sum(0)
        torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-12)


@pytest.mark.parametrize("blocks", [2, 3, 4])
def test_equal_blocks_and_their_mean_make_columns_of_gradients_equal(blocks):
    """dLoss/dp_ij is the product with x_j, the same for all j; behind the last layer all blocks are read alike."""
    layers = stack_of(4, blocks, 3, 2, scale=0.0)
    (numbers(2, 3, 3, seed=5) * torch.tanh(collapsed(run(layers, numbers(2, 3, 3, seed=4)), "mean"))).sum().backward()
    for layer in layers:
        gradient = layer.altup.prediction.grad
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradient, gradient[:, :1].expand_as(gradient), rtol=1e-10, atol=1e-12)
    last = layers[-1].altup.correction.grad
    assert last.abs().min() > 1e-4
    torch.testing.assert_close(last, last[:1].expand_as(last), rtol=1e-10, atol=1e-12)


def test_it_is_causal():
    layers = stack_of(4, 3, 4, 3, split=True)
    x = numbers(1, 6, 12, seed=1)
    other = x.clone()
    other[:, 3:] += 1
    with torch.no_grad():
        one, two = run(layers, x), run(layers, other)
    assert torch.equal(one[:, :, :3], two[:, :, :3])
    assert not torch.equal(one[:, :, 3], two[:, :, 3])


@pytest.mark.parametrize("mixin", [AltUpLayer, CollapsedInput])
def test_an_extended_module_stays_what_it_is(mixin):
    base = Layer(4, 0).double()
    hook = base.register_forward_hook(lambda *args: None)
    new = mixin.replacing(base, 2, 1) if mixin is AltUpLayer else mixin.replacing(base)
    assert isinstance(new, Layer)
    assert isinstance(new, mixin)
    assert type(new).__name__ == "Layer"
    assert type(new) is extended_class(mixin, Layer)
    assert new.weight is base.weight
    assert not new._forward_hooks
    assert not isinstance(base, mixin)
    assert "altup" not in dict(base.named_modules())
    hook.remove()
    x = numbers(2, 1, 3, 4)
    for other in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert type(other) is type(new)
        assert torch.equal(other(x), new(x))
        assert other.weight is not new.weight
    assert type(extended(new, mixin)) is type(new), "once is enough"


def test_what_is_no_stream_becomes_one():
    x = numbers(2, 3, 6)
    assert torch.equal(as_streams(x, 2, False), torch.stack([x, x]))
    assert torch.equal(as_streams(x, 2, True, 3), torch.stack([x[..., :3], x[..., 3:]]))
    streams = numbers(2, 1, 3, 4)
    assert as_streams(streams, 2, True, 4) is streams
    for blocks, width, message in [(4, None, "6 wide and should be 4 blocks"), (2, 6, "should be 2 x 6 = 12")]:
        with pytest.raises(ConfigError, match=message):
            as_streams(x, blocks, True, width)


def test_what_leaves_the_last_layer():
    streams = numbers(3, 2, 4, 5)
    torch.testing.assert_close(collapsed(streams, "mean"), streams.mean(0))
    assert torch.equal(collapsed(streams, "sum"), streams.sum(0))
    assert torch.equal(collapsed(streams, "concatenate"), torch.cat(list(streams), dim=-1))
    assert collapsed(streams[0], "sum") is not None
    assert torch.equal(collapsed(streams[0], "sum"), streams[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [2, 3, 5, 6, 7])
def test_the_mean_of_equal_blocks_is_that_block(blocks, dtype):
    x = numbers(50, 4, 5, seed=3, dtype=dtype)
    assert torch.equal(collapsed(x.expand(blocks, 50, 4, 5), "mean"), x)


def test_block_distance():
    x = numbers(2, 3, 4)
    assert block_distance(torch.stack([x, x])) == 0
    assert block_distance(torch.stack([x, -x])) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("over", ["blocks", "all"])
def test_norms_of_wide_streams(kind, over):
    streams = numbers(3, 2, 4, 5, seed=2)
    norm = BlockNorm(15, 3, kind, over, eps=1e-2, bias=kind == "layer", gain_offset=0.5, dtype=torch.float64)
    with torch.no_grad():
        for seed, parameter in enumerate(norm.parameters()):
            parameter.copy_(numbers(15, seed=seed))
        gain, bias = norm.weight + 0.5, norm.bias if norm.bias is not None else torch.zeros(15)
        parts = list(streams) if over == "blocks" else [torch.cat(list(streams), dim=-1)]
        width = parts[0].shape[-1]
        plain = (nn.RMSNorm if kind == "rms" else nn.LayerNorm)(width, eps=1e-2, elementwise_affine=False)
        expected = torch.cat([plain(part) for part in parts], dim=-1) * gain + bias
        torch.testing.assert_close(norm(streams), expected, rtol=1e-12, atol=1e-12)


def test_wide_tables_and_readers():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return 3 * super().forward(ids)

    for table in (nn.Embedding(7, 4, padding_idx=1), Scaled(7, 4, padding_idx=1)):
        wide = WideEmbedding.replacing(table, 3)
        assert type(wide) is type(table)
        assert (wide.embedding_dim, wide.padding_idx, tuple(wide.weight.shape)) == (12, 1, (7, 12))
        assert (table.embedding_dim, tuple(table.weight.shape)) == (4, (7, 4))
        assert wide(torch.tensor([2])).shape == (1, 12)
    assert (WideLinear.replacing(nn.Linear(4, 5, bias=False), 2).weight.shape) == (5, 8)
    for brick in (WideEmbedding, WideLinear):
        with pytest.raises(ConfigError, match=r"Conv1d is no"):
            brick.replacing(nn.Conv1d(1, 1, 1), 2)
    several = ParallelEmbeddings.replacing(nn.Embedding(7, 4), 3)
    assert several(torch.tensor([[1, 2]])).shape == (1, 2, 12)
    assert type(several).__name__ == "Embedding"


@pytest.mark.parametrize(("blocks", "active"), [(1, 0), (2, 2), (3, -1)])
def test_impossible_numbers_are_refused(blocks, active):
    with pytest.raises(ConfigError, match=f"block {active} of {blocks}"):
        AltUpLayer.replacing(Layer(4, 0), blocks, active)
    with pytest.raises(ConfigError, match="need hidden_size"):
        AltUpLayer.replacing(Layer(4, 0), 2, 0, coefficients="dynamic")


@given(blocks=st.integers(2, 6), active=st.integers(0, 5), width=st.integers(1, 9), seed=st.integers(0, 2**20))
def test_both_ways_of_mixing_are_the_same(blocks, active, width, seed):
    """As a product and as sums, up to rounding; of equal blocks and unit row sums, to the last bit the output."""
    update = AltUp(blocks, active % blocks)
    output = numbers(3, width, seed=seed + 1)
    case = (*(tensor.detach() for tensor in update.coefficients(torch.float64)), output)
    mixing, gains = case[0] + numbers(blocks, blocks, seed=seed), case[1] + numbers(blocks, seed=seed + 2)
    streams = numbers(blocks, 3, width, seed=seed + 3)
    expected = torch.einsum("ij,jtd->itd", mixing, streams) + gains[:, None, None] * output
    for way in (mixed_by_product, mixed_by_sums):
        torch.testing.assert_close(way(mixing, gains, streams, output), expected, rtol=1e-12, atol=1e-12)
        equal = way(case[0], case[1], streams[:1].expand(blocks, -1, -1), output)
        assert torch.equal(equal, output.expand(blocks, -1, -1))


@pytest.mark.parametrize("how", ["autocast", "medium"])
def test_shorter_products_do_not_round_the_streams(how):
    """Autocast and shorter products change what layers compute; the stream between them stays float32."""
    torch.manual_seed(0)
    update = AltUp(3, 1)
    with torch.no_grad():
        update.prediction.normal_(0, 0.1)
        update.correction.normal_(0, 0.1)
    streams, output = torch.randn(3, 2, 5, 64), torch.randn(2, 5, 64)
    expected = update.correct(streams, output)
    before = torch.get_float32_matmul_precision()
    try:
        if how == "medium":
            torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            found = update.correct(streams, output)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
