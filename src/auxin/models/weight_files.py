"""The files of a folder that transformers loads a model's weights from."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from auxin.errors import CheckpointError, reason

PLAIN = "model.safetensors"
"""The whole file, as transformers calls it."""
EDITED = "edited_model.safetensors"
"""The whole file of a model that is not what its config's class builds: transformers looks for no such name, so that
loading fails where `auxin`, which tells it (`auxin.edits.replay`), is not imported."""
INDEX_ENDING = ".index.json"
PIECES = "pieces"
"""The folder in a checkpoint where its tensors lie that are in pieces (`auxin.models.pieces`)."""


EDITED_NAMES = (EDITED, EDITED + INDEX_ENDING)
NAMES = (PLAIN, PLAIN + INDEX_ENDING, *EDITED_NAMES)


def first_file(folder: Path) -> Path | None:
    """The file that `from_pretrained` opens first: the whole file, or the index of its pieces; None: there is none.
    Where several lie in the folder, it is the one that the config names, or else the plain one."""
    found = [folder / name for name in NAMES if (folder / name).is_file()]
    if len(found) > 1:
        told = _told(folder)
        found.sort(key=lambda path: path.name != told)
    return next(iter(found), None)


def _told(folder: Path) -> str | None:
    """The file that the config in `folder` names (`auxin.edits.saved`); None where it names none, or can't be read."""
    try:
        told = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]["weights"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(told)


def refuse_pieces(folder: Path) -> None:
    """Raise CheckpointError where the weights in `folder` lie in pieces, which transformers can't read."""
    if first_file(folder) is None and (folder / PIECES).is_dir():
        raise CheckpointError(
            f"{folder} keeps its tensors in pieces, as the processes of a run wrote them: that run goes on from it. "
            f"For anything else make a whole checkpoint of it: auxin export {folder} -o FOLDER"
        )


def weight_files(folder: Path) -> list[Path]:
    """The `*.safetensors` files that `from_pretrained` reads: the whole file, or those that the index names. Others
    (an adapter, another precision, the weights in another package's names) are not the model's.

    Where neither of the two is there: all.

    Raises:
        CheckpointError: the index can't be read.
    """
    first = first_file(folder)
    if first is None:
        return sorted(folder.glob("*.safetensors"))
    return sorted(folder / name for name in set(weight_map(first).values())) if _is_index(first) else [first]


def _is_index(path: Path) -> bool:
    return path.name.endswith(INDEX_ENDING)


def weight_map(path: Path) -> dict[str, str]:
    """The file of every tensor, by an index; CheckpointError when it can't be read."""
    try:
        return {
            str(name): str(file) for name, file in json.loads(path.read_text(encoding="utf-8"))["weight_map"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} can't be read: {error!r}. Restore it from an earlier checkpoint.") from error


def stored_tensors(folder: Path) -> dict[str, Path]:
    """The file of every tensor that `from_pretrained` reads; none where a file can't be read."""
    try:
        first = first_file(folder)
        if first is not None and _is_index(first):
            return {name: folder / file for name, file in weight_map(first).items()}
        places: dict[str, Path] = {}
        for path in weight_files(folder):
            with safe_open(path, framework="pt") as file:
                places |= dict.fromkeys(file.offset_keys(), path)
        return places
    except (OSError, SafetensorError, CheckpointError):
        return {}


def readable_files(folder: Path) -> list[Path]:
    """`weight_files`, of which each begins and ends as it should; no more than their headers is looked at.

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
    return files


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a file."""
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor
