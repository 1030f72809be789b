"""Biases of zeros for linear layers that have none: what a switch of the config asks for, and changes nothing yet."""

from typing import Any

import torch
from torch import Tensor

from auxin.errors import PlanError
from auxin.nn.bricks import MAKINGS, Making, Shapes, Tensors


class ZeroBias(Making):
    """Of a linear layer's `weight` (outputs, inputs), which stays, a `bias` (outputs,) of zeros. No settings."""

    def shapes(self, old: Shapes, **settings: Any) -> Shapes:
        if set(old) != {"weight"} or len(old["weight"]) != 2:
            raise PlanError(
                f"a bias of zeros is made for a layer that has a weight of two axes alone, and the module has "
                f"{', '.join(sorted(old)) or 'nothing'}"
            )
        return {"bias": old["weight"][:1]}

    def values(self, old: Tensors, draw: torch.Generator, **settings: Any) -> dict[str, Tensor]:
        return {"bias": old["weight"].new_zeros(len(old["weight"]))}


MAKINGS.add("zero_bias", ZeroBias())
