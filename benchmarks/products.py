"""What the products of matrices in some work would take by themselves: the limit that no other arrangement of the same
work comes below."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from measuring import median_seconds
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PLACES = {aten.mm: 0, aten.addmm: 1, aten.bmm: 0, aten.baddbmm: 1}
"""Operations that are a product of two matrices, or of many pairs, and the place of the first one in their
arguments. Attention's fused kernels are none."""
Kind = tuple[torch.dtype, tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Type, shape and strides of the first, shape and strides of the second."""


class Products(TorchDispatchMode):
    """Within the context, notes every product of matrices that is executed, backward passes included. Compiled code
    shows none of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: Counter[Kind] = Counter()
        """How often products of one kind are executed."""

    @classmethod
    def of(cls, run: Callable[[], object]) -> Self:
        """Those that `run` executes."""
        found = cls()
        with found:
            run()
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = PLACES.get(func.overloadpacket)
        if place is not None:
            a, b = args[place : place + 2]
            self.kinds[a.dtype, tuple(a.shape), a.stride(), tuple(b.shape), b.stride()] += 1
        return func(*args, **(kwargs or {}))

    @property
    def flops(self) -> int:
        """Of all of them; a multiply-add is two."""
        return sum(2 * times * torch.Size(a).numel() * b[-1] for (_, a, _, b, _), times in self.kinds.items())

    def seconds(self, device: str) -> float:
        """What they take one after the other, each kind warmed up and timed many times: the sum of the medians."""
        total = 0.0
        for (dtype, *sides), times in self.kinds.items():
            a, b = _drawn(*sides[:2], dtype, device), _drawn(*sides[2:], dtype, device)
            total += times * median_seconds(partial(torch.matmul, a, b), device)
        return total


def _drawn(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Random numbers, as a GPU is slower on those than on zeros, in the same order of memory."""
    size = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    return torch.randn(size, dtype=dtype, device=device).as_strided(shape, strides)
