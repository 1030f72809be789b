"""Models whose attention or feed-forward part is gone: they run, cache or none, and compute what they must.

The reference is the whole model in which that part's last projection is zero, weight and bias: its branch adds nothing.
"""

import copy
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import Cache, LinearAttentionLayer

from auxin.edits import ReplaceModule
from auxin.edits.structure import with_structural_edits
from auxin.errors import PlanError
from auxin.models.places import what_is_returned
from auxin.nn.bricks import find_brick
from auxin.nn.stand_ins import Identity, StandIn, Zeros
from tiny_models import InDouble, inputs, tiny

# The places of each architecture, and what makes the same place add nothing in a whole model.
PLACES = {
    "llama": [("model.layers.{}.self_attn", "o_proj"), ("model.layers.{}.mlp", "down_proj")],
    "qwen3": [("model.layers.{}.self_attn", "o_proj"), ("model.layers.{}.mlp", "down_proj")],
    "gpt2": [("transformer.h.{}.attn", "c_proj"), ("transformer.h.{}.mlp", "c_proj")],
    "gpt_neox": [("gpt_neox.layers.{}.attention", "dense"), ("gpt_neox.layers.{}.mlp", "dense_4h_to_h")],
    "tokenformer": [("model.layers.{}.attention", "proj")],
    # Here a norm is inside the place: its gain and offset, too, make it add nothing.
    "bert": [
        ("bert.encoder.layer.{}.attention.self", "value"),
        ("bert.encoder.layer.{}.attention", "output.LayerNorm"),
    ],
    "vit": [("vit.layers.{}.attention", "o_proj"), ("vit.layers.{}.mlp", "fc2")],
    "t5": [
        ("encoder.block.{}.layer.1.DenseReluDense", "wo"),
        ("decoder.block.{}.layer.1.EncDecAttention", "o"),
        ("decoder.block.{}.layer.2.DenseReluDense", "wo"),
    ],
}
CASES = [
    (family, tuple(path.format(layer) for layer in layers), last)
    for family, places in PLACES.items()
    for path, last in places
    for layers in ([0], [0, 1])
] + [
    # The first self-attention makes the position bias of the other.
    ("t5", ("encoder.block.1.layer.0.SelfAttention",), "o"),
    ("t5", ("decoder.block.1.layer.0.SelfAttention",), "o"),
    ("t5", ("decoder.block.0.layer.0.SelfAttention", "decoder.block.1.layer.0.SelfAttention"), "o"),
]
GENERATING = [case for case in CASES if case[0] not in ("bert", "vit")]
NAMES = [f"{family}-{'+'.join(paths)}" for family, paths, _ in CASES]
GENERATING_NAMES = [name for name in NAMES if not name.startswith(("bert", "vit"))]


def without(model: PreTrainedModel, paths: list[str], brick: str = "zeros") -> PreTrainedModel:
    """A copy of `model` with stand-ins at `paths`."""
    new = copy.deepcopy(model)
    for path, returns in what_is_returned(model, paths).items():
        old = new.get_submodule(path)
        new.set_submodule(path, find_brick(brick).replacing(old, returns=returns).train(old.training))
    return new


@torch.no_grad()
def silenced(model: PreTrainedModel, paths: list[str], last: str) -> PreTrainedModel:
    """A copy of `model` in which the modules at `paths` add nothing."""
    new = copy.deepcopy(model)
    for path in paths:
        for parameter in new.get_submodule(f"{path}.{last}").parameters():
            parameter.zero_()
    return new


@cache
def models(family: str, paths: tuple[str, ...], last: str, attention: str = "sdpa") -> tuple[PreTrainedModel, ...]:
    """A model, one without the modules at `paths`, and the reference; nobody changes them."""
    model = tiny(family, attn_implementation=attention)
    return model, without(model, list(paths)), silenced(model, list(paths), last)


def run(model: PreTrainedModel, batch: dict[str, Tensor], **extra) -> Tensor:
    with torch.no_grad(), InDouble():
        return model(**batch, **extra).logits


def written(model: PreTrainedModel, batch: dict[str, Tensor], **extra) -> Tensor:
    """What the model goes on with, four tokens."""
    config = GenerationConfig(
        max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0
    )
    ids = batch["input_ids"]
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, **extra)


@pytest.mark.parametrize(("family", "paths", "last"), CASES, ids=NAMES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_model_computes_what_it_does_when_the_part_adds_nothing(family, paths, last, attention):
    model, gone, reference = models(family, paths, last, attention)
    for size in (1, 2, 3):
        batch = inputs(model, batch=size)
        logits = run(gone, batch)
        assert logits.shape == run(model, batch).shape
        torch.testing.assert_close(logits, run(reference, batch), rtol=0, atol=1e-12)
    assert not torch.allclose(logits, run(model, batch))


@pytest.mark.parametrize(("family", "paths", "last"), GENERATING, ids=GENERATING_NAMES)
def test_with_and_without_cache_it_writes_what_the_reference_writes(family, paths, last):
    model, gone, reference = models(family, paths, last)
    for size in (1, 2, 3):
        batch = inputs(model, batch=size)
        wanted = written(reference, batch, use_cache=False)
        assert torch.equal(written(gone, batch), wanted)
        assert torch.equal(written(gone, batch, use_cache=False), wanted)
    assert torch.equal(written(gone, batch, cache_implementation="static", disable_compile=True), wanted)
    assert torch.equal(written(gone, batch, num_beams=2), written(reference, batch, num_beams=2))


STEPS = {
    "llama": ("model.layers.0.self_attn",),
    "gpt2": ("transformer.h.0.attn",),
    "gpt_neox": ("gpt_neox.layers.0.attention", "gpt_neox.layers.1.attention"),
    "t5": ("decoder.block.0.layer.1.EncDecAttention", "decoder.block.1.layer.0.SelfAttention"),
}
LAST = {"llama": "o_proj", "gpt2": "c_proj", "gpt_neox": "dense", "t5": "o"}


@pytest.mark.parametrize("family", STEPS)
@pytest.mark.parametrize("kind", ["dynamic", "static", "static, allocated before"])
def test_the_cache_is_right_step_by_step(family, kind):
    model, gone, reference = models(family, STEPS[family], LAST[family])
    config, ids = model.config, inputs(tiny("llama"))["input_ids"]

    def part() -> Cache:
        if kind == "dynamic":
            return DynamicCache()
        new = StaticCache(config, max_cache_len=12)
        if "before" in kind:
            heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
            head_dim = getattr(config, "d_kv", config.hidden_size // config.num_attention_heads)
            new.early_initialization(2, heads, head_dim, torch.float64, torch.device("cpu"))
        return new

    def new() -> Cache:
        return EncoderDecoderCache(part(), DynamicCache()) if family == "t5" else part()

    def step(model: PreTrainedModel, ids: Tensor, past: Cache) -> Tensor:
        batch = {"input_ids": ids} if family != "t5" else {**inputs(model), "decoder_input_ids": ids}
        return run(model, batch, past_key_values=past, use_cache=True)

    mine, theirs = new(), new()
    for chunk in (ids[:, :3], ids[:, 3:4], ids[:, 4:]):
        torch.testing.assert_close(step(gone, chunk, mine), step(reference, chunk, theirs), rtol=0, atol=1e-12)
        for layer in range(2):
            assert int(mine.get_seq_length(layer)) == int(theirs.get_seq_length(layer)) > 0
    if kind == "dynamic":
        for past in (mine, theirs):
            past.crop(-4)
        torch.testing.assert_close(
            step(gone, ids[:, :2], mine), step(reference, ids[:, :2], theirs), rtol=0, atol=1e-12
        )
    if family == "llama" and kind == "dynamic":
        assert mine.layers[0].keys.shape == (2, 1, 5, 1)
    if family == "t5":
        assert mine.is_updated == theirs.is_updated == {0: True, 1: True}


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("layers", [[0], [1], [0, 1]])
def test_windows_that_slide_are_kept(layers, static):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=19,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=12,
        sliding_window=4,
        initializer_range=0.5,
    )
    model = MistralForCausalLM(config).double().eval()
    paths = [f"model.layers.{layer}.self_attn" for layer in layers]
    gone, reference = without(model, paths), silenced(model, paths, "o_proj")
    batch = inputs(tiny("llama"), batch=2)
    wanted = written(reference, batch, use_cache=False)
    extra = {"cache_implementation": "static", "disable_compile": True} if static else {}
    assert torch.equal(written(gone, batch, **extra), wanted)
    past = DynamicCache(config=config)
    run(gone, batch, past_key_values=past)
    assert [past.get_seq_length(layer) for layer in range(2)] == [7, 7]
    assert past.layers[0].is_sliding


def shorter(family: str, removed: int, **length: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model, and one that has one of its layers less."""
    # transformers makes as many layers of the cache as the encoder has.
    encoder = {"num_layers": 3} if family == "t5" else {}
    model = tiny(family, **encoder, **{field: 1 + value for field, value in length.items()})
    short = tiny(family, **encoder, **length)
    kept = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        inside = "layers" in parts or "h" in parts or parts[:2] == ["decoder", "block"]
        number = next((place for place, part in enumerate(parts) if part.isdigit()), None) if inside else None
        if number is not None and int(parts[number]) == removed:
            continue
        if number is not None and int(parts[number]) > removed:
            parts[number] = str(int(parts[number]) - 1)
        kept[".".join(parts)] = value
    short.load_state_dict(kept)
    return model, short


@pytest.mark.parametrize(
    ("family", "path", "removed", "length"),
    [
        ("llama", "model.layers.0", 0, {"num_hidden_layers": 2}),
        ("llama", "model.layers.1", 1, {"num_hidden_layers": 2}),
        ("gpt2", "transformer.h.0", 0, {"n_layer": 2}),
        ("gpt_neox", "gpt_neox.layers.0", 0, {"num_hidden_layers": 2}),
        ("t5", "decoder.block.1", 1, {"num_decoder_layers": 2}),
    ],
)
def test_a_whole_layer_that_lets_its_input_through_is_a_model_without_that_layer(family, path, removed, length):
    model, short = shorter(family, removed, **length)
    gone = without(model, [path], "identity")
    for size in (1, 2, 3):
        batch = inputs(model, batch=size)
        torch.testing.assert_close(run(gone, batch), run(short, batch), rtol=0, atol=1e-12)
        wanted = written(short, batch)
        assert torch.equal(written(gone, batch), wanted)
        assert torch.equal(written(gone, batch, use_cache=False), wanted)
    assert torch.equal(written(gone, batch, num_beams=2), written(short, batch, num_beams=2))


def test_parts_of_a_layer_can_go_one_after_the_other_and_the_rest_after_them():
    model, short = shorter("t5", 1, num_decoder_layers=2)
    paths = ["decoder.block.1.layer.0.SelfAttention", "decoder.block.1.layer.1.EncDecAttention"]
    gone = without(without(model, paths[:1]), paths[1:])
    reference = silenced(model, paths, "o")
    batch = inputs(model)
    torch.testing.assert_close(run(gone, batch), run(reference, batch), rtol=0, atol=1e-12)
    assert torch.equal(written(gone, batch), written(reference, batch))
    # The layer without attentions is still called with the cache; so is what stands for it.
    layer = without(gone, ["decoder.block.1"], "identity").decoder.block[1]
    assert (layer.cache_layers, layer.looks_twice) == ((1,), True)
    again = without(gone, paths[:1]).get_submodule(paths[0])
    assert (again.arguments, again.cache_layers) == (gone.get_submodule(paths[0]).arguments, (1,))
    whole = without(without(model, paths), ["decoder.block.1"], "identity")
    assert torch.equal(written(whole, batch), written(short, batch))


def test_attention_that_looks_at_an_encoder_fills_the_other_cache():
    config = BertConfig(
        vocab_size=19,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=12,
        is_decoder=True,
        add_cross_attention=True,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    model = BertLMHeadModel(config).double().eval()
    paths = [f"bert.encoder.layer.{layer}.crossattention.self" for layer in range(2)]
    reference, gone = silenced(model, paths, "value"), copy.deepcopy(model)
    for path in paths:
        gone.set_submodule(path, Zeros.replacing(gone.get_submodule(path), ["hidden", "nothing"]))
    # BERT's layers call it by position, with the encoder's states third.
    outer = Zeros.replacing(model.bert.encoder.layer[0].crossattention, ["hidden", "nothing"])
    memory = torch.randn(2, 5, 16, dtype=torch.float64)
    mine, theirs, third = (EncoderDecoderCache(DynamicCache(), DynamicCache()) for _ in range(3))
    ids = inputs(tiny("llama"))["input_ids"]
    for chunk in (ids[:, :4], ids[:, 4:5], ids[:, 5:]):
        batch = {"input_ids": chunk, "encoder_hidden_states": memory}
        logits = run(gone, batch, past_key_values=mine)
        torch.testing.assert_close(logits, run(reference, batch, past_key_values=theirs), rtol=0, atol=1e-12)
        states = torch.randn(2, chunk.shape[1], 16, dtype=torch.float64)
        assert outer(states, None, memory, None, past_key_values=third)[1] is None
    assert mine.is_updated == theirs.is_updated == {0: True, 1: True}
    assert third.is_updated == {0: True}
    for past in (mine, theirs, third):
        assert past.cross_attention_cache.get_seq_length(0) == 5
    assert [past.get_seq_length() for past in (mine, theirs, third)] == [7, 7, 0]


@pytest.mark.parametrize("cls", [Zeros, Identity])
@given(data=st.data())
def test_what_is_returned_is_data(cls, data):
    class Module(nn.Module):
        def forward(self, hidden_states, mask=None, *, bias=None, **rest):
            raise AssertionError

    handed_on = data.draw(st.lists(st.sampled_from(["nothing", "mask", "bias", "extra"]), max_size=4))
    by_position = data.draw(st.integers(0, 2))
    shape = data.draw(st.tuples(*[st.integers(1, 4)] * 3))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    given_to_it = {"hidden_states": torch.ones(shape, dtype=dtype), "mask": torch.ones(1), "bias": torch.ones(2)}
    args = list(given_to_it.values())[:by_position]
    kwargs = dict(list(given_to_it.items())[by_position:])
    stand_in = cls.replacing(Module(), returns=["hidden", *handed_on] if handed_on else [])
    result = stand_in(*args, **kwargs, extra=None)
    first = result[0] if handed_on else result
    if cls is Zeros:
        assert torch.equal(first, torch.zeros(shape, dtype=dtype))
        assert first.dtype == dtype
    else:
        assert first is given_to_it["hidden_states"]
    if handed_on:
        assert isinstance(result, tuple)
        assert len(result) == 1 + len(handed_on)
        assert all(part is given_to_it.get(name) for part, name in zip(result[1:], handed_on, strict=True))
    else:
        assert isinstance(result, Tensor)


def test_they_have_no_parameters_and_say_what_they_are():
    stand_in = Zeros.replacing(tiny("llama").model.layers[1].self_attn, ["hidden", "nothing"])
    assert not stand_in.state_dict()
    assert stand_in.cache_layers == (1,)
    assert not stand_in.looks_twice
    assert repr(stand_in) == "Zeros(returns=['hidden', 'nothing'])"
    assert isinstance(stand_in, StandIn)
    assert Zeros().scaled(0.0, {}) == {}
    with pytest.raises(PlanError, match="no parameter scales"):
        Identity().scaled(0.5, {})
    with pytest.raises(PlanError, match=r"returns \['nothing'\] must begin with 'hidden'"):
        Zeros(returns=["nothing"])


def test_a_layer_of_the_cache_that_needs_no_keys_is_left_alone():
    class Empty:
        """One for a layer without attention."""

        keys = None

    past = Cache(layers=[Empty(), LinearAttentionLayer()])
    stand_in = Zeros()
    stand_in.cache_layers = (0, 1)
    stand_in(torch.ones(2, 3, 4), past_key_values=past)
    assert past.layers[0].keys is None
    assert past.has_previous_state(1)


def test_it_compiles_in_one_graph():
    stand_in = Zeros.replacing(tiny("llama").model.layers[0].self_attn, ["hidden", "nothing"])
    compiled = torch.compile(stand_in, backend="eager", fullgraph=True)
    past, hidden = DynamicCache(), torch.ones(2, 3, 4)
    for tokens in (3, 6):
        result = compiled(hidden_states=hidden, position_embeddings=(hidden, hidden), past_key_values=past)
        assert torch.equal(result[0], torch.zeros(2, 3, 4))
        assert past.get_seq_length() == tokens


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_checkpoint_is_saved_and_loaded(family, tmp_path):
    paths = STEPS[family]
    model, gone, reference = models(family, paths, LAST[family])
    found = what_is_returned(model, paths)
    gone = copy.deepcopy(gone).float()
    edits = [ReplaceModule(module=path, brick="zeros", settings={"returns": found[path]}) for path in paths]
    with_structural_edits(gone.config, edits)
    gone.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    batch = inputs(model)
    assert torch.equal(run(loaded, batch), run(gone, batch))
    assert torch.equal(written(loaded.double(), batch), written(reference, batch))
    for path in paths:
        mine, theirs = loaded.get_submodule(path), gone.get_submodule(path)
        assert (mine.arguments, mine.cache_layers) == (theirs.arguments, theirs.cache_layers)
