"""Tensors in pieces: each of the processes that train a model together writes a file of what lies in it.

The files are safetensors in the folder `pieces/` of a checkpoint. Where a piece begins in its tensor stands in the
metadata, as torch.distributed.checkpoint notes it, which reads them again: whole, or into the pieces of any other
number of processes.
"""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from auxin.errors import CheckpointError, first_line
from auxin.files import flush
from auxin.models.weight_files import PIECES

SHARDING, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
"""Where torch.distributed.checkpoint looks in the metadata of a file, and in what stands there of a tensor."""

FAILURES = (OSError, SafetensorError, CheckpointException)
"""What writing and reading raise; CheckpointException wraps what happened on each process and is no Exception."""

_NAME = re.compile(r"(?P<rank>\d{5})-of-(?P<size>\d{5})\.safetensors")

Piece = tuple[Tensor, tuple[int, ...]]
"""A part of a tensor, and where it begins along each axis."""


def lies_in_pieces(checkpoint: Path) -> bool:
    """Whether the tensors of a checkpoint lie in pieces."""
    return (checkpoint / PIECES).is_dir()


def own_piece(tensor: Tensor, leads: bool) -> Piece | None:
    """What this process has to write of a tensor, a copy in the computer's memory; None: nothing.

    Args:
        tensor: in pieces, or whole, and then the same in every process.
        leads: whether this is the process that writes those that are whole.
    """
    if not isinstance(tensor, DTensor):
        return (_copied(tensor), (0,) * tensor.dim()) if leads else None
    place = tensor.device_mesh.get_coordinate()
    assert place is not None, "each process has a place in the mesh"
    if any(index for index, kind in zip(place, tensor.placements, strict=True) if kind.is_replicate()):
        return None  # a copy of what another writes
    local = tensor.to_local()
    if not local.numel():
        return None
    (chunk,) = tensor.__create_chunk_list__()
    return _copied(local), tuple(chunk.offsets)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def write_pieces(checkpoint: Path, rank: int, size: int, pieces: Mapping[str, Piece]) -> Path:
    """Write the pieces of process `rank` of `size`, flushed to the disk; the file."""
    path = checkpoint / PIECES / f"{rank:05d}-of-{size:05d}.safetensors"
    offsets = {name: {OFFSETS: list(begin)} for name, (_, begin) in pieces.items()}
    metadata = {"format": "pt", SHARDING: json.dumps(offsets)}
    save_file({name: tensor for name, (tensor, _) in pieces.items()}, path, metadata=metadata)
    flush(path)
    return path


class _Reader(HuggingFaceStorageReader):
    """Looks into the files once, and not for every tensor that is read."""

    _known: Metadata | None = None

    def read_metadata(self) -> Metadata:
        if self._known is None:
            self._known = super().read_metadata()
        return self._known


class StoredTensors:
    """The tensors in the safetensors files of a folder, in pieces or whole.

    Args:
        folder: the folder.

    Raises:
        CheckpointError: a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._reader = _Reader(str(folder))
            known = self._reader.read_metadata().state_dict_metadata
        except (*FAILURES, KeyError, ValueError, TypeError, AttributeError) as error:
            raise self._damaged(error) from error
        kinds = {name: item for name, item in known.items() if isinstance(item, TensorStorageMetadata)}
        self.shapes = {name: tuple(item.size) for name, item in kinds.items()}
        """Of the whole tensors, by name."""
        self._types = {name: item.properties.dtype for name, item in kinds.items()}

    def read(self, *names: str) -> dict[str, Tensor]:
        """Whole tensors, in the computer's memory, by name.

        Raises:
            CheckpointError: a file is damaged.
        """
        tensors = {name: torch.empty(self.shapes[name], dtype=self._types[name]) for name in names}
        self.read_into(tensors)
        return tensors

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Fill tensors, whole ones or what lies of them in this process, with what is stored under their names.

        Raises:
            CheckpointError: a file is damaged, or has a tensor of another shape.
        """
        try:
            with warnings.catch_warnings():
                # At every call it warns that it reads for one process, which is what is meant.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
                dcp.load(dict(targets), storage_reader=self._reader, no_dist=True)
        except (*FAILURES, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: BaseException) -> CheckpointError:
        if isinstance(error, CheckpointException):
            for wrapped, _ in error.failures.values():
                if not isinstance(wrapped, Exception):  # an interrupt, an exit
                    raise wrapped from None
        return CheckpointError(f"{self._folder} is damaged: {failure(error)}. Restore it or use another checkpoint.")


def stored_pieces(checkpoint: Path) -> StoredTensors:
    """The tensors of a checkpoint that lie in pieces.

    Raises:
        CheckpointError: a file is damaged, or those of some processes are not there.
    """
    folder = checkpoint / PIECES
    found = [match for path in sorted(folder.iterdir()) if (match := _NAME.fullmatch(path.name))]
    sizes = {int(match["size"]) for match in found}
    if len(sizes) != 1 or len(found) != sizes.pop():
        names = ", ".join(match[0] for match in found) or "none"
        raise CheckpointError(
            f"{folder} does not hold one file of each process, but {names}. Restore what is missing, or use another "
            "checkpoint."
        )
    return StoredTensors(folder)


def failure(error: BaseException) -> str:
    """One line that says what went wrong, from below the wrapper of torch.distributed.checkpoint."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return first_line(error).rstrip(".")
