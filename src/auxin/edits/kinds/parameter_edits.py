"""Edits of one parameter: each maps the old tensor to the new one, the optimizer's moments along, and back.

The moments follow the gradient. Where W' = R W C, with R the copying of outputs and C the division among the copies of
inputs, the chain rule gives the adjoint map G' = C_out^T G R_in^T: outputs that were copied share the gradient, inputs
that were divided get all of it each. A second moment takes the squares of the same factors.
"""

import hashlib
import math
from functools import cached_property
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from auxin.edits.kinds.fills import Fill, RepeatFill, Tagged, ZeroFill, mean_of_rows, root_mean_square
from auxin.edits.kinds.rate import Rate
from auxin.errors import PlanError
from auxin.words.paths import path_pattern

ABSENT_UNIT = -1
"""In an index list: a unit of zeros."""


class ParameterEdit(Tagged):
    """What all edits of a parameter share."""

    parameter: str
    """The parameter's dotted name; `*` stands for any one part, so that one edit serves all layers."""

    def matches(self, name: str) -> bool:
        """Whether the edit means the parameter `name`."""
        return path_pattern(self.parameter).fullmatch(name) is not None

    def collides_with(self, other: "ParameterEdit") -> bool:
        """Whether both change the same thing of one parameter, so that one of them must be a mistake."""
        return type(self) is type(other) and getattr(self, "axis", None) == getattr(other, "axis", None)

    def new_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that `shape` becomes; PlanError when it can't."""
        return shape

    def map_parameter(self, old: Tensor, seed: int, name: str) -> Tensor:
        """The new tensor; its random numbers depend on `seed`, the parameter's name and the old shape only."""
        raise NotImplementedError

    def map_moment(self, old: Tensor, order: int) -> Tensor:
        """The optimizer's moment of `order` (1 or 2) for the new tensor."""
        raise NotImplementedError

    def restore_parameter(self, new: Tensor, old_shape: tuple[int, ...]) -> Tensor | None:
        """The old tensor out of the new one, as well as it can be had; None: not at all."""
        return None

    def inverse(self, old_shape: tuple[int, ...]) -> "list[ParameterEdit] | None":
        """The edits that lead back to the old tensor, up to rounding and noise; None where there are none."""
        return None

    def rate(self, old_shape: tuple[int, ...]) -> Rate:
        """How AdamW must go on; see `Rate`."""
        return Rate(exact=False)

    def shown(self, name: str, which: bool = True) -> str:
        """The edit in words for a table that names the parameter.

        Args:
            name: of the parameter; what belongs to the same layer is said without the layer's path.
            which: whether units are told by their numbers. Without them parameters of which as many units stay, others
                in each, are alike.
        """
        return str(self)


class PadParameter(ParameterEdit):
    """Lengthen parameters along one axis; the old entries come first."""

    kind: Literal["pad_parameter"] = "pad_parameter"
    axis: int = Field(default=0, ge=0)
    """The axis that grows."""
    size: int = Field(gt=0)
    """The length of that axis afterwards."""
    fill: Fill
    """Where the new entries come from."""

    def new_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that `shape` becomes; PlanError when it can't."""
        check_axis(self.axis, shape)
        if self.size <= shape[self.axis]:
            raise PlanError(
                f"size {self.size} must be more than the {shape[self.axis]} that axis {self.axis} of shape "
                f"{list(shape)} has; padding can't shrink"
            )
        self.fill.check(shape, self.axis, self.size)
        return (*shape[: self.axis], self.size, *shape[self.axis + 1 :])

    def map_parameter(self, old: Tensor, seed: int, name: str) -> Tensor:
        """The new tensor; its random numbers depend on `seed`, the parameter's name and the old shape only."""
        new = self._room_for(old)
        if old.is_meta:
            return new
        self.fill.write(new, self.axis, old.shape[self.axis], generator(seed, name, tuple(old.shape)))
        return new

    def map_moment(self, old: Tensor, order: int) -> Tensor:
        """The optimizer's moment of `order` (1 or 2) for the new tensor."""
        new = self._room_for(old)
        self.fill.write_moment(new, self.axis, old.shape[self.axis], order)
        return new

    def restore_parameter(self, new: Tensor, old_shape: tuple[int, ...]) -> Tensor:
        """The old tensor out of the new one, as well as it can be had."""
        return self.fill.restore(new, self.axis, old_shape[self.axis])

    def inverse(self, old_shape: tuple[int, ...]) -> list[ParameterEdit] | None:
        """Cutting the new entries off; None where the old ones were divided among copies."""
        if isinstance(self.fill, RepeatFill) and self.fill.divide:
            return None
        return [SliceParameter(parameter=self.parameter, axis=self.axis, index=list(range(old_shape[self.axis])))]

    def rate(self, old_shape: tuple[int, ...]) -> Rate:
        """Exact for zeros; copies as for `SliceParameter`."""
        if isinstance(self.fill, ZeroFill):
            return Rate()
        if isinstance(self.fill, RepeatFill):
            return _copy_rate(*self.fill.copies(old_shape[self.axis], self.size), self.fill.divide, self.fill.noise)
        return Rate(exact=False)

    def _room_for(self, old: Tensor) -> Tensor:
        new = old.new_empty(self.new_shape(tuple(old.shape)))
        new.narrow(self.axis, 0, old.shape[self.axis]).copy_(old)
        return new

    def __str__(self) -> str:
        return f"pad axis {self.axis} to {self.size}: {self.fill}"


class AverageRows(ParameterEdit):
    """Put means of old rows where rows held nothing: the rows of a vocabulary's table that new tokens get."""

    kind: Literal["average_rows"] = "average_rows"
    axis: int = Field(default=0, ge=0)
    """The axis whose entries are the rows."""
    first: int = Field(gt=0)
    """The first row that is written; all rows before it are old."""
    sources: list[list[int]]
    """Row first + i becomes the mean of the old rows sources[i]; an empty list means all old rows."""

    @model_validator(mode="after")
    def _sensible(self) -> "AverageRows":
        if not self.sources:
            raise ValueError("sources: an empty list would write no row")
        odd = next((row for rows in self.sources for row in rows if not 0 <= row < self.first), None)
        if odd is not None:
            raise ValueError(f"sources: {odd} is no old row; give 0 to {self.first - 1}")
        return self

    def new_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The same shape; PlanError when the rows do not exist."""
        check_axis(self.axis, shape)
        length = shape[self.axis]
        if self.first + len(self.sources) > length:
            raise PlanError(f"row {self.first + len(self.sources) - 1} is beyond the {length} rows that it has")
        return shape

    def map_parameter(self, old: Tensor, seed: int, name: str) -> Tensor:
        """The new tensor; nothing is random."""
        new = old.clone()
        if old.is_meta:
            return new
        source, target = (tensor.movedim(self.axis, 0) for tensor in (old, new))
        everything = mean_of_rows(source[: self.first])[0]
        for place, rows in enumerate(self.sources, start=self.first):
            target[place] = mean_of_rows(source[rows])[0] if rows else everything
        return new

    def map_moment(self, old: Tensor, order: int) -> Tensor:
        """As for other fresh rows: no first moment, the mean of the old rows' second."""
        new = old.clone()
        rows = new.narrow(self.axis, self.first, len(self.sources))
        known = old.narrow(self.axis, 0, self.first)
        rows.copy_(mean_of_rows(known, self.axis).expand_as(rows)) if order == 2 else rows.zero_()
        return new

    def inverse(self, old_shape: tuple[int, ...]) -> list[ParameterEdit] | None:
        """Nothing: the rows held nothing before."""
        return []

    def __str__(self) -> str:
        given = sum(1 for rows in self.sources if rows)
        means = {0: "mean of the old", len(self.sources): "means of their old rows"}
        last = self.first + len(self.sources) - 1
        along = f" along axis {self.axis}" if self.axis else ""
        return f"rows {self.first}..{last}{along}: {means.get(given, f'means of old rows ({given} of chosen ones)')}"


class SliceParameter(ParameterEdit):
    """Take units of parameters along one axis by an index list: slicing, reordering, copying."""

    kind: Literal["slice_parameter"] = "slice_parameter"
    axis: int = Field(default=0, ge=0)
    """The axis that is indexed."""
    index: list[int]
    """New unit i is old unit index[i]. Units not listed are dropped, units listed twice are copied, -1 is a unit of
    zeros."""
    unit: int = Field(default=1, gt=0)
    """Entries per unit: 1, or the head size for whole heads."""
    divide: bool = False
    """Whether every unit is divided by the number of its copies; for readers of copied units."""
    offset: float = Field(default=0.0, allow_inf_nan=False)
    """With `divide`: what a model adds to the stored value before it uses it, as in `ScaleParameter`."""
    noise: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """With `divide`: root mean square of noise that sums to zero over the copies of a unit, relative to that of the
    result. It breaks the symmetry of copies without changing their sum."""

    @model_validator(mode="after")
    def _sensible(self) -> "SliceParameter":
        if not self.index:
            raise ValueError("index: an empty list would leave nothing of the parameter")
        if min(self.index) < ABSENT_UNIT:
            raise ValueError(f"index: {min(self.index)} is no unit; give 0, 1, ... or -1 for zeros")
        if self.noise and not self.divide:
            raise ValueError("noise keeps a sum only among copies that were divided; set divide, or leave noise out")
        if self.offset and not self.divide:
            raise ValueError("offset says how copies are divided; set divide, or leave offset out")
        return self

    def new_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that `shape` becomes; PlanError when it can't."""
        check_axis(self.axis, shape)
        length = shape[self.axis]
        if length % self.unit:
            raise PlanError(f"axis {self.axis} of shape {list(shape)} is no whole number of units of {self.unit}")
        if max(self.index) >= length // self.unit:
            raise PlanError(
                f"index {max(self.index)} is beyond the {length // self.unit} units that axis {self.axis} of shape "
                f"{list(shape)} has"
            )
        return (*shape[: self.axis], len(self.index) * self.unit, *shape[self.axis + 1 :])

    def map_parameter(self, old: Tensor, seed: int, name: str) -> Tensor:
        """The new tensor; the noise depends on `seed`, the parameter's name and the old shape only."""
        if old.is_meta:
            return old.new_empty(self.new_shape(tuple(old.shape)))
        new = self._taken(old)
        if self.divide:
            counts = self._along_axis(self._counts(old.shape)[self._sources(old.shape)], new)
            new = (new + self.offset).div_(counts).sub_(self.offset) if self.offset else new.div_(counts)
        if self.noise:
            self._add_noise(new, tuple(old.shape), generator(seed, name, tuple(old.shape)))
        return new

    def map_moment(self, old: Tensor, order: int) -> Tensor:
        """The adjoint map. New units of zeros in an old tensor have its step count: like fresh rows elsewhere they
        start from the mean of the second moments."""
        new = self._taken(old)
        if not self.divide:
            new.div_(self._along_axis(self._counts(old.shape)[self._sources(old.shape)], new) ** order)
        absent = self._absent_entries()
        if order == 2 and len(absent):
            mean = old.mean(dim=self.axis, keepdim=True)
            new.index_copy_(self.axis, absent.to(new.device), mean.expand(*self._piece(new, len(absent))).contiguous())
        return new

    def restore_parameter(self, new: Tensor, old_shape: tuple[int, ...]) -> Tensor | None:
        """The old tensor, where every old unit is still there."""
        first = self._first_copies(old_shape)
        if first is None:
            return None
        old = new.index_select(self.axis, first.to(new.device))
        if not self.divide:
            return old
        return (old + self.offset) * self._along_axis(self._counts(old_shape), old) - self.offset

    def inverse(self, old_shape: tuple[int, ...]) -> list[ParameterEdit] | None:
        """Taking the first copy of every unit; None where a unit was dropped or divided unevenly."""
        first, counts = self._first_units(old_shape), self._counts(old_shape)
        if first is None or (self.divide and len(set(counts.tolist())) > 1):
            return None
        back: list[ParameterEdit] = [
            SliceParameter(parameter=self.parameter, axis=self.axis, index=first, unit=self.unit)
        ]
        if self.divide and counts[0] > 1:
            back.append(ScaleParameter(parameter=self.parameter, factor=float(counts[0]), offset=self.offset))
        return back

    def rate(self, old_shape: tuple[int, ...]) -> Rate:
        """Exact where all units have equally many copies with equal shares; with an offset, see `ScaleParameter`."""
        counts = self._counts(old_shape)
        most = max(int(counts.max()), 1)
        rate = _copy_rate(most, bool((counts == most).all()), self.divide, self.noise)
        return rate.model_copy(update={"exact": False}) if self.offset and rate != Rate() else rate

    @cached_property
    def _entries(self) -> Tensor:
        """Old entry of every new entry; negative for zeros."""
        units = torch.tensor(self.index)
        entries = units[:, None] * self.unit + torch.arange(self.unit)
        return torch.where(units[:, None] < 0, ABSENT_UNIT, entries).flatten()

    def _absent_entries(self) -> Tensor:
        return torch.nonzero(self._entries < 0).flatten()

    def _sources(self, shape: tuple[int, ...]) -> Tensor:
        """As `_entries`, with the zeros pointing anywhere."""
        return self._entries.clamp(min=0)

    def _counts(self, shape: tuple[int, ...]) -> Tensor:
        """How many copies every old entry has."""
        return torch.bincount(self._entries[self._entries >= 0], minlength=shape[self.axis])

    def _taken(self, old: Tensor) -> Tensor:
        new = old.index_select(self.axis, self._sources(tuple(old.shape)).to(old.device))
        absent = self._absent_entries()
        return new.index_fill_(self.axis, absent.to(new.device), 0) if len(absent) else new

    def _first_units(self, shape: tuple[int, ...]) -> list[int] | None:
        """Where the first copy of every old unit is; None when one is nowhere."""
        places: dict[int, int] = {}
        for place, unit in enumerate(self.index):
            places.setdefault(unit, place)
        units = range(shape[self.axis] // self.unit)
        return [places[unit] for unit in units] if all(unit in places for unit in units) else None

    def _first_copies(self, shape: tuple[int, ...]) -> Tensor | None:
        units = self._first_units(shape)
        if units is None:
            return None
        return (torch.tensor(units)[:, None] * self.unit + torch.arange(self.unit)).flatten()

    def _add_noise(self, new: Tensor, old_shape: tuple[int, ...], random: torch.Generator) -> None:
        # On the CPU, where the sums below are deterministic.
        sources, counts = self._sources(old_shape), self._counts(old_shape)
        noise = torch.randn(new.shape, generator=random, dtype=torch.promote_types(new.dtype, torch.float32))
        noise.mul_(self.noise * root_mean_square(new))
        absent = self._absent_entries()
        noise.index_fill_(self.axis, absent, 0)
        mean = noise.new_zeros(self._piece(new, old_shape[self.axis]))
        mean.index_add_(self.axis, sources, noise)
        mean.div_(self._along_axis(counts.clamp(min=1), mean))
        noise.sub_(mean.index_select(self.axis, sources)).index_fill_(self.axis, absent, 0)
        new.add_(noise.to(device=new.device, dtype=new.dtype))

    def _along_axis(self, values: Tensor, like: Tensor) -> Tensor:
        """`values`, shaped to be broadcast along the axis; counts of absent units are 1."""
        shape = [-1 if dim == self.axis else 1 for dim in range(like.dim())]
        return values.clamp(min=1).to(device=like.device, dtype=like.dtype).view(shape)

    def _piece(self, new: Tensor, length: int) -> tuple[int, ...]:
        return (*new.shape[: self.axis], length, *new.shape[self.axis + 1 :])

    def shown(self, name: str, which: bool = True) -> str:
        """As of `ParameterEdit`."""
        return self._in_words(_ranges(self.index) if which else "others in each")

    def __str__(self) -> str:
        return self._in_words(_ranges(self.index))

    def _in_words(self, taken: str) -> str:
        units = f"units of {self.unit} along axis {self.axis}" if self.unit > 1 else f"axis {self.axis}"
        copied = len(self.index) - len(set(self.index))
        parts = [f"take {len(self.index)} of {units} ({taken})"]
        parts += ["divided" + (f" (offset {self.offset:g})" if self.offset else "")] if self.divide and copied else []
        parts += [f"noise {self.noise:g}"] if self.noise else []
        return ", ".join(parts)


class ScaleParameter(ParameterEdit):
    """Multiply parameters by a number: p' = factor (p + offset) - offset."""

    kind: Literal["scale_parameter"] = "scale_parameter"
    factor: float = Field(allow_inf_nan=False)
    """The number; 0 silences what the parameter does."""
    offset: float = Field(default=0.0, allow_inf_nan=False)
    """What a model adds to the stored value before it uses it: 1 for norm gains that are stored less one."""

    def collides_with(self, other: ParameterEdit) -> bool:
        """Whether both mean the same parameters: a factor for all layers and one for a new layer are no mistake."""
        return super().collides_with(other) and self.parameter == other.parameter

    def map_parameter(self, old: Tensor, seed: int, name: str) -> Tensor:
        """The new tensor."""
        return (old + self.offset) * self.factor - self.offset if self.offset else old * self.factor

    def map_moment(self, old: Tensor, order: int) -> Tensor:
        """The gradient is divided by the factor; moments of a silenced parameter start anew."""
        return old / self.factor**order if self.factor else torch.zeros_like(old)

    def restore_parameter(self, new: Tensor, old_shape: tuple[int, ...]) -> Tensor | None:
        """The old tensor, up to rounding."""
        return (new + self.offset) / self.factor - self.offset if self.factor else None

    def inverse(self, old_shape: tuple[int, ...]) -> list[ParameterEdit] | None:
        """Dividing again; None after a factor of 0."""
        if not self.factor:
            return None
        return [ScaleParameter(parameter=self.parameter, factor=1 / self.factor, offset=self.offset)]

    def rate(self, old_shape: tuple[int, ...]) -> Rate:
        """Steps scale with the parameter. Weight decay pulls stored values to 0, which with an offset is not the same
        place."""
        size = abs(self.factor)
        if not size or not math.isfinite(1 / size):
            return Rate(exact=False)
        return Rate(lr=size, eps=1 / size, exact=self.factor > 0 and not self.offset)

    def __str__(self) -> str:
        return f"multiply by {self.factor:.6g}" + (f" (offset {self.offset:g})" if self.offset else "")


class CentreParameter(ParameterEdit):
    """Subtract the mean along one axis: fold I - 11^T/d, which a LayerNorm does first, into what writes its input."""

    kind: Literal["centre_parameter"] = "centre_parameter"
    axis: int = Field(default=0, ge=0)
    """The axis along which the mean is taken."""

    def new_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The same shape; PlanError when the axis does not exist."""
        check_axis(self.axis, shape)
        return shape

    def map_parameter(self, old: Tensor, seed: int, name: str) -> Tensor:
        """The new tensor."""
        return old - old.mean(dim=self.axis, keepdim=True)

    def map_moment(self, old: Tensor, order: int) -> Tensor:
        """The gradient behind a LayerNorm has no mean: moments stay."""
        return old.clone()

    def __str__(self) -> str:
        return f"subtract the mean along axis {self.axis}"


def generator(seed: int, name: str, shape: tuple[int, ...]) -> torch.Generator:
    """A generator on the CPU for one tensor. The old shape takes part so that a second growth draws other numbers."""
    digest = hashlib.sha256(f"{seed}/{name}/{shape}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def check_axis(axis: int, shape: tuple[int, ...]) -> None:
    """PlanError when there is no such axis."""
    if axis >= len(shape):
        raise PlanError(f"axis {axis} is beyond the {len(shape)} axes of shape {list(shape)}")


def _copy_rate(most: int, even: bool, divide: bool, noise: float) -> Rate:
    """The rate of entries of which the `most` copied ones have so many copies; those dropped are no concern of the new
    model's.

    Where the counts differ (not `even`), no rate is right for all; that of the most copied ones is safe. Where noise
    makes the shares of readers differ, the copies that they read get different gradients from then on.
    """
    exact = even and not noise
    if divide:
        return Rate(lr=1 / most, exact=exact)
    return Rate(eps=1 / most, exact=exact)


def _ranges(index: list[int]) -> str:
    """The list, runs written as `first..last`, at most three of them."""
    runs: list[list[int]] = []
    for unit in index:
        if runs and unit == runs[-1][1] + 1 and unit > 0:
            runs[-1][1] = unit
        else:
            runs.append([unit, unit])
    words = [str(first) if first == last else f"{first}..{last}" for first, last in runs[:3]]
    return ", ".join(words) + (", ..." if len(runs) > 3 else "")
