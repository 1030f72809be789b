"""The edits: each one structural change of a model, as pure data.

An edit knows how the structure changes (a config value, a shape), how new parameters come from the old ones, how the
moments of an optimizer follow, and how to get the old tensor back out of the new one.
"""

import hashlib
import re
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from auxin.edits.fills import Fill, Tagged
from auxin.errors import PlanError

MOMENT_ORDERS = {
    "exp_avg": 1,
    "momentum_buffer": 1,
    "grad_avg": 1,
    "prev": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "square_avg": 2,
    "acc_delta": 2,
    "sum": 2,
}
"""How the state tensors of torch's optimizers depend on the gradient: linearly (1) or by its square (2)."""


def moment_order(name: str, parameter: str) -> int:
    """The order of the optimizer state `name`; PlanError when it is not known how it depends on the gradient."""
    if name not in MOMENT_ORDERS:
        raise PlanError(
            f"The optimizer keeps a state {name!r} for {parameter} and it is not known how it follows a change of "
            f"shape. Known states: {', '.join(MOMENT_ORDERS)}. Use such an optimizer, or apply without one."
        )
    return MOMENT_ORDERS[name]


class SetConfig(Tagged):
    """Set values of the model's config; the structure that follows from it is built from the new config."""

    kind: Literal["set_config"] = "set_config"
    values: dict[str, Any]
    """The new values by name."""

    def __str__(self) -> str:
        return "set " + ", ".join(f"{key} = {value}" for key, value in self.values.items())


class PadParameter(Tagged):
    """Lengthen parameters along one axis; the old entries come first."""

    kind: Literal["pad_parameter"] = "pad_parameter"
    parameter: str
    """The parameter's dotted name; `*` stands for any one part, so that one edit serves all layers."""
    axis: int = Field(default=0, ge=0)
    """The axis that grows."""
    size: int = Field(gt=0)
    """The length of that axis afterwards."""
    fill: Fill
    """Where the new entries come from."""

    def matches(self, name: str) -> bool:
        """Whether the edit means the parameter `name`."""
        return re.fullmatch(re.escape(self.parameter).replace(r"\*", r"[^.]+"), name) is not None

    def collides_with(self, other: "PadParameter") -> bool:
        """Whether both change the same thing of one parameter."""
        return self.axis == other.axis

    def new_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that `shape` becomes; PlanError when it can't."""
        if self.axis >= len(shape):
            raise PlanError(f"axis {self.axis} is beyond the {len(shape)} axes of shape {list(shape)}")
        if self.size <= shape[self.axis]:
            raise PlanError(
                f"size {self.size} must be more than the {shape[self.axis]} that axis {self.axis} of shape "
                f"{list(shape)} has; padding can't shrink"
            )
        if self.fill.kind == "repeat" and self.fill.first >= shape[self.axis]:
            raise PlanError(f"first row to repeat {self.fill.first} is beyond the {shape[self.axis]} old rows")
        return (*shape[: self.axis], self.size, *shape[self.axis + 1 :])

    def map_parameter(self, old: Tensor, seed: int, name: str) -> Tensor:
        """The new tensor; its random numbers depend on `seed`, the parameter's name and the old shape only."""
        new = self._room_for(old)
        if old.is_meta:
            return new
        self.fill.write(new, self.axis, old.shape[self.axis], _generator(seed, name, tuple(old.shape)))
        return new

    def map_moment(self, old: Tensor, order: int) -> Tensor:
        """The optimizer's moment of `order` (1 or 2) for the new tensor."""
        new = self._room_for(old)
        self.fill.write_moment(new, self.axis, old.shape[self.axis], order)
        return new

    def restore_parameter(self, new: Tensor, old_shape: tuple[int, ...]) -> Tensor:
        """The old tensor out of the new one, as well as it can be had."""
        return self.fill.restore(new, self.axis, old_shape[self.axis])

    def _room_for(self, old: Tensor) -> Tensor:
        new = old.new_empty(self.new_shape(tuple(old.shape)))
        new.narrow(self.axis, 0, old.shape[self.axis]).copy_(old)
        return new

    def __str__(self) -> str:
        return f"pad axis {self.axis} to {self.size}: {self.fill}"


Edit = Annotated[SetConfig | PadParameter, Field(discriminator="kind")]
ParameterEdit = PadParameter


def _generator(seed: int, name: str, shape: tuple[int, ...]) -> torch.Generator:
    """A generator on the CPU for one tensor. The old shape takes part so that a second growth draws other numbers."""
    digest = hashlib.sha256(f"{seed}/{name}/{shape}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
