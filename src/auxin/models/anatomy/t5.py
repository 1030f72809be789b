"""The anatomy of T5 and of those that have its modules: mT5, and UMT5, in which every layer has a position bias."""

from typing import Any

from transformers import PreTrainedModel

from auxin.models.anatomy.found import ANATOMIES
from auxin.models.anatomy.parts import attention_roles, base_prefix, head_of, head_roles, is_tied, sizes_of
from auxin.words.anatomy import Anatomy, LayerStack
from auxin.words.roles import Axes, ParameterRole, embedding, linear, norm, per_head
from auxin.words.widths import ConfigFields

READERS = ("lm_head", "qa_outputs", "classifier", "classification_head.dense")
"""What reads what leaves the last stack."""
PARTS = {"encoder": ("SelfAttention",), "decoder": ("SelfAttention", "EncDecAttention")}
"""The attentions of a block of each stack, in the order in which they run."""


def _t5(model: PreTrainedModel) -> Anatomy:
    config: Any = model.config
    sizes = sizes_of(config, config.d_ff, config.d_kv)
    axes, prefix = Axes.of(sizes, config.vocab_size), base_prefix(model)
    stacks = [name for name in PARTS if hasattr(model.base_model, name)]
    roles = [
        embedding(f"{prefix}shared.weight", axes.vocabulary, axes.residual),
        *linear("classification_head.dense", axes.residual, axes.residual),
        *linear("classification_head.out_proj", (), axes.residual, "head"),
        *head_roles(axes),
    ]
    for name in stacks:
        roles += _block_roles(f"{prefix}{name}.block.*", PARTS[name], axes)
        roles += norm(f"{prefix}{name}.final_layer_norm", axes.residual)
    return Anatomy(
        family=config.model_type,
        sizes=sizes,
        fields=ConfigFields("d_model", "num_heads", None, "d_ff", "d_kv", "layer_norm_epsilon"),
        stacks=tuple(_stack(prefix, name, stacks) for name in stacks),
        roles=tuple(roles),
        norm="rms",
        norm_has_gain=True,
        tied=is_tied(model),
        final_norm=f"{prefix}{stacks[-1]}.final_layer_norm",
        head=head_of(model, READERS),
        embeddings=(f"{prefix}shared.weight",),
        attention_scaled=False,
        logits_scaled=hasattr(model, "lm_head") and _scales_logits(config),
    )


def _scales_logits(config: Any) -> bool:
    """Whether the head reads what leaves the decoder divided by the root of the hidden size."""
    told = {"t5": "scale_decoder_outputs", "umt5": "tie_word_embeddings"}
    return config.model_type in told and bool(getattr(config, told[config.model_type]))


def _block_roles(block: str, attentions: tuple[str, ...], axes: Axes) -> list[ParameterRole]:
    roles: list[ParameterRole] = []
    for number, attention in enumerate(attentions):
        module = f"{block}.layer.{number}.{attention}"
        roles += attention_roles(module, axes, ("q", "k", "v", "o"))
        roles.append(embedding(f"{module}.relative_attention_bias.weight", (), per_head(axes.query)))
    feed = f"{block}.layer.{len(attentions)}.DenseReluDense"
    for name in ("wi", "wi_0", "wi_1"):
        roles += linear(f"{feed}.{name}", axes.ffn, axes.residual)
    roles += linear(f"{feed}.wo", axes.residual, axes.ffn)
    return roles + norm(f"{block}.layer.*.layer_norm", axes.residual)


def _stack(prefix: str, name: str, stacks: list[str]) -> LayerStack:
    attentions = PARTS[name]
    feed = f"layer.{len(attentions)}.DenseReluDense"
    modules = tuple(f"layer.{number}.{attention}" for number, attention in enumerate(attentions))
    read_by_decoder = tuple(f"{prefix}decoder.block.*.layer.1.EncDecAttention.{part}" for part in "kv")
    return LayerStack(
        f"{prefix}{name}.block",
        "num_layers" if name == "encoder" else "num_decoder_layers",
        (*(f"{module}.o" for module in modules), f"{feed}.wo"),
        entries=(f"{prefix}shared", f"{prefix}{name}.embed_tokens"),
        end=f"{prefix}{name}.final_layer_norm",
        readers=read_by_decoder if name != stacks[-1] else READERS,
        feed_forward=(feed,),
        attentions=modules,
    )


for _family in ("t5", "mt5", "umt5"):
    ANATOMIES.add(_family, _t5)
