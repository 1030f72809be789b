"""How the widths of a plan are said: in the config, or for single modules where the config has one value for all."""

from collections.abc import Iterator
from typing import Any

from auxin.edits.kinds.module_edits import ConfigureModule
from auxin.words.roles import FEED_FORWARD, SETTINGS, Anatomy, LayerStack, Sizes, Stream


def size_edits(anatomy: Anatomy, new: Sizes) -> tuple[Sizes, list[ConfigureModule]]:
    """The widths that the config has to say for a model to have those of `new`, and the edits for the rest.

    The config says a width where all modules that follow it get the same one. Otherwise its value stays, and the
    modules that get another one are configured; so are those that have one of their own already. Heads that the config
    refuses, since their number does not divide the hidden size, are said for the modules.

    Args:
        anatomy: of the model before, whose roles tell the scopes apart that have widths in `new`.
        new: the widths afterwards.

    Returns:
        The widths of the config, without narrower scopes, and the edits of modules.
    """
    fields = anatomy.fields
    said: dict[Stream, int | None] = {}
    values: dict[str, dict[str, int]] = {}
    streams: tuple[Stream, ...] = ("query", "key_value", *FEED_FORWARD)
    usual = _told(anatomy, "query", new)[0]
    refused = anatomy.heads_divide_hidden_size and usual is not None and new.residual % usual != 0
    for stream in streams:
        field = fields.undotted.of(stream)
        said[stream], told = _told(anatomy, stream, new, stays=refused and stream not in FEED_FORWARD)
        for scope, units in told.items() if field is not None else ():
            alike = fields.like_heads if stream == "query" else ()
            for module in _modules(anatomy, stream, scope):
                values.setdefault(module, {}).update(dict.fromkeys((str(field), *alike), units))
    heads = said["query"] or new.query_heads, said["key_value"] or new.key_value_heads
    config = Sizes.of(new.residual, *heads, new.head_dim, said)
    return config, [ConfigureModule(module=module, values=told) for module, told in values.items()]


def size_values(anatomy: Anatomy, new: Sizes) -> dict[str, Any]:
    """The config's values for the widths `new`: those that change, and those that the config would derive from them."""
    old, fields = anatomy.sizes, anatomy.fields
    widths = {field: (old.units(stream), new.units(stream)) for stream in SETTINGS if (field := fields.of(stream))}
    values: dict[str, Any] = {field: after for field, (before, after) in widths.items() if before != after}
    if fields.head_dim is not None and (values or new.head_dim != old.head_dim):
        values[fields.head_dim] = new.head_dim
    if new.head_dim != old.head_dim:
        values |= dict.fromkeys(fields.like_head_dim, new.head_dim)
    if fields.heads in values:
        values |= dict.fromkeys(fields.like_heads, new.query_heads)
    if fields.hidden_size in values:
        values |= dict.fromkeys(fields.like_hidden_size, new.residual)
        values |= {fields.ffn: new.ffn} if fields.ffn and new.ffn else {}
    return values


def _told(anatomy: Anatomy, stream: Stream, new: Sizes, stays: bool = False) -> tuple[int | None, dict[str, int]]:
    """The width of a stream that the config says (with `stays`, as before), and those of the scopes that need an
    edit."""
    usual = anatomy.sizes.units(stream)
    before = {scope: anatomy.sizes.units(stream, scope) for scope in anatomy.scopes(stream)}
    after = {scope: units for scope in before if (units := new.units(stream, scope)) is not None}
    if not after:
        return new.units(stream), {}
    following = {after[scope] for scope in after if before[scope] == usual} or set(after.values())
    config = following.pop() if len(following) == 1 and not stays else usual
    told = {
        scope: units
        for scope, units in after.items()
        if (units != config if before[scope] == usual else units != before[scope])
    }
    return config, told


def _modules(anatomy: Anatomy, stream: Stream, scope: str) -> Iterator[str]:
    """The modules that take the width of a stream in a scope from their config, as paths and patterns."""
    for stack in anatomy.stacks:
        parts = stack.feed_forward if stream in FEED_FORWARD else stack.attentions
        if not scope and _follows_model(anatomy, stack, stream):
            yield from (f"{stack.path}.*.{part}".rstrip(".") for part in parts)
        elif scope == stack.path:
            yield from (f"{scope}.*.{part}".rstrip(".") for part in parts)
        elif scope.startswith(f"{stack.path}."):
            is_layer = "." not in scope.removeprefix(f"{stack.path}.")
            yield from (f"{scope}.{part}".rstrip(".") for part in (parts if is_layer else ("",)))


def _follows_model(anatomy: Anatomy, stack: LayerStack, stream: Stream) -> bool:
    """Whether the layers of `stack` have the model's width, by their roles."""
    return any(
        segment.stream == stream and not segment.scope
        for role in anatomy.roles
        if anatomy.stack_of(role.pattern) is stack
        for segments in role.axes
        for segment in segments
    )
