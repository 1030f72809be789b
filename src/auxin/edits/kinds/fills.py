"""How the new rows of a padded tensor come from the old ones, and how optimizer moments follow."""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor

from auxin.errors import PlanError
from auxin.nn.random_features import drawn_directions
from auxin.settings import Settings


class Tagged(Settings):
    """One member of a union that is told apart by its field `kind`, which is therefore always written."""

    @model_serializer(mode="wrap")
    def _with_kind(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"kind": self.__dict__["kind"], **handler(self)}


class _FreshFill(Tagged):
    """New rows that owe nothing to a particular old row."""

    def check(self, shape: tuple[int, ...], axis: int, size: int) -> None:
        """PlanError when it can't lengthen a tensor of `shape` along `axis` to `size`; of one that is all new the axis
        0 has length 0."""

    def restore(self, new: Tensor, axis: int, size: int) -> Tensor:
        """The old tensor out of the padded one (a view)."""
        return new.narrow(axis, 0, size)

    def write_moment(self, new: Tensor, axis: int, size: int, order: int) -> None:
        """Fill the new rows of an optimizer moment of `order` 1 or 2; the old rows, already in place, stay.

        A second moment of zero in an old tensor, whose step count is large, would make the first updates several
        times the learning rate. The new rows start from the mean of the old rows instead.
        """
        rows = new.narrow(axis, size, new.shape[axis] - size)
        rows.copy_(
            new.narrow(axis, 0, size).mean(dim=axis, keepdim=True).expand_as(rows)
        ) if order == 2 else rows.zero_()


class ZeroFill(_FreshFill):
    """New rows of zeros."""

    kind: Literal["zeros"] = "zeros"

    def write(self, new: Tensor, axis: int, size: int, generator: torch.Generator) -> None:
        """Fill the new rows of `new`, whose first `size` along `axis` are the old ones."""
        new.narrow(axis, size, new.shape[axis] - size).zero_()

    def __str__(self) -> str:
        return "zeros"


class NormalFill(_FreshFill):
    """New rows of independent normal numbers."""

    kind: Literal["normal"] = "normal"
    std: float | None = Field(default=None, gt=0)
    """Standard deviation; None means the root mean square of the old tensor."""

    def check(self, shape: tuple[int, ...], axis: int, size: int) -> None:
        """PlanError when there is nothing old whose root mean square could be taken."""
        if self.std is None and not math.prod(shape):
            raise PlanError("std: there are no old entries to take it from; give a number")

    def write(self, new: Tensor, axis: int, size: int, generator: torch.Generator) -> None:
        """Fill the new rows of `new`, whose first `size` along `axis` are the old ones."""
        rows = new.narrow(axis, size, new.shape[axis] - size)
        std = root_mean_square(new.narrow(axis, 0, size)) if self.std is None else self.std
        rows.copy_(torch.randn(rows.shape, generator=generator).mul_(std))

    def __str__(self) -> str:
        return f"normal, std {'of the old' if self.std is None else format(self.std, '.3g')}"


class DirectionsFill(_FreshFill):
    """New rows that are random directions N(0, I), independent or orthogonal in blocks; of a matrix that is all new."""

    kind: Literal["directions"] = "directions"
    orthogonal: bool = True
    """Whether as many as there are columns, one block after the other, are orthogonal; their norms are drawn apart."""

    def check(self, shape: tuple[int, ...], axis: int, size: int) -> None:
        """PlanError when it is no matrix that is all new."""
        if len(shape) != 2 or axis or shape[0]:
            raise PlanError("directions fill whole new matrices, a row each; use normal")

    def write(self, new: Tensor, axis: int, size: int, generator: torch.Generator) -> None:
        """Fill `new`, (directions, width)."""
        new.copy_(drawn_directions(new.shape[0], new.shape[1], generator, self.orthogonal))

    def __str__(self) -> str:
        return f"random {'orthogonal ' if self.orthogonal else ''}directions"


class ConstantFill(_FreshFill):
    """New rows of one number."""

    kind: Literal["constant"] = "constant"
    value: float
    """The number."""

    def write(self, new: Tensor, axis: int, size: int, generator: torch.Generator) -> None:
        """Fill the new rows of `new`, whose first `size` along `axis` are the old ones."""
        new.narrow(axis, size, new.shape[axis] - size).fill_(self.value)

    def __str__(self) -> str:
        return f"all {self.value:g}"


class MeanFill(_FreshFill):
    """New rows that are the mean of the old ones."""

    kind: Literal["mean"] = "mean"
    rows: int | None = Field(default=None, gt=0)
    """Only the first so many old rows count, of values and of moments: those of a table that hold something. None: all.
    """

    def check(self, shape: tuple[int, ...], axis: int, size: int) -> None:
        """PlanError when there are not as many old rows as are to be averaged."""
        if max(self.rows or 0, 1) > shape[axis]:
            raise PlanError(f"the mean of {self.rows or 'all'} rows needs more than the {shape[axis]} old rows")

    def write(self, new: Tensor, axis: int, size: int, generator: torch.Generator) -> None:
        """Fill the new rows of `new`, whose first `size` along `axis` are the old ones."""
        rows = new.narrow(axis, size, new.shape[axis] - size)
        rows.copy_(mean_of_rows(new.narrow(axis, 0, self.rows or size), axis).expand_as(rows))

    def write_moment(self, new: Tensor, axis: int, size: int, order: int) -> None:
        """Fill the new rows of an optimizer moment of `order` 1 or 2, from the rows that count."""
        rows = new.narrow(axis, size, new.shape[axis] - size)
        if order == 2:
            rows.copy_(mean_of_rows(new.narrow(axis, 0, self.rows or size), axis).expand_as(rows))
        else:
            rows.zero_()

    def __str__(self) -> str:
        return "mean of the old" if self.rows is None else f"mean of the first {self.rows:,}"


class RepeatFill(Tagged):
    """Copies of the old rows from `first` on, in order, over and over."""

    kind: Literal["repeat"] = "repeat"
    first: int = Field(default=0, ge=0)
    """The first old row that is copied; those before it stay alone."""
    divide: bool = False
    """Whether every row is divided by the number of its copies, itself included; for readers of duplicated units."""
    noise: float = Field(default=0.0, ge=0)
    """Root mean square of the noise, relative to that of the result. With `divide` it sums to zero over the copies of a
    row, so that it breaks their symmetry without changing their sum; without, it is added to the new rows only."""

    def check(self, shape: tuple[int, ...], axis: int, size: int) -> None:
        """PlanError when there is no old row to repeat."""
        if self.first >= shape[axis]:
            raise PlanError(f"first row to repeat {self.first} is beyond the {shape[axis]} old rows")

    def copies(self, size: int, new_size: int) -> tuple[int, bool]:
        """How many copies those of `size` old rows have that have most, itself included, and whether all have as
        many."""
        repeated, rows = size - self.first, new_size - self.first
        most = -(-rows // repeated)
        return most, most == 1 or (self.first == 0 and rows % repeated == 0)

    def write(self, new: Tensor, axis: int, size: int, generator: torch.Generator) -> None:
        """Fill the new rows of `new`, whose first `size` along `axis` are the old ones, and divide if asked."""
        sources = self.sources(size, new.shape[axis], new.device)
        new.copy_(new.narrow(axis, 0, size).index_select(axis, sources))
        if self.divide:
            new.div_(self._counts(new, axis, size).index_select(axis, sources))
        if self.noise:
            self._add_noise(new, sources, axis, size, generator)

    def _add_noise(self, new: Tensor, sources: Tensor, axis: int, size: int, generator: torch.Generator) -> None:
        # On the CPU, where the sums below are deterministic.
        noise, sources = torch.randn(new.shape, generator=generator), sources.cpu()
        noise.mul_(self.noise * root_mean_square(new))
        if self.divide:
            counts = self._counts(noise, axis, size)
            mean = torch.zeros_like(noise.narrow(axis, 0, size)).index_add_(axis, sources, noise).div_(counts)
            noise.sub_(mean.index_select(axis, sources))
        else:
            noise.narrow(axis, 0, size).zero_()
        new.add_(noise.to(device=new.device, dtype=new.dtype))

    def restore(self, new: Tensor, axis: int, size: int) -> Tensor:
        """The old tensor out of the padded one; up to rounding, and up to the noise, when the rows were divided."""
        old = new.narrow(axis, 0, size)
        return old * self._counts(new, axis, size) if self.divide else old

    def write_moment(self, new: Tensor, axis: int, size: int, order: int) -> None:
        """Map a moment as the gradient maps: the adjoint of the duplication.

        Copies that are averaged by their readers get an equal share of the gradient each; their readers (`divide`)
        get the full gradient each.
        """
        sources = self.sources(size, new.shape[axis], new.device)
        new.copy_(new.narrow(axis, 0, size).index_select(axis, sources))
        if not self.divide:
            new.div_(self._counts(new, axis, size).index_select(axis, sources) ** order)

    def sources(self, size: int, new_size: int, device: torch.device | None = None) -> Tensor:
        """The old row, of `size`, that each of `new_size` rows is a copy of."""
        rows = torch.arange(new_size, device=device)
        return torch.where(rows < size, rows, self.first + (rows - self.first) % (size - self.first))

    def _counts(self, new: Tensor, axis: int, size: int) -> Tensor:
        """How many copies each old row has, shaped to be broadcast along `axis`."""
        counts = torch.bincount(self.sources(size, new.shape[axis], new.device), minlength=size).to(new.dtype)
        return counts.view([-1 if dim == axis else 1 for dim in range(new.dim())])

    def __str__(self) -> str:
        parts = [f"copies of rows {self.first}.."]
        parts += ["divided"] if self.divide else []
        parts += [f"noise {self.noise:g}"] if self.noise else []
        return ", ".join(parts)


class ValuesFill(_FreshFill):
    """New rows that are given, for small tensors."""

    kind: Literal["values"] = "values"
    values: list[float] = Field(min_length=1)
    """All of the new entries, the last axis running fastest."""

    def check(self, shape: tuple[int, ...], axis: int, size: int) -> None:
        """PlanError when there are not as many values as new entries."""
        rows = (*shape[:axis], size - shape[axis], *shape[axis + 1 :])
        if len(self.values) != math.prod(rows):
            raise PlanError(
                f"values: {len(self.values)} are given for {math.prod(rows)} new entries of shape {list(rows)}; give "
                "one for each"
            )

    def write(self, new: Tensor, axis: int, size: int, generator: torch.Generator) -> None:
        """Fill the new rows of `new`, whose first `size` along `axis` are the old ones."""
        rows = new.narrow(axis, size, new.shape[axis] - size)
        rows.copy_(torch.tensor(self.values, dtype=torch.float64).view(rows.shape))

    def __str__(self) -> str:
        shown = ", ".join(format(value, ".3g") for value in self.values[:6])
        return f"[{shown}{', ...' if len(self.values) > 6 else ''}]"


class CopyFill(_FreshFill):
    """All that another parameter of the model holds, the optimizer's moments too; for new parameters of a brick."""

    kind: Literal["copy"] = "copy"
    of: str
    """The parameter, relative to the brick."""

    def check(self, shape: tuple[int, ...], axis: int, size: int) -> None:
        """PlanError for rows of an old parameter. (A new one has the other parameter as its source and is no fill.)"""
        raise PlanError("copy fills whole new parameters of a brick, not rows of a padded one; use repeat")

    def write(self, new: Tensor, axis: int, size: int, generator: torch.Generator) -> None:
        """Never called: see `check`."""
        raise NotImplementedError

    def __str__(self) -> str:
        return f"a copy of {self.of}"


Fill = Annotated[
    ZeroFill | ConstantFill | NormalFill | DirectionsFill | MeanFill | RepeatFill | ValuesFill | CopyFill,
    Field(discriminator="kind"),
]


def mean_of_rows(tensor: Tensor, axis: int = 0) -> Tensor:
    """The mean along `axis`, which stays with length 1; summed in float32 at least."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.mean(dim=axis, keepdim=True, dtype=wide).to(tensor.dtype)


def root_mean_square(tensor: Tensor) -> float:
    """The root mean square of all entries, accumulated in float64, piece by piece to need no copy of the tensor."""
    norms = [float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in tensor.flatten().split(2**20)]
    return math.hypot(*norms) / math.sqrt(tensor.numel())
