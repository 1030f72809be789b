"""The anatomy of GPT-NeoX."""

from typing import Any

from transformers import PreTrainedModel

from auxin.models.anatomy.found import ANATOMIES
from auxin.models.anatomy.parts import is_tied, sizes_of
from auxin.words.roles import Anatomy, Axes, ConfigFields, LayerStack, Segment, embedding, linear, norm


def _gpt_neox(model: PreTrainedModel) -> Anatomy:
    config: Any = model.config
    sizes = sizes_of(config, config.intermediate_size)
    axes = Axes.of(sizes, config.vocab_size)
    layer = "gpt_neox.layers.*"
    # Query, key and value of one head lie together: a unit is three head dimensions.
    fused = (Segment("query", 3 * sizes.head_dim, sizes.query_heads, ("query", "key", "value")),)
    roles = [
        embedding("gpt_neox.embed_in.weight", axes.vocabulary, axes.residual),
        *norm(f"{layer}.input_layernorm", axes.residual),
        *norm(f"{layer}.post_attention_layernorm", axes.residual),
        *linear(f"{layer}.attention.query_key_value", fused, axes.residual),
        *linear(f"{layer}.attention.dense", axes.residual, axes.attended),
        *linear(f"{layer}.mlp.dense_h_to_4h", axes.ffn, axes.residual),
        *linear(f"{layer}.mlp.dense_4h_to_h", axes.residual, axes.ffn),
        *norm("gpt_neox.final_layer_norm", axes.residual),
        *linear("lm_head", axes.vocabulary, axes.residual, "head"),
        *linear("embed_out", axes.vocabulary, axes.residual, "head"),
    ]
    return Anatomy(
        family="gpt_neox",
        sizes=sizes,
        fields=ConfigFields("hidden_size", "num_attention_heads", None, "intermediate_size", None, "layer_norm_eps"),
        stacks=(
            LayerStack(
                "gpt_neox.layers",
                "num_hidden_layers",
                ("attention.dense", "mlp.dense_4h_to_h"),
                entries=("gpt_neox.embed_in",),
                end="gpt_neox.final_layer_norm",
                readers=("lm_head", "embed_out"),
                feed_forward=("mlp",),
                parallel=config.use_parallel_residual,
            ),
        ),
        roles=tuple(roles),
        norm="layer",
        norm_has_gain=True,
        tied=is_tied(model),
        final_norm="gpt_neox.final_layer_norm",
        head="lm_head",
        embeddings=("gpt_neox.embed_in.weight",),
        rotary_dim=int(sizes.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0)),
        rope_type=config.rope_parameters.get("rope_type", "default"),
    )


ANATOMIES.add("gpt_neox", _gpt_neox)
