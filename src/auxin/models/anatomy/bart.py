"""Encoders and decoders that name their modules as BART does: `encoder.layers.*.fc1`, `decoder.layers.*.encoder_attn`.

What an architecture has beside or instead of BART's is a row of `ENCODER_DECODERS`; roles of modules that it lacks are
dropped by whoever asks for the anatomy. Models with the decoder alone (BartForCausalLM) and with the encoder alone
(WhisperForAudioClassification) are described by the same function.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from auxin.models.anatomy.found import ANATOMIES
from auxin.models.anatomy.parts import VOCABULARY_HEADS, attention_roles, base_prefix, head_of, is_tied
from auxin.words.anatomy import Anatomy, LayerStack, NormPosition
from auxin.words.roles import Axes, ParameterRole, embedding, linear, norm
from auxin.words.widths import ConfigFields, Sizes, Stream

ATTENTIONS = {"encoder": ("self_attn",), "decoder": ("self_attn", "encoder_attn")}
"""The attentions of a layer of each stack, in the order in which they run."""
READERS = (*VOCABULARY_HEADS, "qa_outputs", "classification_head.dense", "projector")
"""What reads what leaves the last stack."""
COMPUTED = (
    "this architecture computes the sinusoids of positions from the hidden size and does not save them, so that with "
    "another one every position would have others. Leave it out, and grow feed-forward parts or layers."
)


@dataclass(frozen=True)
class EncoderDecoder:
    """What an architecture with BART's names has of its own."""

    norm_position: NormPosition = "before"
    computed_positions: bool = False
    """Whether positions are sinusoids that the model computes whenever it is made, and does not save."""
    scales_embeddings: bool = True
    """Whether the config's scale_embedding does what it says (Whisper reads it and does nothing)."""


ENCODER_DECODERS = {
    "bart": EncoderDecoder("after_residual"),
    "plbart": EncoderDecoder("after_residual"),
    "marian": EncoderDecoder("after_residual", computed_positions=True),
    "mbart": EncoderDecoder(),
    "blenderbot": EncoderDecoder(),
    "pegasus": EncoderDecoder(),
    "m2m_100": EncoderDecoder(computed_positions=True),
    "whisper": EncoderDecoder(scales_embeddings=False),
}
"""By model type."""


def encoder_decoder(model: PreTrainedModel, own: EncoderDecoder) -> Anatomy:
    """The anatomy of a model with BART's names.

    Args:
        model: the model, with a head or without, with both stacks or one.
        own: what its architecture has of its own.
    """
    config: Any = model.config
    prefix = base_prefix(model)
    names = [name for name in ATTENTIONS if hasattr(model.base_model, name)]
    sizes = {name: _sizes(config, name) for name in names}
    fields: dict[str, Mapping[Stream, str]] = {
        name: {"query": f"{name}_attention_heads", "ffn": f"{name}_ffn_dim"} for name in names
    }
    tied, main, last = is_tied(model), names[0], f"{prefix}{names[-1]}"
    # After the last layer of a post-norm decoder there is no norm but that layer's own.
    post_norm_end = f"{last}.layers.{getattr(config, f'{names[-1]}_layers') - 1}.final_layer_norm"
    layer_norms = {name: [f"{prefix}{name}.layers.*.final_layer_norm"] for name in names}
    if own.norm_position == "after_residual" and tied:
        depth = getattr(config, f"{names[-1]}_layers")
        layer_norms[names[-1]] = [f"{last}.layers.{layer}.final_layer_norm" for layer in range(depth)]
    axes = Axes.of(sizes[main], config.vocab_size)
    roles = [*_embeddings(config, prefix, axes), *_head_roles(config, axes)]
    for name in names:
        roles += _layer_roles(f"{prefix}{name}.layers.*", ATTENTIONS[name], Axes.of(sizes[name], 0))
        roles += [role for path in layer_norms[name] for role in norm(path, axes.residual)]
        for path in ("layernorm_embedding", "layer_norm"):
            roles += norm(f"{prefix}{name}.{path}", axes.residual)
    return Anatomy(
        family=config.model_type,
        sizes=sizes[main],
        fields=ConfigFields(
            "d_model",
            fields[main]["query"],
            None,
            fields[main]["ffn"],
            None,
            # Epsilon is that of torch's LayerNorm, which no value of the config says.
            None,
            by_stack={f"{prefix}{name}.layers": fields[name] for name in names},
        ),
        stacks=tuple(_stack(model, name, names, own) for name in names),
        roles=tuple(roles),
        norm="layer",
        norm_has_gain=True,
        tied=tied,
        final_norm=post_norm_end if own.norm_position == "after_residual" else f"{last}.layer_norm",
        head=head_of(model, READERS),
        embeddings=tuple(role.pattern for role in roles if role.kind == "embedding"),
        embedding_scaled=own.scales_embeddings and bool(config.scale_embedding),
        fixed_widths=(("residual", COMPUTED),) if own.computed_positions else (),
    )


def _sizes(config: Any, stack: str) -> Sizes:
    """The widths of one stack by the config."""
    heads = getattr(config, f"{stack}_attention_heads")
    return Sizes(config.d_model, heads, heads, config.d_model // heads, getattr(config, f"{stack}_ffn_dim"))


def _embeddings(config: Any, prefix: str, axes: Axes) -> list[ParameterRole]:
    """The roles of what enters the stacks: tables of tokens and positions, and the convolutions over a spectrogram, of
    which the second reads what the first writes along a stream like the residual."""
    of_decoder = Axes.of(_sizes(config, "decoder"), getattr(config, "decoder_vocab_size", None) or config.vocab_size)
    encoder, decoder = f"{prefix}encoder", f"{prefix}decoder"
    return [
        embedding(f"{prefix}shared.weight", axes.vocabulary, axes.residual),
        embedding(f"{encoder}.embed_tokens.weight", axes.vocabulary, axes.residual),
        embedding(f"{decoder}.embed_tokens.weight", of_decoder.vocabulary, axes.residual),
        *(embedding(f"{stack}.embed_positions.weight", (), axes.residual) for stack in (encoder, decoder)),
        embedding(f"{encoder}.conv1.weight", axes.residual, (), ()),
        embedding(f"{encoder}.conv1.bias", axes.residual),
        ParameterRole(
            f"{encoder}.conv2.weight", (axes.residual, axes.residual, ()), ("writes", "reads", None), "embedding"
        ),
        embedding(f"{encoder}.conv2.bias", axes.residual),
    ]


def _head_roles(config: Any, axes: Axes) -> list[ParameterRole]:
    """The roles of the heads. Classifiers read the residual by way of a layer of their own: BART's is as wide as the
    residual, a stream like it; Whisper's projector has a width that never changes."""
    of_decoder = Axes.of(_sizes(config, "decoder"), getattr(config, "decoder_vocab_size", None) or config.vocab_size)
    return [
        *(role for head in VOCABULARY_HEADS for role in linear(head, of_decoder.vocabulary, axes.residual, "head")),
        *linear("qa_outputs", (), axes.residual, "head"),
        *linear("classification_head.dense", axes.residual, axes.residual),
        *linear("classification_head.out_proj", (), axes.residual, "head"),
        *linear("projector", (), axes.residual, "head"),
        *linear("classifier", (), (), "head"),
        ParameterRole("layer_weights", ((),), (None,), "mixing"),
    ]


def _layer_roles(layer: str, attentions: tuple[str, ...], axes: Axes) -> list[ParameterRole]:
    """The roles of a layer, but for its last norm."""
    roles: list[ParameterRole] = []
    for attention in attentions:
        roles += attention_roles(f"{layer}.{attention}", axes)
        roles += norm(f"{layer}.{attention}_layer_norm", axes.residual)
    return [
        *roles,
        *linear(f"{layer}.fc1", axes.ffn, axes.residual),
        *linear(f"{layer}.fc2", axes.residual, axes.ffn),
    ]


def _entries(model: PreTrainedModel, name: str) -> tuple[str, ...]:
    """What is added up before the first layer: a norm of the embeddings, or token embeddings and positions."""
    if hasattr(getattr(model.base_model, name), "layernorm_embedding"):
        return (f"{name}.layernorm_embedding",)
    first = "conv2" if hasattr(getattr(model.base_model, name), "conv2") else "embed_tokens"
    return ("shared", f"{name}.{first}", f"{name}.embed_positions")


def _stack(model: PreTrainedModel, name: str, names: list[str], own: EncoderDecoder) -> LayerStack:
    prefix = base_prefix(model)
    attentions, post_norm = ATTENTIONS[name], own.norm_position == "after_residual"
    read_by_decoder = tuple(f"{prefix}decoder.layers.*.encoder_attn.{part}_proj" for part in "kv")
    return LayerStack(
        f"{prefix}{name}.layers",
        f"{name}_layers",
        (*(f"{attention}.out_proj" for attention in attentions), "fc2"),
        (*(f"{attention}_layer_norm" for attention in attentions), "final_layer_norm") if post_norm else (),
        own.norm_position,
        tuple(f"{prefix}{entry}" for entry in _entries(model, name)),
        f"{prefix}{name}" if post_norm else f"{prefix}{name}.layer_norm",
        read_by_decoder if name != names[-1] else READERS,
    )


for _family, _own in ENCODER_DECODERS.items():
    ANATOMIES.add(_family, partial(encoder_decoder, own=_own))
