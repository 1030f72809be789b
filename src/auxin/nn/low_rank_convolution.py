"""Convolutions of low rank: one with the same kernel to `rank` channels, then one with a kernel of 1 to all of them
(CED of Greenformers, Cahyawijaya 2021, arXiv 2108.10808).

The weight (out, in, *kernel) is taken as the matrix (out, in * kernel) by which each place's window is multiplied, and
becomes a product as a linear layer's does (`auxin.nn.low_rank`), bias and all. A product of rank r has
r (in * kernel + out) parameters and takes as many multiply-adds for each place that is given: it pays below
out * in * kernel / (out + in * kernel). The paper's code leaves the kernel out there.
"""

import math
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from auxin.errors import PlanError
from auxin.nn.bricks import Roles, Shapes, Tensors, brick
from auxin.nn.low_rank import INPUT, OUTPUT, WEIGHT, LowRankMaking, Product, Start
from auxin.nn.made import take_over
from auxin.nn.unmultiplied import unmultiplied
from auxin.words.roles import ParameterRole

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The classes that become products; none of their subclasses, which do something of their own."""
_CALLED: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
_KEPT = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    "_reversed_padding_repeated_twice",
)
"""What a convolution says of itself, which models read."""


class LowRankConvolutionMaking(LowRankMaking):
    """`input_factor` (rank, in, *kernel) and `output_factor` (out, rank) out of the weight, and back; as of a linear
    layer that reads in * kernel units."""

    def shapes(self, old: Shapes, rank: int, start: Start = "weight") -> Shapes:  # type: ignore[override]
        """Those of both factors."""
        flat = {name: (shape[0], math.prod(shape[1:])) if len(shape) > 2 else shape for name, shape in old.items()}
        found = dict(super().shapes(flat, rank, start))
        return found and {OUTPUT: found[OUTPUT], INPUT: (rank, *_window(old))}

    def values(  # type: ignore[override]
        self, old: Tensors, draw: torch.Generator, rank: int, start: Start = "weight"
    ) -> dict[str, Tensor]:
        """As of a linear layer."""
        return _wide(super().values(_flat(old), draw, rank, start), old)

    def moments(  # type: ignore[override]
        self, old: Tensors, moments: Tensors, order: int, rank: int, start: Start = "weight"
    ) -> dict[str, Tensor] | None:
        """As of a linear layer."""
        found = super().moments(_flat(old), _flat(moments), order, rank, start)
        return found and _wide(found, old)

    def back(self, new: Tensors, **settings: Any) -> dict[str, Tensor]:
        """The product."""
        return _wide(super().back(_flat(new)), new)

    def moments_back(self, new: Tensors, moments: Tensors, order: int, **settings: Any) -> dict[str, Tensor] | None:
        """As of a linear layer."""
        found = super().moments_back(_flat(new), _flat(moments), order)
        return found and _wide(found, new)


@brick("low_rank_convolution")
class LowRankConvolution(Product):
    """An `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` without groups, of low rank.

    Parameters `input_factor` (rank, in, *kernel), `output_factor` (out, rank), and the replaced one's `bias` (out,), if
    it has one; they are not filled.

    Args:
        like: what it stands in for.
        rank: from 1 to the smaller of out and in * kernel.
    """

    making = LowRankConvolutionMaking()
    plain_form = "merge it back (the edit merge_module); the convolution then is a dense one that holds the product"
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    def __init__(self, like: nn.Module, rank: int) -> None:
        super().__init__()
        for name in _KEPT:
            setattr(self, name, getattr(like, name))
        self.rank = rank
        named = dict(like.named_parameters())
        example = next(iter(named.values()))
        shapes = self.making.shapes({name: tuple(p.shape) for name, p in named.items()}, rank, "random")
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(example.new_empty(shape)))
        self.register_parameter("bias", nn.Parameter(example.new_empty(self.out_channels)) if "bias" in named else None)

    @classmethod
    def replacing(cls, module: nn.Module, rank: int, start: Start = "weight") -> Self:
        """The convolution of low rank for `module`, filled from it where it has values.

        Args:
            module: a convolution, also on the meta device; or one of low rank, which gets another rank.
            rank: from 1 to the smaller of out and in * kernel, with which it is the same function.
            start: what the factors are made of: "weight", or "random" numbers, by which the bias alone is kept.

        Raises:
            PlanError: the module is something else or has groups, or the rank is none of its.
        """
        if type(module) is not cls:
            refuse_other(module)
        new = cls(module, rank)
        take_over(new, module, cls.making, rank=rank, start=start)
        return new.train(module.training)

    @property
    def weight(self) -> Tensor:
        """The product, (out, in, *kernel), for whoever reads a convolution's weight without calling it."""
        shape = self.out_channels, self.in_channels, *self.kernel_size
        return unmultiplied(self.output_factor, self.input_factor.flatten(1), shape=shape)

    def forward(self, x: Tensor) -> Tensor:
        """(samples, in, *places) -> (samples, out, *places), as the convolution."""
        convolve, padding = _CALLED[len(self.kernel_size) - 1], self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0,)
            padding *= len(self.kernel_size)
        found = convolve(x, self.input_factor, None, self.stride, padding, self.dilation)
        return convolve(found, self.output_factor[(..., *[None] * len(self.kernel_size))], self.bias)

    def roles(self, replaced: Roles) -> Roles:
        """One factor writes what the weight wrote, the other reads what it read."""
        if WEIGHT not in replaced:
            return {}
        whole = replaced[WEIGHT]
        path = whole.pattern.removesuffix(WEIGHT)
        return {
            OUTPUT: ParameterRole(path + OUTPUT, (whole.axes[0], ()), (whole.access[0], None), whole.kind),
            INPUT: ParameterRole(path + INPUT, ((), *whole.axes[1:]), (None, *whole.access[1:]), "matrix"),
        }

    def extra_repr(self) -> str:
        """Channels, kernel and rank."""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}"


def refuse_other(module: nn.Module) -> None:
    """Raise PlanError where `module` is no convolution that can be a product: another class, or one in groups."""
    if type(module) not in CONVOLUTIONS:
        raise PlanError(
            f"low_rank_convolution replaces an nn.Conv1d, nn.Conv2d or nn.Conv3d, received a {type(module).__name__}, "
            "which does something of its own (a weight norm, say). Leave it whole, or take that off first."
        )
    if module.groups != 1:
        raise PlanError(
            f"low_rank_convolution: the {type(module).__name__} has {module.groups} groups, each a small matrix of its "
            "own, of which no single product is near. Leave it whole."
        )


def window(module: nn.Module) -> tuple[int, int]:
    """What a convolution reads of each place, in * kernel, and what it gives, out."""
    outputs, *read = module.get_parameter(WEIGHT).shape
    return math.prod(read), outputs


def _window(old: Shapes) -> tuple[int, ...]:
    return old[WEIGHT if WEIGHT in old else INPUT][1:]


def _flat(tensors: Tensors) -> dict[str, Tensor]:
    """With matrices in the place of what has a kernel."""
    return {name: tensor.flatten(1) if tensor.dim() > 2 else tensor for name, tensor in tensors.items()}


def _wide(found: Tensors, old: Tensors) -> dict[str, Tensor]:
    """With kernels as in `old`, where there are any."""
    rest = _window({name: tuple(tensor.shape) for name, tensor in old.items()})
    return {
        name: tensor.unflatten(1, rest).contiguous() if name in (WEIGHT, INPUT) else tensor
        for name, tensor in found.items()
    }
