"""The layers of a model, numbered through all of its stacks."""

from torch import nn
from transformers import PreTrainedModel

from auxin.models.layout import layer_stacks


def layer_paths(model: PreTrainedModel) -> tuple[str, ...]:
    """The path of every layer of `model`, which may be a skeleton; an encoder's before those of its decoder.

    Raises:
        PlanError: the architecture is not known, and no stack of layers is found in it.
    """
    return tuple(
        f"{stack.path}.{number}"
        for stack in layer_stacks(model)
        for number in range(_length(model.get_submodule(stack.path)))
    )


def _length(layers: nn.Module) -> int:
    assert isinstance(layers, nn.ModuleList)
    return len(layers)
