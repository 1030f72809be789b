"""How the widths of a plan are said: in the config, or for single modules where the config has one value for all."""

from collections.abc import Iterator
from dataclasses import replace

from auxin.edits.kinds.module_edits import ConfigureModule
from auxin.words.roles import Anatomy, LayerStack, Sizes, Stream


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
    streams: tuple[tuple[Stream, str | None], ...] = (
        ("query", fields.heads),
        ("key_value", fields.key_value_heads),
        ("ffn", fields.ffn),
    )
    heads = _told(anatomy, "query", new)[0]
    refused = anatomy.heads_divide_hidden_size and heads is not None and new.residual % heads != 0
    for stream, field in streams:
        said[stream], told = _told(anatomy, stream, new, stays=refused and stream != "ffn")
        for scope, units in told.items() if field is not None else ():
            for module in _modules(anatomy, stream, scope):
                values.setdefault(module, {})[str(field)] = units
    config = replace(
        new,
        query_heads=said["query"] or new.query_heads,
        key_value_heads=said["key_value"] or new.key_value_heads,
        ffn=said["ffn"],
        scoped=(),
    )
    return config, [ConfigureModule(module=module, values=told) for module, told in values.items()]


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
        parts = stack.feed_forward if stream == "ffn" else stack.attentions
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
