"""Weights for models that are run for what it costs: small random ones, where a skeleton has none."""

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

SCALE = 0.02
"""Their standard deviation: zeros would be no work to some kernels, and large ones overflow."""
ALIGNED = 64
"""Entries: a tensor in shared memory begins at a multiple of so many, as one by itself does."""
Draw = Callable[[torch.Size, torch.dtype], Tensor]
"""(shape, dtype) -> values of a parameter."""


def fill(module: nn.Module, draw: Draw | None = None, device: torch.device | None = None) -> None:
    """Give what is on the meta device values; what is one tensor stays one. Buffers that have none become ones or, of
    whole numbers, zeros; those that no checkpoint holds have theirs.

    Args:
        module: a skeleton, or a part of one; it is changed.
        draw: makes the values of parameters; None: normal ones of their own.
        device: where buffers go; None: the CPU.
    """
    draw = draw or _normal(torch.Generator().manual_seed(0))
    filled: dict[int, Tensor] = {}
    for inner in module.modules():
        for tensors in (inner._parameters, inner._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in filled:
                    filled[id(old)] = _value(old, draw, device)
                tensors[name] = filled[id(old)]  # type: ignore[assignment]


class Memory:
    """Memory in which one module's parameters lie behind each other, and another's in the same place: what is run in
    turns takes no more than the largest.

    Args:
        device: where it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._all: dict[torch.dtype, Tensor] = {}
        self._used: dict[torch.dtype, int] = {}

    def fill(self, modules: Sequence[nn.Module]) -> None:
        """Give modules that run one after the other weights of their own, as `fill` does, from the beginning on."""
        self._used = {}
        needed: dict[torch.dtype, int] = {}
        for parameter in chain.from_iterable(module.parameters() for module in modules):
            needed[parameter.dtype] = needed.get(parameter.dtype, 0) + _room(parameter.shape)
        for dtype, size in needed.items():
            if dtype not in self._all or len(self._all[dtype]) < size:
                room = torch.empty(size, dtype=dtype, device=self._device)
                self._all[dtype] = room.normal_(0, SCALE) if dtype.is_floating_point else room.zero_()
        for module in modules:
            fill(module, self._draw, self._device)

    def _draw(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        start = self._used.get(dtype, 0)
        self._used[dtype] = start + _room(shape)
        return self._all[dtype][start : start + shape.numel()].view(shape)


def _room(shape: torch.Size) -> int:
    return -(-shape.numel() // ALIGNED) * ALIGNED


def _normal(generator: torch.Generator) -> Draw:
    def draw(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype).normal_(0, SCALE, generator=generator)

    return draw


def _value(old: Tensor, draw: Draw, device: torch.device | None) -> Tensor:
    if isinstance(old, nn.Parameter):
        return nn.Parameter(draw(old.shape, old.dtype), old.requires_grad) if old.is_meta else old
    if not old.is_meta:
        return old if device is None else old.to(device)
    return torch.zeros(old.shape, dtype=old.dtype, device=device).fill_(float(old.is_floating_point()))
