"""What the descriptions of architectures share: sizes from configs, attentions, the heads on a base model, rotary
embeddings, and what all decoders with LayerNorms have."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.nn import Module, Parameter
from transformers import PreTrainedModel

from auxin.nn.bricks import Brick
from auxin.words.anatomy import Anatomy, LayerStack
from auxin.words.roles import Axes, ParameterRole, linear, norm
from auxin.words.widths import ConfigFields, Sizes

VOCABULARY_HEADS = ("lm_head", "embed_out", "proj_out")
"""Linear layers from what leaves the layers to the vocabulary."""
OTHER_HEADS = ("score", "qa_outputs", "classifier")
"""Linear layers from there to classes, of a text, a token or an image, or to the ends of an answer."""
HEADS = (*VOCABULARY_HEADS, *OTHER_HEADS)
"""The linear layers beside the base model that may read what leaves the layers."""


def norm_epsilon(module: Any) -> float:
    """Epsilon of a norm's module. OLMo's norm writes the usual 1e-5 into its code."""
    return float(getattr(module, "variance_epsilon", getattr(module, "eps", 1e-5)))


def base_prefix(model: PreTrainedModel) -> str:
    """What the names of the parameters below a head begin with: "model." for a Llama with one, "" for one without."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def has_parameters(model: PreTrainedModel, path: str) -> bool:
    """Whether the architecture's module at `path`, below whatever edits put around it, has parameters of its own or
    `path` is a parameter."""
    found: Any = model
    for part in path.split("."):
        found = getattr(found, part, None)
        while isinstance(found, Brick) and found.wrapped is not None:
            found = found.wrapped
    return isinstance(found, Parameter) or (isinstance(found, Module) and any(True for _ in found.parameters(False)))


def sizes_of(config: Any, ffn: int | None, head_dim: int | None = None, key_value_heads: int | None = None) -> Sizes:
    """The widths that a config says."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    return Sizes(hidden, heads, key_value_heads or heads, head_dim or hidden // heads, ffn)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output head is a token embedding, the one of the model's inputs or its decoder's own: whether a
    matrix of it is elsewhere, too."""
    head = model.get_output_embeddings()
    if head is None:
        return False
    own, inside = {id(tensor) for tensor in head.parameters() if tensor.dim() > 1}, set(head.modules())
    others = (module for module in model.modules() if module not in inside)
    return any(id(tensor) in own for module in others for tensor in module.parameters(recurse=False))


def head_of(model: PreTrainedModel, heads: tuple[str, ...] = HEADS) -> str | None:
    """That of `heads` which reads what leaves the layers, beside the base model; None for a model without a head."""
    return next((head for head in heads if hasattr(model, head.partition(".")[0])), None)


def head_roles(axes: Axes) -> list[ParameterRole]:
    """The roles of the heads that are one linear layer."""
    heads = [role for head in VOCABULARY_HEADS for role in linear(head, axes.vocabulary, axes.residual, "head")]
    return [*heads, *(role for head in OTHER_HEADS for role in linear(head, (), axes.residual, "head"))]


def attention_roles(
    module: str, axes: Axes, names: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "out_proj")
) -> list[ParameterRole]:
    """The roles of an attention whose queries, keys and values come from a matrix each.

    Args:
        module: the path, a pattern, of what holds the matrices.
        axes: of the model's streams.
        names: of the matrices of queries, keys, values and of the output, relative to `module`.
    """
    query, key, value, output = (f"{module}.{name}" for name in names)
    return [
        *linear(query, axes.query, axes.residual),
        *linear(key, axes.key, axes.residual),
        *linear(value, axes.value, axes.residual),
        *linear(output, axes.residual, axes.attended),
    ]


def layer_norm_decoder(
    model: PreTrainedModel, sizes: Sizes, fields: ConfigFields, stack: LayerStack, roles: Sequence[ParameterRole]
) -> Anatomy:
    """The anatomy of a decoder of one stack that has LayerNorms in its layers and one behind them, and one of the usual
    heads or none. What its architecture has of its own beside these is for the caller to replace.

    Args:
        model: the model.
        sizes: its widths.
        fields: under which names the config holds them.
        stack: its layers, which end in the norm behind them; the heads are what reads them.
        roles: of its embeddings and layers.
    """
    config: Any = model.config
    axes = Axes.of(sizes, config.vocab_size)
    return Anatomy(
        family=config.model_type,
        sizes=sizes,
        fields=fields,
        stacks=(replace(stack, readers=HEADS),),
        roles=(*roles, *norm(stack.end, axes.residual), *head_roles(axes)),
        norm="layer",
        norm_has_gain=True,
        tied=is_tied(model),
        final_norm=stack.end,
        head=head_of(model),
        embeddings=tuple(role.pattern for role in roles if role.kind == "embedding"),
    )


@dataclass(frozen=True)
class Rotary:
    """Rotary embeddings, as a config says them."""

    share: float
    """The rotated part of the head dimension."""
    rope_type: str


def rotary_of(config: Any) -> Rotary:
    """What `rope_parameters` says, or, where types of layers have their own, what they say together: a type that is not
    "default", if there is one."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    share = max(float(value.get("partial_rotary_factor") or 1.0) for value in nested)
    types = [value.get("rope_type", "default") for value in nested]
    return Rotary(share, next((name for name in types if name != "default"), "default"))
