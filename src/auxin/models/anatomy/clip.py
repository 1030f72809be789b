"""CLIP and SigLIP: a tower for texts and one for images, together or alone, with projections or without.

SigLIP has no projections: what its text tower's head gives is compared with the pooled image itself, by the angle
between them. That head's outputs therefore grow with the image tower.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from auxin.models.anatomy.found import ANATOMIES
from auxin.models.anatomy.parts import attention_roles, base_prefix, has_parameters, sizes_of
from auxin.models.anatomy.towers import Towers
from auxin.words.anatomy import Anatomy, LayerStack
from auxin.words.roles import Access, Axes, ParameterRole, embedding, linear, norm
from auxin.words.widths import ConfigFields

PROJECTIONS = {"text": ("text_projection",), "vision": ("visual_projection", "classifier")}
"""Linear layers beside the towers, by the tower that they read."""
NORMS = ("pre_layrnorm", "final_layer_norm", "post_layernorm")
"""The norms of a tower outside of its layers: of images before them (CLIP), of texts and of images behind."""
TEMPERATURES = ("logit_scale", "logit_bias")


def tower(model: PreTrainedModel, kind: str) -> Anatomy:
    """The anatomy of one tower by itself.

    Args:
        model: the tower, or a model of it and a projection.
        kind: "text" or "vision".
    """
    config: Any = model.config
    prefix = base_prefix(model)
    sizes = sizes_of(config, config.intermediate_size)
    roles = _roles(prefix, kind, Axes.of(sizes, getattr(config, "vocab_size", 0)))
    norms = [f"{prefix}{name}" for name in NORMS if has_parameters(model, f"{prefix}{name}")]
    first = next((name for name in norms if name.endswith(NORMS[0])), None)
    reading = [name for name in PROJECTIONS[kind] if has_parameters(model, name)]
    # CLIP norms a pooled image alone, so that its other hidden states are the residual as it is.
    normed = norms[-1] if first is None else ""
    pools = has_parameters(model, f"{prefix}head.probe")
    stack = LayerStack(
        f"{prefix}encoder.layers",
        "num_hidden_layers",
        ("self_attn.out_proj", "mlp.fc2"),
        entries=(first or f"{prefix}embeddings",),
        end=normed or f"{prefix}encoder",
        readers=(f"{prefix}head", f"{prefix}head.attention", *(() if normed else norms[-1:]), *PROJECTIONS[kind]),
        feed_forward=("mlp",),
        attentions=("self_attn",),
        causal=config.model_type == "clip_text_model",  # SigLIP's sees the whole text
    )
    return Anatomy(
        family=config.model_type,
        sizes=sizes,
        fields=ConfigFields("hidden_size", "num_attention_heads", None, "intermediate_size", None, "layer_norm_eps"),
        stacks=(stack,),
        roles=tuple(roles),
        norm="layer",
        norm_has_gain=True,
        tied=False,
        final_norm=norms[-1],
        head=next(iter(reading), None),
        embeddings=tuple(r.pattern for r in roles if r.kind == "embedding" and has_parameters(model, r.pattern)),
        no_padding=f"{first}, a LayerNorm whose output is the residual and has a mean of its own" if first else "",
        unnormed_readers=(f"{prefix}head.attention.in_proj_weight", "pooler_output") if pools else (),
    )


def _roles(prefix: str, kind: str, axes: Axes) -> list[ParameterRole]:
    layer, embeddings, head = f"{prefix}encoder.layers.*", f"{prefix}embeddings", f"{prefix}head"
    roles = [
        embedding(f"{embeddings}.token_embedding.weight", axes.vocabulary, axes.residual),
        embedding(f"{embeddings}.patch_embedding.weight", axes.residual, (), (), ()),
        embedding(f"{embeddings}.patch_embedding.bias", axes.residual),
        embedding(f"{embeddings}.class_embedding", axes.residual),
        embedding(f"{embeddings}.position_embedding.weight", (), axes.residual),
        *attention_roles(f"{layer}.self_attn", axes),
        *linear(f"{layer}.mlp.fc1", axes.ffn, axes.residual),
        *linear(f"{layer}.mlp.fc2", axes.residual, axes.ffn),
        *(role for name in ("layer_norm1", "layer_norm2") for role in norm(f"{layer}.{name}", axes.residual)),
        *(role for name in NORMS for role in norm(f"{prefix}{name}", axes.residual)),
        *(role for name in PROJECTIONS[kind] for role in linear(name, (), axes.residual, "head")),
    ]
    if kind == "text":
        return [*roles, *linear(head, (), axes.residual)]
    # SigLIP pools an image by an attention whose only query, the probe, is learned.
    access: tuple[Access, ...] = ("writes", "reads")
    heads = axes.query + axes.key + axes.value
    return [
        *roles,
        embedding(f"{head}.probe", (), (), axes.residual),
        ParameterRole(f"{head}.attention.in_proj_weight", (heads, axes.residual), access, "matrix"),
        ParameterRole(f"{head}.attention.in_proj_bias", (heads,), ("writes",), "bias"),
        *linear(f"{head}.attention.out_proj", axes.residual, axes.attended),
        *norm(f"{head}.layernorm", axes.residual),
        *linear(f"{head}.mlp.fc1", axes.ffn, axes.residual),
        *linear(f"{head}.mlp.fc2", axes.residual, axes.ffn),
    ]


def joined(model: PreTrainedModel, found: Anatomy, name: str) -> Anatomy:
    """The anatomy of the tower called `name` with what lies beside the towers; see `Towers`."""
    residual = Axes.of(found.sizes, 0).residual
    (stack,) = found.stacks
    projections = PROJECTIONS[name]
    others = tuple(other for kind, several in PROJECTIONS.items() if kind != name for other in several)
    roles = [
        *(role for projection in projections for role in linear(projection, (), residual, "head")),
        *(ParameterRole(f"{other}.weight", ((), ()), (None, None), "head") for other in others),
        *(ParameterRole(f"{other}.bias", ((),), (None,), "bias") for other in others),
    ]
    for temperature in TEMPERATURES:
        if has_parameters(model, temperature):
            axes = model.get_parameter(temperature).dim()
            roles.append(ParameterRole(temperature, ((),) * axes, (None,) * axes, "mixing"))
    found = replace(
        found,
        roles=(*found.roles, *roles),
        stacks=(replace(stack, readers=(*stack.readers, *projections)),),
        head=next((projection for projection in projections if has_parameters(model, projection)), None),
    )
    if name == "vision" and has_parameters(model, "text_model.head"):
        compared = [
            ParameterRole("text_model.head.weight", (residual, ()), ("writes", None), "matrix"),
            ParameterRole("text_model.head.bias", (residual,), ("writes",), "bias"),
        ]
        return replace(
            found,
            roles=(*found.roles, *compared),
            fields=replace(found.fields, like_hidden_size=("text_config.projection_size",)),
            no_padding="the angle between an image and a text, in which it counts",
        )
    return found


for _family in ("clip", "siglip"):
    ANATOMIES.add(_family, Towers(joined))
    for _kind in PROJECTIONS:
        ANATOMIES.add(f"{_family}_{_kind}_model", partial(tower, kind=_kind))
