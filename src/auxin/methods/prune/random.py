"""Widths pruned at random: the baseline that every choice of units has to beat."""

from random import Random

from pydantic import Field
from transformers import PreTrainedModel

from auxin.edits import Plan
from auxin.planning.bench import from_model
from auxin.planning.method import Method
from auxin.planning.pruning import Pruning, prunable, pruning_example


class RandomPruning(Pruning):
    """What stays, and the seed of the choice."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the scores, one uniform number for each unit (key-value group, feed-forward unit, unit of the
    residual)."""


def plan_random(model: PreTrainedModel, settings: RandomPruning) -> Plan:
    """Plan a model without units that were drawn; weights are not needed.

    Raises:
        PlanError: see `auxin.planning.pruning`.
    """
    found, draw = prunable(model, settings), Random(settings.seed)
    scores = {place: [draw.random() for _ in range(units)] for place, units in found.units.items()}
    return found.plan("random", scores, settings.seed)


METHOD = Method(
    name="random",
    title="Fewer heads, feed-forward units or units of the residual, drawn at random",
    paper="the usual baseline",
    intent="prune",
    settings=RandomPruning,
    plan=from_model(plan_random),
    examples=pruning_example,
    promise="none",
)
