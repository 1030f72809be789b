"""Applying a plan to a checkpoint folder: tensors stream from the old files to the new ones, one at a time."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from auxin.accounting import count_parameters
from auxin.edits import replay  # noqa: F401 - edited checkpoints load
from auxin.edits.executor import Receipt, blend, check_finite, check_moment, continuation, map_moment, map_parameter
from auxin.edits.fresh import FreshValues
from auxin.edits.plan import Plan
from auxin.edits.promise import Probe, check_promise, default_probe, probe_logits, relative_change, tolerance
from auxin.edits.resolution import Origin, ResolvedPlan, resolve, shapes_of, tensor_names
from auxin.edits.safetensors_file import DTYPES, TensorPlace, torch_dtype, write_safetensors
from auxin.edits.structure import edited_skeleton
from auxin.errors import CheckpointError
from auxin.files import new_folder
from auxin.models.loading import load_config, load_model

TRAINING_FOLDER = "training"
INDEX_ENDING = ".safetensors.index.json"
OLD_WEIGHTS = (".bin", ".bin.index.json", ".pth")
SAVED_OFFSETS = '"saved_offsets"'
OPTIMIZER_TENSOR = re.compile(r"optimizer\.(?P<state>[^.]+)\.(?P<parameter>.+)")


def apply_to_checkpoint(
    plan: Plan,
    source_dir: str | Path,
    output_dir: str | Path,
    probe: Probe | None = None,
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
        source_dir: a checkpoint folder of a transformers model, as `save_pretrained` writes it.
        output_dir: a folder that does not exist or is empty, and does not lie in `source_dir`.
        probe: token ids (batch, sequence) on which the promise is checked, or the model's inputs by name; default: two
            random sequences or images.
        finish: called with the complete folder, before it takes its name, and the receipt; writes what else belongs
            into it.

    Raises:
        CheckpointError: the source can't be read or the output is in use.
        PlanError, PromiseError: as `apply`; nothing is left behind.
    """
    start = time.perf_counter()
    plan.refuse_estimate()
    source, output = Path(source_dir), Path(output_dir)
    _check_folders(source, output)
    before = edited_skeleton(load_config(source))
    resolved = resolve(plan.edits, before)
    rewrites = _Rewrites(plan, resolved, source)
    rewrites.check()
    probe = default_probe(plan, before) if probe is None else probe
    # The old model is gone before the new one is loaded.
    reference, allowed = _logits(source, probe, plan.vocabulary)
    with new_folder(output) as folder:
        _copy_other_files(source, folder, rewrites)
        rewrites.write(folder)
        config = resolved.after.config
        config.architectures = before.config.architectures
        config.save_pretrained(folder)
        change = relative_change(reference, _logits(folder, probe, plan.vocabulary)[0])
        check_promise(plan, change, allowed)
        receipt = Receipt(
            plan=plan,
            parameters_before=count_parameters(before).total,
            parameters_after=count_parameters(resolved.after).total,
            max_relative_change=change,
            tolerance=allowed,
            continuation=continuation(resolved),
            seconds=time.perf_counter() - start,
        )
        if finish is not None:
            finish(folder, receipt)
    return receipt


@dataclass
class _Output:
    """A tensor that will be written."""

    place: TensorPlace
    make: Callable[[], Tensor]


class _Rewrites:
    """The safetensors files of a checkpoint, and what the plan makes of the tensors in them."""

    def __init__(self, plan: Plan, resolved: ResolvedPlan, source: Path) -> None:
        self.seed, self.source, self.resolved = plan.seed, source, resolved
        self._names = tensor_names(resolved.before)
        self._canonical = {alias: name for name, aliases in self._names.items() for alias in aliases}
        self._fresh = FreshValues(resolved, plan.seed)
        self.weights = sorted(source.glob("*.safetensors"))
        self.training = sorted((source / TRAINING_FOLDER).glob("*.safetensors"))
        self._files = {name: path for path in self.weights for name in _names_in(path)}
        self._loaded_as = _names_after_loading(resolved.before, self._files)
        self._stored: dict[str, list[str]] = {name: [] for name in self._names}
        for name, alias in self._loaded_as.items():
            if alias in self._canonical:
                self._stored[self._canonical[alias]].append(name)
        self._heirs: dict[str, list[str]] = {}
        for name, origin in resolved.origins.items():
            if origin.source is not None:
                self._heirs.setdefault(origin.source, []).append(name)

    def files(self) -> set[Path]:
        """The files that are rewritten and not copied: relative paths."""
        return {path.relative_to(self.source) for path in (*self.weights, *self.training, *self._indices())}

    def _indices(self) -> list[Path]:
        return [path for folder in ("", TRAINING_FOLDER) for path in (self.source / folder).glob(f"*{INDEX_ENDING}")]

    def check(self) -> None:
        """Read everything once: a checkpoint that can't be changed is refused before a byte is written."""
        shapes = shapes_of(self.resolved.before)
        for path in self.weights:
            for name, tensor in _tensors(path):
                check_finite(name, tensor)
                known = self._canonical.get(self._loaded_as[name])
                if known is not None and tuple(tensor.shape) != shapes[known]:
                    raise CheckpointError(
                        f"{path}: {name} has shape {list(tensor.shape)}, but config.json says {list(shapes[known])}. "
                        "The folder mixes two models."
                    )
        needed = {
            source
            for name, origin in self.resolved.origins.items()
            for _, source in origin.sources
            if not self._passes(name, origin)
        }
        if missing := sorted(name for name in needed if not self._stored[name]):
            raise CheckpointError(
                f"{self.source} holds no tensor {missing[0]}. The checkpoint is incomplete, or keeps its tensors in "
                "another form: load the model, apply the plan to it and save it."
            )
        for path in self.training:
            _refuse_sharded(path)
            for name, tensor in _tensors(path):
                if moment := self._moment(name):
                    state, parameter = moment
                    for heir in self._heirs.get(parameter, []):
                        check_moment(self.resolved.origins[heir], state, parameter, tensor)

    def _passes(self, name: str, origin: Origin) -> bool:
        """Whether a parameter stays as it is and lies in the files in another form (experts one by one): its tensors,
        in the same layer and of names that the model does not have, are copied as they are."""
        if origin.source != name or origin.steps or self._stored[name]:
            return False
        layer = re.match(r"(?:.*?\.)??\d+\.", name)
        unknown = (stored for stored, alias in self._loaded_as.items() if alias not in self._canonical)
        return layer is not None and any(stored.startswith(layer[0]) for stored in unknown)

    def write(self, output: Path) -> None:
        """Write the changed files below `output`."""
        outputs = self._weight_outputs()
        for path in self.weights:
            self._write_file(path, output / path.name, outputs[path])
        for path in self.training:
            self._write_file(path, output / TRAINING_FOLDER / path.name, self._training_outputs(path))
        for path in self._indices():
            self._write_index(path, output / path.relative_to(self.source))

    def _weight_outputs(self) -> dict[Path, list[_Output]]:
        """The tensors of every file: each goes where its first old one was, a fresh one to its neighbours."""
        outputs: dict[Path, list[_Output]] = {path: [] for path in self.weights}
        aliases = tensor_names(self.resolved.after)
        path = self.weights[0]
        for name, origin in self.resolved.origins.items():
            if self._passes(name, origin):
                continue
            stored = self._stored[origin.sources[0][1]] if origin.sources else []
            path = self._files[stored[0]] if stored else path
            dtype = self._dtype(stored[0]) if stored else self._dtype_in(path, name)
            kept = [alias for alias in stored if self._loaded_as[alias] in aliases[name]]
            for new in kept or [self._unshared(aliases[name])]:
                make = partial(self._new_parameter, name, origin, torch_dtype(name, dtype))
                outputs[path].append(_Output(TensorPlace(new, dtype, origin.shape), make))
        written = {output.place.name for found in outputs.values() for output in found}
        for name, file in self._files.items():
            if self._loaded_as[name] not in self._canonical and name not in written:
                outputs[file].append(self._unchanged(file, name))
        return outputs

    def _training_outputs(self, path: Path) -> list[_Output]:
        outputs = []
        with safe_open(path, framework="pt") as file:
            for name in file.offset_keys():
                moment = self._moment(name)
                if moment is None:
                    outputs.append(self._unchanged(path, name))
                    continue
                state, parameter = moment
                piece = file.get_slice(name)
                shape = tuple(piece.get_shape())
                for heir in self._heirs.get(parameter, []):
                    origin = self.resolved.origins[heir]
                    if origin.fresh_moments:
                        continue
                    new_shape = origin.shape if shape == origin.old_shape and shape else shape
                    make = partial(self._new_moment, path, name, origin, state, parameter)
                    place = TensorPlace(f"optimizer.{state}.{heir}", piece.get_dtype(), new_shape)
                    outputs.append(_Output(place, make))
        return outputs

    def _unchanged(self, path: Path, name: str) -> _Output:
        with safe_open(path, framework="pt") as file:
            piece = file.get_slice(name)
            place = TensorPlace(name, piece.get_dtype(), tuple(piece.get_shape()))
        return _Output(place, partial(_tensor, path, name))

    def _new_parameter(self, name: str, origin: Origin, dtype: torch.dtype) -> Tensor:
        if not origin.sources:
            value = self._fresh.value(name, origin)
            return value.to(dtype) if value.is_floating_point() else value
        return map_parameter(origin, blend(origin, self._old), self.seed)

    def _old(self, name: str) -> Tensor:
        stored = self._stored[name][0]
        return _tensor(self._files[stored], stored)

    def _new_moment(self, path: Path, name: str, origin: Origin, state: str, parameter: str) -> Tensor:
        return map_moment(origin, state, parameter, _tensor(path, name))

    def _moment(self, name: str) -> tuple[str, str] | None:
        """State and old parameter (the first of its names) that the training tensor called `name` belongs to."""
        match = OPTIMIZER_TENSOR.fullmatch(name)
        parameter = self._canonical.get(match["parameter"]) if match else None
        return (match["state"], parameter) if match and parameter else None

    def _dtype(self, name: str) -> str:
        with safe_open(self._files[name], framework="pt") as file:
            return str(file.get_slice(name).get_dtype())

    def _dtype_in(self, path: Path, name: str) -> str:
        """The type in which a fresh tensor is written: that of the weights around it."""
        placeholder = self._fresh.placeholder(name)
        with safe_open(path, framework="pt") as file:
            types = {str(file.get_slice(key).get_dtype()) for key in file.offset_keys()}
        floating = sorted(dtype for dtype in types if torch_dtype(name, dtype).is_floating_point)
        if placeholder.is_floating_point() and floating:
            return floating[0]
        return next(key for key, dtype in DTYPES.items() if dtype == placeholder.dtype)

    def _unshared(self, aliases: list[str]) -> str:
        """The name under which transformers saves a tensor of several names."""
        shared = self.resolved.after.all_tied_weights_keys
        return next((alias for alias in aliases if alias not in shared), aliases[0])

    def _write_file(self, source: Path, target: Path, outputs: list[_Output]) -> None:
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata()
        places = [output.place for output in outputs]
        write_safetensors(target, places, (output.make() for output in outputs), _metadata_for(metadata, places))

    def _write_index(self, source: Path, target: Path) -> None:
        index = json.loads(source.read_text(encoding="utf-8"))
        total, places = 0, {}
        for path in sorted({target.parent / name for name in index.get("weight_map", {}).values()}):
            with safe_open(path, framework="pt") as file:
                for name in file.offset_keys():
                    total += _bytes(file.get_slice(name))
                    places[name] = path.name
        index["weight_map"] = dict(sorted(places.items()))
        index.setdefault("metadata", {})["total_size"] = total
        target.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _names_after_loading(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """The name in the model of every tensor in the files: transformers renames some on loading, and back on saving."""
    renamings = [item for item in get_model_conversion_mapping(model) if isinstance(item, WeightRenaming)]
    names = set(model.state_dict())
    found: dict[str, str] = {}
    for name in stored:
        alias = name
        for renaming in () if name in names else renamings:
            alias = renaming.rename_source_key(alias)[0]
        found[name] = alias
    return found


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


def _tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _names_in(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.offset_keys())
    except SafetensorError as error:
        raise CheckpointError(f"{path} can't be read: {error}. Restore it from an earlier checkpoint.") from error


def _metadata_for(metadata: dict[str, str] | None, places: list[TensorPlace]) -> dict[str, str] | None:
    """The file's metadata; what torch.distributed.checkpoint notes there of every tensor is noted of the new ones."""
    return {
        key: json.dumps({place.name: {"saved_offsets": [0] * len(place.shape)} for place in places})
        if SAVED_OFFSETS in text
        else text
        for key, text in (metadata or {}).items()
    } or None


def _refuse_sharded(path: Path) -> None:
    """Training state written by several processes holds pieces of tensors, which can't be changed one by one."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    for text in metadata.values():
        if SAVED_OFFSETS not in text:
            continue
        if any(any(place.get("saved_offsets", ())) for place in json.loads(text).values()):
            raise CheckpointError(
                f"{path} holds pieces of tensors of a sharded run. Save the checkpoint from one process first."
            )


def _logits(folder: Path, probe: Probe, vocabulary: int | None) -> tuple[Tensor, float]:
    """The logits of the model in `folder` on `probe`, and the change that its data type allows."""
    model = load_model(folder)
    return probe_logits(model, probe, vocabulary), tolerance(model)


def _bytes(piece: Any) -> int:
    return TensorPlace("", piece.get_dtype(), tuple(piece.get_shape())).num_bytes
