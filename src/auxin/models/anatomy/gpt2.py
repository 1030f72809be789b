"""The anatomy of GPT-2."""

from typing import Any

from transformers import PreTrainedModel

from auxin.models.anatomy.found import ANATOMIES
from auxin.models.anatomy.parts import is_tied, sizes_of
from auxin.words.roles import Anatomy, Axes, ConfigFields, LayerStack, conv1d, embedding, linear, norm


def _gpt2(model: PreTrainedModel) -> Anatomy:
    config: Any = model.config
    sizes = sizes_of(config, config.n_inner or 4 * config.n_embd)
    axes = Axes.of(sizes, config.vocab_size)
    layer = "transformer.h.*"
    roles = [
        embedding("transformer.wte.weight", axes.vocabulary, axes.residual),
        embedding("transformer.wpe.weight", (), axes.residual),
        *norm(f"{layer}.ln_1", axes.residual),
        *conv1d(f"{layer}.attn.c_attn", axes.query + axes.key + axes.value, axes.residual),
        *conv1d(f"{layer}.attn.c_proj", axes.residual, axes.attended),
        *norm(f"{layer}.ln_2", axes.residual),
        *conv1d(f"{layer}.mlp.c_fc", axes.ffn, axes.residual),
        *conv1d(f"{layer}.mlp.c_proj", axes.residual, axes.ffn),
        *norm("transformer.ln_f", axes.residual),
        *linear("lm_head", axes.vocabulary, axes.residual, "head"),
    ]
    return Anatomy(
        family="gpt2",
        sizes=sizes,
        fields=ConfigFields("n_embd", "n_head", None, "n_inner", None, "layer_norm_epsilon"),
        stacks=(
            LayerStack(
                "transformer.h",
                "n_layer",
                ("attn.c_proj", "mlp.c_proj"),
                entries=("transformer.wte", "transformer.wpe"),
                end="transformer.ln_f",
                readers=("lm_head",),
            ),
        ),
        roles=tuple(roles),
        norm="layer",
        norm_has_gain=True,
        tied=is_tied(model),
        final_norm="transformer.ln_f",
        head="lm_head",
        embeddings=("transformer.wte.weight", "transformer.wpe.weight"),
        attention_scaled=config.scale_attn_weights,
    )


ANATOMIES.add("gpt2", _gpt2)
