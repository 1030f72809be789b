"""Widths pruned by trajectories: the units go whose masks move all later layers and the logits least (OPTIN, Khaki and
Plataniotis 2024, arXiv 2403.17921).

The score is that of the measurement `trajectory` (`auxin.analysis.trajectory`): forward passes with one unit masked, no
gradients, no labels, nothing trained. Scores of heads and of feed-forward units are of one kind, and so a target is
shared between them as the paper does it: for every number of heads the best ones are kept, the rest of the limit is
filled with the best feed-forward units, and the number is taken at which the scores that stay have the largest sum.

* `uniform` (the default): the numbers are those of every layer, so that the family's config says them, and the search
  is over these.
* `uniform: false` is the paper's: one ranking of the heads of all layers, and one of their feed-forward units, by
  scores as they are (`normalised` is false here). In every layer something stays; in the paper a layer may lose all.

Not carried over from the paper's code: scores multiplied by an envelope over the units' numbers, a mask of a block that
stays while the blocks after it are scored, tokens that are drawn anew for every unit, padding among them, logits that
are never divided by the temperature, constants for heads and for the last layer. Tokens of images are not merged.
"""

from collections.abc import Sequence

from auxin.analysis.run import measure
from auxin.analysis.trajectory import Trajectory, TrajectorySettings
from auxin.analysis.unit_masks import Streams
from auxin.edits import Plan
from auxin.errors import PlanError
from auxin.objectives.calibration import CalibrationSettings
from auxin.planning.bench import Bench
from auxin.planning.method import Method
from auxin.planning.pruning import STREAMS, Prunable, Pruning, prunable, pruning_example
from auxin.planning.unit_order import Place

NAME = "optin"


class Optin(Pruning, TrajectorySettings):
    """What stays, and how units are scored."""

    normalised: bool = False
    """Where layers may differ, whether scores are standardised within the layer: less their mean, by their spread."""


def plan_optin(bench: Bench, settings: Optin) -> Plan:
    """Plan a model without the units that move the least.

    Raises:
        PlanError: see `auxin.planning.pruning`; the residual, for whose units there are no masks; a model that can't be
            measured (`auxin.analysis.trajectory`).
    """
    settings = bench.seeded(settings)
    found = _prunable(bench, settings)
    found.refuse_impossible(NAME)  # before the model is run
    streams: list[Streams] = [
        name for name in ("heads", "ffn") if any(stream in STREAMS[name] for stream, _ in found.units)
    ]
    asked = {name: getattr(settings, name) for name in TrajectorySettings.model_fields}
    measured = measure(Trajectory(streams=streams, **asked), bench.model, bench.data)
    scores: dict[Place, Sequence[float]] = {}
    for group in measured.groups:
        stream = "query" if group.stream == "key_value" else group.stream
        assert stream != "expert"
        scores[stream, group.scope] = group.scores.means
    return found.plan(NAME, scores, settings.seed, split="worth")


def _prunable(bench: Bench, settings: Optin) -> Prunable:
    if other := next((name for name in settings.chosen if name not in ("heads", "ffn")), None):
        raise PlanError(
            f"{other}: {NAME} masks heads and feed-forward units alone. Leave it out, or choose taylor or fisher."
        )
    return prunable(bench.model, settings)


METHOD = Method(
    name=NAME,
    title="Fewer heads and feed-forward units, without those whose masks move all later layers least (OPTIN)",
    paper="arXiv 2403.17921",
    intent="prune",
    settings=Optin,
    plan=plan_optin,
    examples=pruning_example,
    needs_weights=True,
    promise="none",
    calibration=lambda settings: CalibrationSettings(samples=16),
    outline=lambda bench, settings: _prunable(bench, settings).outline(NAME),
)
