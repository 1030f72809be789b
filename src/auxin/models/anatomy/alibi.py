"""The anatomies of decoders that add to the scores of each head what grows with the distance (ALiBi): Falcon, BLOOM
and MPT. How fast it grows in each head depends on their number."""

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from auxin.models.anatomy.found import ANATOMIES
from auxin.models.anatomy.parts import base_prefix, layer_norm_decoder, rotary_of, sizes_of
from auxin.words.anatomy import Anatomy, LayerStack
from auxin.words.roles import Axes, ParameterRole, embedding, linear, norm
from auxin.words.widths import ConfigFields, Stream

SLOPES = "the slopes of ALiBi depend on the number of heads, so that all heads would attend otherwise than before."
"""Why the number of heads stays."""


def _feed_forward(module: str, axes: Axes) -> list[ParameterRole]:
    return [
        *linear(f"{module}.dense_h_to_4h", axes.ffn, axes.residual),
        *linear(f"{module}.dense_4h_to_h", axes.residual, axes.ffn),
    ]


def _falcon(model: PreTrainedModel) -> Anatomy:
    config: Any = model.config
    grouped, single = config.new_decoder_architecture, config.multi_query and not config.new_decoder_architecture
    key_value_heads = config.num_kv_heads if grouped else 1 if single else None
    sizes = sizes_of(config, config.ffn_hidden_size, key_value_heads=key_value_heads)
    axes, prefix = Axes.of(sizes, config.vocab_size), base_prefix(model)
    layer = f"{prefix}h.*"
    apart = axes.query + axes.key + axes.value
    dealt = tuple(replace(segment, dealt=True) for segment in apart)
    fused = dealt if grouped else apart if single else axes.fused
    norms = ("input_layernorm", "post_attention_layernorm", "ln_attn", "ln_mlp")
    roles = [
        embedding(f"{prefix}word_embeddings.weight", axes.vocabulary, axes.residual),
        *(role for name in norms for role in norm(f"{layer}.{name}", axes.residual)),
        *linear(f"{layer}.self_attention.query_key_value", fused, axes.residual),
        *linear(f"{layer}.self_attention.dense", axes.residual, axes.attended),
        *_feed_forward(f"{layer}.mlp", axes),
    ]
    stays: tuple[tuple[Stream, str], ...] = ()
    if config.alibi:
        reason = (
            "the biases of ALiBi are divided by the root of the head dimension, which is hidden_size / "
            "num_attention_heads, and their slopes depend on the number of heads, so that neither can change. Leave "
            "hidden_size out."
        )
        stays = (("residual", reason),)
    rotary = rotary_of(config)
    return replace(
        layer_norm_decoder(
            model,
            sizes,
            ConfigFields(
                "hidden_size",
                "num_attention_heads",
                "num_kv_heads" if grouped else None,
                "ffn_hidden_size",
                None,
                "layer_norm_epsilon",
                like_heads=() if grouped or single else ("num_kv_heads",),
            ),
            LayerStack(
                f"{prefix}h",
                "num_hidden_layers",
                ("self_attention.dense", "mlp.dense_4h_to_h"),
                entries=(f"{prefix}word_embeddings",),
                end=f"{prefix}ln_f",
                feed_forward=("mlp",),
                attentions=("self_attention",),
                parallel=bool(grouped or config.parallel_attn),
            ),
            roles,
        ),
        rotary_dim=0 if config.alibi else int(sizes.head_dim * rotary.share),
        rope_type=rotary.rope_type,
        heads_stay=SLOPES if config.alibi else "",
        fixed_widths=stays,
        single_key_value_head=bool(single),
    )


def _bloom(model: PreTrainedModel) -> Anatomy:
    config: Any = model.config
    sizes = sizes_of(config, 4 * config.hidden_size)
    axes, prefix = Axes.of(sizes, config.vocab_size), base_prefix(model)
    layer = f"{prefix}h.*"
    norms = ("input_layernorm", "post_attention_layernorm")
    roles = [
        embedding(f"{prefix}word_embeddings.weight", axes.vocabulary, axes.residual),
        *norm(f"{prefix}word_embeddings_layernorm", axes.residual),
        *(role for name in norms for role in norm(f"{layer}.{name}", axes.residual)),
        *linear(f"{layer}.self_attention.query_key_value", axes.fused, axes.residual),
        *linear(f"{layer}.self_attention.dense", axes.residual, axes.attended),
        *_feed_forward(f"{layer}.mlp", axes),
    ]
    # What the residual goes on with is then what each norm gives.
    after_norm = config.apply_residual_connection_post_layernorm
    return replace(
        layer_norm_decoder(
            model,
            sizes,
            ConfigFields("hidden_size", "n_head", None, None, None, "layer_norm_epsilon"),
            LayerStack(
                f"{prefix}h",
                "n_layer",
                ("self_attention.dense", "mlp.dense_4h_to_h"),
                norms if after_norm else (),
                "after_residual" if after_norm else "before",
                entries=(f"{prefix}word_embeddings_layernorm",),
                end=f"{prefix}ln_f",
                feed_forward=("mlp",),
                attentions=("self_attention",),
                causal=True,
            ),
            roles,
        ),
        embedding_norm=f"{prefix}word_embeddings_layernorm",
        heads_stay=SLOPES,
    )


def _mpt(model: PreTrainedModel) -> Anatomy:
    config: Any = model.config
    attention = config.attn_config
    sizes = sizes_of(config, 4 * config.hidden_size)
    axes, prefix = Axes.of(sizes, config.vocab_size), base_prefix(model)
    layer = f"{prefix}blocks.*"
    roles = [
        embedding(f"{prefix}wte.weight", axes.vocabulary, axes.residual),
        *norm(f"{layer}.norm_1", axes.residual),
        *linear(f"{layer}.attn.Wqkv", axes.query + axes.key + axes.value, axes.residual),
        *linear(f"{layer}.attn.out_proj", axes.residual, axes.attended),
        *norm(f"{layer}.norm_2", axes.residual),
        *linear(f"{layer}.ffn.up_proj", axes.ffn, axes.residual),
        *linear(f"{layer}.ffn.down_proj", axes.residual, axes.ffn),
    ]
    return replace(
        layer_norm_decoder(
            model,
            sizes,
            ConfigFields("d_model", "n_heads", None, None, None, "layer_norm_epsilon"),
            LayerStack(
                f"{prefix}blocks",
                "n_layers",
                ("attn.out_proj", "ffn.down_proj"),
                entries=(f"{prefix}wte",),
                end=f"{prefix}norm_f",
                feed_forward=("ffn",),
                attentions=("attn",),
                causal=True,
            ),
            roles,
        ),
        attention_scaled=attention.softmax_scale is None,
        heads_stay=SLOPES,
        heads_clipped=f"clip_qkv = {attention.clip_qkv:g}" if attention.clip_qkv else "",
    )


ANATOMIES.add("falcon", _falcon)
ANATOMIES.add("bloom", _bloom)
ANATOMIES.add("mpt", _mpt)
