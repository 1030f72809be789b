"""Edits of one parameter by a tensor that lies in one of the plan's files: what was learned, or measured."""

import re
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, PrivateAttr
from safetensors import SafetensorError, safe_open
from torch import Tensor

from auxin.edits.kinds.parameter_edits import ParameterEdit, check_axis
from auxin.errors import PlanError

LAYER = re.compile(r"(?<=\.)\d+\.")
"""In a name, a number and the point behind it."""
SUM = re.compile(r"-[0-9a-f]{8}\..*$")
"""In the name of a plan's file, the digits of its sum and the ending."""


class FileEdit(ParameterEdit):
    """What the edits that read a tensor share."""

    file: str
    """The name of the plan's file, of safetensors."""
    tensor: str
    """Name of the tensor in it."""
    shape: tuple[int, ...]
    """Of the tensor."""
    _path: Path | None = PrivateAttr(default=None)

    def located(self, path: Path) -> Self:
        """The same edit, which knows where its file is.

        Raises:
            PlanError: the file lacks the tensor, or it has another shape.
        """
        found = self.model_copy()
        found._path = path
        try:
            with safe_open(path, framework="pt") as file:
                shape = tuple(file.get_slice(self.tensor).get_shape())
        except (OSError, SafetensorError) as error:
            raise PlanError(f"The tensor {self.tensor} can't be read from {path}: {error}.") from error
        if shape != self.shape:
            raise PlanError(f"{self.tensor} in {path} has shape {list(shape)}, and the plan says {list(self.shape)}.")
        return found

    def _of_its_shape(self, shape: tuple[int, ...], what: str) -> tuple[int, ...]:
        """`shape`, that of `what`, which the tensor must have; PlanError."""
        if shape != self.shape:
            raise PlanError(
                f"the tensor {self.tensor} in {self.file} has shape {list(self.shape)}, and {what} has {list(shape)}"
            )
        return shape

    def shown(self, name: str, which: bool = True) -> str:
        """As of `ParameterEdit`, and without the sum in the file's name."""
        layers = [name[: found.end()] for found in LAYER.finditer(name)]
        inside = next((layer for layer in reversed(layers) if self.tensor.startswith(layer)), "")
        tensor, file = self.tensor.removeprefix(inside), SUM.sub("", self.file)
        words = str(self.model_copy(update={"tensor": tensor, "file": file}))
        return words.replace(f"{tensor} of {file}", tensor) if tensor == file else words

    @cached_property
    def _read(self) -> Tensor:
        assert self._path is not None, "the executor locates a plan's files first"
        with safe_open(self._path, framework="pt") as file:
            found: Tensor = file.get_tensor(self.tensor)
        return found

    def _wide(self, old: Tensor) -> Tensor:
        """The tensor beside `old`, in float32 at least."""
        return self._read.to(device=old.device, dtype=torch.promote_types(old.dtype, torch.float32))


class ProjectParameter(FileEdit):
    """Multiply parameters along one axis by a matrix."""

    kind: Literal["project_parameter"] = "project_parameter"
    axis: int = Field(default=0, ge=0)
    """The axis that is multiplied."""
    shape: tuple[int, int]
    """Of the matrix: (new, old)."""

    def new_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that `shape` becomes; PlanError when the file or the matrix does not fit."""
        check_axis(self.axis, shape)
        rows, columns = self.shape
        if columns != shape[self.axis]:
            raise PlanError(
                f"the matrix {self.tensor} in {self.file} has {columns} columns, but axis {self.axis} of shape "
                f"{list(shape)} has {shape[self.axis]}"
            )
        return (*shape[: self.axis], rows, *shape[self.axis + 1 :])

    def map_parameter(self, old: Tensor, seed: int, name: str) -> Tensor:
        """The new tensor."""
        if old.is_meta:
            return old.new_empty(self.new_shape(tuple(old.shape)))
        matrix = self._wide(old)
        product = torch.tensordot(matrix, old.to(matrix.dtype), dims=([1], [self.axis]))
        return product.movedim(0, self.axis).to(old.dtype).contiguous()

    def map_moment(self, old: Tensor, order: int) -> Tensor:
        """Moments start anew: the entries of a learned operator mix gradients of either sign."""
        return old.new_zeros(self.new_shape(tuple(old.shape)))

    def __str__(self) -> str:
        return f"project axis {self.axis} by {self.tensor} of {self.file}"


class MultiplyParameter(FileEdit):
    """Multiply parameters along one axis, entry by entry, by a vector f: p' = f (p + offset) - offset. It may be the
    gain of a norm, which goes into what reads the norm, or factors of units, which what writes them takes up."""

    kind: Literal["multiply_parameter"] = "multiply_parameter"
    axis: int = Field(default=0, ge=0)
    """The axis whose entries are multiplied."""
    shape: tuple[int]
    """Of the vector."""
    offset: float = Field(default=0.0, allow_inf_nan=False)
    """What a model adds to the stored value before it uses it: 1 for norm gains that are stored less one."""
    divide: bool = False
    """Whether entries are divided by the vector instead."""
    made_up_for: bool = True
    """Whether other edits make up for it, so that the function stays and gradients are divided by the factors. Where it
    does not, gradients are of the size they had, and moments stay."""

    def new_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The same shape; PlanError when the vector has another length than the axis."""
        check_axis(self.axis, shape)
        if self.shape != (shape[self.axis],):
            raise PlanError(
                f"the vector {self.tensor} in {self.file} has {self.shape[0]} entries, but axis {self.axis} of shape "
                f"{list(shape)} has {shape[self.axis]}"
            )
        return shape

    def map_parameter(self, old: Tensor, seed: int, name: str) -> Tensor:
        """The new tensor."""
        if old.is_meta:
            return torch.empty_like(old)
        factors = self._factors(old)
        return ((old.to(factors.dtype) + self.offset) * factors - self.offset).to(old.dtype)

    def map_moment(self, old: Tensor, order: int) -> Tensor:
        """Divided by the factors where the function stays; where a factor is 0, moments start anew."""
        if not self.made_up_for:
            return old.clone()
        factors = self._factors(old)
        wanted = torch.where(factors == 0, 0, old.to(factors.dtype) / factors**order)
        return wanted.to(old.dtype)

    def _factors(self, old: Tensor) -> Tensor:
        factors = self._wide(old).view([-1 if dim == self.axis else 1 for dim in range(old.dim())])
        return 1 / factors if self.divide else factors

    def __str__(self) -> str:
        how = "divide" if self.divide else "multiply"
        offset = f" (offset {self.offset:g})" if self.offset else ""
        return f"{how} along axis {self.axis} by {self.tensor} of {self.file}{offset}"


class SetParameter(FileEdit):
    """Give parameters the values of a tensor of their shape."""

    kind: Literal["set_parameter"] = "set_parameter"

    def new_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The same shape; PlanError when the tensor has another one."""
        return self._of_its_shape(shape, "what becomes it")

    def map_parameter(self, old: Tensor, seed: int, name: str) -> Tensor:
        """The tensor."""
        return torch.empty_like(old) if old.is_meta else self._read.to(device=old.device, dtype=old.dtype, copy=True)

    def map_moment(self, old: Tensor, order: int) -> Tensor:
        """Moments start anew: the gradients were those of other values."""
        return torch.zeros_like(old)

    def __str__(self) -> str:
        return f"set to {self.tensor} of {self.file}"


class ShiftParameter(FileEdit):
    """Add a tensor to parameters of its shape."""

    kind: Literal["shift_parameter"] = "shift_parameter"

    def new_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The same shape; PlanError when the tensor has another one."""
        return self._of_its_shape(shape, "what it is added to")

    def map_parameter(self, old: Tensor, seed: int, name: str) -> Tensor:
        """The new tensor."""
        if old.is_meta:
            return torch.empty_like(old)
        shift = self._wide(old)
        return (old.to(shift.dtype) + shift).to(old.dtype)

    def map_moment(self, old: Tensor, order: int) -> Tensor:
        """The gradient is that of another place: moments stay."""
        return old.clone()

    def __str__(self) -> str:
        return f"add {self.tensor} of {self.file}"
