"""Encoders of patches that name their modules as ViT does: of images, and of spectrograms (AST).

What an architecture has of its own is a row of `PATCHES`; roles of modules that it lacks are dropped by whoever asks
for the anatomy. The layer scale of DINOv2 and BEiT is a factor of the units that a layer writes.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from auxin.errors import PlanError
from auxin.models.anatomy.found import ANATOMIES
from auxin.models.anatomy.llama import dense_feed_forward
from auxin.models.anatomy.parts import attention_roles, base_prefix, has_parameters, sizes_of
from auxin.models.head_dims import HEAD_DIM, reads_unlisted_head_dim
from auxin.words.anatomy import Anatomy, LayerStack
from auxin.words.roles import Axes, ParameterRole, embedding, linear, norm, per_head
from auxin.words.widths import ConfigFields, FollowingWidth, Sizes

LEADING = ("cls_token", "distillation_token", "register_tokens")
"""Embeddings of the tokens that come before patches, (1, how many, hidden size)."""
TOKENS = (*LEADING, "position_embeddings")
"""Embeddings beside those of patches; three axes each, of which the last is the hidden size."""
RELATIVE = "relative_position_bias_table"
"""Biases of attention by the distance of patches."""
NORMS = ("layernorm_before", "layernorm_after", "norm1", "norm2")
"""The norms of a layer, both before a part."""
FACTORS = ("layer_scale1.lambda1", "layer_scale2.lambda1", "lambda_1", "lambda_2")
"""The layer scale."""
HEADS = ("classifier", "cls_classifier", "distillation_classifier", "lm_head", "classifier.dense")
"""Linear layers from what leaves the layers to classes, or to visual words."""
READERS = (*HEADS, "decoder.0", "pooler.dense")
"""All that reads what leaves the layers, beside or, the last, in the base model."""


@dataclass(frozen=True)
class Patches:
    """What an encoder of patches has of its own."""

    layers: str = "layers"
    norm: str = "layernorm"
    """The norm behind the layers, or what stands in its place."""
    head_reads: int = 1
    """How many hidden states, side by side, a classifier reads."""
    derives_units: bool = False
    """Whether the number of feed-forward units follows from the hidden size by `mlp_ratio`; of gated ones there are two
    thirds, rounded up to a multiple of 8."""
    mask_axes: int = 3
    """Axes of the embedding of masked patches."""


_DINOV2 = Patches(layers="encoder.layer", head_reads=2, derives_units=True, mask_axes=2)
PATCHES = {
    "vit": Patches(),
    "deit": Patches(),
    "beit": Patches(),
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "audio-spectrogram-transformer": Patches(),
}
"""By model type."""
WITH_PATCHES = (*PATCHES, "vision_tokenformer")
"""Those whose `embeddings` make the tokens of patches, whatever their layers are."""


def patches(model: PreTrainedModel, own: Patches) -> Anatomy:
    """The anatomy of an encoder of patches.

    Args:
        model: the model, with a head of whatever task or without one.
        own: what its architecture has of its own.
    """
    config: Any = model.config
    follows = _following(config) if own.derives_units else None
    reads_head_dim = reads_unlisted_head_dim(config)
    head_dim: int | None = getattr(config, HEAD_DIM, None) if reads_head_dim else None
    sizes = sizes_of(config, follows.units(config.hidden_size) if follows else config.intermediate_size, head_dim)
    prefix = base_prefix(model)
    stack_path, end = f"{prefix}{own.layers}", f"{prefix}{own.norm}"
    roles = _roles(model, own, sizes)
    norms = [name for name in _last_norms(prefix, own) if has_parameters(model, name)]
    readers = tuple(f"{prefix}{name}" if name == "pooler.dense" else name for name in READERS)
    units = None if follows else "intermediate_size"
    heads = (name for name in HEADS if has_parameters(model, name))
    stack = LayerStack(
        stack_path,
        "num_hidden_layers",
        ("attention.o_proj", "mlp.fc2", "mlp.down_proj"),
        entries=(f"{prefix}embeddings",),
        end=end,
        readers=readers,
        feed_forward=("mlp",),
        attentions=("attention",),
    )
    return Anatomy(
        family=config.model_type,
        sizes=sizes,
        fields=ConfigFields(
            "hidden_size",
            "num_attention_heads",
            None,
            units,
            HEAD_DIM if head_dim else None,
            "layer_norm_eps",
            unsaid_head_dim=HEAD_DIM if reads_head_dim and not head_dim else None,
        ),
        stacks=(stack,),
        roles=roles,
        norm="layer",
        norm_has_gain=True,
        tied=False,
        final_norm=norms[-1],
        head=next(heads, None),
        embeddings=tuple(
            role.pattern for role in roles if role.kind == "embedding" and has_parameters(model, role.pattern)
        ),
        no_padding=f"{norms[1]}, which norms what {norms[0]} gives" if len(norms) > 1 else "",
        unnormed_readers=() if norms[0] == end else ("last_hidden_state",),
        ffn_follows=follows,
    )


def tokens_before_patches(model: PreTrainedModel) -> int:
    """How many tokens of an encoder of patches come before those of patches: a class token, registers.

    Raises:
        PlanError: it is no encoder of patches all of whose layers can do without some of them.
    """
    family = model.config.model_type
    if family not in WITH_PATCHES:
        raise PlanError(
            f"{family} is no encoder of patches ({', '.join(WITH_PATCHES)}), and only these can do without some of "
            "their tokens. Leave tokens as they are."
        )
    if table := next((name for name, _ in model.named_parameters() if name.endswith(RELATIVE)), None):
        raise PlanError(
            f"The {family} model adds biases by the distance of patches ({table}) for all of them, and can't run on "
            "some. Leave tokens as they are, or use a model without such biases."
        )
    embeddings = model.get_submodule(f"{base_prefix(model)}embeddings")
    found = (getattr(embeddings, name, None) for name in LEADING)
    return sum(parameter.shape[1] for parameter in found if parameter is not None)


def patch_embeddings(prefix: str, axes: Axes) -> tuple[ParameterRole, ...]:
    """The roles of what `embeddings` below `prefix` makes the tokens of an image with."""
    projection = f"{prefix}embeddings.patch_embeddings.projection"
    return (
        *(embedding(f"{prefix}embeddings.{token}", (), (), axes.residual) for token in TOKENS),
        embedding(f"{projection}.weight", axes.residual, (), (), ()),
        embedding(f"{projection}.bias", axes.residual),
    )


def _following(config: Any) -> FollowingWidth:
    if config.use_swiglu_ffn:
        return FollowingWidth(Fraction(config.mlp_ratio) * Fraction(2, 3), 8)
    return FollowingWidth(Fraction(config.mlp_ratio))


def _roles(model: PreTrainedModel, own: Patches, sizes: Sizes) -> tuple[ParameterRole, ...]:
    axes, prefix = Axes.of(sizes, 0), base_prefix(model)
    layer = f"{prefix}{own.layers}.*"
    roles = [
        *patch_embeddings(prefix, axes),
        embedding(f"{prefix}embeddings.mask_token", *[()] * (own.mask_axes - 1), axes.residual),
        *attention_roles(f"{layer}.attention", axes, ("q_proj", "k_proj", "v_proj", "o_proj")),
        *dense_feed_forward(f"{layer}.mlp", axes.ffn, axes.residual),
        *(role for name in NORMS for role in norm(f"{layer}.{name}", axes.residual)),
        *(ParameterRole(f"{layer}.{name}", (axes.residual,), ("writes",), "scale") for name in FACTORS),
        *(
            embedding(f"{place}.{RELATIVE}", (), per_head(axes.query))
            for place in (f"{layer}.relative_position_bias", f"{prefix}shared_position_bias")
        ),
        *(role for name in _last_norms(prefix, own) for role in norm(name, axes.residual)),
        *linear(f"{prefix}pooler.dense", (), axes.residual),
        *(role for name in HEADS for role in linear(name, (), axes.residual * own.head_reads, "head")),
        ParameterRole("decoder.0.weight", ((), axes.residual, (), ()), (None, "reads", None, None), "head"),
        ParameterRole("decoder.0.bias", ((),), (None,), "bias"),
    ]
    return tuple(roles)


def _last_norms(prefix: str, own: Patches) -> tuple[str, ...]:
    """The norms that may sit between the layers and a head, in order: BEiT's behind its pooling, or with the head;
    AST's head has one of its own."""
    return tuple(dict.fromkeys((f"{prefix}{own.norm}", f"{prefix}pooler.layernorm", own.norm, "classifier.layernorm")))


for _family, _own in PATCHES.items():
    ANATOMIES.add(_family, partial(patches, own=_own))
