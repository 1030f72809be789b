"""Tensors of its own for a module that shared them with another one: a head that was the token embedding."""

from typing import Any

import torch
from torch import Tensor

from auxin.nn.bricks import MAKINGS, Making, Shapes, Tensors


class OwnTensors(Making):
    """All tensors of a module as they are, shared with none from then on. No settings.

    The config has to say that they are not tied. Moments start anew: those of a shared tensor are of the sum of both
    gradients.
    """

    def shapes(self, old: Shapes, **settings: Any) -> Shapes:
        return dict(old)

    def values(self, old: Tensors, draw: torch.Generator, **settings: Any) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in old.items()}


MAKINGS.add("own_tensors", OwnTensors())
