"""The anatomy of ViT."""

from typing import Any

from transformers import PreTrainedModel

from auxin.models.anatomy.found import ANATOMIES
from auxin.models.anatomy.parts import sizes_of
from auxin.words.roles import Anatomy, Axes, ConfigFields, LayerStack, embedding, linear, norm


def _vit(model: PreTrainedModel) -> Anatomy:
    config: Any = model.config
    sizes = sizes_of(config, config.intermediate_size)
    axes = Axes.of(sizes, 0)
    layer = "vit.layers.*"
    patches = "vit.embeddings.patch_embeddings.projection"
    roles = [
        embedding("vit.embeddings.cls_token", (), (), axes.residual),
        embedding("vit.embeddings.position_embeddings", (), (), axes.residual),
        embedding(f"{patches}.weight", axes.residual, (), (), ()),
        embedding(f"{patches}.bias", axes.residual),
        *linear(f"{layer}.attention.q_proj", axes.query, axes.residual),
        *linear(f"{layer}.attention.k_proj", axes.key, axes.residual),
        *linear(f"{layer}.attention.v_proj", axes.value, axes.residual),
        *linear(f"{layer}.attention.o_proj", axes.residual, axes.attended),
        *norm(f"{layer}.layernorm_before", axes.residual),
        *norm(f"{layer}.layernorm_after", axes.residual),
        *linear(f"{layer}.mlp.fc1", axes.ffn, axes.residual),
        *linear(f"{layer}.mlp.fc2", axes.residual, axes.ffn),
        *norm("vit.layernorm", axes.residual),
        *linear("classifier", (), axes.residual, "head"),
    ]
    return Anatomy(
        family="vit",
        sizes=sizes,
        fields=ConfigFields("hidden_size", "num_attention_heads", None, "intermediate_size", None, "layer_norm_eps"),
        stacks=(
            LayerStack(
                "vit.layers",
                "num_hidden_layers",
                ("attention.o_proj", "mlp.fc2"),
                entries=("vit.embeddings",),
                end="vit.layernorm",
                readers=("classifier",),
                feed_forward=("mlp",),
            ),
        ),
        roles=tuple(roles),
        norm="layer",
        norm_has_gain=True,
        tied=False,
        final_norm="vit.layernorm",
        head="classifier",
        embeddings=tuple(role.pattern for role in roles if role.kind == "embedding"),
    )


ANATOMIES.add("vit", _vit)
