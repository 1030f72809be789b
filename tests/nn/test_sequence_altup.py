"""The bricks of Sequence-AltUp alone: the equations, what is exact to the bit, what a strided layer is given and its
cache."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from auxin.errors import ConfigError
from auxin.nn.altup_layer import AltUpLayer
from auxin.nn.sequence_altup import SequenceAltUp, SequenceAltUpLayer
from auxin.nn.strided import argument_names, strided_arguments
from auxin.nn.strided_cache import StridedLayer, strided_cache
from auxin.nn.token_groups import Chunk, texts, visible_tokens
from oracles import sequence_altup as oracle
from tiny_models import tiny

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
factor = st.floats(-2, 2, allow_nan=False)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


class Layer(nn.Module):
    """A layer with its residual sum; a token sees those before it, or with `causal` = False all. Notes what it sees."""

    def __init__(self, width: int, seed: int = 0, as_tuple: bool = False, causal: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(numbers(width, width, seed=seed) / width**0.5)
        self.as_tuple, self.is_causal, self.shapes = as_tuple, causal, []

    def forward(self, x, attention_mask=None, position_ids=None, quiet=False):
        self.shapes.append(tuple(x.shape))
        read = x.cumsum(-2) if self.is_causal else x.sum(-2, keepdim=True)
        y = x if quiet else x + torch.tanh(read @ self.weight)
        return (y, "weights") if self.as_tuple else y


def strided(layer: nn.Module, stride: int, factors=None, mode="altup") -> SequenceAltUpLayer:
    """`layer` with a stride, its a1, a2 and b as given."""
    new = SequenceAltUpLayer.replacing(layer, stride, mode)
    if factors is not None:
        with torch.no_grad():
            new.sequence_altup.deviations.copy_(
                torch.tensor(factors, dtype=torch.float64) - torch.tensor([1.0, 0.0, 1.0])
            )
    return new


def expected(x: Tensor, layer: nn.Module, update, *args) -> Tensor:
    with torch.no_grad():
        return oracle.of_batch(x, lambda tokens, _: Layer.forward(layer, tokens), lambda s, run: update(s, run, *args))


@given(
    stride=st.integers(1, 9),
    length=st.integers(1, 20),
    factors=st.tuples(factor, factor, factor),
    mode=st.sampled_from(["altup", "skip", "pool"]),
    batch=st.integers(1, 3),
    width=st.integers(1, 5),
    seed=st.integers(0, 2**20),
)
def test_a_layer_is_what_the_equations_say(stride, length, factors, mode, batch, width, seed):
    plain = Layer(width, seed, causal=mode != "pool")
    layer = strided(plain, stride, factors if mode == "altup" else None, mode)
    x = numbers(batch, length, width, seed=seed + 1)
    with torch.no_grad():
        got = layer.eval()(x)
    update = {"altup": oracle.strided, "skip": oracle.skipping, "pool": oracle.pooling}[mode]
    other = expected(x, plain, update, stride, *(factors if mode == "altup" else ()))
    assert (got - other).abs().max() <= 1e-10 * other.abs().max().clamp_min(1)
    assert layer.shapes[-1] == (batch, -(-length // stride), width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("seed", [0, 1])
def test_with_b_1_anchors_are_exactly_what_the_layer_makes_of_them(stride, dtype, seed):
    """Whatever a1 and a2 are. With a stride of 1 all tokens are anchors."""
    plain = Layer(8, seed).to(dtype)
    layer = strided(plain, stride, (0.7, -1.3, 1.0))
    x = numbers(2, 11, 8, seed=seed, dtype=dtype)
    assert torch.equal(layer(x)[:, ::stride], plain(x[:, ::stride].contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_correction_and_mixing_it_is_the_identity(dtype):
    layer = strided(Layer(8).to(dtype), 4, (1.0, 0.0, 0.0))
    x = numbers(2, 11, 8, dtype=dtype)
    assert torch.equal(layer(x), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_predicted_by_the_anchor_alone_all_tokens_get_its_output(dtype):
    plain = Layer(8).to(dtype)
    layer = strided(plain, 4, (0.0, 1.0, 1.0))
    x = numbers(2, 11, 8, dtype=dtype)
    of_anchors = plain(x[:, ::4].contiguous())
    assert torch.equal(layer(x), of_anchors.repeat_interleave(4, dim=1)[:, :11])


def test_small_deviations_count_in_bfloat16():
    """1 + 1e-4 is 1 in bfloat16; a sum of large terms shows that it was computed otherwise."""
    plain = Layer(4)
    layer = strided(plain, 2, (1.0, 1e-4, 1.0))
    exact = layer(x := numbers(1, 8, 4).to(torch.bfloat16).double())
    low = layer.bfloat16()(x.bfloat16())
    mixed = low.double()[:, 1::2] - strided(plain.bfloat16(), 2)(x.bfloat16()).double()[:, 1::2]
    assert (low.double() - exact).abs().max() < 0.05
    assert mixed.isfinite().all()
    assert layer.sequence_altup._coefficients(torch.float32)[1].item() == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize("mode", ["altup", "skip"])
def test_it_is_causal(mode):
    layer = strided(Layer(4), 3, (0.8, 0.3, 1.2) if mode == "altup" else None, mode)
    x = numbers(1, 10, 4)
    before = layer(x)
    for token in range(10):
        changed = x.clone()
        changed[:, token] += 1
        after = layer(changed)
        assert torch.equal(after[:, :token], before[:, :token])
        moved = (after - before).abs().amax((0, 2)) > 0
        # What is no anchor moves nothing but itself.
        assert moved[token]
        assert moved.sum() == (1 if token % 3 else 10 - token if mode == "altup" else moved[token::3].sum())


def test_the_numbers_of_parameters():
    plain = Layer(8)
    for mode, count in (("altup", 3), ("skip", 0)):
        layer = strided(plain, 4, None, mode)
        assert sum(p.numel() for p in layer.parameters()) - sum(p.numel() for p in plain.parameters()) == count
    assert not strided(plain, 4).sequence_altup.deviations.any()
    assert not list(SequenceAltUp(4, "pool").parameters())


def test_decay_of_what_is_stored_pulls_to_the_anchors_delta():
    layer = strided(Layer(4), 2, (1.5, 0.5, 0.5))
    optimizer = torch.optim.AdamW([layer.sequence_altup.deviations], lr=1.0, weight_decay=0.1)
    for _ in range(100):
        layer.sequence_altup.deviations.grad = torch.zeros(3, dtype=layer.sequence_altup.deviations.dtype)
        optimizer.step()
    a1, a2, b = layer.sequence_altup._coefficients(torch.float64)
    torch.testing.assert_close(
        torch.stack([a1, a2, b]).detach(), torch.tensor([1.0, 0.0, 1.0]).double(), atol=1e-4, rtol=0
    )
    x = numbers(1, 6, 4)
    anchors = x[:, ::2].contiguous()
    delta = (Layer.forward(layer, anchors) - anchors).repeat_interleave(2, dim=1)
    torch.testing.assert_close(layer(x), x + delta, atol=1e-3, rtol=0)


def test_gradients():
    layer = strided(Layer(3), 3, (0.8, 0.3, 1.2))
    x = numbers(2, 7, 3).requires_grad_()

    def run(x, deviations, weight):
        values = {"sequence_altup.deviations": deviations, "weight": weight}
        return torch.func.functional_call(layer, values, (x,))

    weights = (layer.sequence_altup.deviations.detach().double().requires_grad_(), layer.weight)
    assert torch.autograd.gradcheck(run, (x, *weights))
    layer(x).square().sum().backward()
    assert (layer.sequence_altup.deviations.grad != 0).all()


def test_what_a_layer_takes_and_gives_beside_tokens_goes_through():
    layer = strided(Layer(4, as_tuple=True), 2)
    x = numbers(1, 6, 4)
    result = layer(x, None, torch.arange(6)[None], quiet=True)
    assert result[1] == "weights"
    torch.testing.assert_close(result[0], x)
    assert argument_names(layer) == ("attention_mask", "position_ids", "quiet")


def test_names_are_found_behind_what_passes_on():
    assert argument_names(tiny("llama").model.layers[0])[:2] == ("attention_mask", "position_ids")
    assert argument_names(tiny("tokenformer").model.layers[0]) == ("attention_mask",)

    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, *args, **kwargs):
            return self.inner(x, *args, **kwargs)

    assert argument_names(Around(Layer(4))) == argument_names(Layer(4))
    assert argument_names(Around(nn.Identity())) == ()


def test_an_extended_layer_stays_what_it_is():
    plain = Layer(4)
    layer = strided(plain, 4)
    assert isinstance(layer, Layer)
    assert type(layer).__name__ == "Layer"
    assert {name for name, _ in layer.named_parameters()} == {"weight", "sequence_altup.deviations"}
    x = numbers(1, 6, 4)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    other = strided(layer, 2)
    assert type(other) is type(layer)
    assert other.sequence_altup.stride == 2
    assert "stride=4" in repr(layer)
    assert "mode=skip" in repr(strided(plain, 4, None, "skip"))


# What belongs to anchors.


@given(stride=st.integers(1, 6), seen=st.integers(0, 13), length=st.integers(1, 12))
def test_a_chunk_knows_its_anchors(stride, seen, length):
    chunk = Chunk(stride, seen, length)
    tokens = torch.arange(seen, seen + length)
    anchors = [token for token in tokens.tolist() if token % stride == 0]
    assert chunk.anchors(tokens, 0).tolist() == anchors
    assert chunk.groups == len(anchors)
    assert chunk.slots == -(-(seen + length) // stride)
    assert chunk.offset == seen % stride
    assert chunk.continues == (seen % stride > 0)
    assert chunk.total == seen + length


@given(
    stride=st.integers(1, 6),
    starts=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    seen=st.integers(0, 9),
    length=st.integers(1, 12),
)
def test_a_chunk_of_padded_sequences_knows_the_anchors_of_each(stride, starts, seen, length):
    """Against the definition: token s + j k is an anchor of a text that begins at s."""
    starts = [min(start, seen + length - 1) for start in starts]
    visible = torch.arange(seen + length) >= torch.tensor(starts)[:, None]
    chunk = Chunk.of(texts(visible, stride, len(starts), seen + length), stride, seen, length)
    tokens = torch.arange(seen, seen + length).expand(len(starts), -1)
    expected = [[t for t in range(seen, seen + length) if t >= s and (t - s) % stride == 0] for s in starts]
    slots = [[t for t in range(seen + length) if (t - s) % stride == 0] for s in starts]
    assert chunk.slots == max(map(len, slots))
    for row, anchors in enumerate(expected):
        got = chunk.anchors(tokens, 1)[row].tolist()
        # Before the text they are padding. So are those that take the place of missing ones, in a first call.
        assert [t for t in got if t >= starts[row]][: len(anchors)] == anchors
        assert seen or set(got) - set(anchors) <= set(range(starts[row]))
        if chunk.starts is not None:
            keys, held = chunk.key_tokens()
            at = [slot for slot in chunk.new_slots()[row].tolist() if slot < len(slots[row])]
            assert seen == 0 or keys[row][held[row]].tolist() == slots[row]
            assert seen == 0 or [slots[row][slot] for slot in at] == [t for t in slots[row] if t >= seen]
            assert sorted(chunk.order()[row].tolist()) == list(range(length)) or seen


@given(
    stride=st.integers(1, 6),
    seen=st.integers(0, 13),
    length=st.integers(1, 12),
    heads=st.integers(1, 2),
    boolean=st.booleans(),
)
def test_arguments_are_those_of_anchors(stride, seen, length, heads, boolean):
    chunk = Chunk(stride, seen, length)
    rows = [i - seen for i in range(seen, seen + length) if i % stride == 0]
    columns = [j for j in range(seen + length) if j % stride == 0]
    square = numbers(2, heads, length, seen + length)
    mask = square > 0 if boolean else square
    slopes, longest = numbers(2 * heads, 1, seen + length), numbers(heads, 1, seen + length + 3)
    cos, sin, ids = numbers(1, length, 3), numbers(2, length, 3), torch.arange(seen, seen + length)[None]
    cross = numbers(2, heads, length, 5)
    got = strided_arguments(
        {
            "attention_mask": mask,
            "position_bias": square[:1],
            "alibi": slopes,
            "position_embeddings": (cos, sin),
            "position_ids": ids,
            "encoder_attention_mask": cross,
            "encoder_decoder_position_bias": cross,
            "encoder_hidden_states": cross,
            "use_cache": True,
            "past_key_values": "cache",
            "layer_past": None,
            "num_items_in_batch": torch.tensor(3),
        },
        chunk,
    )
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            assert torch.equal(got["attention_mask"][:, :, i, j], mask[:, :, row, column])
            assert torch.equal(got["position_bias"][:, :, i, j], square[:1, :, row, column])
        assert torch.equal(got["position_embeddings"][0][:, i], cos[:, row])
        assert torch.equal(got["position_embeddings"][1][:, i], sin[:, row])
        assert got["position_ids"][0, i] == seen + row
        assert torch.equal(got["encoder_attention_mask"][:, :, i], cross[:, :, row])
        assert torch.equal(got["encoder_decoder_position_bias"][:, :, i], cross[:, :, row])
    assert torch.equal(got["alibi"], slopes[..., columns])
    # MPT's are those of the longest sequence there may be, and the last ones are meant.
    last = strided_arguments({"position_bias": longest}, chunk)["position_bias"]
    assert torch.equal(last, longest[..., [column + 3 for column in columns]])
    assert got["attention_mask"].shape == (2, heads, len(rows), len(columns))
    assert got["encoder_hidden_states"] is cross
    assert (got["use_cache"], got["past_key_values"], got["layer_past"]) == (True, "cache", None)
    for_all = {"attention_mask": mask[:, :, :1], "encoder_attention_mask": cross[:, :, :1]}
    if length > 1:
        got = strided_arguments(for_all, chunk)
        assert got["attention_mask"].shape == (2, heads, 1, len(columns))
        assert torch.equal(got["encoder_attention_mask"], cross[:, :, :1])
    flat = torch.ones(2, seen + length, dtype=torch.long)
    assert strided_arguments({"attention_mask": flat}, chunk)["attention_mask"].shape == (2, len(columns))


@given(stride=st.integers(1, 6), length=st.integers(2, 12), kind=st.sampled_from(["bool", "added", "flat", "row"]))
def test_a_group_is_masked_when_all_its_tokens_are(stride, length, kind):
    shape = {"flat": (2, length), "row": (2, 1, 1, length)}.get(kind, (2, 1, length, length))
    seen = numbers(*shape, seed=stride * 100 + length) > 0.3
    mask = seen.long() if kind == "flat" else seen
    if kind in ("added", "row"):
        mask = torch.zeros(shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    got = strided_arguments({"attention_mask": mask}, Chunk(stride, 0, length), pooled=True)["attention_mask"]
    groups = [list(range(start, min(start + stride, length))) for start in range(0, length, stride)]
    seen = seen.view(2, -1, length)
    for batch in range(2):
        for i, rows in enumerate(groups if kind in ("bool", "added") else [[0]]):
            for j, columns in enumerate(groups):
                value = got[batch, j] if kind == "flat" else got[batch, 0, i, j]
                is_seen = value == 0 if kind in ("added", "row") else value
                assert bool(is_seen) == any(seen[batch, row, column] for row in rows for column in columns)
    counts = visible_tokens(mask)
    for batch in range(2):
        for token in range(length):
            assert counts[batch, token] == seen[batch, :, token].any()


def test_hidden_tokens_are_no_part_of_a_mean():
    layer = strided(Layer(3, causal=False), 3, None, "pool")
    x = numbers(2, 7, 3)
    visible = [[True] * 4 + [False] * 3, [True] * 7]
    mask = torch.tensor(visible)[:, None, None, :].expand(2, 1, 7, 7)
    for row in range(2):
        got = layer.sequence_altup.means(x, visible_tokens(mask))[row]
        groups = oracle.pooling(x[row].tolist(), lambda tokens, _: tokens, 3, visible[row])
        torch.testing.assert_close(got, torch.tensor(groups, dtype=torch.float64)[::3])
    changed = x.clone()
    changed[0, 4:] += 1
    assert torch.equal(layer(changed, mask)[0], layer(x, mask)[0])
    assert visible_tokens(None) is None
    assert visible_tokens(mask[..., :1]) is None


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.zeros(1, 8, 3), r" of shape \(1, 8, 3\)"),
        (torch.zeros(1, 9), r" of shape \(1, 9\)"),  # whatever its size is
        (torch.tensor(8), r" of shape \(\)"),
        (8, ", a int"),
        ((torch.zeros(8),), ", a tuple"),
        ("causal", ", a str"),
    ],
)
def test_arguments_that_are_not_known_are_refused_by_name(value, kind):
    with pytest.raises(ConfigError, match=rf"does not know the argument per_layer_input{kind}, and so.*Leave it out"):
        strided_arguments({"per_layer_input": value}, Chunk(4, 0, 8))
    with pytest.raises(ConfigError, match="does not know the argument per_layer_input"):
        strided(Layer(4), 2)(numbers(1, 4, 4), per_layer_input=value)


def test_what_can_belong_to_no_token_goes_through():
    given = {"per_layer_input": None, "output_per_layer": True, "rel_embeddings": torch.zeros(8, 8)}
    assert strided_arguments(given, Chunk(4, 0, 8)) == given


def test_what_has_the_wrong_size_or_is_packed_is_refused():
    chunk = Chunk(4, 0, 8)
    with pytest.raises(ConfigError, match=r"attention_mask has the shape .* expects 8 entries on its axis -1"):
        strided_arguments({"attention_mask": torch.zeros(1, 1, 8, 9)}, chunk)
    with pytest.raises(ConfigError, match="expects 8 entries on its axis -2"):
        strided_arguments({"attention_mask": torch.zeros(1, 1, 7, 8)}, chunk, pooled=True)
    with pytest.raises(ConfigError, match="which tokens cu_seq_lens_q means"):
        strided_arguments({"cu_seq_lens_q": torch.zeros(3)}, chunk)
    block = create_block_mask(lambda b, h, q, k: q >= k, None, None, 128, 128, device="cpu")
    with pytest.raises(ConfigError, match="attn_implementation = sdpa"):
        strided_arguments({"attention_mask": block}, chunk)
    padded = Chunk.of(texts(torch.tensor([[0, 1, 1], [1, 1, 1]]), 2, 2, 3), 2, 0, 3)
    with pytest.raises(ConfigError, match=r"position_embeddings has the shape \(3, 2, 3, 4\).*multiple of the stride"):
        strided_arguments({"position_embeddings": torch.zeros(3, 2, 3, 4)}, padded)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    later = Chunk.of(texts(mask, 2, 2, 3), 2, 2, 1)
    with pytest.raises(ConfigError, match=r"different numbers of tokens.*flash attention can't be told.*= sdpa"):
        strided_arguments({"attention_mask": mask}, later, flash=True)
    with pytest.raises(ConfigError, match="knows the names of 3 of 4 arguments of Layer"):
        strided(Layer(4), 2)(numbers(1, 4, 4), None, None, 1.0, None)


def test_flash_attention_gets_no_positions_that_look_like_packed_sequences():
    chunk = Chunk(2, 0, 6)
    assert strided_arguments({"position_ids": torch.arange(6)[None]}, chunk, flash=True) == {"position_ids": None}
    with pytest.raises(ConfigError, match="packed into one"):
        strided_arguments({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, chunk, flash=True)
    layer = tiny("llama").model.layers[1]
    seen = {}
    layer.self_attn.forward = lambda **kwargs: (seen.update(kwargs), (kwargs["hidden_states"], None))[1]
    layer.self_attn.config._attn_implementation = "flash_attention_2"
    strided(layer, 2)(numbers(1, 6, 16), position_ids=torch.arange(6)[None])
    assert seen["position_ids"] is None


def test_flash_attention_with_a_sliding_window_is_refused():
    """It would count the window in anchors. Not run here, where there is no flash attention."""
    for family in ("mistral", "gemma3_text"):
        model = tiny(family)
        layers = [layer for layer in model.model.layers if getattr(layer.self_attn, "sliding_window", 1) is not None]
        layers[0].self_attn.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ConfigError, match=r"the window of \d+ tokens .* = sdpa"):
            strided(layers[0], 2)(numbers(1, 6, layers[0].hidden_size))


def test_impossible_layers_are_refused():
    with pytest.raises(ConfigError, match="stride = 0"):
        SequenceAltUpLayer.replacing(Layer(4), 0)
    with pytest.raises(ConfigError, match="alternating updates"):
        SequenceAltUpLayer.replacing(AltUpLayer.replacing(Layer(4), 2, 0), 2)
    with pytest.raises(ConfigError, match="the layer is causal"):
        SequenceAltUpLayer.replacing(Layer(4), 2, "pool")
    with pytest.raises(ConfigError, match=r"\(batch, sequence, width\), given \(2, 1, 4, 4\)"):
        strided(Layer(4), 2)(numbers(2, 1, 4, 4))
    with pytest.raises(ConfigError, match="no position_bias"):
        strided(tiny("t5").encoder.block[0], 2)(numbers(1, 4, 16))


@pytest.mark.parametrize("mode", ["altup", "skip", "pool"])
def test_a_stride_longer_than_the_sequence_is_refused_in_training(mode):
    layer = strided(Layer(4, causal=False), 4, None, mode).train()
    with pytest.raises(ConfigError, match=r"stride = 4 is longer than the sequence of 3 tokens.*smaller stride"):
        layer(numbers(1, 3, 4))
    layer(numbers(1, 4, 4))
    layer.eval()(numbers(1, 3, 4))


# The cache.


class Numbered(nn.Module):
    layer_idx = 1


def test_the_part_of_a_cache_that_belongs_to_a_layer():
    for cache in (DynamicCache(), DynamicCache(config=tiny("llama").config)):
        mine = strided_cache(cache, Numbered(), 2)
        assert isinstance(mine, StridedLayer)
        assert cache.layers[1] is mine
        assert type(cache.layers[0]) is DynamicLayer
        assert strided_cache(cache, Numbered(), 2) is mine
        assert strided_cache(EncoderDecoderCache(cache, DynamicCache()), Numbered(), 2) is mine
        numbered_otherwise = nn.Identity()
        numbered_otherwise.layer_id = 1
        assert strided_cache(cache, numbered_otherwise, 2) is mine


def test_other_caches_are_refused():
    sliding = DynamicCache()
    sliding.layers = [DynamicLayer(), DynamicSlidingWindowLayer(4)]
    sliding.update(numbers(1, 1, 3, 2), numbers(1, 1, 3, 2), 1)
    filled = DynamicCache()
    for number in (0, 1):
        filled.update(numbers(1, 1, 3, 2), numbers(1, 1, 3, 2), number)
    offloaded = DynamicCache()
    offloaded.offloading = True
    for cache, kind in (
        (sliding, "DynamicCache with tokens in a DynamicSlidingWindowLayer"),
        (filled, "DynamicCache with tokens in a DynamicLayer"),
        (offloaded, "DynamicCache that is offloaded"),
        (StaticCache(config=tiny("llama").config, max_cache_len=8), "StaticLayer"),
        ((1, 2), "tuple"),
    ):
        with pytest.raises(ConfigError, match=rf"{kind}.*empty DynamicCache"):
            strided_cache(cache, Numbered(), 2)
    with pytest.raises(ConfigError, match="DynamicCache as its cache"):
        strided_cache(DynamicCache(), nn.Identity(), 2)


def test_a_strided_part_of_a_cache_follows_its_batch():
    part, tokens = StridedLayer(3), numbers(2, 3, 4)
    part.reorder_cache(torch.tensor([0]))
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    part.begin(2, 7, mask)
    part.update(tokens[:, None], tokens[:, None])
    part.advance(torch.cat([tokens[:, :1], tokens], dim=1), 2 * torch.cat([tokens[:, :1], tokens], dim=1))
    # One of seven tokens has the last anchor at 6 and the other at 4, of which it is the second.
    assert torch.equal(part.current[0], torch.stack([tokens[0, 1:2], tokens[1, 2:3]]))
    assert part.get_seq_length() == 7
    assert part.get_mask_sizes(2) == (9, 0)
    assert not part.is_croppable
    part.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(part.keys[:, 0], tokens[[1, 0]])
    assert torch.equal(part.current[0], torch.stack([tokens[1, 2:3], tokens[0, 1:2]]))
    assert part.texts.starts.tolist() == [0, 1]
    part.batch_repeat_interleave(2)
    assert torch.equal(part.current[1], 2 * tokens[[1, 1, 0, 0], [2, 2, 1, 1]][:, None])
    assert part.texts.starts.tolist() == [0, 0, 1, 1]
    part.batch_select_indices(torch.tensor([2]))
    assert torch.equal(part.current[0], tokens[[0], 1:2])
    assert part.texts.starts.tolist() == [1]
    assert torch.equal(part.values[:, 0], tokens[[0]])
    part.crop(0)
    with pytest.raises(ConfigError, match="without an assistant model"):
        part.crop(-1)
    part.reset()
    assert part.get_seq_length() == 0
    assert part.current is part.keys is part.texts is None
