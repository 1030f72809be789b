"""Decoders that name their modules as Llama does: `layers.*.self_attn.q_proj`, `layers.*.mlp.down_proj`, `norm`.

What an architecture has beside or instead of Llama's is a row of `DECODERS`; roles of modules that it lacks are dropped
by whoever asks for the anatomy.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from transformers import PreTrainedModel

from auxin.models.anatomy.found import ANATOMIES
from auxin.models.anatomy.parts import (
    HEADS,
    attention_roles,
    base_prefix,
    head_of,
    head_roles,
    is_tied,
    rotary_of,
    sizes_of,
)
from auxin.models.head_dims import HEAD_DIM, reads_unlisted_head_dim
from auxin.words.anatomy import Anatomy, LayerStack, Routing
from auxin.words.roles import Access, Axes, Kind, ParameterRole, Segment, embedding, linear, norm, per_head
from auxin.words.widths import ConfigFields, Sizes, Stream

NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "post_self_attn_layernorm",
    "post_mlp_layernorm",
    "attention_layernorm",
    "feedforward_layernorm",
)
"""The norms over the residual in a layer, wherever they sit."""


@dataclass(frozen=True)
class Decoder:
    """What a decoder with Llama's names has of its own."""

    norm: Literal["rms", "layer"] = "rms"
    norm_has_gain: bool = True
    epsilon: str | None = "rms_norm_eps"
    final_norm: str = "norm"
    feed_forward: str = "mlp"
    """The feed-forward part of a layer, dense or with experts."""
    norm_first: bool = False
    """Whether the last norm is applied to the embeddings too (nanochat)."""
    output_norms: tuple[str, ...] = ()
    """The norms between an output and the residual."""
    gain_offset: float = 0.0
    embedding_scaled: bool = False
    """Whether embeddings are multiplied by the root of the hidden size."""
    attention_scaled: bool = True
    """Whether scores are divided by the root of the head dimension; else a constant of the config does it."""
    heads_divide_hidden_size: bool = False
    heads_are_hidden_size: bool = False
    """Whether heads x head dimension has to be the hidden size although the config has a head dimension (Helium)."""
    qk_norm: Literal["none", "head", "each_head", "all_heads"] = "none"
    """Whether one gain serves all heads, each has its own (Cohere), or all are normed together."""
    qk_norm_if: str = ""
    """The config's switch for the norms on queries and keys; "" where they are always there."""
    parallel: bool = False
    parallel_if: str = ""
    """The config's switch for parts that read the same; "" where there is none."""
    rotary_pairs: Literal["halves", "neighbours"] = "halves"
    expert_field: str | None = None
    """The config's name for the experts' inner width, where dense layers have another one."""
    shared_expert_field: str | None = None
    shared_experts_field: str | None = None
    """The config's name for the number of experts, of the inner width of all others, that all tokens share."""
    experts_field: str | None = None
    """The config's name for the number of experts among which a router chooses."""
    experts_per_token_field: str = "num_experts_per_tok"
    """The config's name for the number that it chooses for a token."""
    groups_scored_by: int = 0
    """How many of a group's experts say whether a token gets experts of it; 0: experts have no groups."""
    groups_if: str = ""
    """The config's value of `topk_method` with which groups count; "" where they always do."""
    heads_are: Literal["grouped", "equal"] = "grouped"
    """Whether query heads can share key-value heads, or the config has to say the same number of both."""
    interleaved: bool = False
    """Whether the rows of gate and up projection of experts take turns, experts have biases, and inputs come before
    outputs (gpt-oss)."""


_GEMMA = Decoder(embedding_scaled=True, gain_offset=1.0)
_SANDWICH = ("post_attention_layernorm", "post_feedforward_layernorm")
_QWEN_EXPERTS = Decoder(
    expert_field="moe_intermediate_size",
    shared_expert_field="shared_expert_intermediate_size",
    experts_field="num_experts",
)
_COHERE = Decoder(norm="layer", epsilon="layer_norm_eps", parallel=True, rotary_pairs="neighbours")
_LAYER_NORM = Decoder(norm="layer", epsilon="layer_norm_eps")
_SHARED_EXPERTS = Decoder(
    expert_field="moe_intermediate_size",
    shared_experts_field="n_shared_experts",
    experts_field="n_routed_experts",
    groups_scored_by=2,
)

DECODERS = {
    "llama": Decoder(heads_divide_hidden_size=True),
    "mistral": Decoder(),
    "ministral": Decoder(),
    "mixtral": Decoder(experts_field="num_local_experts"),
    "qwen2": Decoder(),
    "qwen3": Decoder(qk_norm="head"),
    "qwen2_moe": _QWEN_EXPERTS,
    "qwen3_moe": replace(_QWEN_EXPERTS, qk_norm="head", experts_field="num_local_experts"),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, output_norms=_SANDWICH, attention_scaled=False),
    "gemma3_text": replace(_GEMMA, output_norms=_SANDWICH, attention_scaled=False, qk_norm="head"),
    "olmo": Decoder(norm="layer", norm_has_gain=False, epsilon=None),
    "olmo2": Decoder(output_norms=_SANDWICH, qk_norm="all_heads"),
    "olmo3": Decoder(output_norms=_SANDWICH, qk_norm="all_heads"),
    "olmoe": Decoder(qk_norm="all_heads", experts_field="num_experts"),
    "phi": replace(_LAYER_NORM, final_norm="final_layernorm", parallel=True, qk_norm="head", qk_norm_if="qk_layernorm"),
    "phi3": Decoder(),
    "granite": Decoder(attention_scaled=False),
    "granitemoe": Decoder(feed_forward="block_sparse_moe", attention_scaled=False, experts_field="num_local_experts"),
    "cohere": replace(_COHERE, qk_norm="each_head", qk_norm_if="use_qk_norm"),
    "cohere2": _COHERE,
    "smollm3": Decoder(),
    "stablelm": replace(_LAYER_NORM, parallel_if="use_parallel_residual", qk_norm="head", qk_norm_if="qk_layernorm"),
    "starcoder2": Decoder(norm="layer", epsilon="norm_epsilon"),
    "glm": Decoder(rotary_pairs="neighbours"),
    "glm4": Decoder(output_norms=("post_self_attn_layernorm", "post_mlp_layernorm"), rotary_pairs="neighbours"),
    "exaone4": Decoder(output_norms=_SANDWICH, qk_norm="head"),
    "gpt_oss": Decoder(interleaved=True, experts_field="num_local_experts"),
    "nemotron": Decoder(norm="layer", epsilon="norm_eps", gain_offset=1.0),
    "helium": Decoder(rotary_pairs="neighbours", heads_are_hidden_size=True),
    "arcee": Decoder(),
    "apertus": Decoder(qk_norm="head"),
    "seed_oss": Decoder(),
    "hunyuan_v1_dense": Decoder(qk_norm="head"),
    "nanochat": Decoder(norm_has_gain=False, norm_first=True, qk_norm="head"),
    "dots1": replace(_SHARED_EXPERTS, qk_norm="head"),
    "glm4_moe": replace(_SHARED_EXPERTS, qk_norm="head", qk_norm_if="use_qk_norm"),
    "ernie4_5_moe": replace(
        _SHARED_EXPERTS,
        shared_experts_field="moe_num_shared_experts",
        experts_field="moe_num_experts",
        experts_per_token_field="moe_k",
        groups_scored_by=0,
        rotary_pairs="neighbours",
    ),
}
"""By model type."""


def decoder(model: PreTrainedModel, own: Decoder) -> Anatomy:
    """The anatomy of a decoder with Llama's names.

    Args:
        model: the model, with a head or without.
        own: what its architecture has of its own.
    """
    config: Any = model.config
    sizes = _sizes(model, own)
    axes, stack_path = Axes.of(sizes, config.vocab_size), f"{base_prefix(model)}layers"
    qk_norm = own.qk_norm if not own.qk_norm_if or getattr(config, own.qk_norm_if) else "none"
    roles = [
        embedding(f"{base_prefix(model)}embed_tokens.weight", axes.vocabulary, axes.residual),
        *_attention(f"{stack_path}.*.self_attn", axes, qk_norm),
        *feed_forward_roles(f"{stack_path}.*", sizes, own, shared_experts(model, own)),
        *(role for name in NORMS for role in norm(f"{stack_path}.*.{name}", axes.residual)),
        *norm(f"{base_prefix(model)}{own.final_norm}", axes.residual),
        *head_roles(axes),
    ]
    return assembled(model, own, sizes, roles, qk_norm)


def assembled(
    model: PreTrainedModel,
    own: Decoder,
    sizes: Sizes,
    roles: list[ParameterRole],
    qk_norm: Literal["none", "head", "each_head", "all_heads"] = "none",
    head_dim_field: str | None = None,
) -> Anatomy:
    """The anatomy made of the roles of a decoder with Llama's names, and of what its architecture has of its own.

    Args:
        model: the model.
        own: what its architecture has of its own.
        sizes: its widths.
        roles: of all of its parameters.
        qk_norm: which norms it has on queries and keys.
        head_dim_field: what the config calls the head dimension; default: "head_dim" where it has that.
    """
    config: Any = model.config
    prefix, rotary = base_prefix(model), rotary_of(config)
    head_dim_field = head_dim_field or ("head_dim" if hasattr(config, "head_dim") else None)
    final_norm = f"{prefix}{own.final_norm}"
    stack = LayerStack(
        f"{prefix}layers",
        "num_hidden_layers",
        OUTPUTS,
        own.output_norms,
        "after_output" if own.output_norms else "before",
        (f"{prefix}embed_tokens",),
        final_norm,
        HEADS,
        (own.feed_forward,),
        ("self_attn",),
        own.parallel or bool(own.parallel_if and getattr(config, own.parallel_if)),
    )
    return Anatomy(
        family=config.model_type,
        sizes=sizes,
        fields=ConfigFields(
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads" if own.heads_are == "grouped" else None,
            "intermediate_size" if sizes.ffn else None,
            None if own.heads_are_hidden_size else head_dim_field,
            own.epsilon,
            own.expert_field if sizes.expert_ffn else None,
            own.shared_expert_field if sizes.shared_expert_ffn else None,
            own.experts_field if sizes.experts else None,
            own.experts_per_token_field if sizes.experts else None,
            like_heads=() if own.heads_are == "grouped" else ("num_key_value_heads",),
            like_head_dim=("head_dim",) if own.heads_are_hidden_size else (),
            unsaid_head_dim=None if own.heads_are_hidden_size else _unsaid_head_dim(config, head_dim_field),
        ),
        stacks=(stack,),
        roles=tuple(roles),
        norm=own.norm,
        norm_has_gain=own.norm_has_gain,
        tied=is_tied(model),
        final_norm=final_norm if own.norm_has_gain else None,
        head=head_of(model),
        embeddings=(f"{prefix}embed_tokens.weight",),
        attention_scaled=own.attention_scaled,
        embedding_scaled=own.embedding_scaled,
        embedding_norm=final_norm if own.norm_first else None,
        gain_offset=own.gain_offset,
        rotary_dim=int(sizes.head_dim * rotary.share),
        rope_type=rotary.rope_type,
        rotary_pairs=own.rotary_pairs,
        heads_divide_hidden_size=own.heads_divide_hidden_size,
        routing=_routing(config, own) if sizes.experts else None,
        heads_clipped=f"clip_qkv = {config.clip_qkv:g}" if getattr(config, "clip_qkv", None) else "",
        qk_norm="head" if qk_norm == "each_head" else qk_norm,
    )


def _unsaid_head_dim(config: Any, field: str | None) -> str | None:
    if field is None:
        return HEAD_DIM if reads_unlisted_head_dim(config) else None
    return field if getattr(config, field) is None else None


OUTPUTS = (
    "self_attn.o_proj",
    "self_attn.dense",
    "mlp.down_proj",
    "mlp.fc2",
    "mlp.c_proj",
    "mlp.experts.down_proj",
    "mlp.experts.down_proj_bias",
    "block_sparse_moe.experts.down_proj",
    "mlp.shared_expert.down_proj",
    "mlp.shared_experts.down_proj",
)
"""What is added to the residual: the modules, and of experts the parameters, that give it."""


def _sizes(model: PreTrainedModel, own: Decoder) -> Sizes:
    """The widths that the config says; those of feed-forward parts that no layer has are left out."""
    config: Any = model.config
    sizes = sizes_of(config, config.intermediate_size, getattr(config, "head_dim", None), config.num_key_value_heads)
    return feed_forward_sizes(model, own, sizes)


def feed_forward_sizes(model: PreTrainedModel, own: Decoder, sizes: Sizes) -> Sizes:
    """`sizes` with the number of experts, with their widths where these have their own, and without those that no layer
    has.

    Args:
        model: the model.
        own: what its architecture has of its own.
        sizes: the widths, with that of dense layers.
    """
    # Modules and not their parameters: a brick may have put something between.
    paths = [name for name, _ in model.named_modules()]
    if own.experts_field is not None and any(path.endswith(f".{own.feed_forward}.experts") for path in paths):
        sizes = replace(sizes, experts=getattr(model.config, own.experts_field))
    if own.expert_field is None:
        return sizes
    dense = any(path.endswith(".mlp.down_proj") for path in paths)
    experts, shared = (any(path.endswith(f".mlp.{name}") for path in paths) for name in ("experts", "shared_expert"))
    config: Any = model.config
    return replace(
        sizes,
        ffn=sizes.ffn if dense else None,
        expert_ffn=getattr(config, own.expert_field) if experts else None,
        shared_expert_ffn=getattr(config, str(own.shared_expert_field), None) if shared else None,
    )


def _routing(config: Any, own: Decoder) -> Routing:
    per_token = getattr(config, own.experts_per_token_field)
    if not own.groups_scored_by or (own.groups_if and config.topk_method != own.groups_if):
        return Routing(per_token)
    return Routing(per_token, config.n_group, config.topk_group, own.groups_scored_by)


def _attention(module: str, axes: Axes, qk_norm: str) -> list[ParameterRole]:
    roles = [
        *linear(f"{module}.qkv_proj", axes.query + axes.key + axes.value, axes.residual),
        *attention_roles(module, axes, ("q_proj", "k_proj", "v_proj", "o_proj")),
        *linear(f"{module}.dense", axes.residual, axes.attended),
        ParameterRole(f"{module}.sinks", (per_head(axes.query),), ("writes",), "bias"),
    ]
    gains: tuple[tuple[str, tuple[str, ...], tuple[Segment, ...], Kind], ...] = (
        ("q_norm", ("q_layernorm", "query_layernorm"), axes.query, "query_gain"),
        ("k_norm", ("k_layernorm", "key_layernorm"), axes.key, "key_gain"),
    )
    for name, others, heads, kind in gains:
        if qk_norm == "each_head":
            roles.append(ParameterRole(f"{module}.{name}.weight", (per_head(heads), ()), ("writes", None), kind))
        else:
            roles += norm(f"{module}.{name}", heads if qk_norm == "all_heads" else (), kind)
        roles += [role for other in others for role in norm(f"{module}.{other}", (), kind)]
    return roles


def shared_experts(model: PreTrainedModel, own: Decoder) -> int:
    """How many experts of the inner width of all others all tokens share."""
    return int((own.shared_experts_field and getattr(model.config, own.shared_experts_field, None)) or 0)


def feed_forward_roles(layer: str, sizes: Sizes, own: Decoder, shared_experts: int = 0) -> list[ParameterRole]:
    """The roles of dense feed-forward parts, experts and routers of a layer.

    Args:
        layer: the layer's path, a pattern.
        sizes: the model's widths.
        own: what its architecture has of its own.
        shared_experts: how many experts all tokens share, whose units lie in one module.
    """
    axes = Axes.of(sizes, 0)
    shared = _units("shared_expert_ffn", sizes.shared_expert_ffn)
    roles = dense_feed_forward(f"{layer}.mlp", axes.ffn, axes.residual)
    roles += dense_feed_forward(f"{layer}.mlp.shared_expert", shared, axes.residual)
    inner = _units("expert_ffn", sizes.expert_ffn) if own.expert_field else axes.ffn
    # For each unit of an expert there are as many in this module; which of them belong together makes no difference.
    together = tuple(replace(segment, unit=shared_experts) for segment in inner if shared_experts)
    roles += dense_feed_forward(f"{layer}.mlp.shared_experts", together, axes.residual)
    roles += linear(f"{layer}.{own.feed_forward}.shared_expert_gate", (), axes.residual)
    experts = _units("expert", sizes.experts)
    for router in ("gate", "router"):
        roles += _router(f"{layer}.{own.feed_forward}.{router}", experts, axes.residual)
    make = _interleaved_experts if own.interleaved else _experts
    return roles + make(f"{layer}.{own.feed_forward}.experts", experts, inner, axes.residual)


def _router(module: str, experts: tuple[Segment, ...], residual: tuple[Segment, ...]) -> list[ParameterRole]:
    """A row for each expert, and what is added to its score: to choose it (in a parameter or a buffer), or always."""
    correction = "e_score_correction_bias"
    return [
        ParameterRole(f"{module}.weight", (experts, residual), (None, "reads"), "matrix"),
        ParameterRole(f"{module}.bias", (experts,), (None,), "bias"),
        ParameterRole(f"{module}.{correction}", (experts,), (None,), "shape"),
        ParameterRole(f"{module}.moe_statics.{correction}", ((), experts), (None, None), "shape"),
    ]


def _units(stream: Stream, count: int | None) -> tuple[Segment, ...]:
    return (Segment(stream, 1, count),) if count else ()


def dense_feed_forward(module: str, inner: tuple[Segment, ...], residual: tuple[Segment, ...]) -> list[ParameterRole]:
    """The roles of a feed-forward part: gated, its two inputs apart or in one, or not gated."""
    roles: list[ParameterRole] = []
    for name in ("gate_proj", "up_proj", "fc1", "c_fc"):
        roles += linear(f"{module}.{name}", inner, residual)
    roles += linear(f"{module}.gate_up_proj", inner + inner, residual)
    for name in ("down_proj", "fc2", "c_proj"):
        roles += linear(f"{module}.{name}", residual, inner)
    return [*roles, ParameterRole(f"{module}.act_fn.*", ((),), (None,), "shape")]


def _experts(
    module: str, experts: tuple[Segment, ...], inner: tuple[Segment, ...], residual: tuple[Segment, ...]
) -> list[ParameterRole]:
    """All experts in one tensor: (experts, outputs, inputs), gate before up."""
    access: tuple[Access | None, ...] = (None, "writes", "reads")
    return [
        ParameterRole(f"{module}.gate_up_proj", (experts, inner + inner, residual), access, "matrix"),
        ParameterRole(f"{module}.down_proj", (experts, residual, inner), access, "matrix"),
    ]


def _interleaved_experts(
    module: str, experts: tuple[Segment, ...], inner: tuple[Segment, ...], residual: tuple[Segment, ...]
) -> list[ParameterRole]:
    """All experts in one tensor: (experts, inputs, outputs), gate and up of a unit next to each other, biases."""
    pairs = tuple(replace(segment, unit=2) for segment in inner)
    return [
        ParameterRole(f"{module}.gate_up_proj", (experts, residual, pairs), (None, "reads", "writes"), "matrix"),
        ParameterRole(f"{module}.gate_up_proj_bias", (experts, pairs), (None, "writes"), "bias"),
        ParameterRole(f"{module}.down_proj", (experts, inner, residual), (None, "reads", "writes"), "matrix"),
        ParameterRole(f"{module}.down_proj_bias", (experts, residual), (None, "writes"), "bias"),
    ]


for _family, _own in DECODERS.items():
    ANATOMIES.add(_family, partial(decoder, own=_own))
