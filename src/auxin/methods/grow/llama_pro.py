"""Block expansion (LLaMA Pro, arXiv 2401.02415, section 3): new layers that begin as identities and are trained alone.

The L layers are taken in N groups of M; after each group come copies of its top P layers whose outputs are zeroed,
weights and biases. The function is the same to the last bit in any pre-norm architecture. At the first step only the
zeroed modules of a new layer get a gradient; the others follow as soon as these are not zero any more.

The paper adapts a finished model to a new domain and trains the new layers only, so that what the model knew stays
within reach: embeddings, old layers, final norm and head are frozen. That is `train_only_new`, a hook of the training
that follows, which the plan brings along. Where pretraining goes on, everything is trained.

    plan = plan_block_expansion(model, BlockExpansion(group_size=4, train_only_new=True))
    apply(plan, model)
    train(model, data, settings, folder, hooks=hooks_of(plan))

The paper's own expansion of Llama 2 (32 -> 40 layers) is group_size = 4, copies = 1. Its ablation found 8 new layers of
32 as good as 16, all new layers at the top somewhat worse and all at the bottom a failure.
"""

from typing import Any, Self

from pydantic import Field, model_validator
from transformers import PreTrainedModel

from auxin.edits import Edit, Plan
from auxin.edits.structure import config_values
from auxin.errors import PlanError, shown
from auxin.models.layout import layer_stacks
from auxin.planning.bench import from_model
from auxin.planning.depth import arrange, depth, identity_layers, naming_parts, stacks_to_deepen
from auxin.planning.hooks import TrainOnly, TrainOnlySettings
from auxin.planning.method import Method
from auxin.settings import Settings


class BlockExpansion(Settings):
    """Where identity blocks are inserted; give `group_size` or `layers`."""

    group_size: int | None = Field(default=None, gt=0)
    """Old layers in a group (M); it has to divide their number."""
    copies: int = Field(default=1, gt=0)
    """New layers after each group (P): copies of the group's top layers, hence at most its size."""
    layers: int | None = Field(default=None, gt=0)
    """Number of layers after the growth, instead of a group size; the groups are as many as that takes."""
    part: str | None = None
    """Of a model with an encoder and a decoder, the one to grow; None grows both."""
    train_only_new: bool = False
    """Whether the training that follows freezes all but the new layers, as the paper does."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.group_size is None) == (self.layers is None):
            raise ValueError(
                f"give exactly one of group_size ({shown(self.group_size)}) and layers ({shown(self.layers)}), for "
                "example group_size = 4."
            )
        return self


def plan_block_expansion(model: PreTrainedModel, settings: BlockExpansion) -> Plan:
    """Plan identity blocks after every group of layers; weights are not needed.

    Raises:
        PlanError: no stack of layers is found, a post-norm architecture or one whose outputs are not found, layers that
            depend on their number, or groups that do not come out even.
    """
    body, stacks = stacks_to_deepen(model, settings.part)
    edits: list[Edit] = []
    with naming_parts(stacks, settings.part):
        expansions = [_expansion(settings, depth(model, stack), stack.path) for stack in stacks]
    for stack, (order, new) in zip(stacks, expansions, strict=True):
        edits += arrange(model, body, stack, order, dict.fromkeys(new, 0.0), exact=True)
    plan = Plan(
        method="llama-pro",
        settings=settings.model_dump(mode="json", exclude_defaults=True),
        promise="exact",
        edits=edits,
        made_for=config_values(model.config),
    )
    if not settings.train_only_new:
        return plan
    return plan.model_copy(update={"hooks": [TrainOnlySettings(paths=_new_paths(plan)).model_dump()]})


def new_layers(settings: BlockExpansion, num_hidden_layers: int) -> list[int]:
    """The indices, in the grown model, of the layers that `settings` insert among `num_hidden_layers` old ones.

    Raises:
        PlanError: the groups do not come out even.
    """
    return _expansion(settings, num_hidden_layers, "the model")[1]


def train_new_layers(plan: Plan) -> TrainOnly:
    """The training hook that trains the layers that `plan` inserts and freezes the rest, as the paper does.

    Raises:
        ConfigError: the plan inserts no identity blocks.
    """
    return TrainOnly(_new_paths(plan))


def _new_paths(plan: Plan) -> list[str]:
    return [f"{path}.{index}" for path, indices in identity_layers(plan).items() for index in indices]


def _expansion(settings: BlockExpansion, layers: int, name: str) -> tuple[list[int], list[int]]:
    """The old layer of each new one, and the indices of those that are inserted."""
    copies = settings.copies
    possible = [size for size in range(copies, layers + 1) if layers % size == 0]
    if not possible:
        raise PlanError(
            f"copies = {copies} is more than the {layers} layers of {name}, and a layer is copied once at most. Ask "
            f"for at most {layers}."
        )
    if settings.layers is not None:
        size = _group_size(layers, settings.layers, copies, possible, name)
    else:
        assert settings.group_size is not None
        size = settings.group_size
    if size not in possible:
        near = min(possible, key=lambda other: (abs(other - size), -other))
        why = "does not divide" if size >= copies else f"is less than copies = {copies}, of"
        raise PlanError(f"group_size = {size} {why} the {layers} layers of {name}. The nearest possible is {near}.")
    order: list[int] = []
    new: list[int] = []
    for start in range(0, layers, size):
        order += range(start, start + size)
        new += range(len(order), len(order) + copies)
        order += range(start + size - copies, start + size)
    return order, new


def _group_size(layers: int, wanted: int, copies: int, possible: list[int], name: str) -> int:
    targets = {layers + layers // size * copies: size for size in possible}
    if wanted in targets:
        return targets[wanted]
    near = min(targets, key=lambda target: (abs(target - wanted), target))
    raise PlanError(
        f"layers = {wanted}: the {layers} layers of {name} can't be expanded to that in equal groups with copies = "
        f"{copies} new layers each. The nearest possible is {near}; all are "
        f"{', '.join(map(str, sorted(targets)))}."
    )


def _examples(model: PreTrainedModel) -> dict[str, Any]:
    # Two groups where that goes, so that new layers stand between old ones.
    depths = {depth(model, stack) for stack in layer_stacks(model)}
    halves = {layers // 2 for layers in depths if layers % 2 == 0}
    return {"group_size": halves.pop() if len(halves) == len(depths) == 1 else 1}


METHOD = Method(
    name="llama-pro",
    title="Deeper by identity blocks after every group of layers (LLaMA Pro)",
    paper="arXiv 2401.02415",
    intent="grow",
    settings=BlockExpansion,
    plan=from_model(plan_block_expansion),
    examples=_examples,
    promise="exact to the last bit for every pre-norm architecture; refused for post-norm",
)
