"""The anatomies of decoders with low-rank attention (DeepSeek): queries, and keys with values, come from a narrow
vector of their own, and one rotated key serves all heads."""

from functools import partial
from typing import Any

from transformers import PreTrainedModel

from auxin.models.anatomy.found import ANATOMIES
from auxin.models.anatomy.llama import Decoder, assembled, feed_forward_roles, feed_forward_sizes, shared_experts
from auxin.models.anatomy.parts import base_prefix, head_roles, sizes_of
from auxin.words.anatomy import Anatomy
from auxin.words.roles import Axes, ParameterRole, Segment, embedding, linear, norm
from auxin.words.widths import Sizes

LATENT = {
    "deepseek_v2": Decoder(
        expert_field="moe_intermediate_size",
        shared_experts_field="n_shared_experts",
        experts_field="n_routed_experts",
        groups_scored_by=1,
        groups_if="group_limited_greedy",
        heads_are="equal",
        rotary_pairs="neighbours",
    ),
    "deepseek_v3": Decoder(
        expert_field="moe_intermediate_size",
        shared_experts_field="n_shared_experts",
        experts_field="n_routed_experts",
        groups_scored_by=2,
        heads_are="equal",
    ),
}
"""By model type."""


def _latent(model: PreTrainedModel, own: Decoder) -> Anatomy:
    config: Any = model.config
    prefix = base_prefix(model)
    # The rotated part of a head is what the config calls head_dim; no part of a head changes.
    sizes = sizes_of(config, config.intermediate_size, config.qk_rope_head_dim)
    sizes = feed_forward_sizes(model, own, sizes)
    axes, layer = Axes.of(sizes, config.vocab_size), f"{prefix}layers.*"
    roles = [
        embedding(f"{prefix}embed_tokens.weight", axes.vocabulary, axes.residual),
        *_attention(f"{layer}.self_attn", config, sizes, axes),
        *feed_forward_roles(layer, sizes, own, shared_experts(model, own)),
        *norm(f"{layer}.input_layernorm", axes.residual),
        *norm(f"{layer}.post_attention_layernorm", axes.residual),
        *norm(f"{prefix}{own.final_norm}", axes.residual),
        *head_roles(axes),
    ]
    return assembled(model, own, sizes, roles)


def _attention(module: str, config: Any, sizes: Sizes, axes: Axes) -> list[ParameterRole]:
    heads, plain, value = sizes.query_heads, config.qk_nope_head_dim, config.v_head_dim
    query = (Segment("query", plain + config.qk_rope_head_dim, heads, ("query",)),)
    key_and_value = (Segment("query", plain + value, heads, ("key", "value"), (plain, value)),)
    attended = (Segment("query", value, heads, ("value",)),)
    return [
        *linear(f"{module}.q_proj", query, axes.residual),
        *linear(f"{module}.q_a_proj", (), axes.residual),
        *norm(f"{module}.q_a_layernorm", ()),
        *linear(f"{module}.q_b_proj", query, ()),
        *linear(f"{module}.kv_a_proj_with_mqa", (), axes.residual),
        *norm(f"{module}.kv_a_layernorm", ()),
        *linear(f"{module}.kv_b_proj", key_and_value, ()),
        *linear(f"{module}.o_proj", axes.residual, attended),
    ]


for _family, _own in LATENT.items():
    ANATOMIES.add(_family, partial(_latent, own=_own))
