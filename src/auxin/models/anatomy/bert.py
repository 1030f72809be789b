"""Encoders of text with norms after the residual sum: BERT, and those that say the same in names of their own.

What an architecture has of its own is a row of `ENCODERS`; roles of modules that it lacks are dropped by whoever asks
for the anatomy. The base model is the family; whatever head may stand on it is found by `encoder_heads`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from auxin.models.anatomy.encoder_heads import Heads, heads
from auxin.models.anatomy.found import ANATOMIES
from auxin.models.anatomy.parts import attention_roles, base_prefix, sizes_of
from auxin.words.anatomy import Anatomy, LayerStack
from auxin.words.roles import Axes, ParameterRole, embedding, linear, norm, per_head
from auxin.words.widths import ConfigFields, Sizes

TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")
"""The tables that are added up before the first layer, that of the tokens first."""

FIELDS = ConfigFields("hidden_size", "num_attention_heads", None, "intermediate_size", None, "layer_norm_eps")
"""The usual names of the widths."""


@dataclass(frozen=True)
class Layer:
    """What the modules of a layer are called, relative to it."""

    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    attended: str = "attention.output.dense"
    inner: str = "intermediate.dense"
    outer: str = "output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    output_norm: str = "output.LayerNorm"

    def inside(self, module: str) -> "Layer":
        """The same names below `module`."""
        return Layer(**{name: f"{module}.{path}" for name, path in vars(self).items()})


@dataclass(frozen=True)
class Encoder:
    """What an encoder with norms after the residual sum has of its own."""

    layer: Layer = field(default_factory=Layer)
    layers: str = "encoder.layer"
    """The module list, below the base model."""
    end: str = "encoder"
    """The module that runs the layers."""
    length_field: str = "num_hidden_layers"
    fields: ConfigFields = FIELDS
    projection: str = ""
    """What leads from embeddings of a width of their own (embedding_size) to the residual, below the base model."""
    always_projected: bool = False
    """Whether that layer is there although both widths are the same."""
    normed_projection: bool = False
    """Whether the norm of the embeddings comes behind that layer."""
    shared_layers: bool = False
    """Whether num_hidden_layers layers share num_hidden_groups sets of parameters."""


def encoder(
    model: PreTrainedModel, own: Encoder, more: Callable[[str, Axes], list[ParameterRole]] | None = None
) -> Anatomy:
    """The anatomy of an encoder with norms after the residual sum, with any head or none.

    Args:
        model: the model.
        own: what its architecture has of its own.
        more: from the base model's prefix and the axes to roles beside those of `own`.
    """
    config: Any = model.config
    prefix = base_prefix(model)
    sizes, fields, never = _sizes(config, own)
    axes = Axes.of(sizes, config.vocab_size)
    embedded = () if _is_projected(config, own) else axes.residual
    stack_path, modules = f"{prefix}{own.layers}", {path for path, _ in model.named_modules()}
    tables = [f"{path}.weight" for name in TABLES if (path := f"{prefix}embeddings.{name}") in modules]
    found, crossed = heads(model, axes, embedded), bool(getattr(config, "add_cross_attention", False))
    roles = [
        embedding(tables[0], axes.vocabulary, embedded),
        *(embedding(table, (), embedded) for table in tables[1:]),
        *norm(f"{prefix}embeddings.LayerNorm", axes.residual if own.normed_projection else embedded),
        *(linear(f"{prefix}{own.projection}", axes.residual, embedded) if own.projection else ()),
        *layer_roles(f"{stack_path}.*", own.layer, axes),
        *(normed_attention_roles(f"{stack_path}.*", CROSS_ATTENTION, axes) if crossed else ()),
        *found.roles,
        *(more(prefix, axes) if more else ()),
    ]
    return Anatomy(
        family=config.model_type,
        sizes=sizes,
        fields=fields,
        stacks=(_stack(config, own, prefix, found, crossed),),
        roles=tuple(roles),
        norm="layer",
        norm_has_gain=True,
        tied=found.tied,
        final_norm=found.norm,
        head=found.last,
        embeddings=tuple(tables),
        before_norms=(f"{prefix}{own.projection}",) if own.normed_projection else (),
        never_hidden_size=never,
        fixed_widths=(("residual", _OF_ANOTHER_MODEL),) if crossed else (),
        embedding_norm=f"{prefix}embeddings.LayerNorm",
    )


def _sizes(config: Any, own: Encoder) -> tuple[Sizes, ConfigFields, tuple[tuple[int, str], ...]]:
    """The widths, under which names the config holds them, and hidden sizes that can't be."""
    names = own.fields
    sizes = sizes_of(config, getattr(config, str(names.ffn)))
    width = getattr(config, "embedding_size", None)
    if not own.projection or own.always_projected or width is None:
        return sizes, names, ()
    if width == sizes.residual:
        return sizes, replace(names, like_hidden_size=(*names.like_hidden_size, "embedding_size")), ()
    why = (
        f"it would be the embedding_size of this model, for which the architecture has no {own.projection} between "
        f"embeddings and layers. Ask for another one, for example {2 * width}."
    )
    return sizes, names, ((width, why),)


def _is_projected(config: Any, own: Encoder) -> bool:
    """Whether a layer leads from the embeddings to the residual."""
    width = getattr(config, "embedding_size", config.hidden_size)
    return bool(own.projection) and (own.always_projected or width != config.hidden_size)


def _stack(config: Any, own: Encoder, prefix: str, found: Heads, crossed: bool) -> LayerStack:
    outside = _is_projected(config, own) and not own.normed_projection
    layers = [own.layer, *([CROSS_ATTENTION] if crossed else [])]
    sets = getattr(config, "num_hidden_groups", 1)
    return LayerStack(
        f"{prefix}{own.layers}",
        own.length_field,
        (*(layer.attended for layer in layers), own.layer.outer),
        (*(layer.attention_norm for layer in layers), own.layer.output_norm),
        "after_residual",
        (f"{prefix}{own.projection}" if outside else f"{prefix}embeddings",),
        f"{prefix}{own.end}",
        found.readers,
        layers_stay=_SHARED.format(layers=config.num_hidden_layers, sets=sets) if own.shared_layers else "",
        layers_shared=own.shared_layers,
    )


def layer_roles(path: str, layer: Layer, axes: Axes) -> list[ParameterRole]:
    """The roles of a layer.

    Args:
        path: the layer's, a pattern.
        layer: what its modules are called.
        axes: of the model's streams.
    """
    return [
        *normed_attention_roles(path, layer, axes),
        *linear(f"{path}.{layer.inner}", axes.ffn, axes.residual),
        *linear(f"{path}.{layer.outer}", axes.residual, axes.ffn),
        *norm(f"{path}.{layer.output_norm}", axes.residual),
    ]


def normed_attention_roles(path: str, layer: Layer, axes: Axes) -> list[ParameterRole]:
    """The roles of a layer's attention and of the norm behind it; as `layer_roles`."""
    return [
        *attention_roles(path, axes, (layer.query, layer.key, layer.value, layer.attended)),
        *norm(f"{path}.{layer.attention_norm}", axes.residual),
    ]


CROSS_ATTENTION = Layer(
    "crossattention.self.query",
    "crossattention.self.key",
    "crossattention.self.value",
    "crossattention.output.dense",
    attention_norm="crossattention.output.LayerNorm",
)
_OF_ANOTHER_MODEL = (
    "the cross-attention of this decoder (add_cross_attention = True) reads the hidden states of an encoder, which is "
    "another model and as wide as it was. Leave the hidden size, and heads that follow it, as they are."
)
_SHARED = (
    "the {layers} layers (num_hidden_layers) share {sets} set(s) of parameters (num_hidden_groups), so that there is "
    "no layer that could be added: a larger num_hidden_layers only runs the same ones more often. Grow widths, for "
    "example by hypercloning."
)
_DISTIL = Layer(
    "attention.q_lin",
    "attention.k_lin",
    "attention.v_lin",
    "attention.out_lin",
    "ffn.lin1",
    "ffn.lin2",
    "sa_layer_norm",
    "output_layer_norm",
)
_ALBERT = Layer(
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.dense",
    "ffn",
    "ffn_output",
    "attention.LayerNorm",
    "full_layer_layer_norm",
)
_MPNET = Layer(
    "attention.attn.q",
    "attention.attn.k",
    "attention.attn.v",
    "attention.attn.o",
    attention_norm="attention.LayerNorm",
)

ENCODERS = {
    "bert": Encoder(),
    "roberta": Encoder(),
    "xlm-roberta": Encoder(),
    "camembert": Encoder(),
    "electra": Encoder(projection="embeddings_project"),
    "distilbert": Encoder(
        _DISTIL,
        "transformer.layer",
        "transformer",
        "n_layers",
        ConfigFields("dim", "n_heads", None, "hidden_dim", None, None),
    ),
    "albert": Encoder(
        _ALBERT.inside("albert_layers.*"),
        "encoder.albert_layer_groups",
        length_field="num_hidden_groups",
        projection="encoder.embedding_hidden_mapping_in",
        always_projected=True,
        shared_layers=True,
    ),
}
"""By model type."""

for _family, _own in ENCODERS.items():
    ANATOMIES.add(_family, partial(encoder, own=_own))


def _position_biases(prefix: str, axes: Axes) -> list[ParameterRole]:
    """MPNet's table of biases for the scores of heads, which all layers share."""
    return [embedding(f"{prefix}encoder.relative_attention_bias.weight", (), per_head(axes.query))]


ANATOMIES.add("mpnet", partial(encoder, own=Encoder(_MPNET), more=_position_biases))
