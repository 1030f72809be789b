"""What the changes in a model's books made of what was there before them."""

from auxin.accounting import Ledger
from auxin.edits import CentreParameter, PadParameter, Plan, ScaleParameter
from auxin.edits.resolution import resolve
from auxin.edits.structure import config_from_values, edited_skeleton
from auxin.errors import ConfigError, PlanError

OldShapes = dict[str, tuple[int, ...]]
"""By a parameter's name the shape of its old entries, which are the first ones along every axis."""
KEEPS_IN_FRONT = (PadParameter, ScaleParameter, CentreParameter)
"""Edits after which the old entries of a parameter are its first ones."""


def changes_since_training(ledger: Ledger) -> list[Plan]:
    """The plans of the changes after the last training, in order."""
    plans: list[Plan] = []
    for record in reversed(ledger.stages):
        if record.kind == "train":
            break
        if record.kind == "change" and record.plan is not None:
            plans.insert(0, Plan.model_validate(record.plan))
    return plans


def last_changes(ledger: Ledger, asked: str) -> list[Plan]:
    """The plans of the last changes that no training lies between, in order.

    Raises:
        ConfigError: there is none; `asked` says what asked for it.
    """
    stages = ledger.stages
    while stages:
        if plans := changes_since_training(Ledger(stages=stages)):
            return plans
        stages = stages[:-1]
    raise ConfigError(
        f"{asked} is for what was there before the last change, but the model's ledger records no change. Leave it "
        "out, or train after a change stage."
    )


def old_shapes(plans: list[Plan]) -> OldShapes:
    """The entries that were there before `plans`, by the parameters' names after them.

    A parameter that grew holds its old entries in front; of a layer's copies the first is the old one.

    Raises:
        PlanError: a plan mixes old entries with new ones.
    """
    assert plans[0].made_for is not None  # methods say what a plan is made for
    model = edited_skeleton(config_from_values(plans[0].made_for))
    shapes: OldShapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for plan in plans:
        resolved = resolve(plan.edits, model)
        model = resolved.after
        left = dict(shapes)
        shapes = {}
        for name, _ in model.named_parameters():
            origin = resolved.origins[name]
            told_apart = origin.is_fresh or origin.kept is not None
            if not told_apart or not all(isinstance(step.edit, KEEPS_IN_FRONT) for step in origin.steps):
                raise PlanError(
                    f"The change by {plan.method} makes {name} out of old entries and new ones alike, so that there is "
                    "no telling them apart. Leave out the hook old_rates."
                )
            if origin.kept in left:
                shapes[name] = left.pop(origin.kept)
    return shapes
