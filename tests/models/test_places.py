"""What a place must return, found on shapes, for every architecture; and what no stand-in can do is refused."""

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from auxin.edits.structure import edited_skeleton
from auxin.errors import PlanError
from auxin.models.places import what_is_returned
from auxin.nn.stand_ins import Zeros
from tiny_kinds import tiny_kind
from tiny_models import tiny

PAIR, BARE = ["hidden", "nothing"], []
BIASED = ["hidden", "position_bias", "nothing"]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        *(
            (family, {"model.layers.0.self_attn": PAIR, "model.layers.1.mlp": BARE, "model.layers.1": BARE})
            for family in ("llama", "gemma", "qwen2", "qwen3", "olmo", "olmo2")
        ),
        ("gpt2", {"transformer.h.0.attn": PAIR, "transformer.h.0.mlp": BARE, "transformer.h.1": BARE}),
        ("gpt_neox", {"gpt_neox.layers.0.attention": PAIR, "gpt_neox.layers.0.mlp": BARE}),
        ("tokenformer", {"model.layers.0.attention": PAIR, "model.layers.0.mlp": BARE}),
        ("bert", {"bert.encoder.layer.0.attention": PAIR, "bert.encoder.layer.1.attention.self": PAIR}),
        ("vit", {"vit.layers.0.attention": PAIR, "vit.layers.1.mlp": BARE, "vit.layers.1": BARE}),
        (
            "t5",
            {
                "encoder.block.1.layer.0.SelfAttention": BIASED,
                "encoder.block.0.layer.1": BARE,
                "decoder.block.1.layer.0": BIASED,
                # Its bias is one of zeros, which the next layer makes for itself.
                "decoder.block.0.layer.1.EncDecAttention": ["hidden", "nothing", "nothing"],
                "decoder.block.1.layer.1.EncDecAttention": BIASED,
                "decoder.block.1": ["hidden", "position_bias", "encoder_decoder_position_bias"],
                "encoder.block.1": ["hidden", "position_bias", "nothing"],
            },
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_place_is_told(family, wanted, attention):
    assert what_is_returned(tiny(family, attn_implementation=attention), wanted) == wanted


def test_weights_are_not_looked_at_and_the_model_stays_as_it_is():
    model = tiny("t5")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = "decoder.block.1.layer.0.SelfAttention"
    assert what_is_returned(model, [path, path]) == {path: BIASED}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not isinstance(model.get_submodule(path), Zeros)
    assert what_is_returned(edited_skeleton(model.config, type(model)), [path]) == {path: BIASED}
    assert what_is_returned(model, []) == {}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("ASTModel", {"layers.0.attention": PAIR, "layers.1.mlp": BARE}),
        ("WhisperModel", {"encoder.layers.0.self_attn": PAIR, "decoder.layers.1.encoder_attn": PAIR}),
        (
            "CLIPModel",
            {"text_model.encoder.layers.0.mlp": BARE, "vision_model.encoder.layers.1.self_attn": PAIR},
        ),
        ("Wav2Vec2Model", {"encoder.layers.0.feed_forward": BARE}),
        ("XLNetLMHeadModel", {"transformer.layer.0.ff": BARE}),
        ("VideoMAEModel", {"encoder.layer.0.attention": BARE}),
        ("LlavaForConditionalGeneration", {"model.language_model.layers.0.mlp": BARE}),
    ],
)
def test_models_of_any_input_have_places(name, wanted):
    assert what_is_returned(tiny_kind(name), wanted) == wanted


def test_what_other_modules_need_is_named():
    t5 = tiny("t5", num_layers=3)
    first, *others = [f"encoder.block.{layer}.layer.0.SelfAttention" for layer in range(3)]
    message = rf"{first} can't be removed: {others[0]} needs what it returns behind its hidden states \(place 1, shape"
    with pytest.raises(PlanError, match=message):
        what_is_returned(t5, [first])
    with pytest.raises(PlanError, match=rf"{first} can't be removed: {others[1]} needs"):
        what_is_returned(t5, [first, others[0]])
    with pytest.raises(
        PlanError, match=r"decoder.block.0 can't be removed: decoder.block.1.layer.0.SelfAttention needs"
    ):
        what_is_returned(t5, ["decoder.block.0"])
    # Nobody is left who needs it; one who is gone already needs nothing.
    gone = what_is_returned(t5, [first, *others])
    assert gone == {first: ["hidden", "nothing", "nothing"], **dict.fromkeys(others, BIASED)}
    for path in others:
        t5.set_submodule(path, Zeros.replacing(t5.get_submodule(path), gone[path]))
    assert what_is_returned(t5, [first])[first] == ["hidden", "nothing", "nothing"]


class Biased(nn.Module):
    """An attention that gives a number to the next one of its kind, which makes it itself where it gets none."""

    def __init__(self, inner, makes, anew):
        super().__init__()
        self.inner, self.makes, self.anew = inner, makes, anew

    def forward(self, hidden_states, position_bias=None, **kwargs):
        result = self.inner(hidden_states=hidden_states, **kwargs)[0]
        bias = self.makes(result) if position_bias is None or self.anew else position_bias
        return result + bias, bias


class OtherBiased(Biased):
    """One of another kind."""


class Layer(nn.Module):
    """A Llama's layer that has such an attention."""

    def __init__(self, number, layer, shared, attention, uses, first):
        super().__init__()
        self.number, self.layer, self.shared, self.uses, self.first = number, layer, shared, uses, first
        self.attention = attention

    def forward(self, hidden_states, **kwargs):
        if self.number == 0:
            self.shared[0] = hidden_states.new_ones(1) if self.first else None
        added, self.shared[0] = self.attention(hidden_states, position_bias=self.shared[0], **kwargs)
        return hidden_states + added + (self.shared[0] if self.uses and self.number else 0)


def zero(result):
    return result.new_zeros(1)


@pytest.mark.parametrize(
    ("settings", "needed_by"),
    [
        ({}, None),  # a constant, of which the second makes its own
        ({"makes": lambda result: result.mean()}, "model.layers.1.attention"),  # made of activations
        ({"uses": True}, "model.layers.1"),  # used by a module that makes none
        ({"second": OtherBiased}, "model.layers.1.attention"),  # which need not make the same
        ({"first": True, "anew": True}, "model.layers.1.attention"),  # the first was given one and made another
    ],
    ids=["constant", "activation", "another reader", "another class", "not for want of one"],
)
def test_a_constant_is_told_from_what_is_lost(settings, needed_by):
    llama, shared = tiny("llama"), [None]
    makes, anew = settings.get("makes", zero), settings.get("anew", False)
    for number, layer in enumerate(llama.model.layers):
        cls = settings.get("second", Biased) if number else Biased
        attention = cls(layer.self_attn, makes, anew and not number)
        llama.model.layers[number] = Layer(
            number, layer, shared, attention, settings.get("uses", False), settings.get("first", False)
        )
    path = "model.layers.0.attention"
    if needed_by is None:
        assert what_is_returned(llama, [path]) == {path: PAIR}
    else:
        with pytest.raises(PlanError, match=rf"{path} can't be removed: {needed_by} needs"):
            what_is_returned(llama, [path])


@pytest.mark.parametrize(
    ("family", "path", "message"),
    [
        ("llama", "model.layers.0.nope", "LlamaForCausalLM has no module at 'model.layers.0.nope'"),
        ("llama", "model.layers", "model.layers does not run"),
        ("llama", "model", r"makes a BaseModelOutputWithPast of a tensor of shape \[3, 5\]"),
        ("llama", "model.layers.0.self_attn.k_proj", r"shape \[3, 5, 8\] of a tensor of shape \[3, 5, 16\]"),
        ("bert", "bert.encoder.layer.0.intermediate", r"\(BertIntermediate\) can't be removed: it makes"),
        ("bert", "bert.encoder.layer.0.output", r"shape \[3, 5, 16\] of a tensor of shape \[3, 5, 12\]"),
    ],
)
def test_what_has_no_stand_in_is_refused(family, path, message):
    with pytest.raises(PlanError, match=message):
        what_is_returned(tiny(family), [path])


def test_a_model_that_does_not_run_without_is_refused():
    class Asking(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, hidden_states, **kwargs):
            return self.layer(hidden_states, **kwargs) * self.layer.self_attn.head_dim

    llama = tiny("llama")
    llama.model.layers[1] = Asking(llama.model.layers[1])
    with pytest.raises(PlanError, match=r"LlamaForCausalLM does not run without model\.layers\.1\.layer\.self_attn: "):
        what_is_returned(llama, ["model.layers.1.layer.self_attn"])


def test_what_fills_a_cache_in_a_way_of_its_own_is_refused():
    class Filling(nn.Module):
        def forward(self, hidden_states, past_key_values=None, **kwargs):
            past_key_values.update(hidden_states[:, None], hidden_states[:, None], 0)
            return hidden_states, None

    llama = tiny("llama")
    llama.model.layers[0].self_attn = Filling()
    with pytest.raises(PlanError, match="its cache does not come out as before"):
        what_is_returned(llama, ["model.layers.0.self_attn"])


def test_experts_are_a_feed_forward_part_like_others():
    config = MixtralConfig(
        vocab_size=19,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=12,
        num_local_experts=3,
    )
    assert what_is_returned(MixtralForCausalLM(config), ["model.layers.0.mlp"]) == {"model.layers.0.mlp": BARE}
