"""What sentence-transformers keeps beside a model: modules that work on its hidden states and know their width.

A folder of that library is a checkpoint with a `modules.json`, which lists the modules behind the model, and a folder
for each that has a config or weights. Where a plan changes the hidden size:

| module | what follows |
|---|---|
| Pooling | the dimension that its config says |
| Dense | the columns of its weight, as those of any layer that reads the last hidden states |
| Normalize, Dropout | nothing |
| any other | refused by its name, unless a Dense is before it, whose output keeps its width |
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, cat

from auxin.edits.kinds.fills import ZeroFill
from auxin.edits.kinds.parameter_edits import PadParameter, ParameterEdit, SliceParameter
from auxin.edits.resolution import ResolvedPlan
from auxin.errors import CheckpointError, PlanError, reason
from auxin.foreign import lies_outside
from auxin.models.anatomy import anatomy
from auxin.models.weight_files import PLAIN

MODULES = "modules.json"
KEEPING = ("Transformer", "Normalize", "Dropout")
"""Modules that work at any width; the first is the model itself."""
DIMENSIONS = ("word_embedding_dimension", "embedding_dimension")
"""What configs of Pooling call the hidden size, in earlier and in later versions."""


@dataclass(frozen=True)
class _Module:
    kind: str
    """The last name of its class."""
    folder: Path
    """Where its files are."""
    config: dict[str, Any]


def followed_modules(source: Path, resolved: ResolvedPlan) -> dict[str, bytes]:
    """The files of modules behind a model that follow a change of its hidden size.

    Args:
        source: the checkpoint's folder.
        resolved: the plan, for the model in it.

    Returns:
        New contents by paths relative to the folder; empty where it is no folder of sentence-transformers, or the
        hidden size stays.

    Raises:
        CheckpointError: a file can't be read.
        PlanError: a module can't follow; the message names it.
    """
    widths = [getattr(model.config, "hidden_size", None) for model in (resolved.before, resolved.after)]
    old, new = widths
    if not (source / MODULES).is_file() or old is None or new is None or old == new:
        return {}
    files: dict[str, bytes] = {}
    for module in _modules(source):
        if module.kind == "Pooling":
            said = {name: new for name in DIMENSIONS if module.config.get(name) == old}
            files |= _config(source, module, said)
        elif module.kind == "Dense":
            files |= _dense(source, module, resolved, old, new)
            if module.config.get("module_output_name") in (None, "sentence_embedding"):
                break
        elif module.kind not in KEEPING:
            raise PlanError(
                f"hidden_size = {new}: {module.folder.relative_to(source)} ({module.kind}, in {MODULES}) works on "
                f"vectors of {old}, and it is not known how it follows. Leave the hidden size as it is, or take the "
                "module off first."
            )
    return files


def _modules(source: Path) -> list[_Module]:
    """The modules in the order in which they run, those without files too."""
    listed = _read(source / MODULES)
    found = []
    for entry in listed if isinstance(listed, list) else []:
        folder = source / entry.get("path", "")
        if lies_outside(folder, source):
            raise CheckpointError(f"{source / MODULES} names {entry['path']!r}, which lies outside of the folder.")
        config = folder / "config.json"
        # That in the folder itself is the model's own.
        values = _read(config) if folder != source and config.is_file() else {}
        found.append(_Module(entry.get("type", "").rpartition(".")[2], folder, values))
    return found


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {reason(error)}. Mend it, or copy the folder anew.") from error


def _config(source: Path, module: _Module, said: dict[str, Any]) -> dict[str, bytes]:
    """The config of a module with other values."""
    text = json.dumps({**module.config, **said}, indent=2) + "\n"
    return {(module.folder / "config.json").relative_to(source).as_posix(): text.encode()} if said else {}


def _dense(source: Path, module: _Module, resolved: ResolvedPlan, old: int, new: int) -> dict[str, bytes]:
    """Config and weights of a Dense, whose input is one vector of the hidden size or several side by side."""
    name, width = module.folder.relative_to(source), module.config.get("in_features")
    path = module.folder / PLAIN
    begin = f"hidden_size = {new}: {name} (Dense, in {MODULES})"
    leave = "Leave the hidden size as it is, or take the module off first."
    if not isinstance(width, int) or width % old:
        raise PlanError(f"{begin} reads vectors of {width}, which are no whole number of hidden states. {leave}")
    if module.config.get("use_residual"):
        raise PlanError(f"{begin} adds what it reads to what it gives (use_residual). {leave}")
    if not path.is_file():
        raise PlanError(f"{begin} has no {PLAIN}. Save it as safetensors first.")
    edits = _as_columns(resolved)
    if edits is None:
        raise PlanError(f"{begin} reads the last hidden states, whose units this plan does not keep. {leave}")
    tensors = load_file(path)
    tensors["linear.weight"] = cat([_mapped(part, edits) for part in tensors["linear.weight"].split(old, 1)], 1)
    files = _config(source, module, {"in_features": width // old * new})
    return files | {path.relative_to(source).as_posix(): safetensors_bytes(tensors, {"format": "pt"})}


def _mapped(part: Tensor, edits: list[ParameterEdit]) -> Tensor:
    """The columns that read one hidden state, after `edits`."""
    for edit in edits:
        part = edit.map_parameter(part, 0, "")
    return part.contiguous()


def _as_columns(resolved: ResolvedPlan) -> list[ParameterEdit] | None:
    """What the plan does to the units of the last hidden states, as edits of columns that read them: copies are divided
    by, and units that copy none are read by zeros. None where the plan does not keep them.

    Told by the norm that gives these states.
    """
    body = anatomy(resolved.before)
    stack = body.stacks[0]
    norm = stack.end
    if not stack.ends_in_norm:
        if not stack.output_norms:
            return None
        layers = resolved.before.get_submodule(stack.path)
        norm = f"{stack.path}.{len(list(layers.children())) - 1}.{stack.output_norms[-1]}"
    origin = next((origin for origin in resolved.origins.values() if origin.kept == f"{norm}.weight"), None)
    if origin is None:
        return None
    edits: list[ParameterEdit] = []
    for step in origin.steps:
        if isinstance(step.edit, SliceParameter):
            edits.append(step.edit.model_copy(update={"axis": 1, "divide": True, "noise": 0.0}))
        elif isinstance(step.edit, PadParameter):
            edits.append(PadParameter(parameter=step.edit.parameter, axis=1, size=step.edit.size, fill=ZeroFill()))
        elif step.edit.new_shape(step.old_shape) != step.old_shape:
            return None
    return edits
