"""Writing a safetensors file tensor by tensor; the library's own writer wants all tensors of a file in memory.

The format: 8 bytes with the length of the header, the header (JSON, which may end in spaces), the data.
"""

import json
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self

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
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BYTES_PER_ENTRY = 256
"""Room in the header for what is said of one tensor beside its name: type, up to eight sizes, and where it lies."""


def torch_dtype(name: str, dtype: str) -> torch.dtype:
    """The torch type that the format calls `dtype`; CheckpointError, naming the tensor `name`, when there is none."""
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{name} has the data type {dtype}, which can't be rewritten. Known types: {', '.join(DTYPES)}. Convert "
            "the checkpoint to one of them."
        )
    return DTYPES[dtype]


class SafetensorsWriter(AbstractContextManager["SafetensorsWriter"]):
    """A file that tensors are added to, one after another; what they are need not be known before.

    Room for the header is left in front and what is not used of it is spaces.

    Args:
        path: of the file.
        names: of the tensors that may be added.
        metadata_bytes: room for the metadata.
    """

    def __init__(self, path: Path, names: Iterable[str], metadata_bytes: int = 0) -> None:
        room = sum(len(json.dumps(name)) + BYTES_PER_ENTRY for name in names) + 2 * metadata_bytes + BYTES_PER_ENTRY
        self._room = room + -room % 8
        self._path, self._offset = path, 0
        self._header: dict[str, object] = {}
        self._axes: dict[str, int] = {}
        self._file = path.open("wb")
        self._file.seek(8 + self._room)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write `tensor` under `name`."""
        end = self._offset + tensor.numel() * tensor.element_size()
        entry = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [self._offset, end]}
        self._header[name], self._axes[name] = entry, tensor.dim()
        self._file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        self._offset = end

    def axes(self) -> dict[str, int]:
        """The tensors written by now, by name, with their number of axes."""
        return dict(self._axes)

    def finish(self, metadata: dict[str, str] | None) -> None:
        """Write the header, which makes a whole file of it."""
        header = {"__metadata__": metadata, **self._header} if metadata else self._header
        text = json.dumps(header, separators=(",", ":")).encode()
        assert len(text) <= self._room, f"{self._path}: the header needs {len(text)} bytes of {self._room}"
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little"))
        self._file.write(text.ljust(self._room))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
