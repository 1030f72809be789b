"""Checkpoint folders: written whole or not at all, loadable by transformers.

Layout of a folder: the Hugging Face model at its root (config.json, the weights as safetensors under the names of
`auxin.models.weight_files`, tokenizer files); `training/` with the tensors of the training state as safetensors, which
torch.distributed.checkpoint reads, and `state.json`; `ledger.json`; and `SHA256SUMS`, by which a damaged one is known
(`auxin.sums`). It is not changed after it was written.

One that processes write while they train a model in pieces has `pieces/` (`auxin.models.pieces`) in place of the
weights and moments; only their run goes on from it, until it is made whole (`auxin.training.whole`).
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from auxin.accounting.ledger import Ledger
from auxin.data.dataset import Processor, save_processor
from auxin.edits.saved import save_model
from auxin.edits.structure import edited_skeleton
from auxin.edits.tensor_names import shapes_of, tensor_names
from auxin.errors import CheckpointError, reason
from auxin.files import flush, flush_tree, new_folder, temporary_folder
from auxin.models.adapters import has_adapter
from auxin.models.folders import existing_folder, model_folder
from auxin.models.loading import load_config, load_model
from auxin.models.pieces import FAILURES, StoredTensors, failure, lies_in_pieces, stored_pieces
from auxin.nn.bricks import Brick
from auxin.sums import STATE, SUMMED, damage, write_sums
from auxin.training.adapters import load_adapter
from auxin.training.optimizer import build_optimizer, optimizer_tensors, restore_optimizer
from auxin.training.settings import TrainingSettings
from auxin.training.strategies import fill, plain_class

TRAINING = STATE.parent
TENSORS_FILE = "state.safetensors"
WEIGHT = "model."
"""What the names of weights in pieces begin with."""


def write_checkpoint_folder(
    directory: str | Path,
    model: PreTrainedModel,
    *,
    processor: Processor | None = None,
    ledger: Ledger | None = None,
    optimizer: Optimizer | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    state: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint folder atomically: to a sibling, flushed to the disk, then renamed to `directory`.

    Args:
        directory: where it shall be; an existing folder is replaced after the new one is complete.
        model: its weights, config and generation config go to the root.
        processor: the tokenizer, or what else makes inputs for the model; goes to the root.
        ledger: the model's books so far.
        optimizer: its moments go to `training/`, named after the model's parameters.
        tensors: further tensors of the training state.
        state: the JSON part of the training state.

    Returns:
        `directory` as a Path.

    Raises:
        CheckpointError: the disk is full or can't be written; what was there before is as it was.
    """
    training = dict(tensors or {})
    if optimizer is not None:
        training |= optimizer_tensors(model, optimizer)
    with new_checkpoint(Path(directory)) as folder:
        save_model(model, folder)
        write_beside_weights(folder, processor, ledger, training, state)
    return Path(directory)


@contextlib.contextmanager
def new_checkpoint(directory: Path, sums: Mapping[str, str] | None = None) -> Iterator[Path]:
    """An empty sibling of `directory` that takes its name, with the sums of its files and flushed to the disk, when the
    body succeeds, and vanishes else. An existing folder is replaced.

    Args:
        directory: where the checkpoint shall be.
        sums: those that are known when the body ends, of files by their paths in the folder.

    Raises:
        CheckpointError: the disk is full or can't be written; what was there before is as it was.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _restore(directory)
        with temporary_folder(directory) as partial:
            yield partial
            write_sums(partial, sums)
            flush_tree(partial)
            _move_into_place(partial, directory)
    except FAILURES as error:
        raise not_saved(directory, error) from error


def not_saved(directory: Path, error: BaseException) -> CheckpointError:
    """That the checkpoint `directory` could not be written, and what to do."""
    return CheckpointError(
        f"{directory} could not be saved: {failure(error)}. Nothing saved before was touched. Free space on the disk "
        "or choose another output folder, then run again."
    )


def write_beside_weights(
    folder: Path,
    processor: Processor | None,
    ledger: Ledger | None,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any] | None,
) -> None:
    """Write what a checkpoint holds beside the model: as `write_checkpoint_folder` has it."""
    if processor is not None:
        save_processor(processor, folder)
    if ledger is not None:
        ledger.save(folder)
    if tensors or state is not None:
        (folder / TRAINING).mkdir(exist_ok=True)
    if tensors:
        write_tensors(tensors, folder / TRAINING)
    if state is not None:
        (folder / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def refuse_damaged(checkpoint: Path, mend: str) -> None:
    """Make sure that a checkpoint is as it was written, as far as it says; see `auxin.sums`.

    Raises:
        CheckpointError: it is gone, or a file of it is missing or has changed; `mend` says what to do.
    """
    if (reason := damage(checkpoint)) is not None:
        raise CheckpointError(f"{checkpoint} is damaged: {reason}. {mend}")


def copy_checkpoint(source: Path, directory: Path, ledger: Ledger) -> Path:
    """Copy the checkpoint folder `source` to `directory`, which appears complete, with the books `ledger` in place of
    its own. Returns `directory`."""
    with new_folder(directory) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        ledger.save(folder)
        write_sums(folder)
    return directory


def read_state(checkpoint: str | Path) -> dict[str, Any]:
    """The JSON part of a checkpoint's training state.

    Raises:
        CheckpointError: the folder is missing or has no (valid) training state.
    """
    path = existing_folder(checkpoint) / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{checkpoint} has no {STATE}: it is a model without training state. It can start a stage, "
            "but not resume one."
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} can't be read ({reason(error)}). Restore it or use another checkpoint."
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no mapping. Restore it or use another checkpoint.")
    state.pop(SUMMED, None)
    return state


def write_tensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write a training state's tensors into `folder`, from where they are in memory.

    torch.distributed.checkpoint, by which they are read, would copy them all first, and take longer
    (docs/results/checkpoint_cost.md).
    """
    packed: dict[str, Tensor] = {}
    taken: set[tuple[torch.device, int]] = set()
    for name, tensor in tensors.items():
        packed[name] = tensor.detach().contiguous()
        # The format refuses two tensors in one memory.
        memory = (tensor.device, packed[name].untyped_storage().data_ptr())
        if memory in taken:
            packed[name] = packed[name].clone()
        taken.add(memory)
    save_file(packed, folder / TENSORS_FILE, metadata={"format": "pt"})


def read_training(checkpoint: str | Path) -> dict[str, Tensor]:
    """The tensors in the `training/` of a checkpoint, on the CPU: all of the training state, but for what lies in
    pieces.

    Raises:
        CheckpointError: there are none, or a file is cut short or damaged.
    """
    stored = stored_training(checkpoint)
    return stored.read(*stored.shapes)


def stored_moments(checkpoint: str | Path) -> StoredTensors:
    """Where the optimizer's state of a checkpoint lies, whole or in pieces.

    Raises:
        CheckpointError: there is none, or a file is cut short or damaged.
    """
    folder = existing_folder(checkpoint)
    return stored_pieces(folder) if lies_in_pieces(folder) else stored_training(folder)


def stored_training(checkpoint: str | Path) -> StoredTensors:
    """Where the tensors in the `training/` of a checkpoint lie.

    Raises:
        CheckpointError: there are none, or a file is cut short or damaged.
    """
    folder = existing_folder(checkpoint) / TRAINING
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder} holds no tensors: the checkpoint has no optimizer state.")
    return StoredTensors(folder)


def load_optimizer(checkpoint: str | Path, model: PreTrainedModel, settings: TrainingSettings) -> AdamW:
    """AdamW over `model` with the moments of a checkpoint; parameters it has none for start fresh.

    Raises:
        CheckpointError: there are no moments, they are damaged, or they belong to a model of another structure.
    """
    optimizer = build_optimizer(model, settings)
    restore_optimizer(model, optimizer, stored_moments(checkpoint))
    return optimizer


def load_weights(checkpoint: str | Path, model: PreTrainedModel) -> None:
    """Copy weights, buffers and config of a checkpoint into `model`, which must have its structure; of a model with an
    adapter, that alone.

    Raises:
        CheckpointError: the folder is unusable, or its tensors have other names or shapes.
    """
    if has_adapter(model):
        load_adapter(Path(checkpoint), model)
        return
    folder = model_folder(checkpoint)
    target = dict(model.named_parameters()) | dict(model.named_buffers())
    if lies_in_pieces(folder):
        saved = edited_skeleton(load_config(folder), plain_class(model))
        pieces = pieces_of(folder, model)
        pieces.read_into({WEIGHT + name: target[name].detach() for name in tensor_names(model)})
    else:
        saved = load_model(folder, dtype=model.dtype, model_class=plain_class(model))
        source = dict(saved.named_parameters()) | dict(saved.named_buffers())
        shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (source, target)]
        _refuse_other_shapes(folder, *shapes)
        for name, tensor in target.items():
            fill(tensor, source[name])
    for name, module in model.named_modules():
        if isinstance(module, Brick):
            module.overwritten_with(saved.get_submodule(name))
    # Hooks may have changed config values (a scale under annealing) since the model was built.
    for key, value in saved.config.to_dict().items():
        if key not in ("transformers_version", "dtype", "architectures", "_name_or_path"):
            current = getattr(model.config, key, None)
            if current != value and isinstance(value, int | float | str | list | None):
                setattr(model.config, key, value)


def pieces_of(checkpoint: Path, model: PreTrainedModel) -> StoredTensors:
    """The pieces in a checkpoint, which must be those of `model`: weights and moments.

    Raises:
        CheckpointError: a file is damaged or missing, or the weights have other names or shapes.
    """
    pieces = stored_pieces(checkpoint)
    saved = {name: shape for name, shape in pieces.shapes.items() if name.startswith(WEIGHT)}
    _refuse_other_shapes(checkpoint, saved, {WEIGHT + name: shape for name, shape in shapes_of(model).items()})
    return pieces


def _refuse_other_shapes(
    checkpoint: Path, saved: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{checkpoint}: {name} has shape {saved.get(name)} there and {wanted.get(name)} in the model given "
                "(None: it does not exist). Give the model that this run was started with."
            )


def _move_into_place(folder: Path, target: Path) -> None:
    replaced = _replaced(target)
    if target.exists():
        target.rename(replaced)
    try:
        folder.rename(target)
    except OSError:
        _restore(target)
        raise
    try:
        flush(target.parent)
    finally:
        shutil.rmtree(replaced, ignore_errors=True)


def _replaced(target: Path) -> Path:
    """Where what is replaced by a new `target` lies for the moment between two renames."""
    return target.with_name(f".{target.name}.replaced")


def _restore(target: Path) -> None:
    """Undo half of a replacement; of a whole one, remove what was replaced."""
    replaced = _replaced(target)
    if replaced.exists() and not target.exists():
        replaced.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)
