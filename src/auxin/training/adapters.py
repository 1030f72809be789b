"""Models that carry a PEFT adapter (`model.add_adapter`): a checkpoint of theirs is the adapter alone, as transformers
writes it, so that it says all of them only where nothing else is trained."""

from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from auxin.errors import CheckpointError, ConfigError, reason

_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
"""How names in the file begin, which are those of a PeftModel."""


def check_adapter(model: PreTrainedModel) -> None:
    """Refuse to train what the adapter's checkpoints would lack.

    Raises:
        ConfigError: several adapters are active, or a parameter that is no part of the adapter is trained.
    """
    active = model.active_adapters()
    if len(active) != 1:
        raise ConfigError(
            f"The model has {len(active)} active adapters ({', '.join(active)}), of which a checkpoint holds one. "
            "Choose it with set_adapter."
        )
    own = {tensor.data_ptr() for tensor in _tensors(model).values()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.data_ptr() not in own:
            raise ConfigError(
                f"{name} is trained but no part of the adapter {active[0]!r}, so that no checkpoint would hold it. "
                "Freeze it, name its module in the adapter's modules_to_save, or merge the adapter (merge_and_unload)."
            )


def load_adapter(checkpoint: Path, model: PreTrainedModel) -> None:
    """Copy the adapter in `checkpoint` into that of `model`; the weights below it are left as they are.

    Raises:
        CheckpointError: there is no adapter, it can't be read, or it has other names or shapes.
    """
    path = checkpoint / _FILE
    try:
        saved = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} can't be read ({reason(error)}), but the model has an adapter. Give the model that this run was "
            "started with."
        ) from error
    target = _tensors(model)
    for name in sorted(saved.keys() | target.keys()):
        shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (saved, target)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{path}: {name} has shape {shapes[0]} there and {shapes[1]} in the adapter given (None: it does not "
                "exist). Give the adapter that this run was started with."
            )
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(saved[name])


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The active adapter's own tensors, not copies, by their names in the file."""
    return cast(dict[str, Tensor], model.get_adapter_state_dict(model.active_adapters()[0]))
