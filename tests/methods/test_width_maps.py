"""The maps of streams, and the weights that follow from them against dense R and C."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auxin.edits import Plan, apply
from auxin.edits.structure import config_values
from auxin.errors import PlanError
from auxin.methods.grow.hypercloning import METHOD as HYPERCLONING
from auxin.methods.grow.lemon import METHOD as LEMON
from auxin.models.anatomy import anatomy
from auxin.planning.bench import Bench
from auxin.planning.width import widen
from auxin.planning.width_maps import StreamMap, Widening, circular, drawn, head_maps, padded
from auxin.words.widths import Sizes
from oracles import width as oracle
from tiny_models import inputs, logits, tiny


@given(old=st.integers(1, 12), new=st.integers(1, 40))
def test_decoders_undo_encoders(old, new):
    for stream in (circular(old, max(old, new)), padded(old, max(old, new))):
        index = [*stream.index, *[-1] * stream.added]
        assert stream.size == len(index) == max(old, new)
        assert np.allclose(oracle.decoder(index, old) @ oracle.encoder(index, old), np.eye(old))
    copies = circular(old, 3 * old)
    assert copies.is_even
    assert copies.is_tiled
    assert copies.counts == (3,) * old


@given(
    keys=st.integers(1, 4),
    group=st.integers(1, 4),
    new_keys=st.integers(1, 12),
    new_group=st.integers(1, 8),
)
def test_query_heads_keep_their_key_value_head(keys, group, new_keys, new_group):
    sizes = Sizes(64, keys * group, keys, 4, 8)
    new_keys = max(keys, new_keys)
    if new_keys * new_group < keys * group:
        new_group = -(-keys * group // new_keys)
    if any(room * new_group < group for room in np.bincount(np.arange(new_keys) % keys)):
        with pytest.raises(PlanError, match=r"would be lost.*nearest possible"):
            head_maps(sizes, new_keys * new_group, new_keys)
        return
    query, key_value = head_maps(sizes, new_keys * new_group, new_keys)
    assert query.size == new_keys * new_group
    assert set(query.index) == set(range(keys * group))
    assert set(key_value.index) == set(range(keys))
    for place, head in enumerate(query.index):
        assert key_value.index[place // new_group] == head // group
    for head in range(keys):
        counts = query.counts[head * group : (head + 1) * group]
        assert max(counts) - min(counts) <= max(1, key_value.counts[head])


@pytest.mark.parametrize(
    ("old", "new", "query", "key_value"),
    [
        ((4, 2), (8, 4), [0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 0, 1]),  # tiled together
        ((4, 2), (4, 4), [0, 1, 2, 3], [0, 0, 1, 1]),  # every head its own: repeated next to each other
        ((4, 2), (8, 2), [0, 1, 0, 1, 2, 3, 2, 3], [0, 1]),  # inside the group
        ((4, 2), (6, 3), [0, 1, 2, 3, 0, 1], [0, 1, 0]),  # two groups become three
        ((4, 4), (6, 6), [0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 0, 1]),
        ((4, 1), (8, 1), [0, 1, 2, 3, 0, 1, 2, 3], [0]),  # a single one stays single
    ],
)
def test_head_maps_of_the_known_cases(old, new, query, key_value):
    maps = head_maps(Sizes(64, *old, 4, 8), *new)
    assert [list(stream.index) for stream in maps] == [query, key_value]


def test_a_lost_head_is_refused_with_the_nearest_numbers():
    with pytest.raises(
        PlanError,
        match=r"head 5 would be lost.*room for 2 of the 3.*num_attention_heads = 9 with num_key_value_heads = 3",
    ):
        head_maps(Sizes(64, 6, 2, 4, 8), 6, 3)


def state(model):
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def closest(new, expected):
    assert new.keys() == expected.keys()
    for name, weight in new.items():
        assert weight.shape == expected[name].shape, name
        assert np.allclose(weight, expected[name], rtol=1e-13, atol=1e-13), name


LLAMA = {"d": 16, "heads": 4, "keys": 2, "dim": 4, "ffn": 12}
TILED = ([*range(16)] * 3, [*range(4)] * 3, [0, 1] * 3, [*range(12)] * 3)


@pytest.mark.parametrize("tied", [False, True])
def test_hypercloned_llama_is_r_w_c(tied):
    model = tiny("llama", tie_word_embeddings=tied)
    old = state(model)
    apply(HYPERCLONING.plan(Bench(model), HYPERCLONING.settings(factor=3)), model)
    closest(state(model), oracle.llama(old, oracle.Maps(*TILED, LLAMA), tied))


@pytest.mark.parametrize("tied", [False, True])
def test_hypercloned_gpt2_is_r_w_c(tied):
    model = tiny("gpt2", tie_word_embeddings=tied)
    old = state(model)
    apply(HYPERCLONING.plan(Bench(model), HYPERCLONING.settings(factor=3)), model)
    sizes = {**LLAMA, "keys": 4}
    maps = oracle.Maps([*range(16)] * 3, [*range(4)] * 3, [*range(4)] * 3, [*range(12)] * 3, sizes)
    closest(state(model), oracle.gpt2(old, maps, tied))


def test_hypercloned_gpt_neox_is_r_w_c():
    model = tiny("gpt_neox")
    old = state(model)
    apply(HYPERCLONING.plan(Bench(model), HYPERCLONING.settings(factor=2)), model)
    sizes = {"d": 32, "heads": 4, "keys": 4, "dim": 8, "ffn": 12}
    maps = oracle.Maps([*range(32)] * 2, [*range(4)] * 2, [*range(4)] * 2, [*range(12)] * 2, sizes)
    closest(state(model), oracle.gpt_neox(old, maps))


def test_arbitrary_maps_are_r_w_c():
    model = tiny("llama")
    old = state(model)
    body = anatomy(model)
    query, key_value = head_maps(body.sizes, 8, 4, chosen=[1, 1])
    ffn, residual = [*range(12), 5, 5, 0], [*range(16), 3, 3, 9, 0, 1, 2, 3, 15]
    widening = Widening(StreamMap(16, tuple(residual)), query, key_value, {"ffn": StreamMap(12, tuple(ffn))}, 4)
    with pytest.raises(PlanError, match="unequal copies"):
        widen(body, widening)
    widened = widen(body, widening, approximate=True)
    assert widened.promise == "approximate"
    before = logits(model)
    values = config_values(model.config)
    plan = Plan(method="maps", promise=widened.promise, edits=widened.edits, made_for=values)
    apply(plan, model, probe=inputs(model))
    maps = oracle.Maps(residual, [0, 1, 2, 3, 2, 3, 2, 3], [0, 1, 1, 1], ffn, LLAMA)
    closest(state(model), oracle.llama(old, maps, tied=False))
    assert (logits(model) - before).abs().max() > 0.01 * before.abs().max()


def test_lemon_llama_is_eta_r_w_c_but_for_the_free_columns():
    model = tiny("llama")
    old = state(model)
    settings = LEMON.settings(hidden_size=40, num_attention_heads=8, num_key_value_heads=4, intermediate_size=20)
    apply(LEMON.plan(Bench(model), settings.model_copy(update={"split_noise": 0.0})), model)
    residual = [*range(16), *range(16), *[-1] * 8]
    ffn = [unit % 12 for unit in range(20)]
    maps = oracle.Maps(residual, [*range(4)] * 2, [0, 1, 0, 1], ffn, LLAMA)
    eta = np.sqrt(32 / 40)
    expected = oracle.llama(old, maps, tied=False, gain=eta)
    new = state(model)
    for name in expected:
        free = name.endswith("norm.weight") or expected[name].shape[-1] == 40
        stop = 32 if free and "bias" not in name and "embed" not in name else None
        assert np.allclose(new[name][..., :stop], expected[name][..., :stop], rtol=1e-13, atol=1e-13), name
    assert model.config.rms_norm_eps == pytest.approx(1e-2 * 32 / 40, rel=1e-15)
    # The free columns are as large as their neighbours: zeros would never learn.
    columns = new["model.layers.0.mlp.up_proj.weight"]
    assert 0.5 < columns[:, 32:].std() / columns[:, :32].std() < 2


def test_lemon_gpt2_pads_with_the_mean():
    model = tiny("gpt2")
    old = state(model)
    settings = LEMON.settings(hidden_size=24, num_attention_heads=6, split_noise=0.0)
    apply(LEMON.plan(Bench(model), settings), model)
    residual = [*range(16), *[-1] * 8]
    heads = [0, 1, 2, 3, 0, 1]
    maps = oracle.Maps(residual, heads, heads, [*range(12)], {**LLAMA, "keys": 4})
    zeros, maps.Rr = maps.Rr, oracle.mean_encoder(1, 8, 16)
    expected = oracle.gpt2(old, maps, tied=True, gain=np.sqrt(16 / 24), offsets=zeros)
    new = state(model)
    for name in expected:
        rows, columns = expected[name].shape if expected[name].ndim == 2 else (None, None)
        if "ln_" in name:
            assert np.allclose(new[name][:16], expected[name][:16], rtol=1e-13), name
            if name.endswith("bias"):
                assert not new[name][16:].any()
        elif "c_attn.weight" in name or "c_fc.weight" in name:
            assert rows == 24
            assert np.allclose(new[name][:16], expected[name][:16], rtol=1e-13, atol=1e-13), name
        else:
            assert np.allclose(new[name], expected[name], rtol=1e-13, atol=1e-13), name
    assert columns is None or columns > 0


def test_uneven_shares_add_up():
    model = tiny("llama")
    old = state(model)["model.layers.1.mlp.up_proj.weight"]
    apply(HYPERCLONING.plan(Bench(model), HYPERCLONING.settings(factor=2, variant="noisy", snr_db=6.0)), model)
    new = state(model)["model.layers.1.mlp.up_proj.weight"]
    for rows in (new[:12], new[12:]):
        assert np.allclose(rows[:, :16] + rows[:, 16:], old, atol=1e-14)
    noise = new[:, :16] - np.tile(old, (2, 1)) / 2
    # Two shares of zero-sum noise have half the variance of the noise that was drawn.
    expected = 10 ** (-6 / 20) * np.sqrt((old / 2).std() ** 2) / np.sqrt(2)
    assert noise.std() == pytest.approx(expected, rel=0.2)
    assert not np.allclose(new[:12], new[12:])


def test_diagonal_is_a_block_diagonal():
    model = tiny("gpt2")
    old = state(model)["transformer.h.0.attn.c_attn.weight"]
    apply(HYPERCLONING.plan(Bench(model), HYPERCLONING.settings(factor=2, variant="diagonal")), model)
    new = state(model)["transformer.h.0.attn.c_attn.weight"]
    for part in range(3):
        q, wide = old[:, 16 * part :][:, :16], new[:, 32 * part :][:, :32]
        assert np.allclose(wide, np.kron(np.eye(2), q), atol=1e-14)


def test_drawn_keeps_the_old_units_first():
    stream = drawn(4, 7, [2, 2, 0])
    assert stream.index == (0, 1, 2, 3, 2, 2, 0)
    assert stream.counts == (2, 1, 3, 1)
    assert not stream.is_even


def test_the_same_seed_gives_the_same_model():
    twice = []
    for _ in range(2):
        model = tiny("llama")
        apply(LEMON.plan(Bench(model), LEMON.settings(hidden_size=24, seed=3)), model)
        twice.append(state(model))
    assert all(np.array_equal(twice[0][name], twice[1][name]) for name in twice[0])
    model = tiny("llama")
    apply(LEMON.plan(Bench(model), LEMON.settings(hidden_size=24, seed=4)), model)
    assert any(not np.array_equal(twice[0][name], weight) for name, weight in state(model).items())
    assert torch.isfinite(logits(model)).all()
