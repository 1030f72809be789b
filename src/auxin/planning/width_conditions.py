"""When a widening keeps the function of a model, and what stands against it where it does not."""

import math
from collections.abc import Iterable

from auxin.errors import PlanError
from auxin.planning.width_maps import Padding, StreamMap, Widening
from auxin.words.anatomy import Anatomy
from auxin.words.paths import encloses
from auxin.words.widths import IN_FEED_FORWARD, SETTINGS, Sizes, Stream

ROPE_BY_FREQUENCY = ("default", "linear", "llama3")
"""Rotary embeddings whose treatment of a pair depends on its frequency alone, not on the head dimension."""
_UNITS: dict[Stream, str] = {
    "residual": "hidden",
    "query": "query head",
    "ffn": "feed-forward",
    "expert_ffn": "expert's feed-forward",
    "shared_expert_ffn": "shared expert's feed-forward",
    "expert": "expert",
}


def fatal_reasons(anatomy: Anatomy, widening: Widening, from_above: bool, cut: bool) -> list[str]:
    """Why the maps make nonsense of a model; see `auxin.planning.width.widen` for the arguments."""
    residual = widening.residual
    groups = [] if residual.is_tiled and not residual.added else _group_reasons(anatomy, residual.size)
    reasons = [*_unfit(anatomy, widening), *_above_reasons(anatomy, from_above), *groups]
    return [*reasons, *_lost(widening, cut), *_fixed_reasons(anatomy, widening), *_tied_head_reasons(anatomy, widening)]


def inexact_reasons(anatomy: Anatomy, widening: Widening) -> list[str]:
    """Why the maps do not keep the function whatever the weights are."""
    cuts = [
        f"{_place(scope)}{len(m.index)} of {m.old} experts stay, which is exact only if no token is routed to the "
        "others and gates are shares among those that are chosen."
        if stream == "expert"
        else f"{_place(scope)}{len(m.index)} of {m.old} {_UNITS[stream]} units stay, which is exact only if nothing "
        "comes from the others."
        for stream, scope, m in widening.maps()
        if m.is_cut and stream in _UNITS
    ]
    scopes = dict.fromkeys(scope for stream, scope, _ in widening.maps() if stream in ("query", "key_value"))
    heads = [reason for scope in scopes for reason in _head_reasons(anatomy, widening, scope)]
    turned = widening.head_dim != anatomy.sizes.head_dim
    dims = _head_dim_reasons(anatomy, widening.head_dim) if turned else []
    return [*cuts, *_residual_reasons(anatomy, widening), *heads, *dims]


def norm_scale(anatomy: Anatomy, residual: StreamMap) -> float:
    """By what the gains of the norms are multiplied, and epsilon by its square, for the residual's map: the norms'
    input keeps its sum of squares and is spread over more units (padding), or over fewer (zeros were cut out).

    1 where units are neither padded nor cut, and where units are cut and the norms can't be scaled."""
    if residual.added:
        return math.sqrt(len(residual.index) / residual.size)
    scalable = anatomy.norm_position != "after_residual" and _can_scale_norms(anatomy)
    return math.sqrt(residual.old / residual.size) if residual.is_cut and scalable else 1.0


def _residual_reasons(anatomy: Anatomy, widening: Widening) -> list[str]:
    """Why the norms or the head do not commute with the residual's map; empty where they do."""
    residual = widening.residual
    if residual.is_identity:
        return []
    old, new = residual.old, residual.size
    below, above = new // old * old, (new // old + 1) * old
    whole = f"The nearest sizes that are whole copies are {below} and {above}." if new % old else ""
    reasons = []
    if not residual.is_even and not residual.is_cut:
        reasons.append(
            f"hidden_size = {new}: with unequal copies of the {old} units the norm's statistics are weighted anew for "
            f"each token. {whole or 'Use whole copies, or padding.'}"
        )
    if residual.added and (why := _padding_reason(anatomy, widening.padding)):
        reasons.append(
            f"hidden_size = {new} is no whole number of copies of the {old} units, and padding {why} {whole}".rstrip()
        )
    return reasons


def takes_padding(anatomy: Anatomy, padding: Padding) -> bool:
    """Whether the residual can be padded without a change of the function."""
    return not _padding_reason(anatomy, padding)


def _padding_reason(anatomy: Anatomy, padding: Padding) -> str:
    """Why padding of the residual changes the function, in sentences that follow "padding "; empty where it does
    not."""
    scaled = [role for role in anatomy.roles if role.kind == "scale" and role.along("residual", "writes")]
    if anatomy.norm_position == "after_residual":
        return "does not pass a norm that comes after the residual sum."
    if anatomy.embedding_norm is not None and anatomy.norm == "layer":
        return (
            f"does not pass {anatomy.embedding_norm}, a LayerNorm whose output is the residual: what it gives for the "
            "padding is neither zero nor the mean of the others."
        )
    if anatomy.no_padding:
        return f"does not pass {anatomy.no_padding}."
    if not _can_scale_norms(anatomy):
        return "needs norms with a gain and an epsilon that can be scaled; these have none."
    if anatomy.norm == "rms" and padding == "mean":
        return "with the mean changes the mean square that an RMSNorm divides by. Pad with zeros."
    if anatomy.norm == "layer" and padding == "zeros" and anatomy.tied:
        return (
            "with zeros needs a residual without mean, which a LayerNorm does not notice but a tied head does. Pad "
            "with the mean, or untie the head first."
        )
    if anatomy.norm == "layer" and padding == "zeros" and anatomy.unnormed_readers:
        return (
            "with zeros needs a residual without mean, which a LayerNorm does not notice but "
            f"{' and '.join(anatomy.unnormed_readers)} would, without a norm before. Pad with the mean."
        )
    if anatomy.norm == "layer" and scaled:
        mend = " Merge them first." if all(role.added for role in scaled) else ""
        return (
            f"asks for the mean of what a layer gives, which factors of its units ({scaled[0].pattern}) change behind "
            f"it.{mend}"
        )
    return ""


def refuse_fixed_widths(anatomy: Anatomy, new: Sizes) -> None:
    """Raise PlanError when the architecture or a brick of the model keeps it from having the widths `new`."""
    old = anatomy.sizes
    widths = [(stream, name, old.units(stream), new.units(stream)) for stream, name in SETTINGS.items()]
    fixed = _fixed(anatomy, [*widths, *_head_dims(old.head_dim, new.head_dim)])
    if reasons := [*fixed, *_never(anatomy, new.residual), *_group_reasons(anatomy, new.residual)]:
        raise PlanError(reasons[0])


def _fixed_reasons(anatomy: Anatomy, widening: Widening) -> list[str]:
    """Why the architecture or a brick of the model keeps it from being widened so; empty where nothing does."""
    # A map may keep the number of units and still move or cut them.
    widths = [(s, SETTINGS[s], m.old if m.is_identity else None, m.size) for s, _, m in widening.maps()]
    never = _never(anatomy, widening.residual.size)
    return [*_fixed(anatomy, [*widths, *_head_dims(anatomy.sizes.head_dim, widening.head_dim)]), *never]


def _never(anatomy: Anatomy, hidden: int) -> list[str]:
    """Why the model can't have this hidden size; empty where it can."""
    return [f"hidden_size = {hidden}: {why}" for size, why in anatomy.never_hidden_size if size == hidden]


def _group_reasons(anatomy: Anatomy, hidden: int) -> list[str]:
    """Why the residual can't get another width but by whole copies; empty where it can."""
    old = anatomy.sizes.residual
    if not anatomy.residual_groups or hidden == old:
        return []
    return [
        f"hidden_size = {hidden}: a convolution mixes the {old} units of the residual in {anatomy.residual_groups} "
        f"groups ({anatomy.fields.residual_groups}), and does the same only for whole copies of all of them, in order. "
        f"Use hypercloning with a multiple of {old}, or leave hidden_size out."
    ]


def _head_dims(before: int, after: int) -> list[tuple[Stream, str, int | None, int | None]]:
    """The head dimension as a width of both kinds of heads."""
    return [("query", "head_dim", before, after), ("key_value", "head_dim", before, after)]


def _fixed(anatomy: Anatomy, widths: Iterable[tuple[Stream, str, int | None, int | None]]) -> list[str]:
    """A reason for every changed width (stream, name, before, after) of a stream whose width is fixed."""
    fixed = dict(anatomy.fixed_widths)
    return [
        f"{name} = {after}: {fixed[stream]}"
        for stream, name, before, after in widths
        if before != after and stream in fixed
    ]


def _tied_head_reasons(anatomy: Anatomy, widening: Widening) -> list[str]:
    if widening.residual.is_identity or widening.residual.is_cut or not anatomy.tied:
        return []
    if anatomy.final_norm is not None:
        return []
    return [
        f"hidden_size = {widening.residual.size}: the head is the token embedding and no norm with a gain comes "
        "right before it that could take up the number of copies, so this can't grow. Untie the head first, or leave "
        "hidden_size out."
    ]


def _head_reasons(anatomy: Anatomy, widening: Widening, scope: str) -> list[str]:
    """Why attention does not keep its function in a scope; empty where it does."""
    query, key_value, sizes = widening.at("query", scope), widening.at("key_value", scope), anatomy.sizes.at(scope)
    assert query is not None
    assert key_value is not None
    reasons = []
    old_groups, groups = sizes.query_heads // sizes.key_value_heads, query.size // key_value.size
    for place, head in enumerate(query.index):
        reads = place // groups
        if reads >= len(key_value.index) or key_value.index[reads] != head // old_groups:
            reasons.append(
                f"{_place(scope)}Query head {head} at place {place} of {query.size} would read another key-value head "
                "than before. Copy query and key-value heads group by group."
            )
            break
    if anatomy.qk_norm == "all_heads" and not (query.is_even and key_value.is_even and query.added == 0):
        reasons.append(
            f"{_place(scope)}{query.size} query and {key_value.size} key-value heads: the norm over all heads together "
            f"asks for equally many copies of each. Ask for multiples of {sizes.query_heads} and "
            f"{sizes.key_value_heads}."
        )
    return reasons


def _head_dim_reasons(anatomy: Anatomy, head_dim: int) -> list[str]:
    old, rotary = anatomy.sizes.head_dim, anatomy.rotary_dim
    if anatomy.qk_norm != "none":
        return [
            f"A head dimension of {head_dim} instead of {old}: the norm on queries and keys would divide by another "
            f"mean square. Keep {old} and ask for more heads."
        ]
    if anatomy.heads_clipped and anatomy.attention_scaled:
        return [
            f"A head dimension of {head_dim} instead of {old}: scores are divided by its root, which queries can't "
            f"make up for where they are clipped ({anatomy.heads_clipped}). Keep {old}."
        ]
    if not rotary:
        return []
    if anatomy.rope_type not in ROPE_BY_FREQUENCY:
        return [
            f"A head dimension of {head_dim} instead of {old}: rotary embeddings of the type {anatomy.rope_type!r} "
            f"change with it. Keep {old} and ask for more heads."
        ]
    if rotary_after(anatomy, head_dim) % rotary:
        below, above = max(head_dim // old, 1) * old, (head_dim // old + 1) * old
        return [
            f"A head dimension of {head_dim} instead of {old}: every rotary frequency must exist again, which only "
            f"multiples give. The nearest are {below} and {above}."
        ]
    return []


def rotary_after(anatomy: Anatomy, head_dim: int) -> int:
    """How many of `head_dim` dimensions are rotated: the same share as before, or the same number."""
    if anatomy.rotary_dim_stays:
        return anatomy.rotary_dim
    return int(anatomy.rotary_dim / anatomy.sizes.head_dim * head_dim + 1e-9)


def _unfit(anatomy: Anatomy, widening: Widening) -> list[str]:
    """Why the maps are not those of this model."""
    segments = [segment for role in anatomy.roles for axis in role.axes for segment in axis]
    for segment in segments:
        found = widening.stream(segment)
        if found is not None and found.old != segment.count:
            return [
                f"{_place(segment.scope)}the widening maps {found.old} units of {segment.stream}, and there are "
                f"{segment.count}. Give a map for this scope."
            ]
    streams = {segment.stream for segment in segments}
    for stream, scope in widening.scoped:
        if stream == "key_value" and stream not in streams:
            continue  # all heads read what the parameters of query heads make (DeepSeek)
        if not any(segment.stream == stream and encloses(scope, segment.scope) for segment in segments):
            return [
                f"{scope}: the anatomy does not tell the {stream} units of this scope apart. Ask for one that does: "
                f"anatomy(model, scopes=[{scope!r}])."
            ]
    return []


def _above_reasons(anatomy: Anatomy, from_above: bool) -> list[str]:
    """Why units of the layer above can't be taken."""
    streams: tuple[Stream, ...] = (*IN_FEED_FORWARD, "query", "key_value")
    if from_above and (shared := next((stack for stack in anatomy.stacks if stack.layers_shared), None)):
        return [
            f"{shared.path}: the layers share their parameters, so that there is no layer above whose units one could "
            "take. Take copies of its own (bert2bert with initialisation = fpi)."
        ]
    layers = [scope for stream in streams for scope in anatomy.scopes(stream)]
    stacks = {stack.path for stack in anatomy.stacks}
    if not from_above or not set(layers) - stacks - {""}:
        return []
    return [
        "The layers have different widths, so that a layer can't take units of the one above it. Take copies of its "
        "own (bert2bert with initialisation = fpi)."
    ]


def _lost(widening: Widening, cut: bool) -> list[str]:
    return [
        f"{_place(scope)}{_UNITS[stream]} unit {m.counts.index(0)} would be lost."
        for stream, scope, m in widening.maps()
        if stream in _UNITS and 0 in m.counts and not (cut and m.is_cut)
    ]


def _can_scale_norms(anatomy: Anatomy) -> bool:
    return anatomy.norm_has_gain and anatomy.final_norm is not None and anatomy.fields.epsilon is not None


def _place(scope: str) -> str:
    return f"{scope}: " if scope else ""
