"""Linear layers as products of two smaller ones (Greenformers, Cahyawijaya 2021, arXiv 2108.10808; the layers are those
of the Low-Rank Transformer, Winata et al. 2020, arXiv 1910.13923):

    y = A (B x) + b        W (out, in) ~ A B,   A (out, rank), B (rank, in),

with nothing between the two. A product of rank r has r (in + out) parameters and takes as many multiply-adds for a
token; it saves below the break-even rank in out / (in + out). What A and B are made of:

* `svd`: the nearest product to W, by its singular value decomposition; both factors get the roots of the singular
  values.
* `activations`: the nearest in what the layer gives for samples X, |(W - A B) X|, with C = X X^T (SVD-LLM, Wang et al.
  2024, arXiv 2403.07378; ASVD, Yuan et al. 2023, arXiv 2312.05821). Each token is divided by its length, so that a few
  that are far larger than the others, which trained models have, do not count for all. With C = R R^T and the left
  singular vectors U of W R, the best one is A B = U_r U_r^T W: no R has to be inverted. A hundredth of the mean of C's
  diagonal is added to it (GPTQ's damping, arXiv 2210.17323), so that directions that no sample has count a little.
* `random`: numbers of the size of W's, for a model that is to be trained from the start. Biases are kept.

Ranks are one share of the break-even rank or one number for all layers (the paper's rule), as small as keeps a share of
the sum of squares, or divided among layers so that a target is met: see `auxin.planning.ranks`.

Not as in the paper's code: singular values go to both factors, and the decomposition is exact; a bias stays with random
factors; ranks at which nothing is saved are told by all parameters, a convolution's kernel among them; layers that are
direct children of the model and heads are left alone by a rule that is written down (`targets`), and not by how the
code walks; convolutions become products where they are named, and those in groups stay.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, StrictFloat, StrictInt, model_validator
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from auxin.analysis.input_moments import Read, input_moments, read_together
from auxin.edits import Edit, Plan
from auxin.edits.kinds.file_edits import SetParameter
from auxin.edits.kinds.module_edits import ReplaceModule
from auxin.edits.plan_files import PlanFile
from auxin.edits.structure import config_values
from auxin.errors import PlanError, placed
from auxin.nn.linear import known_class, widths
from auxin.nn.low_rank import INPUT, OUTPUT, signs
from auxin.nn.low_rank_convolution import CONVOLUTIONS, refuse_other, window
from auxin.objectives.calibration import CalibrationSettings
from auxin.planning.bench import Bench
from auxin.planning.kept_paths import KeptPaths, is_kept, refuse_impossible
from auxin.planning.linear_layers import linear_layers, merged_paths
from auxin.planning.method import Method
from auxin.planning.product_times import ProductTimes, on_shapes
from auxin.planning.ranks import Matrix, Ranks, after, rank_that_keeps, rounded, steps, steps_alike
from auxin.planning.target import Gauge, Removal, Target, least_removal, removal
from auxin.settings import Settings

NAME = "greenformers"
FACTORS = "factors.safetensors"
BRICKS: dict[type[nn.Module], str] = {
    nn.Linear: "low_rank_linear",
    Conv1D: "low_rank_conv1d",
    **dict.fromkeys(CONVOLUTIONS, "low_rank_convolution"),
}
DAMPING = 0.01
"""What is added to the second moments of inputs, as a share of the mean of their diagonal."""


class Greenformers(Settings):
    """How small the products are: `rank`, `energy` or a `target`; and what they are made of."""

    rank: StrictInt | StrictFloat | None = Field(default=None, gt=0)
    """Of every product: a share of the break-even rank (0.5: about half of the parameters stay), rounded down, or a
    number. Layers in which it would save nothing stay as they are."""
    energy: float | None = Field(default=None, gt=0, lt=1)
    """The share of each layer's sum of squares, of its outputs on samples or of its weight, that is to be kept; the
    rank is the least that does."""
    target: Target | None = None
    """How small the model shall be; ranks are divided among the layers."""
    solver: Literal["activations", "svd", "random"] = "activations"
    """What factors are made of: the weight and samples, the weight alone, or random numbers."""
    targets: list[str] = []
    """The layers, as dotted paths or ends of paths; `*` stands for any one part ("q_proj", "layers.0.mlp.*"). Empty:
    all linear layers inside the layer stacks. Convolutions without groups become products where they are named, with
    the solvers svd and random."""
    keep: KeptPaths = ()
    """Paths of layers or parts that stay as they are, `*` for any one part."""
    multiple_of: Annotated[StrictInt, Field(gt=0)] | Literal["machine"] = 1
    """Ranks are multiples of it, which may suit a machine: `rank` is rounded down to one, what `energy` asks for up.
    "machine": of the least power of 2 up to 64 whose multiples are fast on this one, which some seconds of timing
    tell."""
    measure: bool = False
    """Time layers and products on this machine with 1 to 4,096 tokens at once, a few seconds for each shape, and say
    from how many on products are faster."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in ("rank", "energy", "target") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "give exactly one of rank (0.5, or a number), energy and target, not "
                f"{' and '.join(given) or 'none of them'}."
            )
        if isinstance(self.rank, float) and self.rank >= 1:
            raise ValueError(f"rank = {self.rank} is no share below 1. Give one (0.5), or a whole number.")
        if self.energy is not None and self.solver == "random":
            raise ValueError("energy is told by the weights, and solver = random does not look at them. Give rank.")
        return self


@dataclass(frozen=True)
class Products:
    """The layers of a model that can become products."""

    model: PreTrainedModel
    settings: Greenformers
    layers: Mapping[str, nn.Module]
    """By path."""
    here: bool = True
    """Whether something may be timed."""

    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        """Their shapes."""
        return {path: Matrix(*_sides(layer)) for path, layer in self.layers.items()}

    @cached_property
    def multiple(self) -> int:
        """What ranks are multiples of."""
        asked = self.settings.multiple_of
        if asked != "machine":
            return asked
        if not self.linear:
            raise PlanError("multiple_of: machine: convolutions are not timed. Give a number.")
        largest = max(self.linear, key=lambda path: self.matrices[path].most)
        middle = max(self.matrices[largest].most // 2, 1)
        layer = self.layers[largest]
        return self.times.liked_multiple(lambda rank: _product(layer, rank), middle) if self.here else 1

    @cached_property
    def linear(self) -> list[str]:
        """The paths of those that are no convolutions."""
        return [path for path, layer in self.layers.items() if not isinstance(layer, CONVOLUTIONS)]

    @cached_property
    def times(self) -> ProductTimes:
        """Times of the linear ones."""
        return ProductTimes(self.layers[self.linear[0]].get_parameter("weight").dtype)

    def ranks(self, squares: Mapping[str, Tensor] | None) -> tuple[Ranks, Removal | None]:
        """The rank of every layer that becomes a product, and what a target found.

        Args:
            squares: by path the squared singular values, the largest first; None: not known.

        Raises:
            PlanError: nothing is saved, or a target can't be met.
        """
        settings, matrices = self.settings, self.matrices
        if settings.target is not None:
            return self._by_target(settings.target, squares)
        ranks = {path: self.rank(path, None if squares is None else squares[path]) for path in matrices}
        saving = {path: rank for path, rank in ranks.items() if rank}
        if not saving:
            asked = f"rank = {settings.rank}" if settings.rank is not None else f"energy = {settings.energy}"
            most = max(matrix.most for matrix in matrices.values())
            raise PlanError(
                f"{asked}: no layer would have fewer parameters as a product. The largest rank that saves some here is "
                f"{most}; ask for less."
            )
        return saving, None

    def rank(self, path: str, squares: Tensor | None) -> int:
        """The rank of a layer where there is no target; 0: it stays whole. Of an unknown energy the largest."""
        matrix, asked, multiple = self.matrices[path], self.settings.rank, self.multiple
        if asked is not None:
            rank = rounded(asked if isinstance(asked, int) else int(Fraction(str(asked)) * matrix.limit), multiple)
        elif squares is None:
            rank = matrix.most
        else:
            assert self.settings.energy is not None
            rank = rank_that_keeps(squares.tolist(), self.settings.energy, multiple)
        return rank if rank <= matrix.most else 0

    def _by_target(self, target: Target, squares: Mapping[str, Tensor] | None) -> tuple[Ranks, Removal | None]:
        matrices, multiple = self.matrices, self.multiple
        if squares is None:
            order = steps_alike(matrices, multiple)
        else:
            order = steps(matrices, {path: values.tolist() for path, values in squares.items()}, multiple)

        def family(amount: int) -> list[Edit]:
            return list(self.edits(after(order[:amount])))

        found = least_removal(Gauge(target, self.model), family, len(order), NAME)
        assert found.amount is not None
        return after(order[: found.amount]), found

    def edits(self, ranks: Ranks, file: PlanFile | None = None) -> Iterator[Edit]:
        """What makes products of the layers that have a rank.

        Args:
            ranks: by path.
            file: of the factors; None: they are made of the weight, or drawn.
        """
        # Those of a file take the place of drawn ones, which cost nothing.
        start = {} if self.settings.solver == "svd" else {"start": "random"}
        chosen = {path: layer for path, layer in self.layers.items() if path in ranks}
        for path, name in merged_paths(self.model, chosen, lambda name: (type(chosen[name]), ranks[name])):
            values = {"rank": ranks[name], **start}
            yield ReplaceModule(module=path, brick=BRICKS[_class_of(chosen[name])], settings=values)
        if file is None:
            return
        for path, rank in ranks.items():
            matrix = self.matrices[path]
            for name, shape in ((OUTPUT, (matrix.outputs, rank)), (INPUT, (rank, matrix.inputs))):
                yield SetParameter(parameter=f"{path}.{name}", file=file.name, tensor=f"{path}.{name}", shape=shape)

    def _timed(self, linear: Mapping[str, nn.Module], ranks: Ranks) -> str:
        products = {path: _product(layer, ranks[path]) for path, layer in linear.items()}
        return self.times.findings(linear, products, {path: f"of rank {ranks[path]}" for path in linear})

    def plan(self, ranks: Ranks, found: Removal | None, file: PlanFile | None, findings: Sequence[str]) -> Plan:
        """The plan, with what is to be known of it."""
        edits = list(self.edits(ranks, file))
        target = self.settings.target
        linear = {path: self.layers[path] for path in ranks if path in self.linear}
        timed = [self._timed(linear, ranks)] if linear and self.settings.measure and self.here else []
        if self.settings.multiple_of == "machine" and self.here:
            timed.append(f"Ranks are multiples of {self.multiple}, as this machine likes them.")
        sizes = sorted(ranks.values())
        told = f"{len(ranks)} of {len(self.layers)} layers become products, of rank {sizes[0]}"
        if sizes[-1] > sizes[0]:
            told += f" to {sizes[-1]}, {statistics.median_low(sizes)} in the middle"
        return Plan(
            method=NAME,
            settings=self.settings.model_dump(mode="json", exclude_defaults=True),
            promise="none",
            edits=edits,
            files=[] if file is None else [file],
            findings=[*(found or removal(self.model, edits)).findings(target), f"{told}.", *findings, *timed],
            made_for=config_values(self.model.config),
        )


def plan_greenformers(bench: Bench, settings: Greenformers) -> Plan:
    """Plan products in place of linear layers.

    Args:
        bench: with samples for the solver `activations`. The file of its factors goes to the bench's folder.
        settings: how small, and of what.

    Raises:
        PlanError: there is no such layer, nothing would be saved, a target can't be met, or a weight or what a layer
            reads is not finite.
    """
    products = _products(bench.model, settings)
    # Those of an energy, the weights tell; what of the others can't be is refused before these are looked at.
    shapes_alone = None if settings.energy is not None else products.ranks(None)
    for path, layer in products.layers.items():
        if not layer.get_parameter("weight").isfinite().all():
            raise PlanError(f"{path} has a weight that is not finite. Go back to an earlier checkpoint.")
    if settings.solver == "activations":
        return _by_samples(bench, products)
    if settings.solver == "random":
        assert shapes_alone is not None  # there is no energy of random numbers
        return products.plan(*shapes_alone, None, [])
    squares = {path: torch.linalg.svdvals(_matrix(layer)).square() for path, layer in products.layers.items()}
    ranks, found = products.ranks(squares)
    return products.plan(ranks, found, None, [_kept(squares, ranks, "weights")])


def _by_samples(bench: Bench, products: Products) -> Plan:
    """The plan of products that are nearest in what layers give for the bench's samples."""
    reads = read_together(bench.model, list(products.layers))
    products, left = _read(products, reads)
    squares, directions = dict[str, Tensor](), dict[str, Tensor]()
    for path, found, vectors in _decompositions(bench, products, reads):
        squares[path] = found
        most = products.matrices[path].most
        if products.settings.target is None:  # only a target has to know all layers first
            most = products.rank(path, found)
        # At most half as large as the weight, by what a product of the largest rank takes.
        weight = products.layers[path].get_parameter("weight")
        directions[path] = vectors[:, :most].to(torch.promote_types(weight.dtype, torch.float32))
    ranks, target = products.ranks({path: squares[path] for path in products.layers})
    content: dict[str, Tensor] = {}
    for path, rank in ranks.items():
        layer = products.layers[path]
        made = factors(_matrix(layer), directions.pop(path)[:, :rank].double())
        dtype = layer.get_parameter("weight").dtype
        content |= {f"{path}.{name}": value.to(dtype).cpu().contiguous() for name, value in made.items()}
    file = PlanFile.write(bench.folder, FACTORS, save(content))
    said = [_kept(squares, ranks, "outputs on the samples"), *left]
    return products.plan(ranks, target, file, said).beside(bench.folder)


def _decompositions(bench: Bench, products: Products, reads: Sequence[Read]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of every layer, in no particular order: the path, the squares of what it gives in the directions in which it
    gives most, the largest first, and these directions, U of this module, (out, min(in, out)); float64."""
    assert bench.data is not None
    for read, moments in input_moments(bench.model, bench.data, reads):
        root = _root(moments)
        for path in read.paths:
            left, roots, _ = torch.linalg.svd(_matrix(products.layers[path]) @ root, full_matrices=False)
            yield path, roots.square(), left


def _root(moments: Tensor) -> Tensor:
    """R with R R^T = C, damped; where a layer reads zeros alone, by which all directions are alike, the identity."""
    mean = moments.diagonal().mean()
    if mean == 0:
        return torch.eye(len(moments)).to(moments)
    values, vectors = torch.linalg.eigh(moments)
    return vectors * (values.clamp(min=0) + DAMPING * mean).sqrt()


def factors(weight: Tensor, directions: Tensor) -> dict[str, Tensor]:
    """A and B of U U^T W, of one length in every direction, so that both have gradients of one size. The largest entry
    of each direction is made positive, so that the result does not depend on the machine's choice.

    Args:
        weight: W, (out, in).
        directions: U, (out, rank), orthonormal.
    """
    directions = directions * signs(directions)
    given = directions.mT @ weight
    lengths = given.norm(dim=1)
    roots = torch.where(lengths > 0, lengths, 1).sqrt()
    return {OUTPUT: directions * roots, INPUT: given / roots[:, None]}


def _products(model: PreTrainedModel, settings: Greenformers) -> Products:
    """The layers that can become products; weights are not looked at."""
    none = "TokenFormers and layers that are products already have nothing to be factorised."
    also = CONVOLUTIONS if settings.targets else ()
    layers = linear_layers(model, settings.targets, "factorised", also, none=none)
    refuse_impossible(settings.keep, layers, "a linear layer")
    left = {path: layer for path, layer in layers.items() if not is_kept(path, settings.keep)}
    for path, layer in left.items():
        if isinstance(layer, CONVOLUTIONS):
            with placed(f"targets: {path}: "):
                refuse_other(layer)
            if settings.solver == "activations":
                raise PlanError(
                    f"targets: {path} is a convolution, and by samples linear layers alone become products. Give "
                    "solver = svd, or plan the convolutions by themselves."
                )
    return Products(model, settings, left)


def _read(products: Products, reads: Sequence[Read]) -> tuple[Products, list[str]]:
    """Without the layers that do not run, and which these are."""
    run = {path for read in reads for path in read.paths}
    layers = {path: layer for path, layer in products.layers.items() if path in run}
    if not layers:
        raise PlanError("None of the layers runs when the model is called, so that nothing is known of their inputs.")
    idle = [path for path in products.layers if path not in run]
    said = [f"Left whole, as they do not run: {', '.join(idle)}."] if idle else []
    return replace(products, layers=layers), said


def _class_of(layer: nn.Module) -> type[nn.Module]:
    return type(layer) if isinstance(layer, CONVOLUTIONS) else known_class(layer)


def _product(layer: nn.Module, rank: int) -> nn.Module:
    """What stands in the place of a layer, without values."""
    return on_shapes(BRICKS[_class_of(layer)], layer, rank=rank)


def _sides(layer: nn.Module) -> tuple[int, int]:
    """What the layer's matrix reads and gives; of a convolution all that its kernel sees of a place."""
    return window(layer) if isinstance(layer, CONVOLUTIONS) else widths(layer)


def _matrix(layer: nn.Module) -> Tensor:
    """The weight (out, in) in float64."""
    weight = layer.get_parameter("weight").detach().double()
    return weight.mT if isinstance(layer, Conv1D) else weight.flatten(1)


def _kept(squares: Mapping[str, Tensor], ranks: Ranks, of: str) -> str:
    shares = {
        path: float(squares[path][:rank].sum() / squares[path].sum()) if squares[path].any() else 1.0
        for path, rank in ranks.items()
    }
    least = min(shares, key=lambda path: shares[path])
    middle = statistics.median(shares.values())
    return (
        f"Of the sum of squares of their {of} products keep {middle:.1%} in the middle; least, {shares[least]:.1%}, at "
        f"{least}."
    )


def _outline(bench: Bench, settings: Greenformers) -> Plan:
    products = replace(_products(bench.model, settings), here=False)
    said = (
        ["How small it gets, the weights tell; this is the largest it can be."] if settings.energy is not None else []
    )
    return products.plan(*products.ranks(None), None, said)


def _example(model: PreTrainedModel) -> dict[str, Any]:
    _products(model, Greenformers(rank=1))
    return {"rank": 0.5, "solver": "svd"}


METHOD = Method(
    name=NAME,
    title="Linear layers as products of two smaller ones, by their weights or by what they give on samples",
    paper="arXiv 2108.10808 (activations: arXiv 2403.07378)",
    intent="factorize",
    settings=Greenformers,
    plan=plan_greenformers,
    examples=_example,
    needs_weights=True,
    promise="none",
    calibration=lambda settings: CalibrationSettings(samples=64) if settings.solver == "activations" else None,
    outline=_outline,
)
