"""The edit of a stack of layers: duplicate, insert, drop, reorder, and blend."""

import re
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import nn
from transformers import PreTrainedModel

from auxin.edits.kinds.fills import Tagged
from auxin.edits.kinds.parameter_edits import ABSENT_UNIT, SliceParameter
from auxin.errors import PlanError
from auxin.models.layout import config_for_order, tensors_by_layer


class ArrangeLayers(Tagged):
    """Say for every layer of a stack which old layer it is: duplicating, inserting, dropping and reordering layers.

    The config's number of layers follows, and what it says of layers by their numbers; see `auxin.models.layer_rules`.
    """

    kind: Literal["arrange_layers"] = "arrange_layers"
    layers: str
    """Path of the stack (a ModuleList), for example "model.layers"."""
    order: list[int | None] = Field(min_length=1)
    """New layer i is old layer order[i], the second time a copy of it; None is a fresh one, initialised as the
    architecture does it."""
    blend: dict[str, list[list[float]]] | None = None
    """By a parameter's name in the layer: weights (new layers, old layers); the parameter of new layer i is the sum of
    those of all old layers, weighted by row i. Parameters not named here are those of `order`."""

    fresh_moments: list[int] = []
    """New layers whose optimizer state starts anew although their parameters are copies: those that learn from another
    starting point than the layer that they copy, such as identity blocks."""

    @model_validator(mode="after")
    def _blends_all(self) -> "ArrangeLayers":
        for name, rows in (self.blend or {}).items():
            if len(rows) != len(self.order):
                raise ValueError(f"blend: {name} has {len(rows)} rows for {len(self.order)} new layers")
        if any(source is not None and source < 0 for source in self.order):
            raise ValueError("order: layers are counted from 0; null is a fresh layer")
        if beyond := [place for place in self.fresh_moments if not 0 <= place < len(self.order)]:
            raise ValueError(f"fresh_moments: {beyond[0]} is none of the {len(self.order)} new layers")
        return self

    def check(self, length: int) -> None:
        """PlanError when the stack of `length` layers lacks one of those named."""
        if beyond := [source for source in self.order if source is not None and source >= length]:
            raise PlanError(f"layer {beyond[0]} is beyond the {length} layers of {self.layers} (0..{length - 1})")
        for name, rows in (self.blend or {}).items():
            if wrong := [row for row in rows if len(row) != length]:
                raise PlanError(f"blend of {name} has rows of {len(wrong[0])} weights for {length} old layers")

    def renamed(self, name: str) -> list[str]:
        """The names that a parameter or module called `name` has afterwards."""
        match = re.fullmatch(re.escape(self.layers) + r"\.(\d+)(\..*)?", name)
        if match is None:
            return [name]
        source, rest = int(match[1]), match[2] or ""
        return [f"{self.layers}.{place}{rest}" for place, old in enumerate(self.order) if old == source]

    def layer_of(self, name: str) -> str | None:
        """Path of the layer of this stack that `name` lies in; None outside of it."""
        match = re.match(re.escape(self.layers) + r"\.\d+(?=\.|$)", name)
        return match[0] if match else None

    def renamed_pattern(self, pattern: str) -> list[str]:
        """As `renamed` for a pattern: one that means every layer goes on meaning every layer."""
        if pattern.startswith(f"{self.layers}.*"):
            if None in self.order:
                raise PlanError(
                    f"a fresh layer can't be put among layers that were changed ({pattern}); copy one of them instead"
                )
            return [pattern]
        return self.renamed(pattern)

    def inverse(self, length: int) -> "ArrangeLayers | None":
        """The arrangement that leads back from here to `length` old layers; None when one of them is gone."""
        if self.blend or any(layer not in self.order for layer in range(length)):
            return None
        return ArrangeLayers(layers=self.layers, order=[self.order.index(layer) for layer in range(length)])

    def config_values(self, model: PreTrainedModel) -> dict[str, Any]:
        """What the config of `model` must say, by dotted names, for the stack to hold the layers `order`: their number,
        and what it says of layers by their numbers.

        Raises:
            PlanError: the config can't say it.
        """
        return config_for_order(model, self.layers, self.order)

    def slices(self, model: PreTrainedModel) -> list[SliceParameter]:
        """What happens to the parameters of `model` outside of the stack that hold entries of each of its layers; those
        of fresh layers are zeros."""
        index = [ABSENT_UNIT if source is None else source for source in self.order]
        return [
            SliceParameter(parameter=name, axis=axis, index=index, unit=unit)
            for name, (axis, unit) in tensors_by_layer(model, self.layers, self.order).items()
        ]

    def __str__(self) -> str:
        fresh = self.order.count(None)
        copies = len(self.order) - fresh - len(set(self.order) - {None})
        words = [f"{len(self.order)} layers: {' '.join('new' if i is None else str(i) for i in self.order)}"]
        words += [f"{copies} copied"] if copies else []
        words += ["blended"] if self.blend else []
        return ", ".join(words)


class JoinAbove(Tagged):
    """Put behind a parameter of every layer, along one axis, that of the layer above, for a later `SliceParameter` to
    choose from both. The top layer is joined to itself."""

    kind: Literal["join_above"] = "join_above"
    layers: str
    """Path of the stack (a ModuleList), for example "model.layers"."""
    parameter: str
    """The parameter's name in a layer, for example "mlp.up_proj.weight"."""
    axis: int = Field(default=0, ge=0)
    """The axis along which they are joined."""

    def __str__(self) -> str:
        return f"{self.parameter} and that of the layer above, joined along axis {self.axis}"


def layer_stack(model: PreTrainedModel, path: str) -> nn.ModuleList:
    """The stack of layers at `path`; PlanError, naming those there are, when it is none."""
    try:
        stack = model.get_submodule(path)
    except AttributeError:
        stack = None
    if not isinstance(stack, nn.ModuleList):
        known = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
        outer = [name for name in known if not re.search(r"\.\d+\.", name)]
        raise PlanError(f"{path} is no stack of layers. This model has {', '.join(outer) or 'none'}")
    return stack
