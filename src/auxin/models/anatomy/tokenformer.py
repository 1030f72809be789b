"""The anatomy of a TokenFormer."""

from typing import Any

from transformers import PreTrainedModel

from auxin.models.anatomy.found import ANATOMIES
from auxin.models.anatomy.parts import is_tied, sizes_of
from auxin.words.roles import Anatomy, Axes, ConfigFields, LayerStack, ParameterRole, Segment, embedding, linear, norm


def _tokenformer(model: PreTrainedModel) -> Anatomy:
    """A TokenFormer: the axes between streams are those of keys (read) and values (written); its tokens are no stream,
    the method "tokenformer" grows them."""
    config: Any = model.config
    sizes = sizes_of(config, None)
    axes = Axes.of(sizes, config.vocab_size)
    layer = "model.layers.*"
    ends: dict[str, tuple[tuple[Segment, ...], tuple[Segment, ...]]] = {
        "attention.query": (axes.residual, axes.query),
        "attention.key": (axes.residual, axes.key),
        "attention.value": (axes.residual, axes.value),
        "attention.proj": (axes.attended, axes.residual),
        "mlp": (axes.residual, axes.residual),
    }
    roles = [
        embedding("model.embed_tokens.weight", axes.vocabulary, axes.residual),
        *(ParameterRole(f"{layer}.{name}.key_tokens", ((), ends[name][0]), (None, "reads"), "matrix") for name in ends),
        *(
            ParameterRole(f"{layer}.{name}.value_tokens", ((), ends[name][1]), (None, "writes"), "matrix")
            for name in ends
        ),
        *norm("model.norm", axes.residual),
        *linear("lm_head", axes.vocabulary, axes.residual, "head"),
    ]
    return Anatomy(
        family="tokenformer",
        sizes=sizes,
        fields=ConfigFields("hidden_size", "num_attention_heads", None, None, None, "layer_norm_eps"),
        stacks=(
            LayerStack(
                "model.layers",
                "num_hidden_layers",
                ("attention.proj", "mlp"),
                entries=("model.embed_tokens",),
                end="model.norm",
                readers=("lm_head",),
            ),
        ),
        roles=tuple(roles),
        norm="layer",
        norm_has_gain=False,
        tied=is_tied(model),
        final_norm="model.norm",
        head="lm_head",
        embeddings=("model.embed_tokens.weight",),
        rotary_dim=config.rotary_dim,
    )


ANATOMIES.add("tokenformer", _tokenformer)
