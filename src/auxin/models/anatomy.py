"""The anatomy of a transformer: what every parameter's axes run along, where its layers are, how its norms sit.

Growing, pruning and merging methods ask this one module instead of knowing architectures by name. A **stream** is a
family of units that grow together: the residual, the query heads (which index the attention's output too), the
key-value heads, the hidden units of the feed-forward part, the vocabulary. A parameter **writes** a stream with the
axis that produces its units (outputs, embeddings, gains, biases) and **reads** it with the axis that consumes them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedModel

from auxin.errors import PlanError, unknown_name
from auxin.models.paths import path_pattern

Stream = Literal["residual", "query", "key_value", "ffn", "vocabulary"]
Access = Literal["writes", "reads"]
Kind = Literal["matrix", "bias", "embedding", "gain", "offset", "head", "query_gain", "key_gain"]
"""What a parameter is: a matrix between streams, its bias, an embedding (of tokens, positions, types), a norm's gain or
its offset (the norm's bias), the output head, or the gain of a norm on queries or keys."""
HeadPart = Literal["query", "key", "value"]
NormPosition = Literal["before", "after_output", "after_residual"]


@dataclass(frozen=True)
class Segment:
    """A stretch of an axis: `count` units of `unit` consecutive entries each."""

    stream: Stream
    unit: int
    count: int
    parts: tuple[HeadPart, ...] = ()
    """What a head's unit is made of, a head dimension each: its query, key or value, or all three one after another.
    The attention's output is read as values are. Empty where a unit has no head dimensions."""

    @property
    def size(self) -> int:
        """Entries of the segment."""
        return self.unit * self.count


@dataclass(frozen=True)
class ParameterRole:
    """What the parameters of one pattern are and what their axes run along."""

    pattern: str
    """Dotted name, `*` for one part."""
    axes: tuple[tuple[Segment, ...], ...]
    """Per axis the segments that make it up, concatenated; an empty tuple for an axis along no stream."""
    access: tuple[Access | None, ...]
    """Per axis whether the parameter writes or reads the stream there."""
    kind: Kind

    def matches(self, name: str) -> bool:
        """Whether the parameter `name` has this role."""
        return path_pattern(self.pattern).fullmatch(name) is not None

    def along(self, stream: Stream, access: Access | None = None) -> bool:
        """Whether an axis runs along `stream` (and is accessed so)."""
        return any(
            segment.stream == stream and access in (None, how)
            for segments, how in zip(self.axes, self.access, strict=True)
            for segment in segments
        )


@dataclass(frozen=True)
class LayerStack:
    """A list of like layers that one field of the config counts."""

    path: str
    """The module list: "model.layers"."""
    length_field: str
    """The config's attribute with the number of layers."""
    outputs: tuple[str, ...]
    """Modules of a layer whose output is added to the residual, relative to the layer: "self_attn.o_proj"."""
    output_norms: tuple[str, ...] = ()
    """Norms between such an output and the residual, relative to the layer."""
    norm_position: NormPosition = "before"
    """Where the norms sit: before each part, after its output, or after the sum of output and residual."""


@dataclass(frozen=True)
class Sizes:
    """The widths of a model, in units."""

    residual: int
    query_heads: int
    key_value_heads: int
    head_dim: int
    ffn: int | None


@dataclass(frozen=True)
class ConfigFields:
    """Under which names the config holds the widths; None where it has no such value."""

    hidden_size: str
    heads: str
    key_value_heads: str | None
    ffn: str | None
    head_dim: str | None
    """None: the head dimension is hidden size / heads."""
    epsilon: str | None


@dataclass(frozen=True)
class Anatomy:
    """Everything about a model's build that a change of its size has to respect."""

    family: str
    sizes: Sizes
    fields: ConfigFields
    stacks: tuple[LayerStack, ...]
    roles: tuple[ParameterRole, ...]
    norm: Literal["rms", "layer"]
    norm_has_gain: bool
    """Whether the norms inside the layers have gains."""
    tied: bool
    """Whether the head is the token embedding."""
    final_norm: str | None
    """The module whose gain comes right before the head; None where that norm has no gain."""
    head: str | None
    """The output head's module."""
    embeddings: tuple[str, ...]
    """The parameters that are added up to the first residual."""
    epsilon: float = 0.0
    """Epsilon of the norms; set where the config holds it."""
    rotary_dim: int = 0
    """How many of a head's dimensions are rotated by position; 0: none."""
    rope_type: str = "default"
    """How the rotary frequencies depend on the dimension, in the words of transformers."""
    attention_scaled: bool = True
    """Whether attention scores are divided by the square root of the head dimension."""
    logits_scaled: bool = False
    """Whether the tied head's logits are divided by the square root of the hidden size (T5)."""
    embedding_scaled: bool = False
    """Whether token embeddings are multiplied by the square root of the hidden size (Gemma)."""
    gain_offset: float = 0.0
    """What the norms add to their stored gain (Gemma: 1)."""
    heads_divide_hidden_size: bool = False
    """Whether the config insists on it although the head dimension is its own."""
    qk_norm: Literal["none", "head", "all_heads"] = "none"
    """RMS norms on queries and keys: over each head, or over all heads together."""

    @property
    def rotary(self) -> bool:
        """Whether queries and keys are rotated by position."""
        return self.rotary_dim > 0

    @property
    def epsilon_field(self) -> str | None:
        """The config's attribute with the epsilon of the norms; None when it is fixed."""
        return self.fields.epsilon

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a key-value head."""
        return self.sizes.key_value_heads < self.sizes.query_heads

    @property
    def norm_position(self) -> NormPosition:
        """Where the norms sit, the same in all stacks."""
        return self.stacks[0].norm_position

    def role(self, name: str) -> ParameterRole:
        """The role of the parameter `name`; PlanError when it has none."""
        for role in self.roles:
            if role.matches(name):
                return role
        raise PlanError(f"The {self.family} model has a parameter {name} that its anatomy does not know.")


def anatomy(model: PreTrainedModel) -> Anatomy:
    """The anatomy of `model`, which may be a skeleton on the meta device.

    Raises:
        PlanError: the architecture is not known, or the model has a parameter that its architecture's anatomy lacks.
    """
    family = model.config.model_type
    if family not in _FAMILIES:
        raise PlanError(unknown_name("architecture", family, _FAMILIES))
    found = _FAMILIES[family](model)
    names = [name for name, _ in model.named_parameters()]
    used = [role for role in found.roles if any(role.matches(name) for name in names)]
    epsilon = getattr(model.config, found.fields.epsilon) if found.fields.epsilon else 0.0
    found = replace(found, roles=tuple(used), epsilon=epsilon)
    for name in names:
        found.role(name)
    return found


def register_anatomy(model_type: str, describe: Callable[[PreTrainedModel], Anatomy]) -> None:
    """Make the architecture whose config says `model_type` known; roles that a model lacks are dropped by `anatomy`."""
    _FAMILIES[model_type] = describe


def known_families() -> tuple[str, ...]:
    """The model types whose anatomy is known."""
    return tuple(sorted(_FAMILIES))


@dataclass(frozen=True)
class Axes:
    """The segments of a model's streams, from which roles are written down."""

    residual: tuple[Segment, ...]
    query: tuple[Segment, ...]
    key: tuple[Segment, ...]
    value: tuple[Segment, ...]
    attended: tuple[Segment, ...]
    """The attention's output before it goes back to the residual."""
    ffn: tuple[Segment, ...]
    vocabulary: tuple[Segment, ...]

    @classmethod
    def of(cls, sizes: Sizes, vocabulary: int) -> "Axes":
        """The axes of a model of these sizes."""
        return cls(
            residual=(Segment("residual", 1, sizes.residual),),
            query=(Segment("query", sizes.head_dim, sizes.query_heads, ("query",)),),
            key=(Segment("key_value", sizes.head_dim, sizes.key_value_heads, ("key",)),),
            value=(Segment("key_value", sizes.head_dim, sizes.key_value_heads, ("value",)),),
            attended=(Segment("query", sizes.head_dim, sizes.query_heads, ("value",)),),
            ffn=(Segment("ffn", 1, sizes.ffn),) if sizes.ffn else (),
            vocabulary=(Segment("vocabulary", 1, vocabulary),),
        )


def linear(
    module: str, output: tuple[Segment, ...], read: tuple[Segment, ...], kind: Kind = "matrix"
) -> list[ParameterRole]:
    """The roles of a Linear's weight (out, in) and bias (out,)."""
    return [
        ParameterRole(f"{module}.weight", (output, read), ("writes" if output else None, "reads"), kind),
        ParameterRole(f"{module}.bias", (output,), ("writes" if output else None,), "bias"),
    ]


def conv1d(module: str, output: tuple[Segment, ...], read: tuple[Segment, ...]) -> list[ParameterRole]:
    """The roles of a GPT-2 Conv1D's weight (in, out) and bias (out,)."""
    return [
        ParameterRole(f"{module}.weight", (read, output), ("reads", "writes"), "matrix"),
        ParameterRole(f"{module}.bias", (output,), ("writes",), "bias"),
    ]


def norm(module: str, segments: tuple[Segment, ...], kind: Kind = "gain") -> list[ParameterRole]:
    """The roles of a norm's gain and offset."""
    return [
        ParameterRole(f"{module}.weight", (segments,), ("writes" if segments else None,), kind),
        ParameterRole(f"{module}.bias", (segments,), ("writes" if segments else None,), "offset"),
    ]


def embedding(parameter: str, *axes: tuple[Segment, ...]) -> ParameterRole:
    """The role of an embedding: it writes along every axis that has a stream."""
    return ParameterRole(parameter, axes, tuple("writes" if segments else None for segments in axes), "embedding")


def _sizes(config: Any, ffn: int | None, head_dim: int | None = None, key_value_heads: int | None = None) -> Sizes:
    hidden, heads = config.hidden_size, config.num_attention_heads
    return Sizes(hidden, heads, key_value_heads or heads, head_dim or hidden // heads, ffn)


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _llama_like(model: PreTrainedModel) -> Anatomy:
    """Llama, Gemma, Qwen2, Qwen3, OLMo and OLMo2: one naming, different norms."""
    config: Any = model.config
    family = config.model_type
    sizes = _sizes(config, config.intermediate_size, getattr(config, "head_dim", None), config.num_key_value_heads)
    axes = Axes.of(sizes, config.vocab_size)
    layer = "model.layers.*"
    after = family == "olmo2"
    norms = ("post_attention_layernorm", "post_feedforward_layernorm" if after else "input_layernorm")
    # Qwen3 norms each head with one gain for all; OLMo2 norms all heads together.
    qk_norm = {"qwen3": "head", "olmo2": "all_heads"}.get(family, "none")
    qk_axes = (axes.query, axes.key) if qk_norm == "all_heads" else ((), ())
    roles = [
        embedding("model.embed_tokens.weight", axes.vocabulary, axes.residual),
        *linear(f"{layer}.self_attn.q_proj", axes.query, axes.residual),
        *linear(f"{layer}.self_attn.k_proj", axes.key, axes.residual),
        *linear(f"{layer}.self_attn.v_proj", axes.value, axes.residual),
        *linear(f"{layer}.self_attn.o_proj", axes.residual, axes.attended),
        *norm(f"{layer}.self_attn.q_norm", qk_axes[0], "query_gain"),
        *norm(f"{layer}.self_attn.k_norm", qk_axes[1], "key_gain"),
        *linear(f"{layer}.mlp.gate_proj", axes.ffn, axes.residual),
        *linear(f"{layer}.mlp.up_proj", axes.ffn, axes.residual),
        *linear(f"{layer}.mlp.down_proj", axes.residual, axes.ffn),
        *(role for name in norms for role in norm(f"{layer}.{name}", axes.residual)),
        *norm("model.norm", axes.residual),
        *linear("lm_head", axes.vocabulary, axes.residual, "head"),
    ]
    stack = LayerStack(
        "model.layers",
        "num_hidden_layers",
        ("self_attn.o_proj", "mlp.down_proj"),
        norms if after else (),
        "after_output" if after else "before",
    )
    return Anatomy(
        family=family,
        sizes=sizes,
        fields=ConfigFields(
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads",
            "intermediate_size",
            "head_dim" if hasattr(config, "head_dim") else None,
            None if family == "olmo" else "rms_norm_eps",
        ),
        stacks=(stack,),
        roles=tuple(roles),
        norm="layer" if family == "olmo" else "rms",
        norm_has_gain=family != "olmo",
        tied=_is_tied(model),
        final_norm=None if family == "olmo" else "model.norm",
        head="lm_head",
        embeddings=("model.embed_tokens.weight",),
        rotary_dim=sizes.head_dim,
        rope_type=(config.rope_parameters or {}).get("rope_type", "default"),
        embedding_scaled=family == "gemma",
        gain_offset=1.0 if family == "gemma" else 0.0,
        heads_divide_hidden_size=family == "llama",
        qk_norm=qk_norm,  # type: ignore[arg-type]
    )


def _gpt2(model: PreTrainedModel) -> Anatomy:
    config: Any = model.config
    sizes = _sizes(config, config.n_inner or 4 * config.n_embd)
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
        stacks=(LayerStack("transformer.h", "n_layer", ("attn.c_proj", "mlp.c_proj")),),
        roles=tuple(roles),
        norm="layer",
        norm_has_gain=True,
        tied=_is_tied(model),
        final_norm="transformer.ln_f",
        head="lm_head",
        embeddings=("transformer.wte.weight", "transformer.wpe.weight"),
        attention_scaled=config.scale_attn_weights,
    )


def _gpt_neox(model: PreTrainedModel) -> Anatomy:
    config: Any = model.config
    sizes = _sizes(config, config.intermediate_size)
    axes = Axes.of(sizes, config.vocab_size)
    layer = "gpt_neox.layers.*"
    # Query, key and value of one head lie together: a unit is three head dimensions.
    fused = (Segment("query", 3 * sizes.head_dim, sizes.query_heads, ("query", "key", "value")),)
    roles = [
        embedding("gpt_neox.embed_in.weight", axes.vocabulary, axes.residual),
        *norm(f"{layer}.input_layernorm", axes.residual),
        *norm(f"{layer}.post_attention_layernorm", axes.residual),
        *linear(f"{layer}.attention.query_key_value", fused, axes.residual),
        *linear(f"{layer}.attention.dense", axes.residual, axes.attended),
        *linear(f"{layer}.mlp.dense_h_to_4h", axes.ffn, axes.residual),
        *linear(f"{layer}.mlp.dense_4h_to_h", axes.residual, axes.ffn),
        *norm("gpt_neox.final_layer_norm", axes.residual),
        *linear("lm_head", axes.vocabulary, axes.residual, "head"),
        *linear("embed_out", axes.vocabulary, axes.residual, "head"),
    ]
    return Anatomy(
        family="gpt_neox",
        sizes=sizes,
        fields=ConfigFields("hidden_size", "num_attention_heads", None, "intermediate_size", None, "layer_norm_eps"),
        stacks=(LayerStack("gpt_neox.layers", "num_hidden_layers", ("attention.dense", "mlp.dense_4h_to_h")),),
        roles=tuple(roles),
        norm="layer",
        norm_has_gain=True,
        tied=_is_tied(model),
        final_norm="gpt_neox.final_layer_norm",
        head="lm_head",
        embeddings=("gpt_neox.embed_in.weight",),
        rotary_dim=int(sizes.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0)),
        rope_type=config.rope_parameters.get("rope_type", "default"),
    )


def _t5(model: PreTrainedModel) -> Anatomy:
    config: Any = model.config
    sizes = _sizes(config, config.d_ff, config.d_kv)
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
        stacks.append(LayerStack(f"{stack}.block", length, tuple(outputs)))
    return Anatomy(
        family="t5",
        sizes=sizes,
        fields=ConfigFields("d_model", "num_heads", None, "d_ff", "d_kv", "layer_norm_epsilon"),
        stacks=tuple(stacks),
        roles=(*roles, *linear("lm_head", axes.vocabulary, axes.residual, "head")),
        norm="rms",
        norm_has_gain=True,
        tied=_is_tied(model),
        final_norm="decoder.final_layer_norm",
        head="lm_head",
        embeddings=("shared.weight",),
        attention_scaled=False,
        logits_scaled=config.scale_decoder_outputs,
    )


def _bert(model: PreTrainedModel) -> Anatomy:
    config: Any = model.config
    sizes = _sizes(config, config.intermediate_size)
    axes = Axes.of(sizes, config.vocab_size)
    layer, head = "bert.encoder.layer.*", "cls.predictions"
    parts = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    roles = [
        embedding("bert.embeddings.word_embeddings.weight", axes.vocabulary, axes.residual),
        *(embedding(f"bert.embeddings.{part}.weight", (), axes.residual) for part in parts[1:]),
        *norm("bert.embeddings.LayerNorm", axes.residual),
        *linear(f"{layer}.attention.self.query", axes.query, axes.residual),
        *linear(f"{layer}.attention.self.key", axes.key, axes.residual),
        *linear(f"{layer}.attention.self.value", axes.value, axes.residual),
        *linear(f"{layer}.attention.output.dense", axes.residual, axes.attended),
        *norm(f"{layer}.attention.output.LayerNorm", axes.residual),
        *linear(f"{layer}.intermediate.dense", axes.ffn, axes.residual),
        *linear(f"{layer}.output.dense", axes.residual, axes.ffn),
        *norm(f"{layer}.output.LayerNorm", axes.residual),
        *linear("bert.pooler.dense", axes.residual, axes.residual),
        # The masked language model's head: a layer from the residual to a like stream, its norm, the tied decoder.
        *linear(f"{head}.transform.dense", axes.residual, axes.residual),
        *norm(f"{head}.transform.LayerNorm", axes.residual),
        ParameterRole(f"{head}.bias", (axes.vocabulary,), ("writes",), "bias"),
        *linear(f"{head}.decoder", axes.vocabulary, axes.residual, "head"),
        *linear("classifier", (), axes.residual, "head"),
    ]
    stack = LayerStack(
        "bert.encoder.layer",
        "num_hidden_layers",
        ("attention.output.dense", "output.dense"),
        ("attention.output.LayerNorm", "output.LayerNorm"),
        "after_residual",
    )
    return Anatomy(
        family="bert",
        sizes=sizes,
        fields=ConfigFields("hidden_size", "num_attention_heads", None, "intermediate_size", None, "layer_norm_eps"),
        stacks=(stack,),
        roles=tuple(roles),
        norm="layer",
        norm_has_gain=True,
        tied=_is_tied(model),
        final_norm=f"{head}.transform.LayerNorm" if hasattr(model, "cls") else None,
        head=f"{head}.decoder" if hasattr(model, "cls") else "classifier",
        embeddings=tuple(f"bert.embeddings.{part}.weight" for part in parts),
    )


def _vit(model: PreTrainedModel) -> Anatomy:
    config: Any = model.config
    sizes = _sizes(config, config.intermediate_size)
    axes = Axes.of(sizes, 0)
    layer = "vit.layers.*"
    patches = "vit.embeddings.patch_embeddings.projection"
    roles = [
        embedding("vit.embeddings.cls_token", (), (), axes.residual),
        embedding("vit.embeddings.position_embeddings", (), (), axes.residual),
        embedding(f"{patches}.weight", axes.residual, (), (), ()),
        embedding(f"{patches}.bias", axes.residual),
        *linear(f"{layer}.attention.q_proj", axes.query, axes.residual),
        *linear(f"{layer}.attention.k_proj", axes.key, axes.residual),
        *linear(f"{layer}.attention.v_proj", axes.value, axes.residual),
        *linear(f"{layer}.attention.o_proj", axes.residual, axes.attended),
        *norm(f"{layer}.layernorm_before", axes.residual),
        *norm(f"{layer}.layernorm_after", axes.residual),
        *linear(f"{layer}.mlp.fc1", axes.ffn, axes.residual),
        *linear(f"{layer}.mlp.fc2", axes.residual, axes.ffn),
        *norm("vit.layernorm", axes.residual),
        *linear("classifier", (), axes.residual, "head"),
    ]
    return Anatomy(
        family="vit",
        sizes=sizes,
        fields=ConfigFields("hidden_size", "num_attention_heads", None, "intermediate_size", None, "layer_norm_eps"),
        stacks=(LayerStack("vit.layers", "num_hidden_layers", ("attention.o_proj", "mlp.fc2")),),
        roles=tuple(roles),
        norm="layer",
        norm_has_gain=True,
        tied=False,
        final_norm="vit.layernorm",
        head="classifier",
        embeddings=tuple(role.pattern for role in roles if role.kind == "embedding"),
    )


def _tokenformer(model: PreTrainedModel) -> Anatomy:
    """A TokenFormer: the axes between streams are those of keys (read) and values (written); its tokens are no stream,
    the method "tokenformer" grows them."""
    config: Any = model.config
    sizes = _sizes(config, None)
    axes = Axes.of(sizes, config.vocab_size)
    layer = "model.layers.*"
    ends: dict[str, tuple[tuple[Segment, ...], tuple[Segment, ...]]] = {
        "attention.query": (axes.residual, axes.query),
        "attention.key": (axes.residual, axes.key),
        "attention.value": (axes.residual, axes.value),
        "attention.proj": (axes.attended, axes.residual),
        "mlp": (axes.residual, axes.residual),
    }
    roles = [
        embedding("model.embed_tokens.weight", axes.vocabulary, axes.residual),
        *(ParameterRole(f"{layer}.{name}.keys", ((), ends[name][0]), (None, "reads"), "matrix") for name in ends),
        *(ParameterRole(f"{layer}.{name}.values", ((), ends[name][1]), (None, "writes"), "matrix") for name in ends),
        *norm("model.norm", axes.residual),
        *linear("lm_head", axes.vocabulary, axes.residual, "head"),
    ]
    return Anatomy(
        family="tokenformer",
        sizes=sizes,
        fields=ConfigFields("hidden_size", "num_attention_heads", None, None, None, "layer_norm_eps"),
        stacks=(LayerStack("model.layers", "num_hidden_layers", ("attention.proj", "mlp")),),
        roles=tuple(roles),
        norm="layer",
        norm_has_gain=False,
        tied=_is_tied(model),
        final_norm="model.norm",
        head="lm_head",
        embeddings=("model.embed_tokens.weight",),
        rotary_dim=config.rotary_dim,
    )


_FAMILIES: dict[str, Callable[[PreTrainedModel], Anatomy]] = {
    **dict.fromkeys(("llama", "gemma", "qwen2", "qwen3", "olmo", "olmo2"), _llama_like),
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "t5": _t5,
    "bert": _bert,
    "vit": _vit,
    "tokenformer": _tokenformer,
}
