"""Leaving layers out of a model: a method for Auxin in a package of its own.

Deep transformers change the residual stream little in many of their middle layers, so that some can go at a small cost,
which continued training mends (ShortGPT, arXiv 2403.03853). Which ones is for the user to say; the plan promises
nothing, and Auxin measures by how much the function moved.
"""

from typing import Any

from pydantic import Field
from transformers import PreTrainedModel

from auxin.edits import ArrangeLayers, Plan
from auxin.edits.structure import config_values
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.planning.bench import Bench
from auxin.planning.method import Method
from auxin.settings import Settings
from auxin.words.anatomy import LayerStack


class LayerDrop(Settings):
    """Which layers are left out."""

    drop: list[int] = Field(min_length=1)
    """Indices of the layers to leave out, counted from 0."""
    stack: str | None = None
    """Path of the stack of layers, for models that have several; None means the last one (a T5's decoder)."""


def plan_layer_drop(bench: Bench, settings: LayerDrop) -> Plan:
    """Plan the bench's model without the layers `settings.drop`; weights and data are not needed.

    Raises:
        PlanError: an unknown architecture or stack, layers that are not there, or the first one.
    """
    model = bench.model
    stack = _stack(model, settings.stack)
    layers = len(model.get_submodule(stack.path))
    if absent := [layer for layer in settings.drop if not 0 <= layer < layers]:
        raise PlanError(f"drop: {stack.path} has no layer {absent[0]}. Its last one is {layers - 1}.")
    if 0 in settings.drop:
        raise PlanError(
            "drop: the first layer can't be left out; it turns embeddings into what all others read (and holds the "
            "position bias of a T5). The nearest possible is layer 1."
        )
    kept = [layer for layer in range(layers) if layer not in settings.drop]
    return Plan(
        method="drop-layers",
        settings=settings.model_dump(mode="json", exclude_defaults=True),
        promise="none",
        edits=[ArrangeLayers(layers=stack.path, order=kept)],
        made_for=config_values(model.config),
    )


def _stack(model: PreTrainedModel, path: str | None) -> LayerStack:
    stacks = {stack.path: stack for stack in anatomy(model).stacks}
    if path is None:
        return list(stacks.values())[-1]
    if path not in stacks:
        raise PlanError(f"stack: this model has no stack {path!r}. Use one of {', '.join(stacks)}.")
    return stacks[path]


def _examples(model: PreTrainedModel) -> dict[str, Any]:
    """Settings that fit a small model: the last layer goes."""
    return {"drop": [len(model.get_submodule(_stack(model, None).path)) - 1]}


METHOD = Method(
    name="drop-layers",
    title="Leave layers out, by their indices",
    paper="arXiv 2403.03853",
    intent="prune",
    settings=LayerDrop,
    plan=plan_layer_drop,
    examples=_examples,
    promise="none",
)
