"""Linear layers as products in which one factor, or both, are block diagonal ("Building on Efficient Foundations", Wei
et al. 2024, arXiv 2406.16450): W (out, in) ~ A B with

* BlockDense: B has `blocks` blocks, each of which reads a stretch of the input; A is a whole matrix;
* BlockShuffle: both have `blocks` blocks. Block l of A reads the inner units j with j mod blocks = l and writes the
  outputs l, l + blocks, ...; between the two the inner units, min(in, out) of them, are dealt out. This is the Monarch
  matrix of Dao et al. 2022 (arXiv 2204.00595).

Both are several products of low rank side by side, each a piece of W: BlockDense an own one for every stretch of the
input, W[:, stretch]; BlockShuffle one for every W[l::blocks, stretch]. So the product that is nearest to a W, in the
sum of squares, has a closed form: the truncated singular value decomposition of each piece. Moments follow piece by
piece by the chain rule, as those of `auxin.nn.low_rank` do.

Drawn for a training from the start, every block (and the whole A of BlockDense) has orthonormal rows or columns, which
is the paper's initialisation.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from auxin.errors import PlanError
from auxin.nn.bricks import Making, Roles, Shapes, Tensors, brick
from auxin.nn.guide import KEPT, Kept, kept, kept_product
from auxin.nn.linear import linear_class, with_bias
from auxin.nn.low_rank import (
    INPUT,
    OUTPUT,
    WEIGHT,
    Product,
    finite_weight,
    halves,
    moment_of_product,
    moments_of_halves,
)
from auxin.nn.made import take_over
from auxin.nn.unmultiplied import multiplied_when_used
from auxin.words.roles import ParameterRole
from auxin.words.widths import Stream

Start = Literal["weight", "orthogonal", Kept]
"""What factors are made of: the weight, random orthonormal blocks, or those that a guide leaves (`auxin.nn.guide`)."""


@dataclass(frozen=True)
class Piece:
    """A part of W and the parts of both factors whose product it is."""

    rows: slice
    columns: slice
    output: tuple[slice, slice]
    input: slice
    """Rows of the input factor; all its columns count."""


class BlockMaking(Making):
    """Both factors out of the weight, and the weight out of both.

    Args:
        transposed: whether the weight is (in, out), as of a Conv1D.
    """

    def __init__(self, transposed: bool = False) -> None:
        self.transposed = transposed

    def pieces(self, outputs: int, inputs: int, **settings: Any) -> Iterator[Piece]:
        """The pieces of a weight (outputs, inputs)."""
        raise NotImplementedError

    def factor_shapes(self, outputs: int, inputs: int, **settings: Any) -> Shapes:
        """Those of `output_factor` and `input_factor`; PlanError where blocks do not divide the widths."""
        raise NotImplementedError

    def whole_blocks(self, **settings: Any) -> Mapping[str, int]:
        """Into how many blocks each factor is cut, along its rows."""
        raise NotImplementedError

    def shapes(self, old: Shapes, start: Start = "weight", **settings: Any) -> Shapes:
        """Those of both factors.

        Raises:
            PlanError: the module has other tensors, or the settings do not fit its widths.
        """
        if start == KEPT:
            return kept(old)
        return self.factor_shapes(*self.sizes(old), **settings)

    def keeps(self, old: Shapes, **settings: Any) -> Collection[str]:
        """The bias."""
        return {"bias"}

    def values(
        self, old: Tensors, draw: torch.Generator, start: Start = "weight", **settings: Any
    ) -> dict[str, Tensor]:
        """Both factors, made of the weight or drawn.

        Raises:
            PlanError: the weight holds other than finite floating-point numbers.
        """
        if start == KEPT:
            return kept(old)
        weight, dtype = finite_weight(old[WEIGHT])
        if start == "weight":
            factors = self._factors(self._turned(weight), **settings)
        else:
            shapes = self.shapes({WEIGHT: tuple(old[WEIGHT].shape)}, **settings)
            blocks = self.whole_blocks(**settings)
            factors = {name: _orthonormal(shape, blocks[name], draw).to(weight) for name, shape in shapes.items()}
        return {name: factor.to(dtype) for name, factor in factors.items()}

    def moments(
        self, old: Tensors, moments: Tensors, order: int, start: Start = "weight", **settings: Any
    ) -> dict[str, Tensor] | None:
        """By the chain rule, at the factors that `values` gives; drawn ones start anew."""
        if start == KEPT:
            return kept(moments)
        if start == "orthogonal" or WEIGHT not in moments:
            return None
        moment, dtype = self._turned(moments[WEIGHT].double()), moments[WEIGHT].dtype
        factors = self._factors(self._turned(old[WEIGHT].double()), **settings)
        made = {name: torch.zeros_like(factor) for name, factor in factors.items()}
        for piece in self.pieces(*moment.shape, **settings):
            ends = moments_of_halves(
                moment[piece.rows, piece.columns], factors[OUTPUT][piece.output], factors[INPUT][piece.input], order
            )
            made[OUTPUT][piece.output], made[INPUT][piece.input] = ends
        return {name: value.to(dtype) for name, value in made.items()}

    def back(self, new: Tensors, start: Start = "weight", **settings: Any) -> dict[str, Tensor]:
        """The product, computed in float64."""
        return {WEIGHT: self._turned(self.product(new, **settings)).to(new[OUTPUT].dtype).contiguous()}

    def product(self, new: Tensors, **settings: Any) -> Tensor:
        """What both factors come to, (out, in), in float64."""
        output, given = new[OUTPUT].double(), new[INPUT].double()
        weight = self._empty(new, **settings)
        for piece in self.pieces(*weight.shape, **settings):
            weight[piece.rows, piece.columns] = output[piece.output] @ given[piece.input]
        return weight

    def moments_back(
        self, new: Tensors, moments: Tensors, order: int, start: Start = "weight", **settings: Any
    ) -> dict[str, Tensor] | None:
        """Piece by piece, as of a layer of low rank."""
        if OUTPUT not in moments or INPUT not in moments:
            return None
        moment = self._empty(new, **settings)
        for piece in self.pieces(*moment.shape, **settings):
            moment[piece.rows, piece.columns] = moment_of_product(
                new[OUTPUT][piece.output],
                new[INPUT][piece.input],
                moments[OUTPUT][piece.output],
                moments[INPUT][piece.input],
                order,
            )
        return {WEIGHT: self._turned(moment).to(moments[OUTPUT].dtype).contiguous()}

    def sizes(self, old: Shapes) -> tuple[int, int]:
        """Widths of output and input of the layer with the tensors `old`; PlanError when it is no linear layer."""
        if len(old.get(WEIGHT, ())) != 2:
            raise PlanError(
                f"A product of blocks replaces a linear layer, whose weight is a matrix; this module has the tensors "
                f"{ {name: list(shape) for name, shape in old.items()} }. Merge back what is there first."
            )
        first, second = old[WEIGHT]
        return (second, first) if self.transposed else (first, second)

    def _factors(self, weight: Tensor, **settings: Any) -> dict[str, Tensor]:
        """Of a weight (out, in) in float64."""
        shapes = self.factor_shapes(*weight.shape, **settings)
        factors = {name: weight.new_empty(shape) for name, shape in shapes.items()}
        for piece in self.pieces(*weight.shape, **settings):
            rank = factors[INPUT][piece.input].shape[0]
            factors[OUTPUT][piece.output], factors[INPUT][piece.input] = halves(weight[piece.rows, piece.columns], rank)
        return factors

    def _empty(self, new: Tensors, **settings: Any) -> Tensor:
        """Zeros (out, in) in float64 for what the factors `new` are made of."""
        outputs, inputs = self.widths({name: tuple(value.shape) for name, value in new.items()}, **settings)
        return new[OUTPUT].new_zeros(outputs, inputs, dtype=torch.float64)

    def widths(self, new: Shapes, **settings: Any) -> tuple[int, int]:
        """Widths of output and input of the layer with the factors `new`."""
        return new[OUTPUT][0], new[INPUT][1] * settings["blocks"]

    def _turned(self, weight: Tensor) -> Tensor:
        """From (out, in) to the weight's own order, or back."""
        return weight.mT if self.transposed else weight


class BlockDenseMaking(BlockMaking):
    """A whole output factor (out, rank), and an input factor (rank, in / blocks) of `blocks` blocks along its rows."""

    def factor_shapes(self, outputs: int, inputs: int, **settings: Any) -> Shapes:
        """See the class."""
        blocks, rank = settings["blocks"], settings["rank"]
        _refuse_blocks(blocks, {"inputs": inputs, "rank": rank})
        most = min(outputs, inputs // blocks) * blocks
        if not blocks <= rank <= most:
            raise PlanError(f"rank {rank}: give {blocks} to {most} for a matrix of {outputs} x {inputs}.")
        return {OUTPUT: (outputs, rank), INPUT: (rank, inputs // blocks)}

    def pieces(self, outputs: int, inputs: int, **settings: Any) -> Iterator[Piece]:
        """One for every block."""
        width, rank = inputs // settings["blocks"], settings["rank"] // settings["blocks"]
        for block in range(settings["blocks"]):
            inner = slice(block * rank, (block + 1) * rank)
            yield Piece(slice(None), slice(block * width, (block + 1) * width), (slice(None), inner), inner)

    def whole_blocks(self, **settings: Any) -> Mapping[str, int]:
        """One, and `blocks`."""
        return {OUTPUT: 1, INPUT: settings["blocks"]}


class BlockShuffleMaking(BlockMaking):
    """Both factors of `blocks` blocks along their rows: (out, inner / blocks) and (inner, in / blocks), where inner is
    the smaller width."""

    def factor_shapes(self, outputs: int, inputs: int, **settings: Any) -> Shapes:
        """See the class."""
        blocks, inner = settings["blocks"], min(inputs, outputs)
        _refuse_blocks(blocks, {"inputs": inputs, "outputs": outputs})
        if inner % blocks**2:
            raise PlanError(
                f"blocks = {blocks}: the {inner} inner units must be dealt out evenly, for which they have to be a "
                f"multiple of {blocks**2}. Give {_nearest(inner, lambda b: inner % b**2 == 0, blocks)}."
            )
        return {OUTPUT: (outputs, inner // blocks), INPUT: (inner, inputs // blocks)}

    def pieces(self, outputs: int, inputs: int, **settings: Any) -> Iterator[Piece]:
        """One for every pair of a stretch of the input and a residue of the output."""
        blocks, inner = settings["blocks"], min(inputs, outputs)
        per_block, rank = inner // blocks, inner // blocks**2
        for place in range(blocks):
            own = slice(place * outputs // blocks, (place + 1) * outputs // blocks)
            for block in range(blocks):
                columns = slice(block * inputs // blocks, (block + 1) * inputs // blocks)
                read = (own, slice(block * rank, (block + 1) * rank))
                written = slice(block * per_block + place, (block + 1) * per_block, blocks)
                yield Piece(slice(place, None, blocks), columns, read, written)

    def whole_blocks(self, **settings: Any) -> Mapping[str, int]:
        """`blocks` each."""
        return dict.fromkeys((OUTPUT, INPUT), settings["blocks"])


class BlockProduct(Product):
    """What products of blocks are: x -> A (B x) + bias.

    Parameters `input_factor` B and `output_factor` A, whose blocks stand one below the other, and the replaced layer's
    `bias` (out,), if it has one.
    """

    layer: ClassVar[type[nn.Module]]
    """The class that it replaces."""
    making: ClassVar[BlockMaking]
    pre_merges = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: int,
    ) -> None:
        super().__init__()
        shapes = self.making.factor_shapes(out_features, in_features, **settings)
        self.in_features, self.out_features, self.settings = in_features, out_features, settings
        self.blocks = settings["blocks"]
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def replacing(cls, module: nn.Module, start: Start = "weight", **settings: Any) -> Self:
        """The product of blocks for `module`, filled from it where it has values.

        Args:
            module: an `nn.Linear` or `Conv1D` (as the class says), or a subclass that computes the same, also on the
                meta device; or a guide, whose product stays.
            start: what the factors are made of.
            settings: `blocks`, and of BlockDense `rank`.

        Raises:
            PlanError: the module is of another class, or blocks or rank do not fit its widths.
        """
        if start == KEPT:
            return kept_product(module, cls)
        if linear_class(module) is not cls.layer:
            raise PlanError(
                f"{cls.__name__} replaces a {cls.layer.__name__}, received a {type(module).__name__}, which does "
                "something of its own. Choose another layer, or take off what was put around this one."
            )
        outputs, inputs = cls.making.sizes({name: tuple(value.shape) for name, value in module.state_dict().items()})
        weight, bias = module.get_parameter(WEIGHT), "bias" in dict(module.named_parameters())
        new = cls(inputs, outputs, bias, weight.device, weight.dtype, **settings)
        take_over(new, module, cls.making, start=start, **settings)
        return new.train(module.training)

    @property
    def weight(self) -> Tensor:
        """The product, in the replaced layer's order, for whoever reads a layer's weight without calling it; multiplied
        when something is computed with it, as that of a layer of low rank."""
        sizes = (self.out_features, self.in_features)
        return multiplied_when_used(
            sizes[::-1] if self.making.transposed else sizes,
            self.output_factor,
            lambda: self.making.back(dict(self.named_parameters()), start="weight", **self.settings)[WEIGHT],
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if (product := self.merged_for(x)) is not None:
            return with_bias(F.linear(x, product), self.bias)
        tokens = x.reshape(-1, self.in_features)
        output = self._second(self._first(tokens)).reshape(*x.shape[:-1], self.out_features)
        return with_bias(output, self.bias)

    def product(self) -> Tensor:
        """Piece by piece."""
        return self.making.product({name: value.detach() for name, value in self.named_parameters()}, **self.settings)

    def _first(self, tokens: Tensor) -> Tensor:
        """(tokens, in) -> (blocks, tokens, inner / blocks)."""
        factor = self.input_factor.unflatten(0, (self.blocks, -1))
        return torch.bmm(tokens.unflatten(1, (self.blocks, -1)).transpose(0, 1), factor.mT)

    def _second(self, inner: Tensor) -> Tensor:
        """(blocks, tokens, inner / blocks) -> (tokens, out)."""
        raise NotImplementedError

    def roles(self, replaced: Roles) -> Roles:
        """Factors whose axes run along blocks, and so along no stream as a whole."""
        if WEIGHT not in replaced:
            return {}
        path = replaced[WEIGHT].pattern.removesuffix(WEIGHT)
        return {name: ParameterRole(path + name, ((), ()), (None, None), "matrix") for name in (OUTPUT, INPUT)}

    def fixed_widths(self) -> Mapping[Stream, str]:
        """All: blocks have sizes of their own."""
        return dict.fromkeys(
            get_args(Stream),
            "the model has layers that are products of blocks, whose sizes do not follow from a width alone. Merge "
            "them back (merge_module) first.",
        )

    def extra_repr(self) -> str:
        settings = "".join(f", {name}={value}" for name, value in self.settings.items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}{settings}, bias={self.bias is not None}"
        )


class BlockDense(BlockProduct):
    """See the module.

    Args:
        in_features, out_features, bias, device, dtype: as of `nn.Linear`; the parameters are not filled.
        settings: `blocks`, by which input and rank can be divided, and `rank`, the number of inner units.
    """

    def _second(self, inner: Tensor) -> Tensor:
        return F.linear(inner.transpose(0, 1).flatten(1), self.output_factor)


class BlockShuffle(BlockProduct):
    """See the module.

    Args:
        in_features, out_features, bias, device, dtype: as of `nn.Linear`; the parameters are not filled.
        settings: `blocks`, by which both widths can be divided, and the smaller one twice.
    """

    def _second(self, inner: Tensor) -> Tensor:
        # Unit j of all inner ones goes to block j mod blocks.
        dealt = inner.transpose(0, 1).flatten(1).unflatten(1, (-1, self.blocks)).permute(2, 0, 1)
        written = torch.bmm(dealt, self.output_factor.unflatten(0, (self.blocks, -1)).mT)
        return written.permute(1, 2, 0).flatten(1)


@brick("block_dense_linear")
class BlockDenseLinear(BlockDense):
    """An `nn.Linear` whose weight is of the form BlockDense."""

    layer = nn.Linear
    making = BlockDenseMaking()


@brick("block_dense_conv1d")
class BlockDenseConv1D(BlockDense):
    """A `Conv1D` (GPT-2's linear layer) whose weight is of the form BlockDense."""

    layer = Conv1D
    making = BlockDenseMaking(transposed=True)


@brick("block_shuffle_linear")
class BlockShuffleLinear(BlockShuffle):
    """An `nn.Linear` whose weight is of the form BlockShuffle."""

    layer = nn.Linear
    making = BlockShuffleMaking()


@brick("block_shuffle_conv1d")
class BlockShuffleConv1D(BlockShuffle):
    """A `Conv1D` (GPT-2's linear layer) whose weight is of the form BlockShuffle."""

    layer = Conv1D
    making = BlockShuffleMaking(transposed=True)


def _orthonormal(shape: tuple[int, ...], blocks: int, draw: torch.Generator) -> Tensor:
    """(rows, columns) in float64, whose blocks of rows have orthonormal rows or columns, whichever are fewer: U V^T of
    a normal matrix's singular value decomposition."""
    drawn = torch.randn(blocks, shape[0] // blocks, shape[1], generator=draw, dtype=torch.float64)
    left, _, right = torch.linalg.svd(drawn, full_matrices=False)
    return (left @ right).flatten(0, 1)


def _refuse_blocks(blocks: int, divided: Mapping[str, int]) -> None:
    """PlanError where one of the numbers can't be divided by `blocks`."""
    common = math.gcd(*divided.values())
    for name, size in divided.items():
        if blocks < 1 or size % blocks:
            raise PlanError(
                f"blocks = {blocks} does not divide the {name}, {size}. Give "
                f"{_nearest(common, lambda b: common % b == 0, blocks)}."
            )


def _nearest(most: int, fits: Any, wanted: int) -> int:
    """The number of blocks nearest to `wanted` that fits."""
    return min((b for b in range(1, most + 1) if fits(b)), key=lambda b: abs(b - wanted))
