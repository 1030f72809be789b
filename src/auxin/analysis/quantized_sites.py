"""Which tensors of a run integer arithmetic holds, and what operations do to them.

Where a product reads two operands, these have to be integers, and what it gives is stored as integers again. So the
tensors that are told are (Bondarenko et al. 2023, arXiv 2306.12929)

| family | the tensors |
|---|---|
| linear | what a linear layer, a convolution, an expert gives, behind its bias and activation function |
| norm | what a norm gives |
| embedding | the sum of the embeddings |
| scores | the product of queries and keys, before the mask |
| probabilities | the attention's probabilities |
| context | their product with the values |
| sum | the residual stream behind each part's addition |
| input | what a product or a layer reads that is none of these |

An activation function belongs to the linear layer before it where it reads all of that and nothing comes between. BERT
and OPT have nothing in `input`; it is rotated queries and keys, what the two halves of a gated feed-forward part give
together, pixels. The output head and gates (routers, weights of a single row) compute in floating point. Moving
entries about, and multiplying all of a tensor by one number, leaves it on its grid.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

Family = Literal["linear", "norm", "embedding", "scores", "probabilities", "context", "sum", "input"]
aten = torch.ops.aten
PRODUCTS = {
    aten.mm: (0, 1),
    aten.bmm: (0, 1),
    aten.mv: (0, 1),
    aten.addmm: (1, 2),
    aten.baddbmm: (1, 2),
    aten.addmv: (1, 2),
    aten.convolution: (0, 1),
    aten._grouped_mm: (0, 1),
}
"""Where the operands are."""
MOVES = {
    *(aten.view, aten._unsafe_view, aten._reshape_alias, aten.expand, aten.t, aten.transpose, aten.permute),
    *(aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.unbind, aten.unsqueeze, aten.squeeze),
    *(aten.clone, aten._to_copy, aten.alias, aten.detach, aten.lift_fresh, aten.as_strided, aten.unfold),
    *(aten.cat, aten.stack, aten.index, aten.index_select, aten.gather, aten.roll, aten.flip, aten.repeat),
    *(aten.constant_pad_nd, aten.diagonal),
}
"""What moves entries, or writes zeros beside them."""
SCALES = {aten.mul, aten.mul_, aten.div, aten.div_, aten.neg}
ACTIVATIONS = {
    *(aten.relu, aten.relu_, aten.gelu, aten.silu, aten.silu_, aten.tanh, aten.tanh_, aten.sigmoid, aten.sigmoid_),
    *(aten.elu, aten.elu_, aten.leaky_relu, aten.leaky_relu_, aten.hardtanh, aten.hardtanh_, aten.softplus),
    *(aten.hardswish, aten.hardswish_, aten.mish),
}
CLIPS = {aten.clamp, aten.add, aten.add_, aten.mul, aten.mul_}
"""What, with numbers alone, makes other probabilities of a softmax's: clipped ones."""
SUMMANDS = ("linear", "norm", "sum", "embedding", "input")
FUSED = "_scaled_dot_product"
"""What the names of kernels begin with that compute a whole attention."""


@dataclass(frozen=True)
class Site:
    """A tensor that arises in every run."""

    name: str
    """The module or parameter that gives it, or where it arises."""
    family: Family


Change = Callable[[Site, Tensor], Tensor]
"""What is made of a tensor; itself, where nothing is."""


@dataclass(frozen=True)
class Mark:
    """What is known of a tensor in a run."""

    weight: str = ""
    """The parameter that it is, or that it was made of."""
    plain: bool = True
    """Whether it is that parameter, or some of its entries, as they are."""
    hidden: bool = False
    """Whether it depends on the model's inputs."""
    grid: bool = False
    """Whether it is on a grid."""
    pending: tuple[str, int] | None = None
    """The site's stage that it is all of."""
    embedding: bool = False
    """Whether it is made of embeddings alone."""
    part: str = ""
    """The part of a layer that gave it, up to factors."""
    family: Family | Literal[""] = ""
    """Of the site that it was, or is some of."""
    probabilities: tuple[str, int] | None = None
    """The softmax that gave it."""


@dataclass
class Structure:
    """What one run of the model tells about all others."""

    passed_on: set[tuple[str, int]] = field(default_factory=set)
    """Stages of sites that are not stored: something that belongs to them is computed of them at once."""
    read: set[tuple[str, int]] = field(default_factory=set)
    """Softmaxes that a product reads."""


NOTHING = Mark()
"""That of a tensor of which nothing is known."""


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors of nested lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def by_one_number(args: Any) -> bool:
    """Whether all but one of the factors are single numbers."""
    return sum(isinstance(x, Tensor) and x.numel() > 1 for x in args) <= 1 and len(args) <= 2


def kind_of(module: nn.Module) -> Literal["norm", "activation", ""]:
    """What a module is that computes as one, whatever operations it is made of; empty: none of these."""
    if next(module.children(), None) is not None:
        return ""
    cls = type(module)
    if "Norm" in cls.__name__:
        return "norm"
    in_place = cls.__module__ in ("transformers.activations", "torch.nn.modules.activation")
    if (in_place and "Softmax" not in cls.__name__) or "gelu" in cls.__name__.lower():
        return "activation"
    return ""
