"""The anatomies of GPT-2 and of GPT-BigCode, which names its modules in the same way."""

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from auxin.models.anatomy.found import ANATOMIES
from auxin.models.anatomy.parts import base_prefix, layer_norm_decoder, sizes_of
from auxin.words.anatomy import Anatomy, LayerStack
from auxin.words.roles import Axes, ParameterRole, conv1d, embedding, linear, norm
from auxin.words.widths import ConfigFields, Sizes


def _gpt2(model: PreTrainedModel) -> Anatomy:
    config: Any = model.config
    sizes = sizes_of(config, config.n_inner or 4 * config.n_embd)
    axes = Axes.of(sizes, config.vocab_size)
    layer = f"{base_prefix(model)}h.*"
    matrices = [
        *conv1d(f"{layer}.attn.c_attn", axes.query + axes.key + axes.value, axes.residual),
        *conv1d(f"{layer}.attn.c_proj", axes.residual, axes.attended),
        *conv1d(f"{layer}.mlp.c_fc", axes.ffn, axes.residual),
        *conv1d(f"{layer}.mlp.c_proj", axes.residual, axes.ffn),
    ]
    return _assembled(model, sizes, matrices)


def _gpt_bigcode(model: PreTrainedModel) -> Anatomy:
    """With multi-query attention queries, key and value lie one after the other; without, those of each head do."""
    config: Any = model.config
    single = bool(config.multi_query)
    sizes = sizes_of(config, config.n_inner or 4 * config.n_embd, key_value_heads=1 if single else None)
    axes = Axes.of(sizes, config.vocab_size)
    layer = f"{base_prefix(model)}h.*"
    matrices = [
        *linear(f"{layer}.attn.c_attn", axes.query + axes.key + axes.value if single else axes.fused, axes.residual),
        *linear(f"{layer}.attn.c_proj", axes.residual, axes.attended),
        *linear(f"{layer}.mlp.c_fc", axes.ffn, axes.residual),
        *linear(f"{layer}.mlp.c_proj", axes.residual, axes.ffn),
    ]
    return _assembled(model, sizes, matrices, single)


def _assembled(model: PreTrainedModel, sizes: Sizes, matrices: list[ParameterRole], single: bool = False) -> Anatomy:
    """The anatomy of a model of these widths, with the roles of its layers' matrices; `single`: whether all query heads
    read one key-value head."""
    config: Any = model.config
    axes, prefix = Axes.of(sizes, config.vocab_size), base_prefix(model)
    roles = [
        embedding(f"{prefix}wte.weight", axes.vocabulary, axes.residual),
        embedding(f"{prefix}wpe.weight", (), axes.residual),
        *norm(f"{prefix}h.*.ln_1", axes.residual),
        *norm(f"{prefix}h.*.ln_2", axes.residual),
        *matrices,
    ]
    return replace(
        layer_norm_decoder(
            model,
            sizes,
            ConfigFields("n_embd", "n_head", None, "n_inner", None, "layer_norm_epsilon"),
            LayerStack(
                f"{prefix}h",
                "n_layer",
                ("attn.c_proj", "mlp.c_proj"),
                entries=(f"{prefix}wte", f"{prefix}wpe"),
                end=f"{prefix}ln_f",
            ),
            roles,
        ),
        attention_scaled=config.scale_attn_weights,
        single_key_value_head=single,
    )


ANATOMIES.add("gpt2", _gpt2)
ANATOMIES.add("gpt_bigcode", _gpt_bigcode)
