"""Padded batches through models with a stride along the sequence: what a text becomes depends on the text alone."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auxin.edits import apply
from auxin.errors import ConfigError
from auxin.methods.restructure.sequence_altup import SequenceAltUpSettings, plan_sequence_altup
from auxin.nn.sequence_altup import SequenceAltUpLayer
from covering import whole
from tiny_models import VOCABULARY, InDouble, change, tiny

EXACT = 1e-12
MODELS = {
    "llama": {},
    "gpt_neox": {},
    "gpt2": {"n_layer": 4},
    "tokenformer": {},
    "bloom": {"n_layer": 4},
    "falcon alibi": {},
    "mpt": {"n_layers": 4},
    "opt": {},
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 5},
}
"""Decoders whose layers are told of padding and positions in different ways: by rotations, tables, biases by distance
(of all sequences, of each one), within windows."""
DEEP = {"gpt2", "bloom", "mpt"}


def strided(family, stride, mode="altup", seed=0, **values):
    """A model with a stride in its layers 1 and 2, or all, its a1, a2 and b as after training."""
    depth = {} if family in DEEP else {"num_hidden_layers": 4}
    model = tiny(family, **depth, **MODELS.get(family, {}))
    apply(plan_sequence_altup(model, SequenceAltUpSettings(stride=stride, mode=mode, **values)), model)
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, SequenceAltUpLayer) and mode == "altup":
            torch.nn.init.normal_(layer.sequence_altup.deviations, std=0.3, generator=generator)
    return model


def batch(lengths, left, seed=1):
    """Random tokens, padding too, and the mask: sequence b has `left[b]` columns of padding before its text."""
    columns = max(before + length for before, length in zip(left, lengths, strict=True))
    ids = torch.randint(2, VOCABULARY, (len(lengths), columns), generator=torch.Generator().manual_seed(seed))
    places, first = torch.arange(columns), torch.tensor(left)[:, None]
    return ids, ((places >= first) & (places < first + torch.tensor(lengths)[:, None])).long()


def logits(model, ids, mask, start=0, **values):
    """Of the tokens from `start` on, with positions counted from the first visible token where the model takes some."""
    if "position_ids" in inspect.signature(model.forward).parameters:
        values["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, start:]
    return model(ids[:, start:], attention_mask=mask, **values)


padded = {
    "family": st.sampled_from(list(MODELS)),
    "stride": st.integers(2, 5),
    "texts": st.lists(st.tuples(st.integers(1, 9), st.integers(0, 6)), min_size=1, max_size=3),
    "eager": st.booleans(),
    "layers": st.sampled_from([[1, 2], [0, 1, 2, 3]]),
    "mode": st.sampled_from(["altup", "skip"]),
    "seed": st.integers(0, 2**20),
}


def case(family, stride, texts, eager, layers, mode, seed):
    # MPT's first layer works out biases for all.
    model = strided(family, stride, mode, seed, layers=layers[1:] if family == "mpt" else layers)
    if eager and family in ("llama", "gpt_neox", "gpt2", "tokenformer", "mistral", "gemma3_text", "opt"):
        model.set_attn_implementation("eager")  # some have one implementation alone
    lengths, left = zip(*texts, strict=True)
    return model, *batch(lengths, left, seed)


@given(**padded, token=st.integers(0, 14))
@settings(max_examples=40)
def test_no_visible_token_is_moved_by_later_or_hidden_ones(token, **values):
    model, ids, mask = case(**values)
    token %= ids.shape[1]
    other = ids.clone()
    other[:, token] = (other[:, token] + 1) % VOCABULARY
    with torch.no_grad(), InDouble():
        before = logits(model, ids, mask, use_cache=False).logits
        after = logits(model, other, mask, use_cache=False).logits
    for row, visible in enumerate(mask.bool()):
        still = visible.clone()
        if visible[token]:
            still[token:] = False
        assert torch.equal(before[row, still], after[row, still])


@given(**padded)
@settings(max_examples=40)
def test_a_padded_text_is_what_it_is_alone(**values):
    model, ids, mask = case(**values)
    with torch.no_grad(), InDouble():
        got = logits(model, ids, mask, use_cache=False).logits
        for row, visible in enumerate(mask.bool()):
            alone = ids[row, visible][None]
            expected = logits(model, alone, torch.ones_like(alone), use_cache=False).logits
            assert change(expected[0], got[row, visible]) <= EXACT


@given(**padded, cuts=st.lists(st.integers(1, 6), min_size=1, max_size=8))
@settings(max_examples=60)
def test_a_padded_batch_in_pieces_is_the_whole_batch(cuts, **values):
    """Also where the first pieces hold nothing but the padding of some."""
    model, ids, mask = case(**values)
    pieces, cache, start = [], None, 0
    with torch.no_grad(), InDouble():
        whole = logits(model, ids, mask, use_cache=False).logits
        for length in [*cuts, *[1] * ids.shape[1]]:
            end = min(start + length, ids.shape[1])
            if start < end:
                told = mask[:, :end]
                output = logits(model, ids[:, :end], told, start, past_key_values=cache, use_cache=True)
                pieces.append(output.logits)
                cache, start = output.past_key_values, end
    got, visible = torch.cat(pieces, dim=1), mask.bool()
    assert change(whole[visible], got[visible]) <= EXACT


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(
    ("family", "depth"), [("t5", {"num_layers": 3, "num_decoder_layers": 3}), ("bart", {"decoder_layers": 3})]
)
def test_a_padded_batch_for_a_decoder_that_reads_an_encoder(family, depth, eager):
    model = tiny(family, **depth)
    if eager:
        model.set_attn_implementation("eager")
    apply(plan_sequence_altup(model, SequenceAltUpSettings(stride=3, part="decoder")), model)
    ids, mask = batch([5, 7, 3, 6], [2, 0, 4, 1])
    pieces, cache = [], None
    with torch.no_grad(), InDouble():
        given = {"encoder_outputs": model.get_encoder()(ids[:, :4])}
        whole = model(decoder_input_ids=ids, decoder_attention_mask=mask, use_cache=False, **given).logits
        for start, end in ((0, 3), (3, 4), (4, 5), (5, 7)):
            told = {"decoder_attention_mask": mask[:, :end], "past_key_values": cache, "use_cache": True}
            output = model(decoder_input_ids=ids[:, start:end], **told, **given)
            pieces.append(output.logits)
            cache = output.past_key_values
        other = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % VOCABULARY], dim=1)
        moved = model(decoder_input_ids=other, decoder_attention_mask=mask, use_cache=False, **given).logits
    visible, before = mask.bool(), mask.bool() & (torch.arange(7) < 6)
    assert change(whole[visible], torch.cat(pieces, dim=1)[visible]) <= EXACT
    assert torch.equal(whole[before], moved[before])


def test_a_padded_batch_keeps_no_more_keys_than_its_longest_text_needs():
    model = strided("llama", 4)
    ids, mask = batch([11, 9, 10, 12], [1, 3, 2, 0])
    with torch.no_grad():
        cache = logits(model, ids[:, :7], mask[:, :7], use_cache=True).past_key_values
        for end in range(8, 13):
            cache = logits(model, ids[:, :end], mask[:, :end], end - 1, past_key_values=cache).past_key_values
            assert cache.layers[1].keys.shape[-2] == -(-end // 4)


WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(("family", "stride"), [("llama", 3), ("gpt_neox", 2), ("mistral", 2), ("gemma3_text", 3)])
def test_generation_from_a_padded_batch_is_that_from_each_text_alone(family, eager, way, stride):
    model = strided(family, stride)
    if eager:
        model.set_attn_implementation("eager")
    ids, mask = batch([6, 5, 3, 7], [1, 2, 4, 0])
    ways = {"max_new_tokens": 9, "min_new_tokens": 9, "pad_token_id": 0, **WAYS[way]}
    with InDouble():
        written = model.generate(ids, attention_mask=mask, **ways)[:, 7:]
        for row, visible in enumerate(mask.bool()):
            alone = ids[row, visible][None]
            expected = model.generate(alone, attention_mask=torch.ones_like(alone), **ways)
            assert torch.equal(written[row], expected[0, alone.shape[1] :])


@given(
    family=st.sampled_from(["bert", "deberta-v2", "mpnet", "t5 encoder"]),
    mode=st.sampled_from(["altup", "skip", "pool"]),
    stride=st.integers(2, 5),
    texts=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 6)), min_size=1, max_size=3),
    eager=st.booleans(),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=40)
def test_an_encoder_reads_a_padded_text_as_it_is_alone(family, mode, stride, texts, eager, seed):
    depth = {"num_layers" if family == "t5 encoder" else "num_hidden_layers": 3}
    model = tiny(family, **depth)
    apply(plan_sequence_altup(model, SequenceAltUpSettings(stride=stride, mode=mode)), model)
    if family == "bert":
        model.set_attn_implementation("eager" if eager else "sdpa")
    lengths, left = zip(*texts, strict=True)
    ids, mask = batch(lengths, left, seed)
    positions = {}
    if family in ("bert", "deberta-v2", "mpnet"):
        positions["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), InDouble():
        got = model(ids, attention_mask=mask, **positions)[0]
        for row, visible in enumerate(mask.bool()):
            alone = ids[row, visible][None]
            places = {name: torch.arange(alone.shape[1])[None] for name in positions}
            expected = model(alone, attention_mask=torch.ones_like(alone), **places)[0]
            assert change(expected[0], got[row, visible]) <= 1e-10


def test_compiled_a_padded_batch_is_the_same_in_one_graph():
    torch.compiler.reset()
    model = strided("llama", 3, layers=[1])
    ids, mask = batch([7, 5, 6], [1, 3, 2])
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = logits(model, ids, mask, use_cache=False).logits
        got = logits(run, ids, mask, use_cache=False).logits
    visible = mask.bool()
    assert change(expected[visible], got[visible]) <= 1e-5  # norms are computed in float32


def test_gradients_of_a_padded_batch_are_those_of_its_texts():
    model = strided("llama", 3).train()
    ids, mask = batch([7, 5, 6], [1, 3, 2])
    gradients = []
    for alone in (False, True):
        model.zero_grad()
        with InDouble():
            if alone:
                rows = [ids[row, visible][None] for row, visible in enumerate(mask.bool())]
                loss = sum(model(text, use_cache=False).logits.square().sum() for text in rows)
            else:
                loss = logits(model, ids, mask, use_cache=False).logits[mask.bool()].square().sum()
            loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-8, atol=1e-8 * gradient.abs().max().item())


# What can't be.


def test_hidden_anchors_of_visible_tokens_are_refused():
    model = strided("llama", 3)
    ids = torch.randint(2, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 3] = 0
    with pytest.raises(ConfigError, match=r"in sequence 1 hidden tokens .* anchor .* groups of 3.*on the left"):
        model(ids, attention_mask=mask)
    ids[0, 3] = 0  # generate() makes a mask of its own, in which this is padding
    with pytest.raises(ConfigError, match=r"in sequence 0 .*Without an attention_mask, generate\(\) hides"):
        model.generate(ids, max_new_tokens=2, min_new_tokens=2, pad_token_id=0)
    mask[1, 3:5] = torch.tensor([1, 0])  # which is no anchor, and so tells nobody anything
    other = ids.clone()
    other[1, 4] += 1
    with torch.no_grad():
        places = (mask.cumsum(1) - 1).clamp(min=0)
        got = [model(text, attention_mask=mask, position_ids=places).logits[mask.bool()] for text in (ids, other)]
    assert torch.equal(*got)


@pytest.mark.parametrize("eager", [False, True])
def test_to_write_on_behind_padding_is_refused(eager):
    """The anchor of what is written would be padding."""
    model = strided("llama", 4)
    if eager:
        model.set_attn_implementation("eager")
    ids, mask = batch([3, 7], [0, 0])
    with torch.no_grad():
        cache = logits(model, ids, mask, use_cache=True).past_key_values
        more = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        with pytest.raises(ConfigError, match="to write on, on the left"):
            model(ids[:, :1], attention_mask=more, past_key_values=cache)
    with pytest.raises(ConfigError, match="to write on, on the left"):
        model.generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("eager", [False, True])
def test_texts_packed_into_one_sequence_are_refused_where_groups_go_across(eager):
    model = strided("llama", 3)
    if eager:
        model.set_attn_implementation("eager")
    ids = torch.randint(2, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(1))
    with pytest.raises(ConfigError, match=r"several texts are packed.*sequence of its own"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), use_cache=False)
    with torch.no_grad(), InDouble():
        packed = model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]]), use_cache=False).logits
        alone = [model(ids[:, part], use_cache=False).logits for part in (slice(0, 3), slice(3, 9))]
    assert change(torch.cat(alone, dim=1), packed) <= EXACT


@whole  # making its masks takes some seconds; that such masks are refused is tested with the bricks, too
def test_flex_attention_is_refused_by_name():
    model = strided("llama", 3, layers=[0, 1])  # the others would need compiling
    model.set_attn_implementation("flex_attention")
    ids, mask = batch([7, 5], [0, 2])
    with torch.no_grad(), pytest.raises(ConfigError, match=r"which tokens attention_mask means.*= sdpa"):
        model(ids, attention_mask=mask)
