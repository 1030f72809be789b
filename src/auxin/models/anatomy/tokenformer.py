"""The anatomy of a TokenFormer."""

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from auxin.models.anatomy.found import ANATOMIES
from auxin.models.anatomy.parts import base_prefix, layer_norm_decoder, sizes_of
from auxin.words.anatomy import Anatomy, LayerStack
from auxin.words.roles import Axes, ParameterRole, Segment, embedding
from auxin.words.widths import ConfigFields


def _tokenformer(model: PreTrainedModel) -> Anatomy:
    """A TokenFormer: the axes between streams are those of keys (read) and values (written); its tokens are no stream,
    the method "tokenformer" grows them."""
    config: Any = model.config
    sizes = sizes_of(config, None)
    axes = Axes.of(sizes, config.vocab_size)
    prefix = base_prefix(model)
    layer = f"{prefix}layers.*"
    ends: dict[str, tuple[tuple[Segment, ...], tuple[Segment, ...]]] = {
        "attention.query": (axes.residual, axes.query),
        "attention.key": (axes.residual, axes.key),
        "attention.value": (axes.residual, axes.value),
        "attention.proj": (axes.attended, axes.residual),
        "mlp": (axes.residual, axes.residual),
    }
    roles = [
        embedding(f"{prefix}embed_tokens.weight", axes.vocabulary, axes.residual),
        *(ParameterRole(f"{layer}.{name}.key_tokens", ((), ends[name][0]), (None, "reads"), "matrix") for name in ends),
        *(
            ParameterRole(f"{layer}.{name}.value_tokens", ((), ends[name][1]), (None, "writes"), "matrix")
            for name in ends
        ),
    ]
    return replace(
        layer_norm_decoder(
            model,
            sizes,
            ConfigFields("hidden_size", "num_attention_heads", None, None, None, "layer_norm_eps"),
            LayerStack(
                f"{prefix}layers",
                "num_hidden_layers",
                ("attention.proj", "mlp"),
                entries=(f"{prefix}embed_tokens",),
                end=f"{prefix}norm",
            ),
            roles,
        ),
        norm_has_gain=False,
        rotary_dim=config.rotary_dim,
    )


ANATOMIES.add("tokenformer", _tokenformer)
