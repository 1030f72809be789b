"""Tokens are matched and merged as in loops over them; what is the same is merged without a change; none is lost."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from auxin.accounting import flops_per_token
from auxin.accounting.flops import forward_flops
from auxin.edits import Plan, apply
from auxin.edits.kinds.edit import ReplaceModule
from auxin.errors import ConfigError
from auxin.nn.altup_layer import AltUpLayer
from auxin.nn.token_merging import TokenMerging, TokenMergingLayer
from oracles import token_merging as oracle
from tiny_models import InDouble, inputs, tiny

WIDTH = 16
WORDS = ("vit", "deit", "dinov2", "dinov2 gated", "dinov2_with_registers", "audio-spectrogram-transformer")


def tokens(batch: int, length: int, seed: int = 0, width: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, width, generator=generator, dtype=torch.float64)


def merging(model, **merged: int):
    """`model` with layers that merge, by their numbers: l1=3."""
    stack = next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    edits = [
        ReplaceModule(module=f"{stack}.{name[1:]}", brick="token_merging_layer", settings={"merged": count, "kept": 1})
        for name, count in merged.items()
    ]
    made = copy.deepcopy(model)
    apply(Plan(method="by hand", promise="none", edits=edits), made)
    return made


def wide_vit(**config):
    """With 16 patches."""
    return tiny("vit", image_size=16, **config)


@settings(deadline=None)
@given(
    batch=st.integers(1, 3),
    others=st.integers(1, 11),
    kept=st.integers(0, 3),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_groups_are_those_of_loops(batch, others, kept, share, seed):
    """Also where more go than one dealing of the tokens takes."""
    x, merged = tokens(batch, kept + others, seed), min(int(share * others), others - 1)
    means, sizes, groups = TokenMerging(merged, kept)(x)
    assert means.shape == (batch, kept + others - merged, WIDTH)
    for row in range(batch):
        found = oracle.groups(x[row].numpy(), merged, kept)
        got = [(groups[row] == number).nonzero().flatten().tolist() for number in range(len(found))]
        assert got == [sorted(group) for group in found]
        assert sizes[row].tolist() == [len(group) for group in found]
        expected = np.stack([x[row].numpy()[group].mean(0) for group in found])
        np.testing.assert_allclose(means[row].numpy(), expected, rtol=1e-12, atol=1e-14)
        assert got[:kept] == [[number] for number in range(kept)], "the first tokens are left alone"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_groups_of_many_large_tokens_have_their_size_and_mean_in_16_bits(dtype):
    """With 8 bits, 256 and 1 are 256; in float16, 600 times 500 is infinite."""
    x = (500 + 30 * tokens(1, 600)).to(dtype)
    means, sizes, groups = TokenMerging(596, 1)(x)
    assert means.dtype == dtype
    assert sizes[0].tolist() == groups[0].bincount().tolist()
    assert sizes.max() > 256
    for number in range(4):
        mean = x[0].double()[groups[0] == number].mean(0)
        torch.testing.assert_close(means[0, number], mean.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


def test_autocast_matches_what_float32_does():
    x = (1 + 0.01 * tokens(2, 40)).float()  # all nearly alike, as far as bfloat16 can tell
    _, _, expected = TokenMerging(12)(x)
    with torch.autocast("cpu", torch.bfloat16):
        _, _, groups = TokenMerging(12)(x)
    assert torch.equal(groups, expected)


@pytest.mark.parametrize("merged", [1, 3, 8, 13])
def test_a_layer_is_that_of_loops(merged):
    layer = wide_vit().vit.layers[0]
    x = tokens(2, 17)
    with torch.no_grad(), InDouble():
        got = TokenMergingLayer.replacing(layer, merged)(x)
    for row in range(2):
        np.testing.assert_allclose(got[row], oracle.layer(x[row].numpy(), merged, 1, layer), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@settings(max_examples=10, deadline=None)
@given(groups=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_what_is_the_same_is_merged_without_a_change(implementation, groups, seed):
    """Whatever the numbers of equal tokens and wherever they are, as long as each group has tokens of both kinds."""
    layer = wide_vit().vit.layers[0]
    layer.attention.config._attn_implementation = implementation
    distinct = tokens(1, len(groups) + 1, seed)[0]
    generator = torch.Generator().manual_seed(seed)
    even = torch.tensor([n for n, _ in enumerate(groups)])
    odd = torch.tensor([n for n, size in enumerate(groups) for _ in range(size)])
    pad = len(odd) - len(even)
    even = torch.cat([even, even[torch.randint(len(even), (pad,), generator=generator)]])
    dealt = torch.stack([even[torch.randperm(len(even), generator=generator)], odd], dim=1).flatten()
    x = torch.cat([distinct[:1], distinct[1:][dealt]])[None]
    with torch.no_grad(), InDouble():
        # Each token at an even place has its like at an odd one, so that all of these can go.
        for merged in (1, len(even)):
            torch.testing.assert_close(TokenMergingLayer.replacing(layer, merged)(x), layer(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", WORDS)
def test_with_none_merged_all_is_as_it_was_to_the_last_bit(family):
    model = tiny(family)
    made = merging(model, l0=0, l1=0)
    assert all(isinstance(layer, TokenMergingLayer) for layer in made.modules() if hasattr(layer, "token_merging"))
    with torch.no_grad():
        assert torch.equal(made(**inputs(made)).logits, model(**inputs(model)).logits)


@pytest.mark.parametrize("family", WORDS)
def test_a_later_layer_keeps_the_groups_of_an_earlier_one(family):
    """As they come out alike: merging for good."""
    model = merging(tiny(family, image_size=16) if "audio" not in family else tiny(family), l0=3, l1=5)
    seen = []
    for module in model.modules():
        if isinstance(module, TokenMerging):
            module.register_forward_hook(lambda _, given, output: seen.append(output[2]))
    with torch.no_grad(), InDouble():
        model(**inputs(model, batch=2))
    first, second = seen
    for row in range(2):
        for group in first[row].unique():
            assert len(second[row][first[row] == group].unique()) == 1


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99))
def test_groups_do_not_depend_on_the_order_in_which_kinds_of_places_are_filled(seed):
    """Tokens at even places may change places with each other, and so may those at odd ones: the same are merged."""
    x = tokens(1, 13, seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(13)
    order[1::2] = order[1::2][torch.randperm(6, generator=generator)]
    order[2::2] = order[2::2][torch.randperm(6, generator=generator)]
    _, _, plain = TokenMerging(4)(x)
    _, _, moved = TokenMerging(4)(x[:, order])
    partition = {frozenset((plain[0] == n).nonzero().flatten().tolist()) for n in range(9)}
    assert partition == {frozenset(order[(moved[0] == n)].tolist()) for n in range(9)}


def test_flops_are_those_of_so_many_tokens_and_of_the_matching():
    model = wide_vit(num_hidden_layers=3)
    dim, units = model.config.hidden_size, model.config.intermediate_size

    def of_layer(count: int) -> float:
        return 2 * count * (4 * dim * dim + 2 * dim * units) + 4 * count * count * dim

    whole = flops_per_token(model, 17).forward
    fewer = flops_per_token(merging(model, l1=5, l2=11), 17).forward
    # Of 16 patches 8 are held against 8; where 11 go, 3 more of the 8 that are left.
    matching = 2 * dim * (8 * 8 + 8 * 8 + 4 * 4)
    assert whole - fewer == 2 * of_layer(17) - of_layer(12) - of_layer(6) - matching
    x = inputs(model)
    assert forward_flops(merging(model, l1=5, l2=11), x) == fewer * len(x["pixel_values"]), "of a sample"


def test_it_trains_and_loads_again(tmp_path):
    model = merging(wide_vit(dtype=torch.float32), l1=9)
    rows = inputs(model)
    model(**rows, labels=torch.zeros(len(rows["pixel_values"]), dtype=torch.long)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**rows).logits, model.eval()(**rows).logits)
    assert [layer.token_merging.merged for layer in again.vit.layers[1:]] == [9]


def test_what_can_not_be_merged_is_refused():
    layer = wide_vit().vit.layers[0]
    with pytest.raises(ConfigError, match=r"merges 16 of 16 tokens \(and leaves 1 alone\).*merge fewer"):
        TokenMergingLayer.replacing(layer, 16)(tokens(1, 17))
    with pytest.raises(ConfigError, match=r"merged = -1.*Give 0 or more"):
        TokenMergingLayer.replacing(layer, -1)
    merge = TokenMergingLayer.replacing(layer, 2)
    with pytest.raises(ConfigError, match="Leave the mask out"):
        merge(tokens(1, 17), torch.ones(1, 1, 17, 17))
    with pytest.raises(ConfigError, match=r"knows the names of 1 of 2 arguments of ViTLayer"):
        merge(tokens(1, 17), None, None)
    with pytest.raises(ConfigError, match=r"Linear takes no attention_mask"):
        TokenMergingLayer.replacing(nn.Linear(3, 3), 1)
    with pytest.raises(ConfigError, match="alternating updates"):
        TokenMergingLayer.replacing(AltUpLayer.replacing(layer, 2, 0), 1)
    layer.attention.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="flash_attention_2 is not told the sizes"):
        merge(tokens(1, 17))
