"""Which modules are linear layers, y = W x + b of their weight and bias, whatever their class is called."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from auxin.nn.bricks import Brick

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, Conv1D)
"""The classes of linear layers; that of GPT-2 keeps its weight as (in, out)."""

_TRIED: dict[type[nn.Module], bool] = {}
"""Of the subclasses seen so far whether they compute the same."""


def linear_class(module: nn.Module) -> type[nn.Module] | None:
    """The class of `LAYERS` that `module` is, or that it is a subclass of and computes the same as; None for others.

    A subclass counts where it has a forward of its own, which whoever uses it calls (Falcon's FalconLinear), nothing
    beside weight and bias, and where a small layer of it gives what its base class gives. One that leaves forward
    alone has another reason to be: the weight of that in `nn.MultiheadAttention` is read without a call.
    """
    if type(module) in LAYERS:
        return type(module)
    base = next((layer for layer in LAYERS if isinstance(module, layer)), None)
    if base is None or isinstance(module, Brick) or not _same(type(module), base):
        return None
    return base if _attributes(module) <= _attributes(_small(base, True)) else None


def known_class(layer: nn.Module) -> type[nn.Module]:
    """The `linear_class` of a module that is known to have one."""
    found = linear_class(layer)
    assert found is not None
    return found


def widths(layer: nn.Module) -> tuple[int, int]:
    """Of the input and of the output of a linear layer."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]


def with_bias(output: Tensor, bias: Tensor | None) -> Tensor:
    """`output` plus `bias`, in the type of `output`: that of a linear layer's, under autocast, too."""
    return output if bias is None else output + bias.to(output.dtype)


def _attributes(module: nn.Module) -> set[str]:
    return {name for name in vars(module) if not name.startswith("_")}


def _same(cls: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether small layers of `cls` compute what those of `base` compute with the same weight and bias."""
    if cls not in _TRIED:
        _TRIED[cls] = _tried(cls, base)
    return _TRIED[cls]


def _tried(cls: type[nn.Module], base: type[nn.Module]) -> bool:
    if cls.forward is base.forward:
        return False
    try:
        pairs = [(_small(cls, bias), _small(base, bias)) for bias in ((True, False) if base is nn.Linear else (True,))]
        return all(_gives(layer, like) for layer, like in pairs)
    except Exception:  # whatever a class of somebody's does that is no linear layer
        return False


def _small(cls: type[nn.Module], bias: bool) -> nn.Module:
    """A layer of two outputs and three inputs, without data."""
    with torch.device("meta"):
        return cls(3, 2, bias=bias) if issubclass(cls, nn.Linear) else cls(2, 3)


@torch.no_grad()
def _filled(layer: nn.Module) -> nn.Module:
    """The layer in float64, with numbers that all differ."""
    layer = layer.to_empty(device="cpu").double()
    for number, parameter in enumerate(layer.parameters(), 1):
        values = torch.arange(1, parameter.numel() + 1, dtype=torch.float64, device="cpu").sqrt()
        parameter.copy_(values.view(parameter.shape) - number)
    return layer


@torch.no_grad()
def _gives(layer: nn.Module, like: nn.Module) -> bool:
    """Whether `layer` has what `like` has, and gives what it gives, in training and evaluation mode."""
    x = torch.linspace(-2, 3, 12, dtype=torch.float64, device="cpu").view(2, 2, 3)
    if [name for name, _ in layer.named_parameters()] != [name for name, _ in like.named_parameters()]:
        return False
    if any(True for _ in layer.buffers()) or any(True for _ in layer.children()):
        return False
    layer, like = _filled(layer), _filled(like)
    return all(torch.allclose(layer.train(mode)(x), like(x), rtol=1e-12, atol=1e-12) for mode in (True, False))
