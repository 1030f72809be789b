"""Edits of a part of a parameter: some entries along an axis, or some blocks between its copied axes."""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from auxin.edits.kinds.parameter_edits import ParameterEdit
from auxin.edits.kinds.rate import Rate
from auxin.errors import PlanError


class ScaleEntries(ParameterEdit):
    """Multiply some entries along one axis by a number, for example the queries in a fused projection."""

    kind: Literal["scale_entries"] = "scale_entries"
    axis: int = Field(default=0, ge=0)
    """The axis that is indexed."""
    index: list[int] = Field(min_length=1)
    """The entries along it."""
    factor: float = Field(gt=0, allow_inf_nan=False)
    """The number."""

    def new_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The same shape; PlanError when an entry does not exist."""
        if self.axis >= len(shape) or not 0 <= min(self.index) <= max(self.index) < shape[self.axis]:
            raise PlanError(
                f"the entries {min(self.index)}..{max(self.index)} along axis {self.axis} do not all exist in shape "
                f"{list(shape)}"
            )
        return shape

    def map_parameter(self, old: Tensor, seed: int, name: str) -> Tensor:
        """The new tensor."""
        return old * self._factors(old, self.factor)

    def map_moment(self, old: Tensor, order: int) -> Tensor:
        """The gradient is divided by the factor."""
        return old * self._factors(old, self.factor**-order)

    def restore_parameter(self, new: Tensor, old_shape: tuple[int, ...]) -> Tensor:
        """The old tensor, up to rounding."""
        return new / self._factors(new, self.factor)

    def inverse(self, old_shape: tuple[int, ...]) -> list[ParameterEdit]:
        """Dividing again."""
        return [ScaleEntries(parameter=self.parameter, axis=self.axis, index=self.index, factor=1 / self.factor)]

    def rate(self, old_shape: tuple[int, ...]) -> Rate:
        """The entries would need another rate than the rest of their parameter."""
        return Rate(exact=False)

    def _factors(self, like: Tensor, factor: float) -> Tensor:
        factors = like.new_ones(like.shape[self.axis])
        if not like.is_meta:
            factors[torch.tensor(self.index, device=like.device)] = factor
        return factors.view([-1 if dim == self.axis else 1 for dim in range(like.dim())])

    def __str__(self) -> str:
        return f"multiply {len(self.index)} entries along axis {self.axis} by {self.factor:.6g}"


class RouteParameter(ParameterEdit):
    """Of a matrix whose outputs and inputs were copied equally often, let copy j of the outputs read copy j of the
    inputs alone: W' = diag(W, ..., W) in place of blocks W / n everywhere."""

    kind: Literal["route_parameter"] = "route_parameter"
    output_axis: int = Field(ge=0)
    """The axis of the outputs."""
    input_axis: int = Field(ge=0)
    """The axis of the inputs, divided among the copies by an earlier edit."""
    copies: int = Field(ge=2)
    """How many copies both axes hold, one after another."""
    stretches: list[int] = Field(min_length=1)
    """Lengths of the consecutive parts of the outputs' axis that were copied each on its own, for example query, key
    and value; they add up to the axis."""

    @model_validator(mode="after")
    def _sensible(self) -> "RouteParameter":
        if self.output_axis == self.input_axis:
            raise ValueError(f"output_axis and input_axis are both {self.input_axis}; give two axes")
        if wrong := [length for length in self.stretches if length < 1 or length % self.copies]:
            raise ValueError(f"stretches: {wrong[0]} is no whole number of {self.copies} copies")
        return self

    def new_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The same shape; PlanError when it holds no such copies."""
        fits = max(self.output_axis, self.input_axis) < len(shape)
        if not fits or shape[self.output_axis] != sum(self.stretches) or shape[self.input_axis] % self.copies:
            raise PlanError(
                f"shape {list(shape)} does not hold {self.copies} copies of inputs along axis {self.input_axis} and of "
                f"the outputs {self.stretches} along axis {self.output_axis}"
            )
        return shape

    def map_parameter(self, old: Tensor, seed: int, name: str) -> Tensor:
        """The new tensor."""
        return old.clone() if old.is_meta else old * self._mask(old) * self.copies

    def map_moment(self, old: Tensor, order: int) -> Tensor:
        """Blocks of zero get the same gradient as the others: outputs are equal and so are inputs."""
        return old.clone()

    def rate(self, old_shape: tuple[int, ...]) -> Rate:
        """As before: all blocks move, and the function with their sum."""
        return Rate()

    def _mask(self, like: Tensor) -> Tensor:
        outputs = torch.cat([torch.arange(n) // (n // self.copies) for n in self.stretches])
        inputs = torch.arange(like.shape[self.input_axis]) // (like.shape[self.input_axis] // self.copies)
        shape = [1] * like.dim()
        outputs = outputs.view([*shape[: self.output_axis], -1, *shape[self.output_axis + 1 :]])
        inputs = inputs.view([*shape[: self.input_axis], -1, *shape[self.input_axis + 1 :]])
        return (outputs == inputs).to(device=like.device, dtype=like.dtype)

    def __str__(self) -> str:
        return f"route: copy j of axis {self.output_axis} reads copy j of axis {self.input_axis}, {self.copies} copies"
