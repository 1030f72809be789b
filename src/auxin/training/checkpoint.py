"""Checkpoint folders: written whole or not at all, loadable by transformers.

Layout of a folder: the Hugging Face model at its root (config.json, the weights as safetensors under the names of
`auxin.models.weight_files`, tokenizer files); `training/` with the tensors of the training state as safetensors, which
torch.distributed.checkpoint reads, and `state.json`; `ledger.json`; and `SHA256SUMS`, by which a damaged one is known
(`auxin.sums`). It is not changed after it was written.
"""

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from auxin.accounting.ledger import Ledger
from auxin.data.dataset import Processor, save_processor
from auxin.edits.saved import save_model
from auxin.errors import CheckpointError, first_line, reason
from auxin.files import flush, flush_tree, new_folder, temporary_folder
from auxin.models.adapters import has_adapter
from auxin.models.folders import existing_folder
from auxin.models.loading import load_model
from auxin.nn.bricks import Brick
from auxin.sums import STATE, SUMMED, write_sums
from auxin.training.adapters import load_adapter
from auxin.training.optimizer import build_optimizer, optimizer_tensors, restore_optimizer
from auxin.training.settings import TrainingSettings
from auxin.training.strategies import in_pieces_like, plain_class

TRAINING = STATE.parent
TENSORS_FILE = "state.safetensors"

# CheckpointException wraps what happened on each rank and is no Exception.
_FAILURES = (OSError, SafetensorError, CheckpointException)


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
    directory = Path(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _restore(directory)
        with temporary_folder(directory) as partial:
            (partial / TRAINING).mkdir()
            save_model(model, partial)
            if processor is not None:
                save_processor(processor, partial)
            if ledger is not None:
                ledger.save(partial)
            training = dict(tensors or {})
            if optimizer is not None:
                training |= optimizer_tensors(model, optimizer)
            if training:
                write_tensors(training, partial / TRAINING)
            if state is not None:
                (partial / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            if not any((partial / TRAINING).iterdir()):
                (partial / TRAINING).rmdir()
            write_sums(partial)
            flush_tree(partial)
            _move_into_place(partial, directory)
    except _FAILURES as error:
        raise CheckpointError(
            f"{directory} could not be saved: {_reason(error)}. Nothing saved before was touched. Free space on "
            "the disk or choose another output folder, then run again."
        ) from error
    return directory


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


def read_tensors(checkpoint: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's training state, on the CPU.

    Raises:
        CheckpointError: there are none, or a file is cut short or damaged.
    """
    folder = existing_folder(checkpoint) / TRAINING
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder} holds no tensors: the checkpoint has no optimizer state.")
    try:
        reader = HuggingFaceStorageReader(str(folder))
        metadata = reader.read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(item.size, dtype=item.properties.dtype)
            for name, item in metadata.items()
            if isinstance(item, TensorStorageMetadata)
        }
        with _one_process():
            dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
    except (*_FAILURES, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        _raise_what_is_no_error(error)
        raise CheckpointError(
            f"{folder} is damaged: {_reason(error)}. Restore it or use another checkpoint."
        ) from error
    return tensors


def load_optimizer(checkpoint: str | Path, model: PreTrainedModel, settings: TrainingSettings) -> AdamW:
    """AdamW over `model` with the moments of a checkpoint; parameters it has none for start fresh.

    Raises:
        CheckpointError: there are no moments, they are damaged, or they belong to a model of another structure.
    """
    optimizer = build_optimizer(model, settings)
    restore_optimizer(model, optimizer, read_tensors(checkpoint))
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
    saved = load_model(checkpoint, dtype=model.dtype, model_class=plain_class(model))
    for kind in ("named_parameters", "named_buffers"):
        source = dict(getattr(saved, kind)())
        target = dict(getattr(model, kind)())
        for name in sorted(source.keys() | target.keys()):
            shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (source, target)]
            if shapes[0] != shapes[1]:
                raise CheckpointError(
                    f"{checkpoint}: {name} has shape {shapes[0]} there and {shapes[1]} in the model given (None: it "
                    "does not exist). Give the model that this run was started with."
                )
        with torch.no_grad():
            for name, tensor in target.items():
                tensor.copy_(in_pieces_like(source[name], tensor))
    for name, module in model.named_modules():
        if isinstance(module, Brick):
            module.overwritten_with(saved.get_submodule(name))
    # Hooks may have changed config values (a scale under annealing) since the model was built.
    for key, value in saved.config.to_dict().items():
        if key not in ("transformers_version", "dtype", "architectures", "_name_or_path"):
            current = getattr(model.config, key, None)
            if current != value and isinstance(value, int | float | str | list | None):
                setattr(model.config, key, value)


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Without torch.distributed, DCP warns at every call that it saves from one process, which is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


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


def _raise_what_is_no_error(error: BaseException) -> None:
    """Raise what torch.distributed.checkpoint has wrapped as if it were a failure: an interrupt, an exit."""
    for failure, _ in error.failures.values() if isinstance(error, CheckpointException) else ():
        if not isinstance(failure, Exception):
            raise failure from None


def _reason(error: BaseException) -> str:
    """One line that says what went wrong, from below the wrapper of torch.distributed.checkpoint."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return first_line(error).rstrip(".")
