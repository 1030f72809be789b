"""Checkpoints in pieces, made whole: as a single process would have written them."""

import shutil
from pathlib import Path

from transformers import PreTrainedModel

from auxin.edits.safetensors_file import SafetensorsWriter
from auxin.edits.saved import save_weights
from auxin.edits.structure import edited_skeleton
from auxin.errors import CheckpointError
from auxin.files import new_folder
from auxin.models.folders import model_folder
from auxin.models.loading import load_config
from auxin.models.pieces import FAILURES, lies_in_pieces
from auxin.models.weight_files import PIECES
from auxin.sums import SUMS_FILE, write_sums
from auxin.training.checkpoint import (
    TENSORS_FILE,
    TRAINING,
    WEIGHT,
    not_saved,
    pieces_of,
    read_training,
    refuse_damaged,
)


def make_whole(source: Path, folder: Path, model: PreTrainedModel) -> None:
    """Write the tensors of a checkpoint in pieces as a single process would have, one of them in memory at a time.

    Args:
        source: the checkpoint.
        folder: gets the weights, and the moments beside what `training/` holds; config.json is there.
        model: the model, of which the shapes are enough.

    Raises:
        CheckpointError: `source` is damaged, or holds another model.
    """
    pieces = pieces_of(source, model)
    save_weights(model, lambda name: pieces.read(WEIGHT + name)[WEIGHT + name], folder)
    rest = read_training(source)
    moments = [name for name in pieces.shapes if not name.startswith(WEIGHT)]
    written = folder / TRAINING / f".{TENSORS_FILE}"
    with SafetensorsWriter(written, [*rest, *moments]) as writer:
        for name in moments:
            writer.add(name, pieces.read(name)[name])
        for name, tensor in rest.items():
            writer.add(name, tensor)
        writer.finish({"format": "pt"})
    written.replace(folder / TRAINING / TENSORS_FILE)


def whole_checkpoint(source: str | Path, directory: str | Path) -> Path:
    """Make of a checkpoint whose tensors lie in pieces one that a single process would have written.

    Args:
        source: the checkpoint.
        directory: where the new one shall be; it appears complete.

    Returns:
        `directory` as a Path.

    Raises:
        CheckpointError: `source` is no such checkpoint, or damaged; `directory` is in use, or can't be written.
    """
    source, directory = model_folder(source), Path(directory)
    if not lies_in_pieces(source):
        raise CheckpointError(f"{source} is whole already: its tensors don't lie in pieces. Copy it.")
    refuse_damaged(source, "Restore it from a copy or use another checkpoint.")
    model = edited_skeleton(load_config(source))
    try:
        with new_folder(directory) as folder:
            beside = shutil.ignore_patterns(PIECES, SUMS_FILE)
            shutil.copytree(source, folder, dirs_exist_ok=True, ignore=beside)
            make_whole(source, folder, model)
            write_sums(folder)
    except FAILURES as error:
        raise not_saved(directory, error) from error
    return directory
