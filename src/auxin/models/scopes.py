"""The widths of a model's layers, from the shapes of its tensors, and the roles that tell them apart."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Literal

from transformers import PreTrainedModel

from auxin.errors import PlanError
from auxin.models.configs import config_value
from auxin.models.scoped_config import ScopedConfig, config_at
from auxin.words.anatomy import Anatomy, LayerStack
from auxin.words.paths import dotted
from auxin.words.roles import ParameterRole, Segment
from auxin.words.widths import IN_FEED_FORWARD, Stream, Width

STREAMS: tuple[Stream, ...] = ("query", "key_value", *IN_FEED_FORWARD)
"""The streams whose widths can differ from layer to layer."""
Grain = Literal["model", "stack", "layer"]
"""By what the roles of a stack tell a stream's widths apart."""
GRAINS: tuple[Grain, ...] = ("model", "stack", "layer")


def in_scopes(model: PreTrainedModel, found: Anatomy, scopes: Iterable[str] = ()) -> Anatomy:
    """The anatomy with the widths that the model's tensors have.

    Where the layers of a stack have one width, which is not the model's, the roles stay patterns over its layers and
    their segments have the stack as scope. Where they differ, every layer has roles of its own.

    Args:
        model: the model; the meta device serves.
        found: its anatomy by its config.
        scopes: stacks and layers to be told apart although they may be alike, for edits of theirs alone.

    Raises:
        PlanError: a scope that is no stack and no layer; tensors of one layer that disagree about a width, or a layer
            with a head dimension of its own.
    """
    return _Scopes(model, found).told(list(scopes))


class _Scopes:
    def __init__(self, model: PreTrainedModel, found: Anatomy) -> None:
        said = [
            Width(stream, path, config_value(model.config, name))
            for stream in STREAMS
            for path, name in found.fields.names(stream).items()
            if path
        ]
        self.model, self.found = model, replace(found, sizes=found.sizes.with_widths([*found.sizes.scoped, *said]))
        self.found = replace(self.found, fixed_widths=(*found.fixed_widths, *self._other_head_dims()))
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors}
        modules = dict(model.named_modules())
        self.layers: dict[LayerStack, list[str]] = {
            stack: [f"{stack.path}.{place}" for place, _ in enumerate(modules[stack.path].children())]
            for stack in found.stacks
            if stack.path in modules
        }

    def told(self, scopes: list[str]) -> Anatomy:
        """The anatomy by scopes."""
        measured = self._measured()
        self._check_head_dims()
        asked = self._asked(scopes)
        grains: dict[tuple[LayerStack, Stream], Grain] = {}
        widths: list[Width] = []
        for stack, layers in self.layers.items():
            for stream in STREAMS:
                units = {layer: measured[stream, layer] for layer in layers if (stream, layer) in measured}
                usual = self.found.sizes.units(stream, stack.path)
                others = {path: count for path, count in units.items() if count != usual}
                grain = asked.get(stack, "model")
                said = stack.path in self.found.fields.names(stream)
                # What the config says for a stack stays the stack's width, also where no layer follows it.
                if others and others == units and len(set(units.values())) == 1 and grain != "layer" and not said:
                    grain, others = "stack", {stack.path: next(iter(others.values()))}
                elif others:
                    grain = "layer"
                elif usual != self.found.sizes.units(stream):
                    grain = max(grain, "stack", key=GRAINS.index)
                grains[stack, stream] = grain
                widths += [Width(stream, scope, count) for scope, count in others.items()]
            # Query heads read key-value heads: whoever maps the ones of a layer maps the others.
            heads = max(grains[stack, "query"], grains[stack, "key_value"], key=GRAINS.index)
            grains[stack, "query"] = grains[stack, "key_value"] = heads
        if all(grain == "model" for grain in grains.values()):
            return self.found
        sizes = self.found.sizes
        self.found = replace(self.found, sizes=sizes.with_widths([*sizes.scoped, *widths]))
        roles = [scoped for role in self.found.roles for scoped in self._scoped(role, grains)]
        return replace(self.found, roles=tuple(roles))

    def _measured(self) -> dict[tuple[Stream, str], int]:
        """Units by stream and layer, from the axes that run along one stream alone."""
        units: dict[tuple[Stream, str], int] = {}
        for name, shape in self.shapes.items():
            layer = self._layer_of(name)
            role = next((role for role in self.found.roles if role.matches(name)), None)
            if layer is None or role is None or len(role.axes) != len(shape):
                continue
            for size, segments in zip(shape, role.axes, strict=True):
                if len(segments) != 1 or segments[0].stream not in STREAMS:
                    continue
                (segment,) = segments
                have = units.setdefault((segment.stream, layer), size // segment.unit)
                if have * segment.unit != size:
                    raise PlanError(
                        f"{name} has {size} entries along {segment.stream}, but other parameters of {layer} say "
                        f"{have} units of {segment.unit}. The model is not what its architecture builds."
                    )
        return units

    def _other_head_dims(self) -> Iterator[tuple[Stream, str]]:
        """What can't change where the stacks' own numbers of heads make heads of several dimensions."""
        fields, sizes = self.found.fields, self.found.sizes
        heads = {name: config_value(self.model.config, name) for name in fields.names("query").values()}
        if fields.head_dim is None and any(sizes.residual // count != sizes.head_dim for count in heads.values()):
            said = " and ".join(f"{name} = {count}" for name, count in heads.items())
            dims = " and ".join(str(sizes.residual // count) for count in heads.values())
            why = f"{said} make heads of dimensions {dims}, and only heads of one dimension grow. Leave it out."
            yield from ((stream, why) for stream in ("residual", "query", "key_value"))

    def _check_head_dims(self) -> None:
        """Heads are told from tensors by one dimension for all."""
        fields, sizes = self.found.fields.undotted, self.found.sizes
        attentions = (
            (layer, dotted(layer, part))
            for stack, layers in self.layers.items()
            for layer in layers
            for part in stack.attentions
        )
        for layer, path in attentions:
            config = config_at(self.model, path)
            if isinstance(config, ScopedConfig):
                bound = getattr(config, fields.hidden_size) // getattr(config, fields.heads)
                dim = (getattr(config, fields.head_dim) if fields.head_dim else None) or bound
                if dim != sizes.head_dim:
                    raise PlanError(
                        f"{layer} has heads of dimension {dim}, the model of {sizes.head_dim}. Known are layers with "
                        "other numbers of heads, not with other heads."
                    )

    def _asked(self, scopes: list[str]) -> dict[LayerStack, Grain]:
        """By what the roles of stacks shall tell widths apart."""
        grains: dict[LayerStack, Grain] = {}
        for scope in scopes:
            for stack, layers in self.layers.items():
                if scope == stack.path:
                    grains.setdefault(stack, "stack")
                    break
                if scope in layers:
                    grains[stack] = "layer"
                    break
            else:
                stacks = ", ".join(f"{stack.path} ({len(layers)} layers)" for stack, layers in self.layers.items())
                raise PlanError(f"{scope!r} is no stack and no layer of this model. It has {stacks}.")
        return grains

    def _scoped(
        self, role: ParameterRole, grains: Mapping[tuple[LayerStack, Stream], Grain]
    ) -> Iterator[ParameterRole]:
        """The roles that stand for one: itself, or one for each layer."""
        stack = self.found.stack_of(role.pattern)
        streams = {segment.stream for segments in role.axes for segment in segments}
        own = {stream: grains[stack, stream] for stream in STREAMS if stack is not None and stream in streams}
        if stack is None or set(own.values()) <= {"model"}:
            yield role
        elif "layer" not in own.values():
            yield self._rescoped(role, stack.path, {stream for stream, grain in own.items() if grain == "stack"})
        else:
            for layer in self.layers[stack]:
                pattern = layer + role.pattern.removeprefix(f"{stack.path}.*")
                told = self._rescoped(replace(role, pattern=pattern), layer, set(own))
                if any(told.matches(name) for name in self.shapes):
                    yield told

    def _rescoped(self, role: ParameterRole, scope: str, streams: set[Stream]) -> ParameterRole:
        def rescoped(segment: Segment) -> Segment:
            if segment.stream not in streams:
                return segment
            units = self.found.sizes.units(segment.stream, scope)
            assert units is not None
            return replace(segment, count=units, scope=scope)

        return replace(role, axes=tuple(tuple(rescoped(segment) for segment in axis) for axis in role.axes))

    def _layer_of(self, name: str) -> str | None:
        layers = (layer for stack in self.layers.values() for layer in stack)
        return next((layer for layer in layers if name.startswith(f"{layer}.")), None)
