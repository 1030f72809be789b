"""What differs between two checkpoints, or between two plans."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from auxin.edits.kinds.edit import describe_edit
from auxin.edits.plan import Plan
from auxin.edits.promise import relative_change
from auxin.edits.structure import config_values
from auxin.edits.tensor_names import collapse, together
from auxin.errors import CheckpointError
from auxin.models.loading import load_config
from auxin.models.weight_files import read_tensor, weight_files
from auxin.settings import Settings

UNTOLD_CONFIG = {"transformers_version", "_name_or_path"}
"""Config values that say nothing about the model."""


class Reshaped(Settings):
    """A parameter that both checkpoints have, in different shapes or data types."""

    name: str
    old: str
    """Data type and shape in the first, for example "F32 [64, 32]"."""
    new: str
    """The same in the second."""
    kept: bool
    """Whether the entries that both shapes have room for (the leading block) are equal."""


class Changed(Settings):
    """A parameter that both checkpoints have in one shape, with different values."""

    name: str
    change: float
    """max |new - old| / max |old|; infinite where the old one is zero or a value is not finite."""


class CheckpointDiff(Settings):
    """What differs between two checkpoints, the second seen from the first."""

    config: dict[str, tuple[Any, Any]]
    """Config values that differ: (old, new); None stands for a value that is not set."""
    removed: dict[str, str]
    """Parameters that only the first has: data type and shape by name."""
    added: dict[str, str]
    """Parameters that only the second has."""
    reshaped: list[Reshaped]
    changed: list[Changed]
    equal: int
    """How many parameters are the same bit by bit."""

    def rows(self) -> list[list[str]]:
        """(what, name, old, new) for a table; the layers to which the same happened are one row."""
        rows = [["config", key, _text(old), _text(new)] for key, (old, new) in self.config.items()]
        found: list[tuple[str, str, str, str]] = []
        found += [("removed", name, place, "") for name, place in self.removed.items()]
        found += [("added", name, "", place) for name, place in self.added.items()]
        found += [
            ("reshaped", item.name, item.old, item.new + (", old block kept" if item.kept else ""))
            for item in self.reshaped
        ]
        groups: dict[tuple[str, str, str, str], list[str]] = {}
        for what, name, old, new in found:
            groups.setdefault((what, collapse(name), old, new), []).append(name)
        for (what, _, old, new), names in groups.items():
            rows += [[what, place, old, new] for place in together(names)]
        changes = {item.name: item.change for item in self.changed}
        for place, names in together(changes).items():
            rows.append(["values", place, "", f"by {max(changes[name] for name in names):.3g}"])
        return rows


class PlanDiff(Settings):
    """What differs between two plans, the second seen from the first."""

    fields: dict[str, tuple[Any, Any]]
    """Method, promise, seed and settings (as "settings.NAME") that differ."""
    removed: list[str]
    """Edits that only the first has, a line each."""
    added: list[str]
    """Edits that only the second has."""
    changed: list[tuple[str, str]]
    """Edits of the same thing that say something else: (old, new)."""
    reordered: bool
    """Whether the edits that both have come in another order, which means another plan."""

    def rows(self) -> list[list[str]]:
        """(what, name or edit, old, new) for a table."""
        rows = [["plan", key, _text(old), _text(new)] for key, (old, new) in self.fields.items()]
        rows += [["removed", edit, "", ""] for edit in self.removed]
        rows += [["added", edit, "", ""] for edit in self.added]
        rows += [["changed", "", old, new] for old, new in self.changed]
        return [*rows, ["order", "the edits that both have come in another order", "", ""]] if self.reordered else rows


def diff_checkpoints(old: str | Path, new: str | Path) -> CheckpointDiff:
    """Compare two checkpoint folders (config.json and `*.safetensors`); two tensors are in memory at a time.

    Raises:
        CheckpointError: a folder is no checkpoint with safetensors files, or can't be read.
    """
    old_files, new_files = _tensor_files(Path(old)), _tensor_files(Path(new))
    old_values, new_values = (_by_dotted_name(load_config(folder)) for folder in (old, new))
    keys = sorted(key for key in old_values.keys() | new_values.keys() if key.rpartition(".")[2] not in UNTOLD_CONFIG)
    reshaped, changed, equal = [], [], 0
    for name in old_files.keys() & new_files.keys():
        before, after = read_tensor(old_files[name], name), read_tensor(new_files[name], name)
        if before.shape != after.shape or before.dtype != after.dtype:
            kept = _leading_blocks_equal(before, after)
            reshaped.append(Reshaped(name=name, old=_place(before), new=_place(after), kept=kept))
        elif torch.equal(before, after):
            equal += 1
        else:
            changed.append(Changed(name=name, change=relative_change(before, after)))
    return CheckpointDiff(
        config={
            key: (old_values.get(key), new_values.get(key))
            for key in keys
            if old_values.get(key) != new_values.get(key)
        },
        removed={
            name: _place(read_tensor(old_files[name], name)) for name in sorted(old_files.keys() - new_files.keys())
        },
        added={
            name: _place(read_tensor(new_files[name], name)) for name in sorted(new_files.keys() - old_files.keys())
        },
        reshaped=sorted(reshaped, key=lambda item: item.name),
        changed=sorted(changed, key=lambda item: item.name),
        equal=equal,
    )


def _by_dotted_name(config: PreTrainedConfig) -> dict[str, Any]:
    """The values of `config` that are not its type's defaults; those of configs within by dotted names."""
    found = config_values(config)
    for name in [key for key in found if isinstance(getattr(config, key, None), PreTrainedConfig)]:
        found.pop(name)
        found |= {f"{name}.{key}": value for key, value in _by_dotted_name(getattr(config, name)).items()}
    return found


def diff_plans(old: Plan, new: Plan) -> PlanDiff:
    """Compare two plans: edits are paired by kind and by what they change, in order."""
    fields = {key: (getattr(old, key), getattr(new, key)) for key in ("method", "promise", "seed", "hooks")}
    for key in sorted(old.settings.keys() | new.settings.keys()):
        fields[f"settings.{key}"] = (old.settings.get(key), new.settings.get(key))
    partners: dict[int, int] = {}
    # Equal edits first, so that what is left of several edits of one thing is paired with what is left.
    for same in (lambda one, other: one == other, lambda one, other: _target(one) == _target(other)):
        for place, edit in enumerate(old.edits):
            free = (i for i, other in enumerate(new.edits) if i not in partners.values() and same(edit, other))
            if place not in partners and (partner := next(free, None)) is not None:
                partners[place] = partner
    pairs = [(old.edits[place], new.edits[partner]) for place, partner in sorted(partners.items())]
    positions = [partner for _, partner in sorted(partners.items())]
    return PlanDiff(
        fields={key: pair for key, pair in fields.items() if pair[0] != pair[1]},
        removed=[describe_edit(edit) for place, edit in enumerate(old.edits) if place not in partners],
        added=[describe_edit(edit) for place, edit in enumerate(new.edits) if place not in partners.values()],
        changed=[(describe_edit(edit), describe_edit(other)) for edit, other in pairs if edit != other],
        reordered=positions != sorted(positions),
    )


def _target(edit: Any) -> tuple[Any, ...]:
    """What an edit changes, without how."""
    values = edit.model_dump()
    named = [values.get(key) for key in ("parameter", "module", "layers", "brick", "to", "axis")]
    return (edit.kind, *named, *sorted(values.get("values", ())))


def _tensor_files(folder: Path) -> dict[str, Path]:
    """The file of every tensor of the weights in `folder`."""
    load_config(folder)  # says what is wrong with a folder that is none
    files: dict[str, Path] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} can't be read: {error}. Restore it from an earlier checkpoint.") from error
    if not files:
        raise CheckpointError(f"{folder} holds no *.safetensors file: there are no weights to compare.")
    return files


def _leading_blocks_equal(old: Tensor, new: Tensor) -> bool:
    if old.dim() != new.dim():
        return False
    block = tuple(slice(min(sizes)) for sizes in zip(old.shape, new.shape, strict=True))
    return torch.equal(old[block].to(new.dtype), new[block])


def _place(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _text(value: Any) -> str:
    return "-" if value is None else str(value)
