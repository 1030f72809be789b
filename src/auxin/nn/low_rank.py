"""Linear layers of low rank: W (out, in) ~ A B, with A (out, rank) and B (rank, in).

By Eckart and Young's theorem the first singular vectors make the best A B of a rank, in the sum of squares. The
singular values go to both factors alike, as square roots, so that both have gradients of one size. A layer of rank r
has r (in + out) parameters instead of in * out, and as many multiply-adds per token: it pays below
in * out / (in + out). The table of an embedding (`auxin.nn.low_rank_embedding`) is such a W with a row for every token,
(tokens, width).

Factors that are to be trained from the start are drawn instead, so that the product has entries of the size that the
weight's have: the product's variance is rank times those of the factors, which are alike.

Moments go by the chain rule, as everywhere. With G the gradient of W, the factors' are G B^T and A^T G; a second moment
takes the squares of the same factors.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from auxin.errors import PlanError
from auxin.nn.bricks import Brick, Making, Roles, Shapes, Tensors, brick
from auxin.nn.guide import KEPT, Kept, kept, kept_product
from auxin.nn.linear import linear_class
from auxin.nn.made import take_over
from auxin.nn.unmultiplied import unmultiplied
from auxin.words.roles import ParameterRole

WEIGHT, OUTPUT, INPUT = "weight", "output_factor", "input_factor"
Start = Literal["weight", "random", Kept]
"""What factors are made of: the weight, random numbers of its size, or those that a guide leaves (`auxin.nn.guide`)."""


def signs(vectors: Tensor) -> Tensor:
    """Of columns, (columns,): that of their largest entry. Times it, vectors that are known but for their sign do not
    depend on the machine's choice."""
    return vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign().squeeze(0)


def finite_weight(weight: Tensor) -> tuple[Tensor, torch.dtype]:
    """A weight in float64, and its own type.

    Raises:
        PlanError: it holds other than finite floating-point numbers.
    """
    if not weight.dtype.is_floating_point or not weight.isfinite().all():
        raise PlanError(
            f"a weight ({weight.dtype}) that holds other than finite floating-point numbers has no layer of low rank; "
            "dequantize it, or mend what is NaN or infinite in it"
        )
    return weight.double(), weight.dtype


def halves(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of the truncated singular value decomposition of a weight (out, in) in float64. Of each pair of singular
    vectors that with the largest entry of the first positive is taken, so that the result does not depend on the
    machine's choice."""
    left, roots, right = torch.linalg.svd(weight, full_matrices=False)
    left, roots, right = left[:, :rank], roots[:rank].sqrt(), right[:rank]
    roots = roots * signs(left)
    return left * roots, roots[:, None] * right


def moments_of_halves(moment: Tensor, output: Tensor, given: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """The moments of A and B by the chain rule, out of the weight's (out, in) in float64."""
    return moment @ (given**order).mT, (output**order).mT @ moment


def moment_of_product(output: Tensor, given: Tensor, of_output: Tensor, of_input: Tensor, order: int) -> Tensor:
    """As much of the moment of A B, in float64, as the factors' moments tell.

    First: of all G with G B^T and A^T G as they are the smallest; what lies beside both factors is not known, and 0.
    Second: the moment of rank one that has the same sums over rows and columns, weighted as the factors are; exact
    where the weight's moment has rank one, as in Adafactor (arXiv 1804.04235).
    """
    # Directions in which a factor is as good as 0 tell nothing but the moments' rounding.
    least = torch.finfo(of_output.dtype).eps ** 0.5
    output, given, of_output, of_input = (tensor.double() for tensor in (output, given, of_output, of_input))
    if order == 1:
        by_input, by_output = (torch.linalg.pinv(factor, rtol=least).mT for factor in (given, output))
        from_output, from_input = of_output @ by_input, by_output @ of_input
        known_twice = by_output @ (output.mT @ from_output) + (from_input @ given.mT) @ by_input
        return from_output + from_input - known_twice / 2
    rows, columns = of_output.sum(1), of_input.sum(0)
    total = (output.square().sum(1) @ rows + given.square().sum(0) @ columns) / 2
    return torch.outer(rows, columns) / total.clamp(min=torch.finfo(total.dtype).tiny)


class LowRankMaking(Making):
    """Both factors out of the weight, and the weight out of both.

    Out of a layer of low rank, whose rank changes, as if it were the product.

    Args:
        transposed: whether the weight is (in, out), as of a Conv1D.
    """

    def __init__(self, transposed: bool = False) -> None:
        self.transposed = transposed

    def shapes(self, old: Shapes, rank: int, start: Start = "weight") -> Shapes:  # type: ignore[override]
        """Those of `output_factor` (out, rank) and `input_factor` (rank, in); none where they have that rank already.

        Raises:
            PlanError: the module has other tensors, or the rank is none of such a matrix.
        """
        if start == KEPT:
            return kept(old)
        outputs, inputs = self.sizes(old)
        _check_rank(rank, outputs, inputs)
        if _has_rank(old, rank) and start == "weight":
            return {}
        return {OUTPUT: (outputs, rank), INPUT: (rank, inputs)}

    def keeps(self, old: Shapes, **settings: Any) -> Collection[str]:
        """The bias."""
        return {"bias"}

    def values(  # type: ignore[override]
        self, old: Tensors, draw: torch.Generator, rank: int, start: Start = "weight"
    ) -> dict[str, Tensor]:
        """Both factors, made of the weight by the singular value decomposition, or drawn.

        Raises:
            PlanError: the weight holds other than finite floating-point numbers.
        """
        if start == KEPT:
            return kept(old)
        shapes = self.shapes({name: tuple(tensor.shape) for name, tensor in old.items()}, rank, start)
        if not shapes:
            return {}
        return self._factors(old, rank) if start == "weight" else self._drawn(old, shapes, draw)

    def _factors(self, old: Tensors, rank: int) -> dict[str, Tensor]:
        """See `halves`."""
        weight, dtype = self._checked(old)
        output, given = halves(weight, rank)
        return {OUTPUT: output.to(dtype), INPUT: given.to(dtype)}

    def _drawn(self, old: Tensors, shapes: Shapes, draw: torch.Generator) -> dict[str, Tensor]:
        """Independent normal numbers; of a weight of zeros an output factor of zeros, so that the other one's gradient
        begins a step later."""
        weight, dtype = self._checked(old)
        size = weight.square().mean().sqrt()
        deviation = {name: (size.square() / shapes[INPUT][0]) ** 0.25 for name in shapes}
        if size == 0:
            deviation = {OUTPUT: size, INPUT: size + shapes[INPUT][1] ** -0.5}
        return {
            name: (torch.randn(shape, generator=draw, dtype=torch.float64).to(size) * deviation[name]).to(dtype)
            for name, shape in shapes.items()
        }

    def _checked(self, old: Tensors) -> tuple[Tensor, torch.dtype]:
        """The whole weight (out, in) in float64, and its own type; PlanError where it has no factors."""
        weight, dtype = finite_weight(old[WEIGHT] if WEIGHT in old else self._matrix(old))
        if WEIGHT in old:
            return self._turned(weight), dtype
        return weight, old[OUTPUT].dtype

    def moments(  # type: ignore[override]
        self, old: Tensors, moments: Tensors, order: int, rank: int, start: Start = "weight"
    ) -> dict[str, Tensor] | None:
        """By the chain rule, at the factors that `values` gives; drawn ones start anew."""
        if start == KEPT:
            return kept(moments)
        if start == "random":
            return None
        if _has_rank({name: tuple(tensor.shape) for name, tensor in old.items()}, rank):
            return {}
        if WEIGHT not in old:
            moments = self.moments_back(old, moments, order) or {}
        if WEIGHT not in moments:
            return None
        dtype, moment = moments[WEIGHT].dtype, self._turned(moments[WEIGHT].double())
        factors = self._factors(old, rank)
        output, given = moments_of_halves(moment, factors[OUTPUT].double(), factors[INPUT].double(), order)
        return {OUTPUT: output.to(dtype), INPUT: given.to(dtype)}

    def back(self, new: Tensors, **settings: Any) -> dict[str, Tensor]:
        """The product, computed in float64."""
        return {WEIGHT: self._turned(self._matrix(new)).to(new[OUTPUT].dtype).contiguous()}

    def moments_back(self, new: Tensors, moments: Tensors, order: int, **settings: Any) -> dict[str, Tensor] | None:
        """See `moment_of_product`."""
        if OUTPUT not in moments or INPUT not in moments:
            return None
        moment = moment_of_product(new[OUTPUT], new[INPUT], moments[OUTPUT], moments[INPUT], order)
        return {WEIGHT: self._turned(moment).to(moments[OUTPUT].dtype).contiguous()}

    def sizes(self, old: Shapes) -> tuple[int, int]:
        """Widths of output and input of the layer with the tensors `old`; PlanError when it is no linear layer."""
        if OUTPUT in old and INPUT in old:
            return old[OUTPUT][0], old[INPUT][1]
        if len(old.get(WEIGHT, ())) != 2:
            raise PlanError(
                f"A layer of low rank replaces a linear layer, whose weight is a matrix; this module has the tensors "
                f"{ {name: list(shape) for name, shape in old.items()} }."
            )
        first, second = old[WEIGHT]
        return (second, first) if self.transposed else (first, second)

    def _matrix(self, old: Tensors) -> Tensor:
        """The whole weight (out, in) in float64."""
        if WEIGHT in old:
            return self._turned(old[WEIGHT].double())
        return old[OUTPUT].double() @ old[INPUT].double()

    def _turned(self, weight: Tensor) -> Tensor:
        """From (out, in) to the weight's own order, or back."""
        return weight.mT if self.transposed else weight


class Product(Brick):
    """What layers share whose weight is a product: the parameters `output_factor`, which gives what the layer does, and
    `input_factor`, and the replaced layer's `bias`, if it has one."""

    plain_form = "merge it back (the edit merge_module); the layer then is a dense one that holds the product"
    input_factor: nn.Parameter
    output_factor: nn.Parameter
    bias: nn.Parameter | None
    _below: int = 0
    _merged: tuple[object, Tensor] | None = None

    @property
    def below(self) -> int:
        """For fewer tokens at once than this the layer multiplies by its product, where nothing is to be learnt."""
        return self._below

    def merge_below(self, tokens: int) -> None:
        """Multiply by the product in place of the factors where there are fewer than `tokens` tokens at once and no
        gradient is wanted; 0 ends it ("pre-merge", arXiv 2406.16450, section 3.1).

        For few tokens one multiplication by a large matrix can take less time than two by smaller ones. The product is
        made at the first such call, and again when a factor has changed or the layer has run with gradients; after
        writes that torch does not count (through `.data`) call this again. It takes the memory of the dense layer
        beside the factors, and is saved with no checkpoint.
        """
        self._below, self._merged = tokens, None

    def merged_for(self, x: Tensor) -> Tensor | None:
        """The product (out, in) where `x`, (..., in), is to be multiplied by it; None where by the factors."""
        if not self._below or torch.compiler.is_compiling():
            return None
        if self.training or torch.is_grad_enabled():
            self._merged = None  # the optimizer's step may come next; a fused one counts no version
            return None
        if x.numel() >= self._below * x.shape[-1]:
            return None
        state = tuple(map(_state, (self.output_factor, self.input_factor)))
        if self._merged is None or self._merged[0] != state:
            self._merged = state, self.product().to(self.output_factor.dtype)
        return self._merged[1]

    def product(self) -> Tensor:
        """What both factors come to, (out, in), in float64."""
        raise NotImplementedError

    def scaled(self, factor: float, plain: Mapping[str, float]) -> dict[str, float]:
        """The output factor and the bias, where the layer adds to the residual stream."""
        names = (OUTPUT, *(() if self.bias is None else ("bias",))) if plain else ()
        return dict.fromkeys(names, factor)


class LowRank(Product):
    """What both kinds of layers are: x -> (x B^T) A^T + bias.

    Parameters `input_factor` B (rank, in), `output_factor` A (out, rank), and the replaced layer's `bias` (out,), if it
    has one.
    """

    layer: ClassVar[type[nn.Module]]
    """The class that it replaces."""
    making: ClassVar[LowRankMaking]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_rank(rank, out_features, in_features)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.input_factor = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.output_factor = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def replacing(cls, module: nn.Module, rank: int, start: Start = "weight") -> Self:
        """The layer of low rank for `module`, filled from it where it has values.

        Args:
            module: an `nn.Linear` (for LowRankLinear), a `Conv1D` (for LowRankConv1D) or an `nn.Embedding` (for
                LowRankEmbedding), or one of a subclass that computes the same, also on the meta device; or such a
                layer of low rank, which gets another rank.
            rank: from 1 to the smaller of its widths, with which it is the same function.
            start: what the factors are made of: "weight", or "random" numbers, by which the bias alone is kept.

        Raises:
            PlanError: the module is of another class, or the rank is none of its.
        """
        if start == KEPT:
            return kept_product(module, cls)
        if type(module) is not cls and not cls.can_replace(module):
            raise PlanError(
                f"{cls.__name__} replaces a {cls.layer.__name__}, received a {type(module).__name__}, which does "
                "something of its own. Factorize another layer, or take off what was put around this one."
            )
        shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        outputs, inputs = cls.making.sizes(shapes)
        new = cls._for(module, outputs, inputs, rank)
        take_over(new, module, cls.making, rank=rank, start=start)
        return new.train(module.training)

    @classmethod
    def can_replace(cls, module: nn.Module) -> bool:
        """Whether `module` is what it stands in for, whatever its class is called."""
        return linear_class(module) is cls.layer

    @classmethod
    def _for(cls, module: nn.Module, outputs: int, inputs: int, rank: int) -> Self:
        """An unfilled one in the place of `module`, on its device and in its type."""
        example = next(module.parameters())
        return cls(inputs, outputs, rank, "bias" in dict(module.named_parameters()), example.device, example.dtype)

    @property
    def weight(self) -> Tensor:
        """The product A B, in the replaced layer's order, for whoever reads a layer's weight without calling it.

        It is multiplied when something is computed with it. Its type, shape and device, which T5 asks for on every
        call, cost nothing.
        """
        return unmultiplied(self.output_factor, self.input_factor, self.making.transposed)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if (product := self.merged_for(x)) is not None:
            return F.linear(x, product, self.bias)
        return F.linear(F.linear(x, self.input_factor), self.output_factor, self.bias)

    def product(self) -> Tensor:
        """A B."""
        return self.output_factor.detach().double() @ self.input_factor.detach().double()

    def roles(self, replaced: Roles) -> Roles:
        """One factor writes what the weight wrote, the other reads what it read."""
        if WEIGHT not in replaced:
            return {}
        whole = replaced[WEIGHT]
        sides = list(zip(whole.axes, whole.access, strict=True))
        written, read = reversed(sides) if self.making.transposed else sides

        path = whole.pattern.removesuffix(WEIGHT)
        return {
            OUTPUT: ParameterRole(path + OUTPUT, (written[0], ()), (written[1], None), whole.kind),
            INPUT: ParameterRole(path + INPUT, ((), read[0]), (None, read[1]), "matrix"),
        }

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


@brick("low_rank_linear")
class LowRankLinear(LowRank):
    """An `nn.Linear` of low rank.

    Args:
        in_features, out_features, bias, device, dtype: as of `nn.Linear`; the parameters are not filled.
        rank: from 1 to the smaller of the widths.
    """

    layer = nn.Linear
    making = LowRankMaking()
    pre_merges = True


@brick("low_rank_conv1d")
class LowRankConv1D(LowRank):
    """A `transformers.pytorch_utils.Conv1D` (GPT-2's linear layer) of low rank; see `LowRankLinear`."""

    layer = Conv1D
    making = LowRankMaking(transposed=True)
    pre_merges = True

    @property
    def nf(self) -> int:
        """Conv1D's name for the width of the output."""
        return self.out_features

    @property
    def nx(self) -> int:
        """Conv1D's name for the width of the input."""
        return self.in_features


def _state(factor: Tensor) -> tuple[object, ...]:
    """What is another after the factor was changed, moved or cast."""
    version = None if factor.is_inference() else factor._version
    return id(factor), version, factor.data_ptr(), factor.dtype, factor.device


def _has_rank(old: Shapes, rank: int) -> bool:
    """Whether these are the tensors of a layer of that rank already."""
    return OUTPUT in old and old[OUTPUT][1] == rank


def _check_rank(rank: int, outputs: int, inputs: int) -> None:
    if not 1 <= rank <= min(outputs, inputs):
        raise PlanError(
            f"rank {rank} is none of a matrix of {outputs} x {inputs}; give 1 to {min(outputs, inputs)}. Below "
            f"{math.ceil(outputs * inputs / (outputs + inputs))} it has fewer parameters than the whole matrix."
        )
