"""What stands in the place of a module that was removed."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from auxin.errors import PlanError
from auxin.nn.bricks import Brick, brick


@brick("identity")
class Identity(Brick, nn.Identity):
    """Gives back its input."""

    @classmethod
    def replacing(cls, module: nn.Module) -> "Identity":
        """The stand-in for `module`."""
        return cls()

    def scaled(self, factor: float, plain: Mapping[str, float]) -> dict[str, float]:
        """Impossible."""
        raise PlanError(
            "what was removed there left its input, which no parameter scales. Grow the model first and remove modules "
            "then."
        )


@brick("zeros")
class Zeros(Brick):
    """Gives zeros of its input's shape: a branch beside a residual stream that adds nothing."""

    @classmethod
    def replacing(cls, module: nn.Module) -> "Zeros":
        """The stand-in for `module`."""
        return cls()

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Zeros like `hidden_states`."""
        return torch.zeros_like(hidden_states)
