"""Applying a plan to a checkpoint folder: tensors stream from the old files to the new ones, one at a time."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from auxin.accounting import count_parameters
from auxin.edits.executor import Receipt, check_finite, check_moment, map_moment, map_parameter
from auxin.edits.plan import ParameterChange, Plan, ResolvedPlan, parameter_names, resolve
from auxin.edits.promise import check_promise, default_probe, probe_logits, relative_change, tolerance
from auxin.edits.safetensors_file import TensorPlace, torch_dtype, write_safetensors
from auxin.errors import CheckpointError
from auxin.files import new_folder
from auxin.models.loading import load_config, load_model, skeleton

TRAINING_FOLDER = "training"
INDEX_ENDING = ".safetensors.index.json"
OLD_WEIGHTS = (".bin", ".bin.index.json", ".pth")
OPTIMIZER_TENSOR = re.compile(r"optimizer\.(?P<state>[^.]+)\.(?P<parameter>.+)")


def apply_to_checkpoint(
    plan: Plan,
    source_dir: str | Path,
    output_dir: str | Path,
    probe: Tensor | None = None,
    finish: Callable[[Path, Receipt], None] | None = None,
) -> Receipt:
    """Write the checkpoint that `plan` makes of the one in `source_dir` to `output_dir`.

    Weights (`*.safetensors`, in one file or several) and the optimizer's state (`training/*.safetensors`, tensors named
    `optimizer.<state>.<parameter>`) are read, changed and written one tensor at a time, bit by bit as `apply` would
    have it; every other file (tokenizer, ledger, ...) is copied, but for older copies of the weights (`*.bin`, `*.pth`)
    in the folder itself. The folder appears under its name when it is complete
    and the promise was checked, by loading the old model and, after it, the new one.

    Args:
        plan: what to do.
        source_dir: a checkpoint folder of a causal language model, as `save_pretrained` writes it.
        output_dir: a folder that does not exist or is empty, and does not lie in `source_dir`.
        probe: token ids (batch, sequence) on which the promise is checked; default: two random sequences.
        finish: called with the complete folder, before it takes its name, and the receipt; writes what else belongs
            into it.

    Raises:
        CheckpointError: the source can't be read or the output is in use.
        PlanError, PromiseError: as `apply`; nothing is left behind.
    """
    start = time.perf_counter()
    source, output = Path(source_dir), Path(output_dir)
    _check_folders(source, output)
    before = skeleton(load_config(source))
    resolved = resolve(plan, before)
    rewrites = _Rewrites(plan, resolved, source)
    rewrites.check()
    probe = default_probe(plan, before) if probe is None else probe
    # The old model is gone before the new one is loaded.
    reference, allowed = _logits(source, probe)
    with new_folder(output) as folder:
        _copy_other_files(source, folder, rewrites)
        rewrites.write(folder)
        config = resolved.after.config
        config.architectures = before.config.architectures
        config.save_pretrained(folder)
        change = relative_change(reference, _logits(folder, probe)[0])
        check_promise(plan, change, allowed)
        receipt = Receipt(
            plan=plan,
            parameters_before=count_parameters(before).total,
            parameters_after=count_parameters(resolved.after).total,
            max_relative_change=change,
            tolerance=allowed,
            seconds=time.perf_counter() - start,
        )
        if finish is not None:
            finish(folder, receipt)
    return receipt


class _Rewrites:
    """The safetensors files of a checkpoint and what the plan does to each tensor in them."""

    def __init__(self, plan: Plan, resolved: ResolvedPlan, source: Path) -> None:
        self.seed, self.source = plan.seed, source
        names = parameter_names(resolved.before)
        self._changes = {alias: change for name, change in resolved.changes.items() for alias in names[name]}
        self._canonical = resolved.changes
        self.weights = sorted(source.glob("*.safetensors"))
        self.training = sorted((source / TRAINING_FOLDER).glob("*.safetensors"))

    def files(self) -> set[Path]:
        """The files that are rewritten and not copied: relative paths."""
        return {path.relative_to(self.source) for path in (*self.weights, *self.training, *self._indices())}

    def _indices(self) -> list[Path]:
        return [path for folder in ("", TRAINING_FOLDER) for path in (self.source / folder).glob(f"*{INDEX_ENDING}")]

    def check(self) -> None:
        """Read everything once: a checkpoint that can't be changed is refused before a byte is written."""
        found: set[str] = set()
        for path in self.weights:
            for name, tensor in _tensors(path):
                check_finite(name, tensor)
                if change := self._changes.get(name):
                    found.add(change.name)
                    if tuple(tensor.shape) != change.old_shape:
                        raise CheckpointError(
                            f"{path}: {name} has shape {list(tensor.shape)}, but config.json says "
                            f"{list(change.old_shape)}. The folder mixes two models."
                        )
        if missing := sorted(set(self._canonical) - found):
            raise CheckpointError(f"{self.source} holds no tensor {missing[0]}. The checkpoint is incomplete.")
        for path in self.training:
            _refuse_sharded(path)
            for name, tensor in _tensors(path):
                if moment := self._moment(name):
                    check_moment(*moment, tensor)

    def write(self, output: Path) -> None:
        """Write the changed files below `output`."""
        for path in self.weights:
            self._rewrite(path, output / path.name, self._new_parameter)
        for path in self.training:
            self._rewrite(path, output / TRAINING_FOLDER / path.name, self._new_state)
        for path in self._indices():
            self._write_index(path, output / path.relative_to(self.source))

    def _rewrite(self, source: Path, target: Path, new_tensor: Any) -> None:
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata()
            places = [TensorPlace(name, *self._place(name, file)) for name in file.offset_keys()]
        write_safetensors(target, places, (new_tensor(name, tensor) for name, tensor in _tensors(source)), metadata)

    def _place(self, name: str, file: Any) -> tuple[str, tuple[int, ...]]:
        """Data type and shape that the tensor called `name` will have."""
        piece = file.get_slice(name)
        shape = tuple(piece.get_shape())
        moment = self._moment(name)
        change = moment[0] if moment else self._changes.get(name)
        return piece.get_dtype(), change.shapes[-1] if change and shape == change.old_shape else shape

    def _new_parameter(self, name: str, tensor: Tensor) -> Tensor:
        change = self._changes.get(name)
        return map_parameter(change, tensor, self.seed) if change else tensor

    def _new_state(self, name: str, tensor: Tensor) -> Tensor:
        moment = self._moment(name)
        return map_moment(*moment, tensor) if moment else tensor

    def _moment(self, name: str) -> tuple[ParameterChange, str] | None:
        match = OPTIMIZER_TENSOR.fullmatch(name)
        change = self._changes.get(match["parameter"]) if match else None
        return (change, match["state"]) if match and change else None

    def _write_index(self, source: Path, target: Path) -> None:
        index = json.loads(source.read_text(encoding="utf-8"))
        total = 0
        for path in {target.parent / name for name in index.get("weight_map", {}).values()}:
            with safe_open(path, framework="pt") as file:
                total += sum(_bytes(file.get_slice(name)) for name in file.offset_keys())
        index.setdefault("metadata", {})["total_size"] = total
        target.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _check_folders(source: Path, output: Path) -> None:
    if not (source / "config.json").is_file():
        raise CheckpointError(f"{source} is no checkpoint: it holds no config.json. Give the folder of a saved model.")
    if not any(source.glob("*.safetensors")):
        raise CheckpointError(
            f"{source} holds no *.safetensors file. Convert its weights first: load the model and call save_pretrained."
        )
    if output.resolve().is_relative_to(source.resolve()) and output.resolve() != source.resolve():
        raise CheckpointError(f"{output} lies in the folder that is read, {source}. Choose another output folder.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} exists and is not empty. Choose another output folder, or remove it.")


def _copy_other_files(source: Path, target: Path, rewrites: _Rewrites) -> None:
    rewritten = rewrites.files()

    def ignore(folder: str, names: list[str]) -> list[str]:
        stale = names if Path(folder) == source else []  # weights that would stay those of the old model
        return [
            *(name for name in names if (Path(folder) / name).relative_to(source) in rewritten),
            *(name for name in stale if name.endswith(OLD_WEIGHTS)),
        ]

    shutil.copytree(source, target, ignore=ignore, dirs_exist_ok=True)


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.offset_keys():
                torch_dtype(name, file.get_slice(name).get_dtype())
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"{path} can't be read: {error}. Restore it from an earlier checkpoint.") from error


def _refuse_sharded(path: Path) -> None:
    """Training state written by several processes holds pieces of tensors, which can't be changed one by one."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    for text in metadata.values():
        if '"saved_offsets"' not in text:
            continue
        if any(any(place.get("saved_offsets", ())) for place in json.loads(text).values()):
            raise CheckpointError(
                f"{path} holds pieces of tensors of a sharded run. Save the checkpoint from one process first."
            )


def _logits(folder: Path, probe: Tensor) -> tuple[Tensor, float]:
    """The logits of the model in `folder` on `probe`, and the change that its data type allows."""
    model = load_model(folder)
    return probe_logits(model, probe), tolerance(model)


def _bytes(piece: Any) -> int:
    return TensorPlace("", piece.get_dtype(), tuple(piece.get_shape())).num_bytes
