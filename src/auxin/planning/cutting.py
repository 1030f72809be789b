"""Cutting chosen units out of a model: feed-forward units, heads with their key-value groups, experts, the residual.

What is left computes as before where nothing came from the rest: exact for feed-forward units and heads whose output
weights are zero. Without some experts, tokens are routed as if those had scores of minus infinity; where fewer are left
than a token gets, it gets all of them. A norm over a residual that lost units divides by the root mean square of fewer;
its gains and epsilon are scaled so that it computes as before if those units were zero (or, for a LayerNorm, the mean
of the others), which is the way back from padding. Norms after the residual sum, and those without gain or epsilon,
stay as they are.
"""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.planning.size_edits import config_heads
from auxin.planning.width import Widened, widen
from auxin.planning.width_maps import StreamMap, Widening, circular, feed_forward_maps
from auxin.planning.width_targets import followed_width, refuse_without_tower
from auxin.words.anatomy import Anatomy
from auxin.words.paths import encloses
from auxin.words.widths import FEED_FORWARD, IN_FEED_FORWARD, Sizes, Stream

_CUT: tuple[Stream, ...] = ("residual", "query", *IN_FEED_FORWARD)


def cut(model: PreTrainedModel, keep: Mapping[tuple[Stream, str], Sequence[int]], part: str | None = None) -> Widened:
    """The edits that leave of some streams of `model` the units named alone.

    Where all layers get the same width the config says it; otherwise the modules of a stack or a layer are configured.
    A key-value head goes when no query head that reads it stays.

    Args:
        model: the model, on any device; weights are not looked at.
        keep: the units that stay, counted from 0, by stream ("residual", "query" for whole heads, "expert" for whole
            experts, or one of the feed-forward streams) and scope: "" for all layers, a stack ("encoder.block") or a
            layer ("model.layers.3"); the residual has no other scope than "". They keep their order.
        part: of a model of several towers the one that is cut.

    Raises:
        PlanError: an unknown scope or unit, heads of one key-value head that would be more than those of another, heads
            that the architecture can't have fewer of in one place, experts whose groups would not be alike or too
            small, or nothing to cut.
    """
    scopes = dict.fromkeys(scope for _, scope in keep if scope)
    body = anatomy(model, scopes=scopes, part=part)
    refuse_without_tower(body)
    _check(body, keep)
    sizes = body.sizes
    same = Widening(
        residual=circular(sizes.residual, sizes.residual),
        query=circular(sizes.query_heads, sizes.query_heads),
        key_value=circular(sizes.key_value_heads, sizes.key_value_heads),
        feed_forward=feed_forward_maps(sizes, sizes, circular, IN_FEED_FORWARD),
        head_dim=sizes.head_dim,
    )
    maps = _kept_as_they_are(body)
    for (stream, scope), units in keep.items():
        kept = _kept(body, stream, scope, units)
        maps[stream, scope] = kept
        if stream == "expert":
            _check_groups(body, scope, kept)
        if stream == "query":
            maps["key_value", scope] = _key_value_heads(body, scope, kept)
    widening = Widening(
        residual=maps.pop(("residual", ""), same.residual),
        query=maps.pop(("query", ""), same.query),
        key_value=maps.pop(("key_value", ""), same.key_value),
        feed_forward={stream: maps.pop((stream, ""), units) for stream, units in same.feed_forward.items()},
        head_dim=sizes.head_dim,
        scoped=maps,
    )
    if widening.is_identity:
        raise PlanError("There is nothing to cut: all units are among those that stay. Name fewer.")
    _check_tied(model, body, widening)
    _check_heads(body, widening.sizes(sizes))
    _check_followers(body, widening.sizes(sizes))
    return widen(body, widening, approximate=True, cut=True)


def narrowest_scopes(body: Anatomy, stream: Stream) -> list[str]:
    """The narrowest scopes in which units of a stream can be cut on their own; none where it has no units.

    Args:
        body: anatomy of the model whose layers are told apart.
        stream: of those that can be cut.
    """
    if stream == "residual" or (stream == "query" and body.fields.heads_are_bound):
        return [""]
    scopes = body.scopes(stream)
    if stream == "query" and _heads_share_scores(body):
        stacks = (body.stack_of(scope) for scope in scopes)
        scopes = list(dict.fromkeys(scope if s is None else s.path for scope, s in zip(scopes, stacks, strict=True)))
    return scopes


def _kept_as_they_are(body: Anatomy) -> dict[tuple[Stream, str], StreamMap]:
    """The maps of scopes that have widths of their own already."""
    found = {(width.stream, width.scope): circular(width.units, width.units) for width in body.sizes.scoped}
    for scope in [scope for stream, scope in found if stream in ("query", "key_value")]:
        at = body.sizes.at(scope)
        found["query", scope] = circular(at.query_heads, at.query_heads)
        found["key_value", scope] = circular(at.key_value_heads, at.key_value_heads)
    return found


def _check(body: Anatomy, keep: Mapping[tuple[Stream, str], Sequence[int]]) -> None:
    for stream, scope in keep:
        if stream not in _CUT:
            raise PlanError(f"{stream}: units of this stream are not cut. Name one of {', '.join(_CUT)}.")
        if stream == "residual" and body.has_stages:
            raise PlanError(f"The residual of a {body.family} model: {dict(body.fixed_widths)['residual']}")
        if stream == "residual" and scope:
            raise PlanError(f"{scope}: the residual is one through all layers. Give its units for the scope ''.")
        if stream in IN_FEED_FORWARD and not body.scopes(stream):
            raise PlanError(f"The {body.family} model has no units of {stream}. Leave them out.")
        if stream == "query" and body.heads_stay and len(keep[stream, scope]) < body.sizes.at(scope).query_heads:
            raise PlanError(f"{len(keep[stream, scope])} heads: {body.heads_stay} Leave all of them.")
        if stream == "query" and scope:
            _check_head_scope(body, scope)
        inside = [width for width in body.sizes.scoped if width.stream == stream and width.scope != scope]
        if other := next((w for w in inside if encloses(scope, w.scope) and (stream, w.scope) not in keep), None):
            raise PlanError(
                f"{scope or 'all layers'}: {other.scope} in there has {other.units} units of {stream}, others have "
                f"{body.sizes.units(stream, scope)}, so that one list does not serve. Name the units of each."
            )


def _check_head_scope(body: Anatomy, scope: str) -> None:
    if body.fields.heads_are_bound:
        raise PlanError(
            f"{scope}: in this architecture the head dimension is hidden size / heads, so that no layer can have fewer "
            "heads than the others. Cut heads and residual of the whole model together, or silence the heads."
        )
    if (
        _heads_share_scores(body)
        and body.stack_of(scope) is not None
        and scope not in {stack.path for stack in body.stacks}
    ):
        raise PlanError(
            f"{scope}: the layers of a stack share what the first one adds to the scores of their heads, so that all "
            f"have the same. Give the heads that stay for {body.stack_of(scope).path}."  # type: ignore[union-attr]
        )


def _heads_share_scores(body: Anatomy) -> bool:
    """Whether the layers of a stack have one table of what is added to the scores of their heads."""
    return any(role.kind == "embedding" and role.along("query") for role in body.roles)


def _kept(body: Anatomy, stream: Stream, scope: str, units: Sequence[int]) -> StreamMap:
    old = body.sizes.units(stream, scope)
    assert old is not None
    place = f"{stream} of {scope}" if scope else stream
    if not units or len(set(units)) < len(units) or not 0 <= min(units) <= max(units) < old:
        raise PlanError(
            f"{place}: the units that stay must be some of 0..{old - 1}, each once, and not none; received "
            f"{list(units)[:8]}{' ...' if len(units) > 8 else ''}."
        )
    return StreamMap(old, tuple(sorted(units)))


def _key_value_heads(body: Anatomy, scope: str, query: StreamMap) -> StreamMap:
    """The key-value heads that stay with query heads."""
    old = body.sizes.at(scope)
    group = old.query_heads // old.key_value_heads
    counts = [sum(head // group == key for head in query.index) for key in range(old.key_value_heads)]
    if len(sizes := {count for count in counts if count}) > 1:
        raise PlanError(
            f"{scope or 'all layers'}: of the query heads of the {old.key_value_heads} key-value heads {counts} would "
            f"stay, but each must be read by equally many. Keep {min(sizes)} or {max(sizes)} of each."
        )
    return StreamMap(old.key_value_heads, tuple(key for key, count in enumerate(counts) if count))


def _check_groups(body: Anatomy, scope: str, experts: StreamMap) -> None:
    """Experts are scored group by group, where they have groups, so that of each as many must stay."""
    assert body.routing is not None
    groups, least = body.routing.groups, body.routing.scored_by
    size = experts.old // groups
    counts = [sum(expert // size == group for expert in experts.index) for group in range(groups)]
    if len(set(counts)) > 1 or counts[0] < least:
        raise PlanError(
            f"{scope or 'all layers'}: of the {groups} groups of {size} experts {counts} would stay, but a router "
            f"scores groups of one size by their best {least}. Keep equally many of each, at least {least}."
        )


def _check_tied(model: PreTrainedModel, body: Anatomy, widening: Widening) -> None:
    """Of one tensor that several layers have, the same units must stay in all of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for first, *others in names.values():
        streams = {segment.stream for axis in body.role(first).axes for segment in axis} if others else set()
        for name, stream in ((name, stream) for name in others for stream in streams):
            if widening.at(stream, name) != widening.at(stream, first):
                raise PlanError(
                    f"{first} and {name} are one tensor (tied), and of its units ({stream}) others would stay in one "
                    "place than in the other. Name the same for both, or untie them first."
                )


def _check_heads(body: Anatomy, new: Sizes) -> None:
    bound = body.fields.heads_are_bound
    if bound and new.residual != new.query_heads * new.head_dim:
        heads, rest = divmod(new.residual, new.head_dim)
        wanted = f"{heads} heads" if not rest else f"a multiple of {new.head_dim} units of the residual"
        raise PlanError(
            f"{new.residual} units of the residual with {new.query_heads} heads of dimension {new.head_dim}: in this "
            f"architecture hidden size = heads x dimension. Keep {wanted}, or {new.query_heads * new.head_dim} units."
        )
    # Fewer heads than the config takes are said for the modules; the hidden size can be said in the config alone.
    heads = config_heads(body, new)
    if body.heads_divide_hidden_size and all(new.residual % n for n in (heads, body.sizes.query_heads)):
        below = new.residual // heads * heads
        raise PlanError(
            f"{new.residual} units of the residual are no multiple of the {heads} heads, on which this "
            f"architecture's config insists. Keep {below} or {below + heads} units."
        )


def _check_followers(body: Anatomy, new: Sizes) -> None:
    """Feed-forward units that no config value counts follow from the hidden size."""
    for stream in FEED_FORWARD:
        if body.fields.names(stream) or body.fields.of_layers:
            continue
        for scope in body.scopes(stream):
            follows, units = followed_width(body, stream, new.residual), new.units(stream, scope)
            if units != follows:
                raise PlanError(
                    f"{scope or 'all layers'}: {units} feed-forward units would stay, but this architecture has no "
                    f"value for their number and works it out from the hidden size: {follows} for {new.residual}. Keep "
                    f"{follows}."
                )
