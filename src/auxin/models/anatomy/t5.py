"""The anatomy of T5."""

from typing import Any

from transformers import PreTrainedModel

from auxin.models.anatomy.found import ANATOMIES
from auxin.models.anatomy.parts import is_tied, sizes_of
from auxin.words.roles import Anatomy, Axes, ConfigFields, LayerStack, Segment, embedding, linear, norm


def _t5(model: PreTrainedModel) -> Anatomy:
    config: Any = model.config
    sizes = sizes_of(config, config.d_ff, config.d_kv)
    axes = Axes.of(sizes, config.vocab_size)
    heads = (Segment("query", 1, sizes.query_heads),)
    roles = [embedding("shared.weight", axes.vocabulary, axes.residual)]
    parts = {"encoder": ("SelfAttention",), "decoder": ("SelfAttention", "EncDecAttention")}
    stacks = []
    for stack, attentions in parts.items():
        block = f"{stack}.block.*.layer"
        outputs = []
        for number, attention in enumerate(attentions):
            module = f"{block}.{number}.{attention}"
            roles += linear(f"{module}.q", axes.query, axes.residual)
            roles += linear(f"{module}.k", axes.key, axes.residual)
            roles += linear(f"{module}.v", axes.value, axes.residual)
            roles += linear(f"{module}.o", axes.residual, axes.attended)
            roles.append(embedding(f"{module}.relative_attention_bias.weight", (), heads))
            outputs.append(f"layer.{number}.{attention}.o")
        feed = f"{block}.{len(attentions)}.DenseReluDense"
        for name in ("wi", "wi_0", "wi_1"):
            roles += linear(f"{feed}.{name}", axes.ffn, axes.residual)
        roles += linear(f"{feed}.wo", axes.residual, axes.ffn)
        roles += norm(f"{block}.*.layer_norm", axes.residual) + norm(f"{stack}.final_layer_norm", axes.residual)
        outputs.append(f"layer.{len(attentions)}.DenseReluDense.wo")
        length = "num_layers" if stack == "encoder" else "num_decoder_layers"
        readers = (
            ("lm_head",) if stack == "decoder" else tuple(f"decoder.block.*.layer.1.EncDecAttention.{x}" for x in "kv")
        )
        stacks.append(
            LayerStack(
                f"{stack}.block",
                length,
                tuple(outputs),
                entries=("shared", f"{stack}.embed_tokens"),
                end=f"{stack}.final_layer_norm",
                readers=readers,
                feed_forward=(f"layer.{len(attentions)}.DenseReluDense",),
                attentions=tuple(f"layer.{number}.{attention}" for number, attention in enumerate(attentions)),
            )
        )
    return Anatomy(
        family="t5",
        sizes=sizes,
        fields=ConfigFields("d_model", "num_heads", None, "d_ff", "d_kv", "layer_norm_epsilon"),
        stacks=tuple(stacks),
        roles=(*roles, *linear("lm_head", axes.vocabulary, axes.residual, "head")),
        norm="rms",
        norm_has_gain=True,
        tied=is_tied(model),
        final_norm="decoder.final_layer_norm",
        head="lm_head",
        embeddings=("shared.weight",),
        attention_scaled=False,
        logits_scaled=config.scale_decoder_outputs,
    )


ANATOMIES.add("t5", _t5)
