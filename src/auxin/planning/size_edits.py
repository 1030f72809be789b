"""How the widths of a plan are said: in the config, or for single modules where the config has one value for all."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from auxin.edits.kinds.module_edits import ConfigureModule, ResizeModule
from auxin.planning.width_maps import Widening
from auxin.words.anatomy import Anatomy, LayerStack, Routing
from auxin.words.paths import dotted, encloses
from auxin.words.widths import IN_FEED_FORWARD, SETTINGS, ConfigFields, Sizes, Stream, Width


def size_edits(anatomy: Anatomy, new: Sizes) -> tuple[Sizes, list[ConfigureModule]]:
    """The widths that the config has to say for a model to have those of `new`, and the edits for the rest.

    The config says a width where all modules that follow it get the same one. Otherwise its value stays, and the
    modules that get another one are configured; so are those that have one of their own already. Heads that the config
    refuses, since their number does not divide the hidden size, are said for the modules.

    Args:
        anatomy: of the model before, whose roles tell the scopes apart that have widths in `new`.
        new: the widths afterwards.

    Returns:
        The widths of the config, with narrower scopes where it has a name for them, and the edits of modules.
    """
    said: dict[tuple[Stream, str], int | None] = {}
    values: dict[str, dict[str, int]] = {}
    streams: tuple[Stream, ...] = ("query", "key_value", *IN_FEED_FORWARD)
    refused = anatomy.heads_divide_hidden_size and new.residual % config_heads(anatomy, new) != 0
    for stream in streams:
        alike = anatomy.fields.undotted.like_heads if stream == "query" else ()
        for home, field in anatomy.fields.undotted.names(stream).items():
            said[stream, home], told = _told(anatomy, stream, home, new, refused and stream not in IN_FEED_FORWARD)
            for scope, units in told.items():
                own = dict.fromkeys((field, *alike), units)
                if stream == "expert":
                    own |= _fewer_per_token(anatomy.fields.undotted, anatomy.routing, said[stream, home], units)
                for module in _modules(anatomy, stream, home, scope):
                    values.setdefault(module, {}).update(own)
    modules = [ConfigureModule(module=module, values=told) for module, told in values.items()]
    return _config_sizes(anatomy, new, said), modules


def layer_edits(anatomy: Anatomy, widening: Widening) -> list[ResizeModule]:
    """The edits of linear layers, convolutions and norms that take their widths one by one.

    Args:
        anatomy: of the model before, no value of whose config says such a width.
        widening: the maps.
    """
    sizes: dict[str, dict[int, int]] = {}
    for role in anatomy.roles:
        module, _, name = role.pattern.rpartition(".")
        if name != "weight":
            continue
        for axis, segments in enumerate(role.axes):
            maps = [widening.stream(segment) for segment in segments]
            if all(found is None or found.is_identity for found in maps):
                continue
            size = sum(
                segment.unit * (segment.count if found is None else found.size)
                for segment, found in zip(segments, maps, strict=True)
            )
            sizes.setdefault(module, {})[axis] = size
    return [
        ResizeModule(module=module, outputs=of_axes.get(0), inputs=of_axes.get(1)) for module, of_axes in sizes.items()
    ]


def size_values(anatomy: Anatomy, new: Sizes, modules: Sequence[ConfigureModule] = ()) -> dict[str, Any]:
    """The config's values for the widths `new`: those that change, and those that the config would derive from them.

    Args:
        anatomy: of the model before.
        new: the widths that the config says afterwards.
        modules: the edits of those that have others, from `size_edits`.
    """
    old, fields = anatomy.sizes, anatomy.fields
    names = {name: (stream, home) for stream in SETTINGS for home, name in fields.names(stream).items()}
    widths = {name: (old.units(*place), new.units(*place)) for name, place in names.items()}
    values: dict[str, Any] = {name: after for name, (before, after) in widths.items() if before != after}
    # What the config derives where it is not said must be said once what it is derived from changes.
    derived_from = {name for name, (stream, _) in names.items() if stream in ("residual", "query")}
    if fields.head_dim is not None and (values.keys() & derived_from or new.head_dim != old.head_dim):
        values[fields.head_dim] = new.head_dim
    apart = any(fields.undotted.heads in edit.values for edit in modules)
    if fields.unsaid_head_dim is not None and (apart or new.residual != new.query_heads * new.head_dim):
        values[fields.unsaid_head_dim] = new.head_dim
    if new.head_dim != old.head_dim:
        values |= dict.fromkeys(fields.like_head_dim, new.head_dim)
    if fields.heads in values:
        values |= dict.fromkeys(fields.like_heads, new.query_heads)
    if fields.hidden_size in values:
        values |= dict.fromkeys(fields.like_hidden_size, new.residual)
        if fields.residual_groups is not None:
            values[fields.residual_groups] = anatomy.residual_groups * new.residual // old.residual
        values |= {name: units for name, (_, units) in widths.items() if names[name][0] == "ffn" and units}
    return values | _fewer_per_token(fields, anatomy.routing, old.experts, new.experts)


def _fewer_per_token(
    fields: ConfigFields, routing: Routing | None, before: int | None, after: int | None
) -> dict[str, int]:
    """The number of experts that a token gets, where so many are not left."""
    if routing is None or fields.experts_per_token is None or before is None or after is None:
        return {}
    most = routing.most(after)
    return {fields.experts_per_token: most} if most < routing.most(before) else {}


def config_heads(anatomy: Anatomy, new: Sizes) -> int:
    """The query heads that the config would have to say for a model to have the widths `new`, were it not to refuse
    them."""
    return _told(anatomy, "query", "", new)[0] or new.query_heads


def _config_sizes(anatomy: Anatomy, new: Sizes, said: Mapping[tuple[Stream, str], int | None]) -> Sizes:
    """The widths `new` with those that the config says; of a stream that it doesn't know, those of the model."""

    def of_model(stream: Stream) -> int | None:
        units = [units for (named, _), units in said.items() if named == stream]
        return units[0] if units else new.units(stream)

    heads = of_model("query") or new.query_heads, of_model("key_value") or new.key_value_heads
    inner = {stream: of_model(stream) for stream in IN_FEED_FORWARD}
    widths = [Width(stream, home, units) for (stream, home), units in said.items() if home and units is not None]
    return Sizes.of(new.residual, *heads, new.head_dim, inner).with_widths(widths)


def _told(
    anatomy: Anatomy, stream: Stream, home: str, new: Sizes, stays: bool = False
) -> tuple[int | None, dict[str, int]]:
    """The width of a stream that the config says for the stack `home` ("": for all; with `stays`, as before), and those
    of the scopes that need an edit."""
    usual = anatomy.sizes.units(stream, home)
    scopes = [scope for scope in anatomy.scopes(stream) if _is_about(anatomy, stream, home, scope)]
    before = {scope: anatomy.sizes.units(stream, scope) for scope in scopes}
    after = {scope: units for scope in before if (units := new.units(stream, scope)) is not None}
    if not after:
        return new.units(stream, home), {}
    following = {after[scope] for scope in after if before[scope] == usual} or set(after.values())
    config = following.pop() if len(following) == 1 and not stays else usual
    told = {
        scope: units
        for scope, units in after.items()
        if (units != config if before[scope] == usual else units != before[scope])
    }
    return config, told


def _is_about(anatomy: Anatomy, stream: Stream, home: str, scope: str) -> bool:
    """Whether what the config says for the stack `home` is about the units of `stream` in `scope`."""
    if scope:
        return encloses(home, scope)
    return any(_follows_model(anatomy, stack, stream) for stack in anatomy.stacks if home in ("", stack.path))


def _modules(anatomy: Anatomy, stream: Stream, home: str, scope: str) -> Iterator[str]:
    """The modules of the stack `home` ("": of all) that take the width of a stream in a scope from their config, as
    paths and patterns."""
    for stack in anatomy.stacks:
        if home not in ("", stack.path):
            continue
        parts = stack.feed_forward if stream in IN_FEED_FORWARD else stack.attentions
        if not scope and _follows_model(anatomy, stack, stream):
            yield from (dotted(stack.path, "*", part) for part in parts)
        elif scope == stack.path:
            yield from (dotted(scope, "*", part) for part in parts)
        elif scope.startswith(f"{stack.path}."):
            is_layer = "." not in scope.removeprefix(f"{stack.path}.")
            yield from (dotted(scope, part) for part in (parts if is_layer else ("",)))


def _follows_model(anatomy: Anatomy, stack: LayerStack, stream: Stream) -> bool:
    """Whether the layers of `stack` have the model's width, by their roles."""
    return any(
        segment.stream == stream and not segment.scope
        for role in anatomy.roles
        if anatomy.stack_of(role.pattern) is stack
        for segments in role.axes
        for segment in segments
    )
