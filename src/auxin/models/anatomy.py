"""The anatomy of a transformer: what every parameter's axes run along, where its layers are, how its norms sit.

Growing, pruning and merging methods ask this one module instead of knowing architectures by name. `auxin.words.roles`
has the words in which it is written.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from auxin.errors import PlanError, unknown_name
from auxin.models.edited_anatomy import with_bricks
from auxin.models.scopes import in_scopes
from auxin.words.registry import Registry
from auxin.words.roles import (
    Anatomy,
    Axes,
    ConfigFields,
    LayerStack,
    ParameterRole,
    Segment,
    Sizes,
    conv1d,
    embedding,
    linear,
    norm,
)

ANATOMIES: Registry[Callable[[PreTrainedModel], Anatomy]] = Registry(
    "anatomy", "auxin.models", error=PlanError, plural="anatomies"
)
"""What describes the models of a `model_type`, by that; roles that a model lacks are dropped by `anatomy`. Entry points
of the group "auxin.anatomies" name modules of other packages that add some."""


def anatomy(model: PreTrainedModel, complete: bool = True, scopes: Iterable[str] = ()) -> Anatomy:
    """The anatomy of `model`, which may be a skeleton on the meta device.

    Widths are those of its tensors: layers and stacks whose widths differ from what the config says have them by scope.

    Args:
        model: the model.
        complete: whether every parameter must have a role. Without, as for methods that treat layers as black boxes,
            any decoder whose modules have Llama's names will do; widths are those of the config then.
        scopes: stacks and layers whose widths shall be told apart although they may be alike; see `in_scopes`.

    Raises:
        PlanError: the architecture is not known (nor, where that will do, built like Llama), the model has a parameter
            that its architecture's anatomy lacks, or `scopes` names what is no stack and no layer.
    """
    family = model.config.model_type
    describe = ANATOMIES.get(family)
    if describe is None and not complete and _is_built_like_llama(model):
        describe = _llama_like
    if describe is None:
        raise PlanError(unknown_name("architecture", family, ANATOMIES.all()) + ("" if complete else _NOT_LIKE_LLAMA))
    found = describe(model)
    if not complete:
        return found
    found = with_bricks(in_scopes(model, found, scopes), model)
    names = [name for name, _ in model.named_parameters()]
    used = [role for role in found.roles if any(role.matches(name) for name in names)]
    epsilon = getattr(model.config, found.fields.epsilon) if found.fields.epsilon else 0.0
    found = replace(found, roles=tuple(used), epsilon=epsilon)
    for name in names:
        found.role(name)
    return found


_LIKE_LLAMA = ("model.embed_tokens", "model.layers", "model.norm", "lm_head")
_NOT_LIKE_LLAMA = (
    f" Nor has it the modules of a decoder like Llama ({', '.join(_LIKE_LLAMA)}), so that no residual stream is known "
    "in it."
)


def _is_built_like_llama(model: PreTrainedModel) -> bool:
    try:
        return all(model.get_submodule(path) is not None for path in _LIKE_LLAMA)
    except AttributeError:
        return False


def norm_epsilon(norm: Any) -> float:
    """Epsilon of a norm's module. OLMo's norm writes the usual 1e-5 into its code."""
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-5)))


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
        ("model.embed_tokens",),
        "model.norm",
        ("lm_head",),
        ("mlp",),
        ("self_attn",),
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
        stacks=(
            LayerStack(
                "gpt_neox.layers",
                "num_hidden_layers",
                ("attention.dense", "mlp.dense_4h_to_h"),
                entries=("gpt_neox.embed_in",),
                end="gpt_neox.final_layer_norm",
                readers=("lm_head", "embed_out"),
                feed_forward=("mlp",),
                parallel=config.use_parallel_residual,
            ),
        ),
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
        ("bert.embeddings",),
        "bert.encoder",
        # Without a pooler it is the classifier that reads the encoder.
        (f"{head}.transform.dense", "bert.pooler.dense" if model.base_model.pooler is not None else "classifier"),
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
        stacks=(
            LayerStack(
                "vit.layers",
                "num_hidden_layers",
                ("attention.o_proj", "mlp.fc2"),
                entries=("vit.embeddings",),
                end="vit.layernorm",
                readers=("classifier",),
                feed_forward=("mlp",),
            ),
        ),
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
        *(ParameterRole(f"{layer}.{name}.key_tokens", ((), ends[name][0]), (None, "reads"), "matrix") for name in ends),
        *(
            ParameterRole(f"{layer}.{name}.value_tokens", ((), ends[name][1]), (None, "writes"), "matrix")
            for name in ends
        ),
        *norm("model.norm", axes.residual),
        *linear("lm_head", axes.vocabulary, axes.residual, "head"),
    ]
    return Anatomy(
        family="tokenformer",
        sizes=sizes,
        fields=ConfigFields("hidden_size", "num_attention_heads", None, None, None, "layer_norm_eps"),
        stacks=(
            LayerStack(
                "model.layers",
                "num_hidden_layers",
                ("attention.proj", "mlp"),
                entries=("model.embed_tokens",),
                end="model.norm",
                readers=("lm_head",),
            ),
        ),
        roles=tuple(roles),
        norm="layer",
        norm_has_gain=False,
        tied=_is_tied(model),
        final_norm="model.norm",
        head="lm_head",
        embeddings=("model.embed_tokens.weight",),
        rotary_dim=config.rotary_dim,
    )


for _family in ("llama", "gemma", "qwen2", "qwen3", "olmo", "olmo2"):
    ANATOMIES.add(_family, _llama_like)
ANATOMIES.add("gpt2", _gpt2)
ANATOMIES.add("gpt_neox", _gpt_neox)
ANATOMIES.add("t5", _t5)
ANATOMIES.add("bert", _bert)
ANATOMIES.add("vit", _vit)
ANATOMIES.add("tokenformer", _tokenformer)
