"""The anatomies of TokenFormers, of text and of images.

The axes between streams are those of keys (read) and values (written); tokens are no stream, the method "tokenformer"
grows them.
"""

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from auxin.models.anatomy.found import ANATOMIES
from auxin.models.anatomy.parts import base_prefix, has_parameters, layer_norm_decoder, sizes_of
from auxin.models.anatomy.vit import patch_embeddings
from auxin.words.anatomy import Anatomy, LayerStack
from auxin.words.roles import Axes, ParameterRole, Segment, embedding, linear, norm
from auxin.words.widths import ConfigFields

_FIELDS = ConfigFields("hidden_size", "num_attention_heads", None, None, None, "layer_norm_eps")
_NORMS = ("attention_norm", "mlp_norm")
"""The norms of a layer, where they have parameters."""


def _tokenformer(model: PreTrainedModel) -> Anatomy:
    """A TokenFormer of text."""
    config: Any = model.config
    sizes = sizes_of(config, None)
    axes = Axes.of(sizes, config.vocab_size)
    table = f"{base_prefix(model)}embed_tokens"
    roles = [embedding(f"{table}.weight", axes.vocabulary, axes.residual), *_layer_roles(model, axes)]
    return replace(
        layer_norm_decoder(model, sizes, _FIELDS, _stack(model, table), roles),
        norm_has_gain=False,
        rotary_dim=config.rotary_dim,
    )


def _vision_tokenformer(model: PreTrainedModel) -> Anatomy:
    """A TokenFormer of images: the embeddings are ViT's."""
    config: Any = model.config
    sizes, prefix = sizes_of(config, None), base_prefix(model)
    axes = Axes.of(sizes, 0)
    stack = replace(_stack(model, f"{prefix}embeddings"), readers=("classifier",))
    embeddings = patch_embeddings(prefix, axes)
    return Anatomy(
        family=config.model_type,
        sizes=sizes,
        fields=_FIELDS,
        stacks=(stack,),
        roles=(
            *embeddings,
            *_layer_roles(model, axes),
            *norm(stack.end, axes.residual),
            *linear("classifier", (), axes.residual, "head"),
        ),
        norm="layer",
        norm_has_gain=config.norm_parameters,
        tied=False,
        final_norm=stack.end,
        head="classifier" if has_parameters(model, "classifier") else None,
        embeddings=tuple(role.pattern for role in embeddings if has_parameters(model, role.pattern)),
    )


def _stack(model: PreTrainedModel, entry: str) -> LayerStack:
    """The layers, which what is at `entry` feeds."""
    prefix = base_prefix(model)
    return LayerStack(
        f"{prefix}layers",
        "num_hidden_layers",
        ("attention.proj", "mlp"),
        entries=(entry,),
        end=f"{prefix}norm",
    )


def _layer_roles(model: PreTrainedModel, axes: Axes) -> list[ParameterRole]:
    """Of the keys and values of every layer, and of its norms where they have parameters."""
    layer = f"{base_prefix(model)}layers.*"
    ends: dict[str, tuple[tuple[Segment, ...], tuple[Segment, ...]]] = {
        "attention.query": (axes.residual, axes.query),
        "attention.key": (axes.residual, axes.key),
        "attention.value": (axes.residual, axes.value),
        "attention.proj": (axes.attended, axes.residual),
        "mlp": (axes.residual, axes.residual),
    }
    return [
        *(ParameterRole(f"{layer}.{name}.key_tokens", ((), ends[name][0]), (None, "reads"), "matrix") for name in ends),
        *(
            ParameterRole(f"{layer}.{name}.value_tokens", ((), ends[name][1]), (None, "writes"), "matrix")
            for name in ends
        ),
        *(role for name in _NORMS for role in norm(f"{layer}.{name}", axes.residual)),
    ]


ANATOMIES.add("tokenformer", _tokenformer)
ANATOMIES.add("vision_tokenformer", _vision_tokenformer)
