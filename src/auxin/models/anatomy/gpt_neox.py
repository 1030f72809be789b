"""The anatomy of GPT-NeoX."""

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from auxin.models.anatomy.found import ANATOMIES
from auxin.models.anatomy.parts import base_prefix, layer_norm_decoder, rotary_of, sizes_of
from auxin.words.anatomy import Anatomy, LayerStack
from auxin.words.roles import Axes, embedding, linear, norm
from auxin.words.widths import ConfigFields


def _gpt_neox(model: PreTrainedModel) -> Anatomy:
    config: Any = model.config
    sizes = sizes_of(config, config.intermediate_size)
    axes = Axes.of(sizes, config.vocab_size)
    prefix, rotary = base_prefix(model), rotary_of(config)
    layer = f"{prefix}layers.*"
    roles = [
        embedding(f"{prefix}embed_in.weight", axes.vocabulary, axes.residual),
        *norm(f"{layer}.input_layernorm", axes.residual),
        *norm(f"{layer}.post_attention_layernorm", axes.residual),
        *linear(f"{layer}.attention.query_key_value", axes.fused, axes.residual),
        *linear(f"{layer}.attention.dense", axes.residual, axes.attended),
        *linear(f"{layer}.mlp.dense_h_to_4h", axes.ffn, axes.residual),
        *linear(f"{layer}.mlp.dense_4h_to_h", axes.residual, axes.ffn),
    ]
    return replace(
        layer_norm_decoder(
            model,
            sizes,
            ConfigFields("hidden_size", "num_attention_heads", None, "intermediate_size", None, "layer_norm_eps"),
            LayerStack(
                f"{prefix}layers",
                "num_hidden_layers",
                ("attention.dense", "mlp.dense_4h_to_h"),
                entries=(f"{prefix}embed_in",),
                end=f"{prefix}final_layer_norm",
                feed_forward=("mlp",),
                parallel=config.use_parallel_residual,
            ),
            roles,
        ),
        rotary_dim=int(sizes.head_dim * rotary.share),
        rope_type=rotary.rope_type,
    )


ANATOMIES.add("gpt_neox", _gpt_neox)
