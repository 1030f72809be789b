"""What takes part in the training after a growth: the hooks of a train stage."""

from typing import cast

from auxin.accounting import Ledger
from auxin.edits import CentreParameter, PadParameter, Plan, Receipt, ScaleParameter
from auxin.edits.resolution import resolve
from auxin.edits.structure import config_from_values, edited_skeleton
from auxin.errors import ConfigError, PlanError
from auxin.methods import methods
from auxin.methods.grow.tokenformer import OldTokenRates, TauAnneal
from auxin.models.tokenformer import TokenFormerConfig
from auxin.models.tokenformer.configuration import SLOTS, Slot
from auxin.planning.hooks import ExactRates, Hook, OldRates, OldShapes
from auxin.recipes.schema import TrainStage

KEEPS_IN_FRONT = (PadParameter, ScaleParameter, CentreParameter)
"""Edits after which the old entries of a parameter are its first ones."""


def stage_hooks(stage: TrainStage, ledger: Ledger) -> list[Hook]:
    """The hooks of `stage`, which trains the model that `ledger` is of.

    Those that the stage asks for, and those that the growths right before it bring along (masks that open, ...).

    Raises:
        ConfigError: it asks for something about old entries, and the ledger records no growth.
        PlanError: the growth does not tell old entries from new ones.
    """
    hooks = [hook for plan in growths_since_training(ledger) for hook in _hooks_of(plan)]
    if stage.tau_anneal_steps:
        hooks.append(TauAnneal(steps=stage.tau_anneal_steps))
    if stage.old_tokens_rate != 1.0:
        counts = old_token_counts(last_growths(ledger, f"{stage.name}: old_tokens_rate: {stage.old_tokens_rate}"))
        hooks.append(OldTokenRates(stage.old_tokens_rate, counts, stage.old_rate_steps))
    if stage.old_rate != 1.0:
        plans = last_growths(ledger, f"{stage.name}: old_rate: {stage.old_rate}")
        hooks.append(OldRates(stage.old_rate, old_shapes(plans), stage.old_rate_steps))
    if stage.exact_rates:
        # First, so that the optimizer's groups are final when the others see it.
        hooks.insert(0, _exact_rates(stage, ledger))
    return hooks


def growths_since_training(ledger: Ledger) -> list[Plan]:
    """The plans of the growths after the last training, in order."""
    plans: list[Plan] = []
    for record in reversed(ledger.stages):
        if record.kind == "train":
            break
        if record.kind == "grow" and record.plan is not None:
            plans.insert(0, Plan.model_validate(record.plan))
    return plans


def last_growths(ledger: Ledger, asked: str) -> list[Plan]:
    """The plans of the last growths that no training lies between, in order.

    Raises:
        ConfigError: there is none; `asked` says what asked for it.
    """
    stages = ledger.stages
    while stages:
        if plans := growths_since_training(Ledger(stages=stages)):
            return plans
        stages = stages[:-1]
    raise ConfigError(
        f"{asked} is for what was there before the last growth, but the model's ledger records no growth. Leave it "
        "out, or train after a grow stage."
    )


def old_token_counts(plans: list[Plan]) -> dict[Slot, int]:
    """The number of tokens that each slot of a TokenFormer had before `plans`."""
    assert plans[0].made_for is not None  # methods say what a plan is made for
    before = cast(TokenFormerConfig, config_from_values(plans[0].made_for))
    return {slot: sum(before.group_sizes(slot)) for slot in SLOTS}


def old_shapes(plans: list[Plan]) -> OldShapes:
    """The entries that were there before `plans`, by the parameters' names after them.

    A parameter that grew holds its old entries in front; of a layer's copies the first is the old one.

    Raises:
        PlanError: a plan mixes old entries with new ones.
    """
    assert plans[0].made_for is not None
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
                    f"The growth by {plan.method} makes {name} out of old entries and new ones alike, so that there is "
                    "no telling them apart. Leave out old_rate."
                )
            if origin.kept in left:
                shapes[name] = left.pop(origin.kept)
    return shapes


def _hooks_of(plan: Plan) -> list[Hook]:
    method = methods().get(plan.method)
    return [] if method is None or method.hooks is None else method.hooks(plan)


def _exact_rates(stage: TrainStage, ledger: Ledger) -> Hook:
    record = ledger.stages[-1]
    if record.kind != "grow" or record.receipt is None or len(growths_since_training(ledger)) != 1:
        raise ConfigError(
            f"{stage.name}: exact_rates is for the stage right after one growth, and this one follows "
            f"{record.name!r} ({record.kind}). Leave it out."
        )
    return ExactRates(Receipt.model_validate({**record.receipt, "plan": record.plan}))
