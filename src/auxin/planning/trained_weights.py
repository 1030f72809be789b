"""Weights that a method trains while it makes a plan: in a copy of the model, whose values the plan then sets."""

import copy
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.edits.kinds.file_edits import SetParameter
from auxin.edits.plan import Plan
from auxin.edits.plan_files import PlanFile
from auxin.errors import PlanError


def trainable_copy(model: PreTrainedModel, asked: str) -> tuple[PreTrainedModel, dict[str, nn.Parameter]]:
    """A copy of `model`, float32 at least, and those of its weights by name that ask for gradients in the model.

    Args:
        model: the model, which stays as it is.
        asked: the setting that has weights trained, for messages.

    Raises:
        PlanError: none asks for gradients.
    """
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    if not names:
        raise PlanError(
            f"{asked}: no weight of the {type(model).__name__} asks for gradients, so that none would be trained. "
            f"Unfreeze some (model.requires_grad_(True)), or leave {asked} out."
        )
    made = copy.deepcopy(model)
    nn.Module.to(made, torch.promote_types(model.dtype, torch.float32))
    return made, {name: made.get_parameter(name) for name in names}


def with_weights(plan: Plan, model: PreTrainedModel, trained: dict[str, nn.Parameter], folder: Path) -> Plan:
    """`plan`, before whose edits the weights of `model` get other values.

    The file that holds them has all weights that changed, those that the plan cuts included.

    Args:
        plan: of the model, or of one with these weights.
        model: the model; its weights say types, and which values are other ones.
        trained: the values, by name.
        folder: for the file; those of the plan lie there, too.
    """
    tensors: dict[str, Tensor] = {}
    for name, weight in trained.items():
        old = model.get_parameter(name).detach()
        new = weight.detach().to(old.dtype)
        if not torch.equal(new, old):
            tensors[name] = new.cpu().contiguous()
    if not tensors:
        return plan
    file = PlanFile.write(folder, "weights.safetensors", save(tensors))
    edits = [
        SetParameter(parameter=name, file=file.name, tensor=name, shape=tuple(value.shape))
        for name, value in tensors.items()
    ]
    return plan.model_copy(update={"edits": [*edits, *plan.edits], "files": [file, *plan.files]}).beside(folder)
