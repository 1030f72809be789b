"""Sequence-AltUp on whole models: the equations around each family's own layers, decoding with a cache, what it costs,
checkpoints, and what other methods make of it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, StaticCache

from auxin.accounting import flops_per_token
from auxin.edits import apply
from auxin.errors import ConfigError, PlanError
from auxin.methods import method
from auxin.methods.restructure.sequence_altup import METHOD, SequenceAltUpSettings, plan_sequence_altup
from auxin.models.anatomy import anatomy
from auxin.models.tokenformer.modeling import rotary_cos_sin
from auxin.nn.altup_layer import AltUpLayer
from auxin.nn.sequence_altup import SequenceAltUpLayer
from auxin.nn.strided_cache import StridedLayer
from auxin.planning.bench import Bench
from covering import families, whole
from oracles import sequence_altup as oracle
from tiny_models import FAMILIES, VOCABULARY, InDouble, change, inputs, labels, logits, tiny

pytestmark = pytest.mark.filterwarnings("ignore:The loss that balances")

DECODERS = [*(family for family in FAMILIES if family not in ("t5", "bert", "vit")), "gemma"]
EXACT = 1e-12
DEPTH = {"gpt2": ("n_layer",), "t5": ("num_layers", "num_decoder_layers")}


def deep(family, layers=4, **values):
    """A tiny model of `family` with more layers than usual."""
    return tiny(family, **dict.fromkeys(DEPTH.get(family, ("num_hidden_layers",)), layers), **values)


def strided(model, seed=5, **values):
    """`model` with a stride, its a1, a2 and b as after training; those of each layer others."""
    apply(plan_sequence_altup(model, SequenceAltUpSettings.parse(values)), model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in strided_layers(model):
            if layer.sequence_altup.deviations is not None:
                layer.sequence_altup.deviations.copy_(0.3 * torch.randn(3, generator=generator, dtype=torch.float64))
    return model


def strided_layers(model):
    return [module for module in model.modules() if isinstance(module, SequenceAltUpLayer)]


def ids(batch, length, seed=1):
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


# The equations, around layers of real models that are given masks and positions from elsewhere.


def update_of(layer, visible=None):
    """The update of one layer of a strided model, as the oracle takes it."""
    stride, mode = layer.sequence_altup.stride, layer.sequence_altup.mode
    if mode == "skip":
        return lambda x, run: oracle.skipping(x, run, stride)
    if mode == "pool":
        rows = iter([])

        def pooling(x, run):
            # Twice over the batch: once to look, once for the result.
            nonlocal rows
            row = next(rows, None)
            if row is None:
                rows = iter(visible)
                row = next(rows)
            return oracle.pooling(x, run, stride, row)

        return pooling
    a1, a2, b = (layer.sequence_altup.deviations.double() + torch.tensor([1.0, 0.0, 1.0])).tolist()
    return lambda x, run: oracle.strided(x, run, stride, a1, a2, b)


def added(allowed):
    """A mask to be added to scores."""
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -1e30)


def through(layers, plain, x, visible, causal, extra):
    """x through all layers of a strided model, computed by the layers of a copy from before, `plain`.

    Args:
        layers: of the strided model; only its numbers are read.
        plain: the same ones without stride.
        x: (batch, sequence, d).
        visible: for each sequence which tokens are no padding.
        causal: whether a token sees those before it only.
        extra: (positions) -> the other arguments of a plain layer.
    """
    everywhere = list(range(x.shape[1]))
    for layer, own in zip(layers, plain, strict=True):
        is_strided = isinstance(layer, SequenceAltUpLayer)
        pooled = is_strided and layer.sequence_altup.mode == "pool"

        def run(tokens, positions, own=own, layer=layer, pooled=pooled):
            seen = visible
            if pooled:
                stride = layer.sequence_altup.stride
                seen = [[any(row[p : p + stride]) for p in everywhere] for row in visible]
            mask = added(torch.tensor(oracle.allowed(positions, positions, seen, causal)))
            result = own(tokens, attention_mask=mask, **extra(positions))
            return result[0] if isinstance(result, tuple) else result

        x = oracle.of_batch(x, run, update_of(layer, visible)) if is_strided else run(x, everywhere)
    return x


@pytest.mark.parametrize("mode", ["altup", "skip"])
@given(
    family=st.sampled_from(["llama", "qwen3", "gpt_neox", "tokenformer", "olmo2"]),
    stride=st.integers(2, 6),
    length=st.integers(1, 12),
    padding=st.integers(0, 4),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=12)
def test_a_decoder_is_what_the_equations_say(mode, family, stride, length, padding, seed):
    plain = deep(family)
    plain.set_attn_implementation("eager")
    model = strided(copy.deepcopy(plain), seed, stride=stride, mode=mode)
    tokens, padding = ids(2, length, seed), min(padding, length - 1)
    visible = torch.ones(2, length, dtype=torch.bool)
    visible[0, length - padding :] = False
    body, own = model.base_model, plain.base_model
    with torch.no_grad(), InDouble():
        if family == "tokenformer":
            rotary = plain.config.rotary_dim, plain.config.rope_theta, torch.float64
            turn = lambda places: rotary_cos_sin(places, *rotary)  # noqa: E731
        else:
            turn = lambda places: own.rotary_emb(torch.zeros(1, dtype=torch.float64), places)  # noqa: E731
        embed = own.get_input_embeddings()
        x = through(
            body.layers,
            own.layers,
            embed(tokens),
            visible.tolist(),
            True,
            lambda positions: {"position_embeddings": turn(torch.tensor([positions]))},
        )
        final = own.final_layer_norm if family == "gpt_neox" else own.norm
        expected = plain.get_output_embeddings()(final(x))
        got = model(tokens, attention_mask=visible.long(), use_cache=False).logits
    got, expected = got[visible], expected[visible]
    assert (got - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("mode", ["altup", "skip", "pool"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("stride", "length", "padding"), [(2, 9, 3), (4, 12, 5), (3, 3, 0), (5, 4, 2)])
def test_berts_encoder_is_what_the_equations_say(mode, implementation, stride, length, padding):
    plain = deep("bert", attn_implementation=implementation)
    model = strided(copy.deepcopy(plain), stride=stride, mode=mode)
    tokens = ids(2, length)
    visible = torch.ones(2, length, dtype=torch.bool)
    visible[0, length - padding :] = False
    with torch.no_grad(), InDouble():
        embedded = plain.bert.embeddings(tokens)
        x = through(model.bert.encoder.layer, plain.bert.encoder.layer, embedded, visible.tolist(), False, lambda _: {})
        expected = plain.cls(x)
        got = model(tokens, attention_mask=visible.long()).logits
    assert (got - expected)[visible].abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("mode", ["altup", "skip", "pool"])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize(("stride", "length"), [(2, 9), (4, 10), (5, 3)])
def test_a_t5_is_what_the_equations_say(mode, part, stride, length):
    if mode == "pool" and part == "decoder":
        return
    plain = deep("t5", attn_implementation="eager")
    model = strided(copy.deepcopy(plain), stride=stride, mode=mode, part=part)
    read, written = ids(2, 8 if part == "decoder" else length), ids(2, length, 4)
    visible = torch.ones_like(read, dtype=torch.bool)
    visible[0, -2:] = False

    def biases(stack, tokens):
        """Of all tokens to all, and of some positions to themselves."""
        everything = stack.block[0].layer[0].SelfAttention.compute_bias(tokens, tokens)
        return lambda positions: everything[:, :, positions][:, :, :, positions]

    with torch.no_grad(), InDouble():
        bias = biases(plain.encoder, read.shape[1])
        memory = through(
            model.encoder.block,
            plain.encoder.block,
            plain.shared(read),
            visible.tolist(),
            False,
            lambda positions: {"position_bias": bias(positions)},
        )
        memory = plain.encoder.final_layer_norm(memory)
        bias = biases(plain.decoder, length)
        cross = added(visible[:, None, None, :])
        x = through(
            model.decoder.block,
            plain.decoder.block,
            plain.shared(written),
            [[True] * length] * 2,
            True,
            lambda positions: {
                "position_bias": bias(positions),
                "encoder_hidden_states": memory,
                "encoder_attention_mask": cross.expand(2, 1, len(positions), -1),
            },
        )
        x = plain.decoder.final_layer_norm(x)
        expected = plain.lm_head(x * plain.config.d_model**-0.5)
        got = model(read, attention_mask=visible.long(), decoder_input_ids=written, use_cache=False).logits
    assert (got - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_tokens_are_not_pooled_where_the_modules_do_not_say_that_they_are_causal(family):
    with pytest.raises(PlanError, match=r"is causal, and the mean of 2 tokens"):
        strided(tiny(family), mode="pool", layers=[1], stride=2)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma"])
@pytest.mark.parametrize("mode", ["altup", "skip", "pool"])
def test_every_family(family, mode):
    """The layers between the first and the last, and the attention of the model's own choice as eager attention."""
    model = deep(family)
    before = logits(model)
    if mode == "pool" and family not in ("t5", "bert", "vit"):
        with pytest.raises(PlanError, match=r"is causal, and the mean of 2 tokens"):
            strided(model, stride=2, mode=mode)
        return
    strided(model, stride=2, mode=mode)
    assert len(strided_layers(model)) == 2
    after = logits(model)
    assert change(before, after) > 1e-3
    model.set_attn_implementation("eager")
    assert change(after, logits(model)) < EXACT
    roles = anatomy(model)
    assert (mode == "altup") == any(role.kind == "mixing" for role in roles.roles)


# Decoding.


def in_pieces(model, tokens, cuts, **values):
    """Logits with a cache, the text given in pieces of these lengths; and the cache."""
    cache, pieces, start = None, [], 0
    for length in cuts:
        piece = {"input_ids": tokens[:, start : start + length]}
        if "decoder" in values:
            piece = {"encoder_outputs": values["decoder"], "decoder_input_ids": piece["input_ids"]}
        if "mask" in values:
            piece["attention_mask"] = values["mask"][:, : start + length]
        output = model(**piece, past_key_values=cache, use_cache=True)
        cache, start = output.past_key_values, start + length
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1), cache


@given(
    family=st.sampled_from([*DECODERS, "t5"]),
    stride=st.integers(2, 6),
    cuts=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    mode=st.sampled_from(["altup", "skip"]),
    eager=st.booleans(),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60)
def test_a_text_in_pieces_is_the_whole_text(family, stride, cuts, mode, eager, seed):
    model = strided(deep(family), seed, stride=stride, mode=mode, **({"part": "decoder"} if family == "t5" else {}))
    if eager:
        model.set_attn_implementation("eager")
    tokens = ids(2, sum(cuts), seed)
    with torch.no_grad(), InDouble():
        if family == "t5":
            memory = model.encoder(ids(2, 6, 9))
            whole = model(encoder_outputs=memory, decoder_input_ids=tokens, use_cache=False).logits
            got, cache = in_pieces(model, tokens, cuts, decoder=memory)
            cache = cache.self_attention_cache
        else:
            whole = model(tokens, use_cache=False).logits
            got, cache = in_pieces(model, tokens, cuts)
    assert change(whole, got) <= EXACT
    kept = -(-sum(cuts) // stride)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [sum(cuts), kept, kept, sum(cuts)]
    assert {cache.get_seq_length(number) for number in range(4)} == {sum(cuts)}


WINDOWS = {
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 4},
    "olmo3": {"layer_types": ["full_attention", *["sliding_attention"] * 3], "sliding_window": 5},
    "cohere2": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]},
}
"""Layers that see a window of tokens, all of them or some."""


@given(
    family=st.sampled_from(list(WINDOWS)),
    stride=st.integers(2, 6),
    cuts=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    layers=st.sampled_from([[1, 2], [0, 1, 2, 3], [0], [3]]),
    eager=st.booleans(),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60)
def test_within_sliding_windows_a_text_in_pieces_is_the_whole_text(family, stride, cuts, layers, eager, seed):
    model = strided(deep(family, **WINDOWS[family]), seed, stride=stride, layers=layers)
    if eager:
        model.set_attn_implementation("eager")
    tokens = ids(2, sum(cuts), seed)
    with torch.no_grad(), InDouble():
        whole = model(tokens, use_cache=False).logits
        got, _ = in_pieces(model, tokens, cuts)
    assert change(whole, got) <= EXACT


def test_a_strided_layer_keeps_the_anchors_of_its_window_alone():
    model = strided(deep("mistral", **WINDOWS["mistral"]), stride=2, layers=[1, 2])
    with torch.no_grad():
        _, cache = in_pieces(model, ids(2, 20), [8, *[1] * 12])
    assert [layer.keys.shape[-2] for layer in cache.layers] == [3, 2, 2, 3]


def test_also_the_first_layer_can_have_a_stride():
    """It is by it that models ask a cache for the number of tokens."""
    for family in DECODERS:
        model = strided(deep(family), stride=3, layers=[0, 1, 3])
        tokens = ids(2, 10)
        with torch.no_grad(), InDouble():
            got, _ = in_pieces(model, tokens, [4, 1, 1, 4])
            assert change(model(tokens, use_cache=False).logits, got) <= EXACT, family


@pytest.mark.parametrize("family", ["llama", "gpt2", "tokenformer"])
def test_padding_on_the_left_by_whole_groups_changes_nothing(family):
    model = strided(deep(family), stride=2)
    tokens = ids(2, 9)
    padded = torch.cat([torch.full((2, 4), 3), tokens], dim=1)
    mask = torch.cat([torch.zeros(2, 4), torch.ones(2, 9)], dim=1).long()
    with torch.no_grad(), InDouble():
        alone = model(tokens, use_cache=False).logits
        places = (mask.cumsum(1) - 1).clamp(min=0)
        got = model(padded, attention_mask=mask, position_ids=places, use_cache=False).logits[:, 4:]
        assert change(alone, got) <= EXACT
        ways = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
        written = model.generate(tokens, attention_mask=mask[:, 4:], **ways)
        again = model.generate(padded, attention_mask=mask, **ways)
    assert torch.equal(written, again[:, 4:])


WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 5},
    "sequences": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", families([*DECODERS, "t5", "mistral", "gemma3_text"], "mistral"))
@pytest.mark.parametrize("stride", [2, 5])
def test_generation_with_and_without_a_cache_is_the_same(family, way, stride):
    """Also from a prompt that is shorter than the stride."""
    model = deep(family, **WINDOWS.get(family, {}))
    strided(model, stride=stride, **({"part": "decoder"} if family == "t5" else {}))
    written = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        with InDouble():
            written.append(
                model.generate(
                    ids(2, 3),
                    attention_mask=torch.ones(2, 3, dtype=torch.long),
                    use_cache=use_cache,
                    max_new_tokens=8,
                    min_new_tokens=8,
                    pad_token_id=0,
                    **WAYS[way],
                )
            )
    assert torch.equal(*written)


def test_steps_without_an_anchor_skip_the_layer():
    model = strided(deep("llama"), stride=4)
    calls = []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: calls.append(number))
    with torch.no_grad():
        in_pieces(model, ids(1, 12), [1] * 12)
    assert [calls.count(number) for number in range(4)] == [12, 3, 3, 12]


def test_a_cache_that_goes_on_with_chosen_sequences():
    model = strided(deep("llama"), stride=3)
    tokens = ids(3, 11)
    chosen = torch.tensor([2, 0])
    with torch.no_grad(), InDouble():
        whole = model(tokens[chosen], use_cache=False).logits[:, 5:]
        _, cache = in_pieces(model, tokens[:, :5], [5])
        cache.batch_select_indices(chosen)
        got = model(tokens[chosen, 5:], past_key_values=cache).logits
        assert change(whole, got) <= EXACT
        cache.reset()
        assert cache.get_seq_length() == 0
        again = model(tokens, past_key_values=cache).logits
        assert change(model(tokens, use_cache=False).logits, again) <= EXACT


def test_what_needs_another_cache_is_refused():
    model = strided(deep("llama"), stride=3)
    prompt = ids(1, 5)
    for values in (
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
        {"assistant_model": tiny("llama")},
    ):
        with pytest.raises(ConfigError, match=r"empty DynamicCache|without an assistant model"):
            model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, **values)
    with pytest.raises(ConfigError, match="StaticLayer"):
        model(prompt, past_key_values=StaticCache(config=model.config, max_cache_len=9))
    with torch.no_grad():
        filled = tiny("llama")(prompt, use_cache=True).past_key_values
        filled.layers += DynamicCache(config=model.config).layers[2:]
        with pytest.raises(ConfigError, match="tokens in a DynamicLayer"):
            model(prompt, past_key_values=filled)
    kept = model(prompt, use_cache=True).past_key_values
    assert [isinstance(layer, StridedLayer) for layer in kept.layers] == [False, True, True, False]
    assert not kept.is_croppable


# Training.


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
def test_training_moves_all_three_numbers_with_checkpointing_too(family):
    model = strided(deep(family), stride=2).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**inputs(model), labels=labels(model)).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-9)
        if "deviations" in name:
            assert (gradient != 0).all()


# Compiling is slow: a decoder, and one that pools, always; all others with --all.
@pytest.mark.parametrize(
    ("family", "mode"),
    [
        ("llama", "altup"),
        ("bert", "pool"),
        *(pytest.param(family, "altup", marks=whole) for family in ("gpt2", "t5", "bert", "vit", "tokenformer")),
        *(pytest.param(family, "pool", marks=whole) for family in ("t5", "vit")),
    ],
)
def test_compiled_it_is_the_same_in_one_graph(family, mode):
    torch.compiler.reset()
    model = strided(deep(family, layers=3), stride=3, mode=mode).train()
    values = inputs(model) | ({"use_cache": False} if model.can_generate() else {})

    def gradients(run):
        model.zero_grad()
        output = run(**values).logits
        loss = cross_entropy(output.flatten(0, -2), labels(model).flatten())
        loss.backward()
        return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    output, plain = gradients(model)
    again, compiled = gradients(torch.compile(model, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(again, output, rtol=1e-6, atol=1e-9)
    assert (mode == "altup") == any("deviations" in name for name in compiled)
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-5, atol=1e-8)


def test_a_stride_longer_than_the_sequence_is_an_error_in_training_only():
    model = strided(deep("llama"), stride=8)
    text = ids(2, 7)
    assert model(text).logits.isfinite().all()
    model.train().generate(text, max_new_tokens=2, pad_token_id=0)
    with pytest.raises(ConfigError, match="stride = 8 is longer than the sequence of 7 tokens"):
        model(text, labels=text)


# Parameters, costs, checkpoints.


@pytest.mark.parametrize("family", [*FAMILIES, "gemma"])
def test_three_parameters_per_layer(family):
    model = deep(family)
    before = sum(p.numel() for p in model.parameters())
    apply(plan_sequence_altup(model, SequenceAltUpSettings(stride=2)), model)
    assert sum(p.numel() for p in model.parameters()) == before + 3 * 2
    assert not any(layer.sequence_altup.deviations.any() for layer in strided_layers(model))


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_what_is_linear_costs_a_kth_and_attention_a_kth_of_that(stride):
    """FLOPs per token of a forward pass over 32 tokens, in closed form."""
    tokens, model = 32, deep("llama")
    config, layer = model.config, model.model.layers[1]
    linear = sum(2 * p.numel() for p in layer.parameters() if p.dim() == 2)
    attention = 4 * tokens * config.num_attention_heads * config.head_dim
    before = flops_per_token(model, tokens).forward
    strided(model, stride=stride)
    saved = 2 * (linear * (1 - 1 / stride) + attention * (1 - 1 / stride**2))
    assert before - flops_per_token(model, tokens).forward == pytest.approx(saved, rel=1e-12)


# Together with other methods.


def done(name, model, **values):
    other = method(name)
    apply(other.plan(Bench(model), other.settings.parse(values)), model)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert", "vit", "tokenformer"])
def test_alternating_updates_around_strided_layers_are_exact(family):
    model = strided(deep(family), stride=2)
    before = logits(model)
    done("altup", model, blocks=2)
    assert torch.equal(logits(model), before)
    assert all(isinstance(layer, AltUpLayer) for layer in strided_layers(model))
    if family in ("llama", "gpt2", "tokenformer"):
        with torch.no_grad(), InDouble():
            for layer in model.modules():
                if isinstance(layer, AltUpLayer):
                    layer.altup.prediction.add_(0.1)
            tokens = ids(2, 9)
            got, cache = in_pieces(model, tokens, [4, 1, 1, 3])
            assert change(model(tokens, use_cache=False).logits, got) <= EXACT
            assert cache.layers[1].keys.shape[-2] == 5


def test_a_stride_for_streams_is_refused():
    model = done("altup", deep("llama"), blocks=2)
    with pytest.raises(PlanError, match=r"model.layers.1 has alternating updates.*stride first"):
        strided(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "tokenformer"])
@pytest.mark.parametrize("mode", ["altup", "skip"])
def test_identity_blocks_are_exact_also_as_copies_of_strided_layers(family, mode):
    model = strided(deep(family), stride=2, layers=[1, 2], mode=mode)
    before = logits(model)
    done("llama-pro", model, group_size=1)
    assert len(strided_layers(model)) == 4
    assert change(before, logits(model)) <= EXACT


def test_pooled_layers_have_no_identity_copies():
    model = strided(deep("vit"), stride=2, layers=[1, 2], mode="pool")
    with pytest.raises(PlanError, match=r"mode = pool.*no copy of it is an identity block"):
        done("llama-pro", model, group_size=1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert", "tokenformer"])
def test_wider_models_keep_their_stride_and_function(family):
    model = strided(deep(family), stride=2)
    before = logits(model)
    name = "tokenformer" if family == "tokenformer" else "hypercloning"
    done(name, model, **method(name).examples(model))
    assert change(before, logits(model)) < 1e-10
    assert len(strided_layers(model)) == 2


# What can't be.


@pytest.mark.parametrize(
    ("family", "values", "reason"),
    [
        ("llama", {}, r"model.layers has 2 layer\(s\) and none between.*layers = \[1\]"),
        ("llama", {"layers": [2]}, r"layers 0 to 1, and no 2"),
        ("llama", {"layers": [-1]}, r"layers 0 to 1, and no -1"),
        ("llama", {"layers": [1], "stride": 33}, r"stride = 33 is longer than any sequence.*at most 32.*32 or less"),
        ("gpt2", {"layers": [1], "stride": 33}, r"at most 32 tokens"),
        ("vit", {"layers": [1], "stride": 6}, r"at most 5 tokens"),
        ("t5", {"layers": [0, 1]}, r"layer 0 of encoder.block works out the position bias.*Begin with layer 1"),
        ("t5", {"layers": [0], "part": "decoder"}, r"layer 0 of decoder.block works out"),
        ("t5", {"layers": [1], "part": "decoder", "mode": "pool"}, r"decoder.block.1 is causal"),
        ("bert", {"layers": [1], "part": "decoder"}, r"part = 'decoder' names no layers"),
    ],
)
def test_impossible_plans_are_refused(family, values, reason):
    model = tiny(family)
    with pytest.raises(PlanError, match=reason):
        plan_sequence_altup(model, SequenceAltUpSettings.parse(values))


def test_a_second_stride_is_refused_and_other_layers_can_have_another():
    model = strided(deep("llama"), stride=2, layers=[1])
    with pytest.raises(PlanError, match=r"model.layers.1 has a stride of 2 already"):
        strided(model)
    strided(model, stride=3, layers=[2])
    assert [layer.sequence_altup.stride for layer in strided_layers(model)] == [2, 3]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"stride": 1}, "stride: .*2 or more"),
        ({"layers": []}, "layers: "),
        ({"layers": [1, 1]}, "layers: a layer is named twice"),
        ({"mode": "pooling"}, "mode: "),
    ],
)
def test_impossible_settings_are_refused(values, reason):
    with pytest.raises(ConfigError, match=reason):
        SequenceAltUpSettings.parse(values)


def test_the_defaults_are_the_papers():
    plan = plan_sequence_altup(deep("t5", layers=6), SequenceAltUpSettings())
    assert [edit.module for edit in plan.edits] == [f"encoder.block.{number}" for number in range(1, 5)]
    assert {edit.settings["stride"] for edit in plan.edits} == {4}
    assert (plan.promise, plan.notes) == ("none", [])
    plan = plan_sequence_altup(deep("llama"), SequenceAltUpSettings(layers=[3, 1]))
    assert [edit.module for edit in plan.edits] == ["model.layers.1", "model.layers.3"]
    assert plan.notes == []
    assert METHOD.intent == "restructure"


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_what_balances_experts_takes_no_mask_and_the_plan_says_so(family):
    model = tiny(family)
    plan = plan_sequence_altup(model, SequenceAltUpSettings(layers=[1], stride=2))
    assert "give none beside it" in plan.notes[0]
    apply(plan, model)
    ids = inputs(model)["input_ids"]
    balanced = {"input_ids": ids, "labels": ids, "output_router_logits": True, "use_cache": False}
    result = model(**balanced)
    assert [len(rows) for rows in result.router_logits] == [ids.numel(), ids.shape[0] * -(-ids.shape[1] // 2)]
    result.loss.backward()
    assert torch.isfinite(result.loss)
    with pytest.raises(RuntimeError, match="must match the size"):  # transformers' own; once it's gone, so is the note
        model(**balanced, attention_mask=torch.ones_like(ids))
    assert plan_sequence_altup(tiny("llama"), SequenceAltUpSettings(layers=[1], stride=2)).notes == []
