"""What stands in the place of a module that was removed."""

from typing import Any

import torch
from torch import Tensor, nn

from auxin.nn.bricks import brick


@brick("identity")
class Identity(nn.Identity):
    """Gives back its input."""

    @classmethod
    def replacing(cls, module: nn.Module) -> "Identity":
        """The stand-in for `module`."""
        return cls()


@brick("zeros")
class Zeros(nn.Module):
    """Gives zeros of its input's shape: a branch beside a residual stream that adds nothing."""

    @classmethod
    def replacing(cls, module: nn.Module) -> "Zeros":
        """The stand-in for `module`."""
        return cls()

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Zeros like `hidden_states`."""
        return torch.zeros_like(hidden_states)
