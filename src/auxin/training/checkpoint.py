"""Checkpoint folders: written whole or not at all, named in `latest`, loadable by transformers.

Layout of a folder: the Hugging Face model at its root (config.json, model*.safetensors, tokenizer files); `training/`
with the tensors of the training state, written by torch.distributed.checkpoint as safetensors, and `state.json`; and
`ledger.json`. In a run's folder: `checkpoints/step-00000100/` and the file `latest`, which names the newest one.
"""

import contextlib
import json
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from auxin.accounting.ledger import Ledger
from auxin.data.dataset import Processor
from auxin.edits.saved import save_model
from auxin.errors import CheckpointError
from auxin.files import flush, flush_tree, write_text
from auxin.models.loading import existing_folder, load_model
from auxin.nn.bricks import Brick
from auxin.training.adapters import has_adapter, load_adapter
from auxin.training.optimizer import build_optimizer, optimizer_tensors, restore_optimizer
from auxin.training.settings import TrainingSettings

CHECKPOINTS = "checkpoints"
LATEST_FILE = "latest"
TRAINING = "training"
STATE_FILE = "state.json"

# CheckpointException wraps what happened on each rank and is no Exception.
_FAILURES = (OSError, SafetensorError, CheckpointException)


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


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
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        remove_folder(partial)
        (partial / TRAINING).mkdir(parents=True)
        save_model(model, partial)
        if processor is not None:
            processor.save_pretrained(partial)
        if ledger is not None:
            ledger.save(partial)
        training = dict(tensors or {})
        if optimizer is not None:
            training |= optimizer_tensors(model, optimizer)
        if training:
            _write_tensors(training, partial / TRAINING)
        if state is not None:
            (partial / TRAINING / STATE_FILE).write_text(_state_text(state), encoding="utf-8")
        if not any((partial / TRAINING).iterdir()):
            (partial / TRAINING).rmdir()
        flush_tree(partial)
        _move_into_place(partial, directory)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, _FAILURES):
            raise CheckpointError(
                f"{directory} could not be saved: {_reason(error)}. Nothing saved before was touched. Free space on "
                "the disk or choose another output folder, then run again."
            ) from error
        raise
    return directory


def name_latest(output_dir: Path, checkpoint: Path) -> None:
    """Name `checkpoint`, a folder in `output_dir`, as the newest one; a reader sees the old name or the new one."""
    path = output_dir / LATEST_FILE
    try:
        write_text(path, checkpoint.relative_to(output_dir).as_posix() + "\n")
        flush(output_dir)
    except OSError as error:
        raise CheckpointError(
            f"{checkpoint} was saved, but {path} could not be written: {error}. Free space on the disk, then run again."
        ) from error


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run's folder; None where nothing was saved yet.

    Raises:
        CheckpointError: `latest` names a folder that is not there.
    """
    output_dir = Path(output_dir)
    path = output_dir / LATEST_FILE
    if not path.is_file():
        return None
    name = path.read_text(encoding="utf-8").strip()
    checkpoint = output_dir / name
    if not name or not checkpoint.is_dir():
        others = sorted(folder.name for folder in (output_dir / CHECKPOINTS).glob("step-*"))
        raise CheckpointError(
            f"{path} names {name!r}, which does not exist. Write the name of an existing checkpoint into it "
            f"(there are: {', '.join(others) or 'none'}), or delete {path} to start over."
        )
    return checkpoint


def prune_checkpoints(output_dir: Path, keep: Collection[str]) -> None:
    """Remove all checkpoints of a run's folder but those named in `keep`, and what killed processes left unfinished."""
    for folder in (output_dir / CHECKPOINTS).glob("*"):
        if folder.name not in keep:
            remove_folder(folder)
    for folder in (output_dir / CHECKPOINTS).glob(".*"):
        shutil.rmtree(folder, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it is there, so that at no time half of it is seen under its name."""
    if folder.exists():
        doomed = _aside(folder)
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def read_state(checkpoint: str | Path) -> dict[str, Any]:
    """The JSON part of a checkpoint's training state.

    Raises:
        CheckpointError: the folder is missing or has no (valid) training state.
    """
    path = existing_folder(checkpoint) / TRAINING / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{checkpoint} has no {TRAINING}/{STATE_FILE}: it is a model without training state. It can start a stage, "
            "but not resume one."
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} can't be read ({error}). Restore it or use another checkpoint.") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no mapping. Restore it or use another checkpoint.")
    return state


def rewrite_state(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Replace the JSON part of a checkpoint's training state; a reader sees the old one or the whole new one."""
    write_text(checkpoint / TRAINING / STATE_FILE, _state_text(state))


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
    except (*_FAILURES, KeyError, ValueError) as error:
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
    saved = load_model(checkpoint, dtype=model.dtype, model_class=type(model))
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
                tensor.copy_(source[name])
    for name, module in model.named_modules():
        if isinstance(module, Brick):
            module.overwritten_with(saved.get_submodule(name))
    # Hooks may have changed config values (a scale under annealing) since the model was built.
    for key, value in saved.config.to_dict().items():
        if key not in ("transformers_version", "dtype", "architectures", "_name_or_path"):
            current = getattr(model.config, key, None)
            if current != value and isinstance(value, int | float | str | list | None):
                setattr(model.config, key, value)


def _state_text(state: Mapping[str, Any]) -> str:
    return json.dumps(state, indent=2) + "\n"


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Without torch.distributed, DCP warns at every call that it saves from one process, which is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _write_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    with _one_process():
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(path=str(folder)), no_dist=True)


def _move_into_place(folder: Path, target: Path) -> None:
    aside = _aside(target)
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        target.rename(aside)
    try:
        folder.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    try:
        flush(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _aside(folder: Path) -> Path:
    """Where a folder that is about to go is moved first."""
    return folder.with_name(f".{folder.name.lstrip('.')}.removed")


def _reason(error: BaseException) -> str:
    """One line that says what went wrong, from below the wrapper of torch.distributed.checkpoint."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
