"""The anatomy of ModernBERT."""

from typing import Any

from transformers import PreTrainedModel

from auxin.models.anatomy.encoder_heads import heads
from auxin.models.anatomy.found import ANATOMIES
from auxin.models.anatomy.parts import base_prefix, rotary_of, sizes_of
from auxin.words.anatomy import Anatomy, LayerStack
from auxin.words.roles import Axes, embedding, linear, norm
from auxin.words.widths import ConfigFields


def _modernbert(model: PreTrainedModel) -> Anatomy:
    config: Any = model.config
    sizes, prefix, rotary = sizes_of(config, config.intermediate_size), base_prefix(model), rotary_of(config)
    axes = Axes.of(sizes, config.vocab_size)
    layer, tokens = f"{prefix}layers.*", f"{prefix}embeddings.tok_embeddings.weight"
    found = heads(model, axes, axes.residual)
    roles = [
        embedding(tokens, axes.vocabulary, axes.residual),
        *norm(f"{prefix}embeddings.norm", axes.residual),
        # The first layer has no norm before its attention: it reads what the norm of the embeddings gives.
        *norm(f"{layer}.attn_norm", axes.residual),
        *linear(f"{layer}.attn.Wqkv", axes.query + axes.key + axes.value, axes.residual),
        *linear(f"{layer}.attn.Wo", axes.residual, axes.attended),
        *norm(f"{layer}.mlp_norm", axes.residual),
        *linear(f"{layer}.mlp.Wi", axes.ffn + axes.ffn, axes.residual),
        *linear(f"{layer}.mlp.Wo", axes.residual, axes.ffn),
        *norm(f"{prefix}final_norm", axes.residual),
        *found.roles,
    ]
    stack = LayerStack(
        f"{prefix}layers",
        "num_hidden_layers",
        ("attn.Wo", "mlp.Wo"),
        entries=(f"{prefix}embeddings",),
        end=f"{prefix}final_norm",
        readers=found.readers,
        feed_forward=("mlp",),
        attentions=("attn",),
    )
    return Anatomy(
        family=config.model_type,
        sizes=sizes,
        fields=ConfigFields("hidden_size", "num_attention_heads", None, "intermediate_size", None, "norm_eps"),
        stacks=(stack,),
        roles=tuple(roles),
        norm="layer",
        norm_has_gain=True,
        tied=found.tied,
        final_norm=found.norm or f"{prefix}final_norm",
        head=found.last,
        embeddings=(tokens,),
        rotary_dim=sizes.head_dim,
        rope_type=rotary.rope_type,
        embedding_norm=f"{prefix}embeddings.norm",
    )


ANATOMIES.add("modernbert", _modernbert)
