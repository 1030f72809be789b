"""A checkpoint's folder as the place where tensors are carried from and to: they stream from old files to new ones."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from auxin.edits.carry import Carrier, OnDemand
from auxin.edits.origin import Origin
from auxin.edits.resolution import ResolvedPlan
from auxin.edits.safetensors_file import SafetensorsWriter, torch_dtype
from auxin.edits.tensor_names import saved_name, shapes_of, tensor_names
from auxin.errors import CheckpointError, reason
from auxin.models.stored_form import StoredForm
from auxin.models.weight_files import INDEX_ENDING, read_tensor, weight_files, weight_map
from auxin.nn.bricks import is_wide, wide_type

TRAINING_FOLDER = "training"
SAVED_OFFSETS = '"saved_offsets"'
OPTIMIZER_TENSOR = re.compile(r"optimizer\.(?P<state>[^.]+)\.(?P<parameter>.+)")


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies, and what its file's header says of it."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def tensor(self) -> Tensor:
        return read_tensor(self.file, self.name)


class FolderStore:
    """The weights of a checkpoint (the `*.safetensors` that `from_pretrained` reads), the optimizer's state (tensors
    named `optimizer.<state>.<parameter>` in `training/*.safetensors`), and the files that the plan makes of them.

    Every tensor goes into the file of the same name in which its first old one was, a fresh one to its neighbours; a
    file's other tensors are copied. What lies in the files under other names than in the model, or in pieces (experts
    one by one), does so in the new ones. The new files are whole after `close`.

    Args:
        source: the checkpoint's folder.
        resolved: the plan.

    Raises:
        CheckpointError: a file can't be read.
    """

    def __init__(self, source: Path, resolved: ResolvedPlan) -> None:
        self.source, self.resolved = source, resolved
        names = tensor_names(resolved.before)
        self._canonical = {alias: name for name, aliases in names.items() for alias in aliases}
        self._aliases = tensor_names(resolved.after)
        self._weights = weight_files(source)
        self._training = sorted((source / TRAINING_FOLDER).glob("*.safetensors"))
        self._metadata: dict[Path, dict[str, str]] = {}
        self._places = {place.name: place for path in self._weights for place in self._places_in(path)}
        self._form, self._new_form = StoredForm(resolved.before), StoredForm(resolved.after)
        self._loaded_as = {name: self._form.loaded_as(name) for name in self._places}
        self._stored: dict[str, list[str]] = {name: [] for name in names}
        for name, alias in self._loaded_as.items():
            if alias in self._canonical:
                self._stored[self._canonical[alias]].append(name)
        unknown = [name for name, alias in self._loaded_as.items() if alias not in self._canonical]
        self._pieces = {
            name: pieces
            for name, pieces in self._form.pieces(unknown).items()
            if name in self._stored and not self._stored[name]
        }
        self._any_other_form = bool(self._pieces) or any(name != alias for name, alias in self._loaded_as.items())
        self._states: dict[str, dict[str, _Place]] = {}
        self._other_training: list[_Place] = []
        for path in self._training:
            for place in self._places_in(path):
                match = OPTIMIZER_TENSOR.fullmatch(place.name)
                parameter = self._canonical.get(match["parameter"]) if match else None
                if match and parameter:
                    self._states.setdefault(parameter, {})[match["state"]] = place
                else:
                    self._other_training.append(place)
        self._homes = self._found_homes()
        passing = resolved.origins.keys() - self._homes.keys()
        self._other_training += [place for name in passing for place in self._states.get(name, {}).values()]
        self._writers: dict[Path, SafetensorsWriter] = {}

    def read(self, name: str) -> Tensor:
        """The old tensor called `name`."""
        if name in self._pieces:
            return self._form.merged(name, {piece: self._places[piece].tensor() for piece in self._pieces[name]})
        return self._places[self._stored[name][0]].tensor()

    def states(self, name: str) -> Mapping[str, Tensor]:
        """The optimizer's state of the parameter called `name`; its tensors are read when they are asked for."""
        places = self._states.get(name, {})
        return OnDemand(places, lambda state: places[state].tensor())

    def order(self) -> Iterable[str]:
        """File by file."""
        return sorted(self._homes, key=lambda name: self._weights.index(self._homes[name]))

    def write(self, name: str, carrier: Carrier) -> None:
        """Write the new tensor called `name`, and the optimizer's state for it."""
        origin, home = carrier.origin(name), self._homes[name]
        value = carrier.value(name)
        stored = self._stored[origin.reads[0]] if origin.reads else []
        if origin.is_fresh and value.is_floating_point():
            dtype = self._floating_type_in(home, value.dtype)
            value = value.to(wide_type(dtype) if is_wide(self.resolved.after, name) else dtype)
        # A tensor of several names may lie in the file under each of them.
        kept = [alias for alias in stored if self._loaded_as[alias] in self._aliases[name]]
        parts = dict.fromkeys(kept, value) or self._in_files(name, origin, value)
        for new, part in parts.items():
            self._writers[home].add(new, part)
        for state, tensor in carrier.states(name).items():
            place = next(places[state] for old in origin.reads if state in (places := self._states.get(old, {})))
            self._writers[place.file].add(f"optimizer.{state}.{name}", tensor)

    def names(self) -> Iterator[str]:
        """The old tensors that the weights hold."""
        return (name for name, stored in self._stored.items() if stored or name in self._pieces)

    def check(self) -> None:
        """Refuse files that don't hold what the config says.

        Raises:
            CheckpointError: a tensor of another shape, one that is missing, or pieces of tensors of a sharded run.
        """
        shapes = shapes_of(self.resolved.before)
        for name, stored in self._stored.items():
            for place in (self._places[alias] for alias in stored):
                if place.shape != shapes[name]:
                    raise CheckpointError(
                        f"{place.file}: {place.name} has shape {list(place.shape)}, but config.json says "
                        f"{list(shapes[name])}. The folder mixes two models."
                    )
        for name, pieces in self._pieces.items():
            empty = {piece: torch.empty(self._places[piece].shape, device="meta") for piece in pieces}
            if (shape := tuple(self._form.merged(name, empty).shape)) != shapes[name]:
                raise CheckpointError(
                    f"{self.source}: {pieces[0]} and {len(pieces) - 1} more make {name} of shape {list(shape)}, but "
                    f"config.json says {list(shapes[name])}. The folder mixes two models, or is incomplete."
                )
        needed = {old for name in self._homes for old in self.resolved.origins[name].reads}
        if missing := sorted(needed - set(self.names())):
            raise CheckpointError(
                f"{self.source} holds no tensor {missing[0]}. The checkpoint is incomplete, or keeps its tensors in "
                "another form: load the model, apply the plan to it and save it."
            )
        for path in self._training:
            _refuse_sharded(path, self._metadata[path])

    def files(self) -> set[Path]:
        """The files that are rewritten and not copied: relative paths."""
        return {path.relative_to(self.source) for path in (*self._weights, *self._training, *self._indices())}

    def open(self, output: Path) -> None:
        """Begin the new files below the folder `output`."""
        (output / TRAINING_FOLDER).mkdir(exist_ok=True) if self._training else None
        new = [alias for aliases in self._aliases.values() for alias in aliases]
        after = self.resolved.after.state_dict()
        parts = [
            part for name in self._homes for part in self._in_files(name, self.resolved.origins[name], after[name])
        ]
        states = {state for places in self._states.values() for state in places}
        for path in (*self._weights, *self._training):
            own = [place.name for place in (*self._places.values(), *self._other_training) if place.file == path]
            made = (
                [*new, *parts]
                if path in self._weights
                else [f"optimizer.{state}.{name}" for state in states for name in new]
            )
            room = sum(len(json.dumps([key, text])) for key, text in self._metadata[path].items())
            notes = sum(len(name) + 64 for name in made)
            target = output / path.relative_to(self.source)
            self._writers[path] = SafetensorsWriter(target, [*own, *made], room + notes)

    def close(self, output: Path) -> None:
        """Add what stays as it is, and make whole files of those that `open` began."""
        for place in (*self._left_alone(), *self._other_training):
            self._writers[place.file].add(place.name, place.tensor())
        for path, writer in self._writers.items():
            with writer:  # a short header would else stay in the buffer, and the file be read without it
                writer.finish(_metadata_for(self._metadata[path], writer))
        for path in self._indices():
            _write_index(path, output / path.relative_to(self.source))

    def _left_alone(self) -> Iterator[_Place]:
        """The tensors that the model does not know by their names, and pieces of tensors that stay as they are."""
        taken = {alias for aliases in self._aliases.values() for alias in aliases}
        passing = self.resolved.origins.keys() - self._homes.keys()
        taken |= {piece for name, pieces in self._pieces.items() if name not in passing for piece in pieces}
        for name, place in self._places.items():
            if self._loaded_as[name] not in self._canonical and name not in taken:
                yield place

    def _places_in(self, path: Path) -> list[_Place]:
        try:
            with safe_open(path, framework="pt") as file:
                self._metadata[path] = file.metadata() or {}
                pieces = {name: file.get_slice(name) for name in file.offset_keys()}
                return [
                    _Place(path, name, torch_dtype(name, piece.get_dtype()), tuple(piece.get_shape()))
                    for name, piece in pieces.items()
                ]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} can't be read: {reason(error)}. Restore it from an earlier checkpoint."
            ) from error

    def _found_homes(self) -> dict[str, Path]:
        """The file of every new tensor that is written."""
        homes: dict[str, Path] = {}
        path = self._weights[0]
        made = set(self.resolved.after._keys_to_ignore_on_save or ())  # whenever it is built, and never saved
        for name, origin in self.resolved.origins.items():
            if not self._passes(name, origin) and name not in made:
                stored = self._lying_as(origin)
                path = self._places[stored[0]].file if stored else path
                homes[name] = path
        return homes

    def _passes(self, name: str, origin: Origin) -> bool:
        """Whether a parameter stays as it is and lies in the files in another form (experts one by one): its pieces,
        or tensors in the same layer and of names that the model does not have, are copied as they are."""
        if origin.kept != name or origin.steps or self._stored[name]:
            return False
        if name in self._pieces:
            return True
        layer = re.match(r"(?:.*?\.)??\d+\.", name)
        unknown = (stored for stored, alias in self._loaded_as.items() if alias not in self._canonical)
        return layer is not None and any(stored.startswith(layer[0]) for stored in unknown)

    def _lying_as(self, origin: Origin) -> list[str]:
        """The names in the files of the first old tensor that a new one is made of, or of its pieces."""
        return (self._stored[origin.reads[0]] or self._pieces.get(origin.reads[0], [])) if origin.reads else []

    def _in_files(self, name: str, origin: Origin, value: Tensor) -> dict[str, Tensor]:
        """A new tensor as it is written: as transformers would where the old one lies under other names than in the
        model or in pieces; of a fresh one, where any does."""
        alias, stored = saved_name(self.resolved.after, self._aliases[name]), self._lying_as(origin)
        other_form = any(self._loaded_as[old] != old or old not in self._canonical for old in stored)
        if not (other_form if stored else self._any_other_form):
            return {alias: value}
        return self._new_form.saved(alias, value)

    def _floating_type_in(self, path: Path, default: torch.dtype) -> torch.dtype:
        """The type in which a fresh tensor is written: that of the weights around it."""
        types = {place.dtype for place in self._places.values() if place.file == path}
        floating = sorted((dtype for dtype in types if dtype.is_floating_point), key=str)
        return floating[0] if floating else default

    def _indices(self) -> list[Path]:
        """The indices of the files that are rewritten; one that names others is not the model's."""
        rewritten = {*self._weights, *self._training}
        folders = (self.source, self.source / TRAINING_FOLDER)
        indices = [path for folder in folders for path in folder.glob(f"*.safetensors{INDEX_ENDING}")]
        return [path for path in indices if {path.parent / name for name in weight_map(path).values()} <= rewritten]


def _write_index(source: Path, target: Path) -> None:
    index = json.loads(source.read_text(encoding="utf-8"))
    total, count, places = 0, 0, {}
    for path in sorted({target.parent / name for name in weight_map(source).values()}):
        with safe_open(path, framework="pt") as file:
            for name in file.offset_keys():
                piece = file.get_slice(name)
                numbers = math.prod(piece.get_shape())
                total, count = total + numbers * torch_dtype(name, piece.get_dtype()).itemsize, count + numbers
                places[name] = path.name
    index["weight_map"] = dict(sorted(places.items()))
    index.setdefault("metadata", {})["total_size"] = total
    if "total_parameters" in index["metadata"]:
        index["metadata"]["total_parameters"] = count
    target.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _metadata_for(metadata: Mapping[str, str], written: SafetensorsWriter) -> dict[str, str] | None:
    """The file's metadata; what torch.distributed.checkpoint notes there of every tensor is noted of the new ones."""
    return {
        key: json.dumps({name: {"saved_offsets": [0] * axes} for name, axes in written.axes().items()})
        if SAVED_OFFSETS in text
        else text
        for key, text in metadata.items()
    } or None


def _refuse_sharded(path: Path, metadata: Mapping[str, str]) -> None:
    """Training state written by several processes holds pieces of tensors, which can't be changed one by one."""
    for text in metadata.values():
        if SAVED_OFFSETS not in text:
            continue
        try:
            in_pieces = any(any(place.get("saved_offsets", ())) for place in json.loads(text).values())
        except (ValueError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"{path}: its metadata can't be read: {error}. Restore it from an earlier checkpoint."
            ) from error
        if in_pieces:
            raise CheckpointError(
                f"{path} holds pieces of tensors of a sharded run. Save the checkpoint from one process first."
            )
