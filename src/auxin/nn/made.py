"""Bricks that are built by hand, on a module that has values, get theirs at once."""

from typing import Any

import torch
from torch import nn

from auxin.nn.bricks import Making


@torch.no_grad()
def take_over(brick: nn.Module, module: nn.Module, making: Making, **settings: Any) -> None:
    """Fill the tensors of `brick` from those of `module`, which it replaces: parameters of the same name become the
    same ones, the others are made. What is random comes from torch's global generator. On the meta device there is
    nothing to fill.

    Args:
        brick: has the shapes that `making` tells.
        module: stays as it is.
        making: the brick's.
        settings: the brick's.
    """
    old = module.state_dict()
    shapes = making.shapes({name: tuple(tensor.shape) for name, tensor in old.items()}, **settings)
    for name, parameter in module.named_parameters():
        owner, _, key = name.rpartition(".")
        if name in brick.state_dict() and name not in shapes:
            brick.get_submodule(owner).register_parameter(key, parameter)
    if not any(tensor.is_meta for tensor in old.values()):
        tensors = dict(brick.named_parameters()) | dict(brick.named_buffers())
        for name, value in making.values(old, torch.default_generator, **settings).items():
            tensors[name].copy_(value)
