"""The anatomies of GPT-J and GPT-Neo: GPT-2's names with queries, keys and values in matrices of their own."""

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from auxin.models.anatomy.found import ANATOMIES
from auxin.models.anatomy.parts import attention_roles, base_prefix, layer_norm_decoder, sizes_of
from auxin.words.anatomy import Anatomy, LayerStack
from auxin.words.roles import Axes, embedding, linear, norm
from auxin.words.widths import ConfigFields


def _gptj(model: PreTrainedModel) -> Anatomy:
    config: Any = model.config
    sizes = sizes_of(config, config.n_inner or 4 * config.n_embd)
    axes, prefix = Axes.of(sizes, config.vocab_size), base_prefix(model)
    layer = f"{prefix}h.*"
    roles = [
        embedding(f"{prefix}wte.weight", axes.vocabulary, axes.residual),
        *norm(f"{layer}.ln_1", axes.residual),
        *attention_roles(f"{layer}.attn", axes),
        *linear(f"{layer}.mlp.fc_in", axes.ffn, axes.residual),
        *linear(f"{layer}.mlp.fc_out", axes.residual, axes.ffn),
    ]
    return replace(
        layer_norm_decoder(
            model,
            sizes,
            ConfigFields("n_embd", "n_head", None, "n_inner", None, "layer_norm_epsilon"),
            LayerStack(
                f"{prefix}h",
                "n_layer",
                ("attn.out_proj", "mlp.fc_out"),
                entries=(f"{prefix}wte",),
                end=f"{prefix}ln_f",
                attentions=("attn",),
                parallel=True,
            ),
            roles,
        ),
        rotary_dim=config.rotary_dim or sizes.head_dim,
        rotary_pairs="neighbours",
        rotary_dim_stays=True,
    )


def _gpt_neo(model: PreTrainedModel) -> Anatomy:
    config: Any = model.config
    sizes = sizes_of(config, config.intermediate_size or 4 * config.hidden_size)
    axes, prefix = Axes.of(sizes, config.vocab_size), base_prefix(model)
    layer = f"{prefix}h.*"
    roles = [
        embedding(f"{prefix}wte.weight", axes.vocabulary, axes.residual),
        embedding(f"{prefix}wpe.weight", (), axes.residual),
        *norm(f"{layer}.ln_1", axes.residual),
        *attention_roles(f"{layer}.attn.attention", axes),
        *norm(f"{layer}.ln_2", axes.residual),
        *linear(f"{layer}.mlp.c_fc", axes.ffn, axes.residual),
        *linear(f"{layer}.mlp.c_proj", axes.residual, axes.ffn),
    ]
    return replace(
        layer_norm_decoder(
            model,
            sizes,
            ConfigFields("hidden_size", "num_heads", None, "intermediate_size", None, "layer_norm_epsilon"),
            LayerStack(
                f"{prefix}h",
                "num_layers",
                ("attn.attention.out_proj", "mlp.c_proj"),
                entries=(f"{prefix}wte", f"{prefix}wpe"),
                end=f"{prefix}ln_f",
                attentions=("attn",),
            ),
            roles,
        ),
        attention_scaled=False,
    )


ANATOMIES.add("gptj", _gptj)
ANATOMIES.add("gpt_neo", _gpt_neo)
