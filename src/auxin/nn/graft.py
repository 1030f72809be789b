"""Grafts: a linear layer with a Pattention branch beside it, y = W x + b + sum over groups g of f(x K_g^T) V_g.

A dense layer has no tokens that could be appended to; the branch gives it some. With values of zero the layer is, bit
by bit, what it was. A branch of n tokens has n (in + out) parameters, as many as a LoRA of rank n, and is one with a
normalised nonlinearity f between its two matrices. It therefore can't be merged into W, and it can be grown again and
again: each further group of tokens has a norm of its own and leaves the older ones alone.
Pattention: arXiv 2410.23168, eq. 4 and 16; grouped growth is Auxin's own.

The classes are subclasses of the layers that they replace, so `weight` and `bias` keep their names and their meaning
for whatever reads them (PEFT, transformers' own code, exporters). Where a model has a linear layer of a class of its
own (Falcon), that class goes on computing W x + b, so that it comes out the same to the last bit.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from auxin.errors import ConfigError
from auxin.nn.bricks import Brick, Roles, brick
from auxin.nn.linear import linear_class
from auxin.nn.pattention import Pattention


class Branch(Pattention):
    """The Pattention of a graft. Fresh ones have keys N(0, 1/in_features), on which an input of root mean square 1 has
    scores of 1, and values of zero. Keys of zero would not do: their scores have a norm of zero, which scores and
    gradients are divided by."""

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Random keys, values of zero."""
        super().reset_parameters(generator)
        nn.init.zeros_(self.value_tokens)


class Grafted(Brick):
    """What all grafted layers have: the module `branch` beside the layer's own `weight` and `bias`."""

    layer: ClassVar[type[nn.Module]]
    """The class that it is a graft on."""
    replaced: type[nn.Module]
    """What computes W x + b: that class, or the subclass of it that the model has here."""
    axes: ClassVar[tuple[int, int]]
    """The axes of the layer's weight that are its outputs and its inputs."""
    branch: Branch

    @classmethod
    def replacing(cls, module: nn.Module, tokens: Sequence[int], **settings: Any) -> Self:
        """The graft on `module`, whose parameters it takes over; the fresh keys come from torch's global generator.

        Of a layer that is grafted already the branch gets new settings; the rows that it has stay, in front.

        Args:
            module: an `nn.Linear` (for GraftedLinear) or a `Conv1D` (for GraftedConv1D), or one of a subclass that
                computes the same (`linear_class`), also on the meta device.
            tokens: parameter tokens of each group, oldest first.
            settings: `tau` (per group; default sqrt(group size)), `score_function`, `gelu` and `eps` of `Pattention`.

        Raises:
            ConfigError: the module is of another class, its weights are no floating-point numbers, or the settings are
                wrong.
        """
        if type(module) is not cls and linear_class(module) is not cls.layer:
            raise ConfigError(
                f"{cls.__name__} replaces a {cls.layer.__name__}, received a {type(module).__name__}, which does not "
                "compute the same, or whose weight is read without it being called, which would leave the branch out. "
                "Graft another layer."
            )
        weight = cast(Tensor, module.weight)
        if not weight.dtype.is_floating_point:
            raise ConfigError(
                f"{cls.__name__}: the layer's weight is {weight.dtype}; a branch needs a floating-point layer to take "
                "its data type from. Graft before quantizing."
            )
        graft = cls.__new__(cls)
        with torch.device("meta"):
            cls._init_layer(graft, module)
        graft.replaced = module.replaced if isinstance(module, Grafted) else type(module)
        for name, parameter in module.named_parameters(recurse=False):
            graft.register_parameter(name, parameter)
        graft.branch = Branch(*cls._features(module), tokens, device=weight.device, dtype=weight.dtype, **settings)
        if isinstance(module, Grafted):
            _keep_rows(module.branch, graft.branch)
        return graft.train(module.training)

    @staticmethod
    def _init_layer(graft: Any, module: Any) -> None:
        """Run the layer's own constructor on `graft`, for a layer of the shape of `module`."""
        raise NotImplementedError

    @staticmethod
    def _features(module: Any) -> tuple[int, int]:
        """Widths of input and output."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return cast(Tensor, self.replaced.forward(self, x) + self.branch(x))

    def roles(self, replaced: Roles) -> Roles:
        """Keys read what the layer reads, values write what it writes; tokens are no stream."""
        own = dict(super().roles(replaced))
        if (weight := replaced.get("weight")) is not None:
            output, read = self.axes
            own |= {"branch.key_tokens": weight.beside(read, 1), "branch.value_tokens": weight.beside(output, 1)}
        return own

    def scaled(self, factor: float, plain: Mapping[str, float]) -> dict[str, float]:
        """The layer and its branch."""
        branch = {f"branch.{name}": value for name, value in self.branch.scaled(factor, {}).items()}
        return {**super().scaled(factor, plain), **branch}


@brick("grafted_linear")
class GraftedLinear(Grafted, nn.Linear):
    """An `nn.Linear` with a branch: `weight` (out_features, in_features), `bias` (out_features,) or None,
    `branch.key_tokens` (n, in_features) and `branch.value_tokens` (n, out_features).

    Args:
        in_features, out_features, bias: as of `nn.Linear`.
        tokens: parameter tokens of each group, oldest first.
        device, dtype: of all parameters.
        settings: see `Grafted.replacing`.
    """

    layer = nn.Linear
    axes = (0, 1)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tokens: Sequence[int],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self.replaced = nn.Linear
        self.branch = Branch(in_features, out_features, tokens, device=device, dtype=dtype, **settings)

    @staticmethod
    def _init_layer(graft: Any, module: Any) -> None:
        nn.Linear.__init__(graft, module.in_features, module.out_features, module.bias is not None)

    @staticmethod
    def _features(module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features


@brick("grafted_conv1d")
class GraftedConv1D(Grafted, Conv1D):
    """A `transformers.pytorch_utils.Conv1D` (GPT-2's linear layer) with a branch: `weight` (nx, nf), `bias` (nf,),
    `branch.key_tokens` (n, nx) and `branch.value_tokens` (n, nf).

    Args:
        nf, nx: widths of output and input, in this order as of `Conv1D`.
        tokens: parameter tokens of each group, oldest first.
        settings: see `Grafted.replacing`.
    """

    layer = Conv1D
    axes = (1, 0)

    def __init__(self, nf: int, nx: int, tokens: Sequence[int], **settings: Any) -> None:
        Conv1D.__init__(self, nf, nx)
        self.replaced = Conv1D
        self.branch = Branch(nx, nf, tokens, device=self.weight.device, dtype=self.weight.dtype, **settings)

    @staticmethod
    def _init_layer(graft: Any, module: Any) -> None:
        Conv1D.__init__(graft, module.nf, module.nx)

    @staticmethod
    def _features(module: Any) -> tuple[int, int]:
        return module.nx, module.nf

    def __repr__(self) -> str:
        # That of Conv1D shows no modules inside.
        return nn.Module.__repr__(self)

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}"


@torch.no_grad()
def _keep_rows(old: Branch, new: Branch) -> None:
    """Put the tokens of `old` in front of those of `new`; the same parameters where their number is the same."""
    if old.key_tokens.shape == new.key_tokens.shape:
        new.key_tokens, new.value_tokens = old.key_tokens, old.value_tokens
        return
    for name in ("key_tokens", "value_tokens"):
        kept, parameter = getattr(old, name), getattr(new, name)
        rows = min(len(kept), len(parameter))
        parameter[:rows].copy_(kept[:rows])
        parameter.requires_grad_(kept.requires_grad)
