"""DeBERTa and its second version: attention between contents and relative positions, which have a table of their own.

The table is no part of the residual, but its rows are as wide, pass (in the second version) a norm of their own and are
read by the projections of queries and keys, or by some of their own; so it grows as embeddings do.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from auxin.models.anatomy.bert import FIELDS, Encoder, Layer, encoder
from auxin.models.anatomy.found import ANATOMIES
from auxin.models.anatomy.parts import base_prefix
from auxin.words.anatomy import Anatomy
from auxin.words.roles import Axes, ParameterRole, embedding, linear, norm, per_head

_ENCODER = Encoder(
    Layer("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
    fields=replace(FIELDS, like_hidden_size=("pooler_hidden_size",)),
    projection="embeddings.embed_proj",
    normed_projection=True,
)
_GROUPED = (
    "the convolution behind the first layer is in {groups} groups (conv_groups), each of which reads neighbouring "
    "units of the residual alone; of a wider one they would be others. Leave the hidden size, and heads that follow "
    "it, as they are."
)


def _deberta(model: PreTrainedModel) -> Anatomy:
    config: Any = model.config
    own = _ENCODER
    if hasattr(config, "attention_head_size"):
        own = replace(own, fields=replace(own.fields, like_head_dim=("attention_head_size",)))
    groups, conv = getattr(config, "conv_groups", 1), f"{base_prefix(model)}encoder.conv"
    convolved = getattr(config, "conv_kernel_size", 0) > 0
    grouped = convolved and groups > 1
    body = encoder(model, own, partial(_positions, grouped=grouped))
    return replace(
        body,
        stacks=(replace(body.stacks[0], reader_of_entry=conv if convolved else ""),),
        before_norms=(*body.before_norms, f"{conv}.conv"),
        fixed_widths=(("residual", _GROUPED.format(groups=groups)),) if grouped else (),
    )


def _positions(prefix: str, axes: Axes, grouped: bool) -> list[ParameterRole]:
    """The roles of what DeBERTa has beside an encoder's modules: in the first version queries, keys and values of a
    head in one, the biases of two of them apart; in the second a convolution behind the first layer."""
    attention, conv = f"{prefix}encoder.layer.*.attention.self", f"{prefix}encoder.conv"
    heads = per_head(axes.query)
    return [
        embedding(f"{prefix}encoder.rel_embeddings.weight", (), axes.residual),
        *norm(f"{prefix}encoder.LayerNorm", axes.residual),
        *linear(f"{attention}.in_proj", axes.fused, axes.residual),
        ParameterRole(f"{attention}.q_bias", (axes.query,), ("writes",), "bias"),
        ParameterRole(f"{attention}.v_bias", (axes.attended,), ("writes",), "bias"),
        *(
            role
            for name in ("pos_key_proj", "pos_proj")
            for role in linear(f"{attention}.{name}", axes.key, axes.residual)
        ),
        *(
            role
            for name in ("pos_query_proj", "pos_q_proj")
            for role in linear(f"{attention}.{name}", axes.query, axes.residual)
        ),
        *linear(f"{attention}.head_logits_proj", heads, heads),
        *linear(f"{attention}.head_weights_proj", heads, heads),
        ParameterRole(
            f"{conv}.conv.weight",
            (axes.residual, () if grouped else axes.residual, ()),
            ("writes", None if grouped else "reads", None),
            "matrix",
        ),
        ParameterRole(f"{conv}.conv.bias", (axes.residual,), ("writes",), "bias"),
        *norm(f"{conv}.LayerNorm", axes.residual),
    ]


for _family in ("deberta", "deberta-v2"):
    ANATOMIES.add(_family, _deberta)
