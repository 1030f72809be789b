"""The files of a folder that transformers loads a model's weights from."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from auxin.errors import CheckpointError, reason

WHOLE = "model.safetensors"
INDEX = f"{WHOLE}.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The `*.safetensors` files that `from_pretrained` reads: the whole file, or those that the index names. Others
    (an adapter, another precision, the weights in another package's names) are not the model's.

    Where neither of the two is there: all.

    Raises:
        CheckpointError: the index can't be read.
    """
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    if (folder / INDEX).is_file():
        return sorted(folder / name for name in set(index_of(folder).values()))
    return sorted(folder.glob("*.safetensors"))


def index_of(folder: Path) -> dict[str, str]:
    """The file of every tensor, by the index in `folder`; CheckpointError when it can't be read."""
    path = folder / INDEX
    try:
        return {
            str(name): str(file) for name, file in json.loads(path.read_text(encoding="utf-8"))["weight_map"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} can't be read: {error!r}. Restore it from an earlier checkpoint.") from error


def stored_tensors(folder: Path) -> dict[str, Path]:
    """The file of every tensor that `from_pretrained` reads; none where a file can't be read."""
    try:
        if not (folder / WHOLE).is_file() and (folder / INDEX).is_file():
            return {name: folder / file for name, file in index_of(folder).items()}
        places: dict[str, Path] = {}
        for path in weight_files(folder):
            with safe_open(path, framework="pt") as file:
                places |= dict.fromkeys(file.offset_keys(), path)
        return places
    except (OSError, SafetensorError, CheckpointError):
        return {}


def refuse_damaged(folder: Path) -> bool:
    """Whether `folder` holds weights that `from_pretrained` reads; only their headers are looked at.

    Raises:
        CheckpointError: a file of them is gone, cut off or no safetensors file.
    """
    files = weight_files(folder)
    for path in files:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} can't be read: {reason(error)}. Restore the file, or use another checkpoint."
            ) from error
    return bool(files)


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a file."""
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor
