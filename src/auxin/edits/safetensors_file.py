"""Writing a safetensors file tensor by tensor; the library's own writer wants all tensors of a file in memory."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from auxin.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""Data types by their names in the format."""


@dataclass(frozen=True)
class TensorPlace:
    """Name, data type and shape of a tensor that will be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return prod(self.shape) * torch_dtype(self.name, self.dtype).itemsize


def torch_dtype(name: str, dtype: str) -> torch.dtype:
    """The torch type that the format calls `dtype`; CheckpointError, naming the tensor `name`, when there is none."""
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{name} has the data type {dtype}, which can't be rewritten. Known types: {', '.join(DTYPES)}. Convert "
            "the checkpoint to one of them."
        )
    return DTYPES[dtype]


def write_safetensors(
    path: Path, places: Sequence[TensorPlace], tensors: Iterable[Tensor], metadata: dict[str, str] | None
) -> None:
    """Write `tensors`, which come in the order of `places`, holding one of them at a time.

    The format: 8 bytes with the length of the header, the header (JSON, padded to a multiple of 8 bytes), the data.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for place in places:
        end = offset + place.num_bytes
        header[place.name] = {"dtype": place.dtype, "shape": list(place.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for place, tensor in zip(places, tensors, strict=True):
            if tensor.dtype != torch_dtype(place.name, place.dtype) or tuple(tensor.shape) != place.shape:
                raise RuntimeError(f"{place} was announced, but {tensor.dtype} {tuple(tensor.shape)} came")
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
