"""Stacking and interleaving: a deeper model whose layers are copies of the old ones.

| order | layer l' of L' = gL | paper |
|---|---|---|
| stack (default) | l' mod L: the whole stack, g times | StackBERT (ICML 2019), G_stack (arXiv 2405.15319) |
| interleave | floor(l' / g): every layer g times in a row | both, as the alternative |

Neither keeps the function: the loss jumps at the growth and then falls below that of training from scratch. G_stack
finds growth factors of 2 to 4 best (a stack of one layer loses), one growth better than several small ones, and
interleaving worse; its recipe warms the learning rate up again after the growth. Embeddings, final norm and head are
kept; moments are copied with their layers.

Where L' is no multiple of L, stacking puts copies of the top L' mod L layers last (bert2BERT, arXiv 2110.07143; copies
of the bottom layers alone are G_stack's one bad choice), and interleaving repeats as evenly as can be:
floor(l' L / L').
"""

from typing import Any, Literal, Self

from pydantic import Field, model_validator
from transformers import PreTrainedModel

from auxin.edits import Edit, Plan
from auxin.edits.structure import config_values
from auxin.errors import PlanError, shown
from auxin.planning.bench import from_model
from auxin.planning.depth import arrange, depth, naming_parts, stacked_order, stacks_to_deepen
from auxin.planning.method import Method
from auxin.settings import Settings
from auxin.words.anatomy import LayerStack


class LayerStacking(Settings):
    """How deep the model shall be, and in which order its layers are copied; give `factor` or `layers`."""

    factor: int | None = Field(default=None, ge=2)
    """How many times as many layers."""
    layers: int | None = Field(default=None, gt=0)
    """Number of layers after the growth, instead of a factor; for gradual growth too: 6, then 12, then 24."""
    order: Literal["stack", "interleave"] = "stack"
    """stack: the whole stack again and again. interleave: every layer several times in a row."""
    part: str | None = None
    """Of a model with an encoder and a decoder, the one to grow; None grows both."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.factor is None) == (self.layers is None):
            raise ValueError(
                f"give exactly one of factor ({shown(self.factor)}) and layers ({shown(self.layers)}), for example "
                "factor = 2."
            )
        return self


def plan_stacking(model: PreTrainedModel, settings: LayerStacking) -> Plan:
    """Plan a deeper model of copied layers; weights are not needed.

    Raises:
        PlanError: no stack of layers is found, or no more layers are asked for than there are.
    """
    body, stacks = stacks_to_deepen(model, settings.part)
    edits: list[Edit] = []
    depths = [depth(model, stack) for stack in stacks]
    with naming_parts(stacks, settings.part):
        targets = [_target(settings, old, stack) for old, stack in zip(depths, stacks, strict=True)]
    for stack, old, new in zip(stacks, depths, targets, strict=True):
        if new > old:
            edits += arrange(model, body, stack, layer_order(old, new, settings.order))
    if not edits:
        raise PlanError(f"The model has {settings.layers} layers already. Ask for more, for example factor = 2.")
    return Plan(
        method="stacking",
        settings=settings.model_dump(mode="json", exclude_defaults=True),
        promise="none",
        edits=edits,
        made_for=config_values(model.config),
    )


def _target(settings: LayerStacking, old: int, stack: LayerStack) -> int:
    """How many layers `stack`, which has `old` ones, is to have."""
    new = old * settings.factor if settings.factor is not None else settings.layers
    assert new is not None
    if new < old:
        raise PlanError(
            f"layers = {new} is fewer than the {old} of {stack.path}; stacking can't shrink. Ask for at least "
            f"{old + 1}."
        )
    return new


def layer_order(old: int, new: int, order: Literal["stack", "interleave"]) -> list[int]:
    """Which of `old` layers each of `new` ones copies, bottom first."""
    if order == "interleave":
        return [index * old // new for index in range(new)]
    return stacked_order(old, new)


def _examples(model: PreTrainedModel) -> dict[str, Any]:
    return {"factor": 2}


METHOD = Method(
    name="stacking",
    title="Deeper by copies of the layers, stacked or interleaved (StackBERT, G_stack)",
    paper="arXiv 2405.15319",
    intent="grow",
    settings=LayerStacking,
    plan=from_model(plan_stacking),
    examples=_examples,
    promise="none: the loss jumps at the growth, then falls below that of training from scratch",
)
