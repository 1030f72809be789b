"""What `import auxin` offers for everyday work: a plan for a model, the plan applied, models loaded and saved.

The same words serve a model in memory and a checkpoint's folder.
"""

from pathlib import Path
from typing import Any, overload

import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel

from auxin.edits import executor
from auxin.edits.executor import Receipt
from auxin.edits.plan import Plan
from auxin.edits.probe import Probe
from auxin.edits.saved import save_model
from auxin.errors import ConfigError
from auxin.files import new_folder
from auxin.methods import method as find_method
from auxin.models.loading import load_model
from auxin.planning.method import Data, plan_for
from auxin.recipes.change import change_checkpoint


def plan(
    model: PreTrainedModel | str | Path,
    method: str,
    /,
    *,
    data: Data | None = None,
    folder: str | Path = ".",
    **settings: Any,
) -> Plan:
    """What a method would do to a model; nothing is changed.

        plan = auxin.plan(model, "hypercloning", factor=2)
        print(plan)  # every edit, parameters and FLOPs before and after, and the promise

    Args:
        model: a model of transformers, or the folder of a checkpoint (or its config.json, where shapes are enough).
        method: its name, one of `auxin.methods()`.
        data: for a method that looks at data: a list of batches (token ids of shape (batch, length), or the model's
            inputs by name with `labels`), a `Calibration`, or a mapping that says how much is read of which corpus
            (fields of `CorpusCalibration`, such as `samples`, `length` and `seed`). Default for a folder: as much as
            the method asks for, of the standard library's source in the tokens of the folder's tokenizer; a model in
            memory needs it said.
        folder: for files that belong to the plan, where it has any.
        settings: those of the method, by name; `auxin.methods()[method].settings` has them all. A method's seed is one
            of them.

    Raises:
        ConfigError: there is no such method or setting (the message has the nearest name), a value is wrong, or data
            was given to a method that looks at none.
        CheckpointError, DataError: the folder or the data can't be read.
        PlanError: the method can't do it to this model; the message says what it could.
    """
    return plan_for(find_method(method), _source(model, "auxin.plan"), settings, data, folder)


@overload
def apply(
    plan: Plan, model: PreTrainedModel, *, optimizer: Optimizer | None = None, probe: Probe | None = None
) -> Receipt: ...
@overload
def apply(plan: Plan, model: str | Path, *, output: str | Path, probe: Probe | None = None) -> Receipt: ...
def apply(
    plan: Plan,
    model: PreTrainedModel | str | Path,
    *,
    optimizer: Optimizer | None = None,
    probe: Probe | None = None,
    output: str | Path | None = None,
) -> Receipt:
    """Change a model in memory as `plan` says, or write the checkpoint that it makes of another.

        receipt = auxin.apply(plan, model, optimizer=optimizer)
        receipt = auxin.apply(plan, "checkpoint", output="larger")

    A model is changed in place, with the optimizer's state, and is as before when anything fails; `save` writes it. A
    checkpoint is streamed tensor by tensor, its training state and its ledger along, and left as it is; the new folder
    appears when it is complete and the promise was checked.

    Args:
        plan: of `auxin.plan`, or your own.
        model: the model, or the folder of a checkpoint.
        optimizer: of a model: what trains it, any of torch's whose state has the parameters' shape.
        probe: token ids (batch, sequence) on which the promise is checked, or inputs by name; default: three random
            samples of the kind that the model takes.
        output: of a folder: the new one, which does not exist or is empty.

    Returns:
        What was done: parameters before and after, the largest change of an output, and how AdamW can go on.

    Raises:
        ConfigError: something is given that is for the other kind of model, or a folder comes without `output`.
        PlanError: the plan is an estimate or does not fit.
        PromiseError: the plan promised to keep the function and did not.
        CheckpointError: a folder can't be read or written.
    """
    source = _source(model, "auxin.apply")
    if isinstance(source, PreTrainedModel):
        if output is not None:
            raise ConfigError(
                f"output = {str(output)!r}: a model in memory is changed in place. Leave it out and call auxin.save, "
                "or give a checkpoint's folder instead of the model."
            )
        return executor.apply(plan, source, optimizer, probe)
    if optimizer is not None:
        raise ConfigError(f"optimizer is for a model in memory, and {source} is a folder. Leave it out.")
    if output is None:
        raise ConfigError(
            f"{source} is a folder, which is left as it is. Give output, the folder of the new checkpoint."
        )
    return change_checkpoint(plan, source, output, probe=probe)


def load(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model of a checkpoint, of the class that its config names, with the edits that it has gone through.

    Args:
        folder: a local one, as `save_pretrained` or a run writes it.
        device: where to put it.
        dtype: of its weights; default: as they were saved. Training needs torch.float32.

    Raises:
        CheckpointError: the folder is missing, incomplete or damaged, or holds no model; a missing weight is an error,
            where transformers would draw a random one.
    """
    return load_model(folder, device, dtype)


def save(model: PreTrainedModel, folder: str | Path) -> Path:
    """Write a model to a folder that `load` reads: `save_pretrained`, and more for a model whose modules were replaced
    or otherwise changed in ways that no config says. Its weights then lie under a name of their own, so that without
    `import auxin` `from_pretrained` fails and does not return another model, and its card says so.

    Args:
        model: a model of transformers.
        folder: one that does not exist or is empty; it appears under its name when it is complete. A tokenizer's files
            are added by its own `save_pretrained`.

    Returns:
        `folder` as a Path.

    Raises:
        CheckpointError: the folder exists and is not empty.
        ConfigError: what was given is no model in memory, or the folder can't be made.
    """
    source = _source(model, "auxin.save")
    if not isinstance(source, PreTrainedModel):
        raise ConfigError(
            f"auxin.save writes a model in memory, and {source} is a folder. Load it, or copy the folder."
        )
    with new_folder(Path(folder)) as partial:
        save_model(source, partial)
    return Path(folder)


def _source(model: Any, caller: str) -> PreTrainedModel | Path:
    """The model itself, or the folder's path."""
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps
    if isinstance(model, PreTrainedModel):
        return model
    if isinstance(model, str | Path):
        return Path(model)
    if hasattr(model, "merge_and_unload"):
        raise ConfigError(
            f"{caller} takes a model of transformers, received a {type(model).__name__}, which holds an adapter. Merge "
            "it first: model = model.merge_and_unload()."
        )
    raise ConfigError(
        f"{caller} takes a model of transformers or the folder of one, received a {type(model).__name__}. Where that "
        "wraps a model, give the model inside."
    )
