"""Widths pruned by trajectories: the units go whose masks move all later layers and the logits least, and of images the
tokens, too (OPTIN, Khaki and Plataniotis 2024, arXiv 2403.17921).

The scores are those of the measurement `trajectory` (`auxin.analysis.trajectory`): forward passes with one unit masked,
no gradients, no labels, nothing trained. Scores of heads and of feed-forward units are of one kind, and so a target is
shared between them as the paper does it: for every number of heads the best ones are kept, the rest of the limit is
filled with the best feed-forward units, and the number is taken at which the scores that stay have the largest sum.

* `uniform` (the default): the numbers are those of every layer, so that the family's config says them, and the search
  is over these.
* `uniform: false` is the paper's: one ranking of the heads of all layers, and one of their feed-forward units, by
  scores as they are (`normalised` is false here). In every layer something stays; in the paper a layer may lose all.

Encoders of patches may process fewer tokens, too (`token_share`, the paper's configuration tau; without it beta). The
scores (`auxin.analysis.token_trajectory`) say how many tokens fewer each layer gets (`auxin.planning.merged_tokens`),
and the tokens that are most alike are merged (`auxin.nn.token_merging`). Scores of tokens compare samples and those of
units tokens, so that no search shares a limit between the two: the part that tokens save is a setting. In the paper it
is drawn at random.

Not carried over from the paper's code: scores multiplied by an envelope over the units' numbers and over layers, a mask
of a block that stays while the blocks after it are scored, tokens that are drawn anew for every unit, padding among
them, logits that are never divided by the temperature, constants for heads and for the last layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any, Self

from pydantic import Field, model_validator
from transformers import PreTrainedModel

from auxin.analysis.measurement import Measurement
from auxin.analysis.run import measure_all
from auxin.analysis.token_trajectory import TokenTrajectories, TokenTrajectory
from auxin.analysis.trajectory import Trajectories, Trajectory, TrajectorySettings
from auxin.analysis.unit_masks import Streams
from auxin.edits import Plan
from auxin.edits.structure import config_values
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.models.anatomy.vit import tokens_before_patches
from auxin.nn.token_merging import TokenMergingLayer
from auxin.objectives.calibration import CalibrationSettings
from auxin.planning.bench import Bench
from auxin.planning.depth import depth
from auxin.planning.merged_tokens import fewer_tokens, tokens_of_layers
from auxin.planning.method import Method
from auxin.planning.pruning import STREAMS, Prunable, Pruning, prunable, pruning_example
from auxin.planning.target import Gauge
from auxin.planning.unit_order import Place, Scores

NAME = "optin"


class Optin(Pruning, TrajectorySettings):
    """What stays, and how units and tokens are scored."""

    normalised: bool = False
    """Where layers may differ, whether scores are standardised within the layer: less their mean, by their spread."""
    token_share: float = Field(default=0.0, ge=0, le=1)
    """Of what `target.flops` takes away, the part that is saved by merging tokens of images; the rest comes from units.
    The paper has 0.7 to 0.85. At 0 no tokens are merged, at 1 no units go."""

    @model_validator(mode="after")
    def _check_tokens(self) -> Self:
        if self.token_share and (self.target is None or self.target.flops is None):
            raise ValueError("token_share: merging tokens saves FLOPs and nothing else. Give target.flops.")
        if self.token_share == 1 and (self.streams is not None or not self.uniform):
            raise ValueError("token_share = 1: no units go. Leave out what is said of them (streams, uniform).")
        return self


def plan_optin(bench: Bench, settings: Optin) -> Plan:
    """Plan a model without the units, and with fewer tokens, that move the least.

    Raises:
        PlanError: see `auxin.planning.pruning`; the residual, for whose units there are no masks; a model that can't be
            measured (`auxin.analysis.trajectory`, `auxin.analysis.token_trajectory`), or merges tokens already.
    """
    settings = bench.seeded(settings)
    units = _units(bench.model, settings)
    # What is impossible is found before the model is run.
    if settings.token_share:
        _planned(bench.model, settings, units, None, _unknown(bench.model))
    elif units is not None:
        units.refuse_impossible(NAME)
    return _planned(bench.model, settings, units, *_scores(bench, settings, units))


def outline_optin(bench: Bench, settings: Optin) -> Plan:
    """A plan for a model of which there are shapes alone, of the same size where all layers keep as many units."""
    settings = bench.seeded(settings)
    tokens = _unknown(bench.model) if settings.token_share else None
    return _planned(bench.model, settings, _units(bench.model, settings), None, tokens)


@dataclass(frozen=True)
class _Tokens:
    """What tokens are worth."""

    first: int
    """The position of the first patch."""
    scores: Mapping[str, Sequence[float]]
    """By layer, from the second one on, and position, from the first patch on."""


def _unknown(model: PreTrainedModel) -> _Tokens:
    """Of all tokens the same scores.

    Raises:
        PlanError: tokens can't be merged in `model`, or are already.
    """
    first, (stack,) = tokens_before_patches(model), anatomy(model).stacks
    if merging := next((path for path, layer in model.named_modules() if isinstance(layer, TokenMergingLayer)), None):
        raise PlanError(f"{merging} merges tokens already. Start from the model before, and ask for less of that one.")
    patches = tokens_of_layers(model, stack.path) - first
    return _Tokens(first, {f"{stack.path}.{n}": [0.0] * patches for n in range(1, depth(model, stack))})


def _units(model: PreTrainedModel, settings: Optin) -> Prunable | None:
    """What is pruned of heads and feed-forward units, to a target of their own where tokens go, too, if anything."""
    if settings.token_share == 1:
        return None
    if settings.token_share and settings.target is not None:
        gauge = Gauge(settings.target, model)
        left = floor(gauge.have - (1 - settings.token_share) * (gauge.have - float(gauge.limit)))
        target = settings.target.model_copy(update={"flops": float(left)})
        settings = settings.model_copy(update={"target": target})
    alone = f"{NAME} masks heads and feed-forward units alone. Leave it out, or choose taylor or fisher."
    return prunable(model, settings, {"experts": alone, "hidden": alone})


def _scores(bench: Bench, settings: Optin, units: Prunable | None) -> tuple[Scores, _Tokens | None]:
    """The scores of units and of tokens, in one pass over the data."""
    wanted: list[Measurement[Any]] = []
    asked = {name: getattr(settings, name) for name in TrajectorySettings.model_fields}
    if units is not None:
        streams: list[Streams] = [
            name for name in ("heads", "ffn") if any(stream in STREAMS[name] for stream, _ in units.units)
        ]
        wanted.append(Trajectory(streams=streams, **asked))
    if settings.token_share:
        wanted.append(TokenTrajectory(**{name: asked[name] for name in TokenTrajectory.model_fields}))
    scores: dict[Place, Sequence[float]] = {}
    tokens = None
    for result in (record.result for record in measure_all(wanted, bench.model, bench.data)):
        if isinstance(result, TokenTrajectories):
            tokens = _Tokens(result.first, {layer.scope: layer.scores.means for layer in result.layers})
            continue
        assert isinstance(result, Trajectories)
        for group in result.groups:
            stream = "query" if group.stream == "key_value" else group.stream
            assert stream != "expert"
            scores[stream, group.scope] = group.scores.means
    return scores, tokens


def _planned(
    model: PreTrainedModel, settings: Optin, units: Prunable | None, scores: Scores | None, tokens: _Tokens | None
) -> Plan:
    """The plan by scores of units, or where these are not known any units, and of tokens."""
    plan = Plan(method=NAME, promise="none", seed=settings.seed, edits=[], made_for=config_values(model.config))
    if units is not None:
        plan = units.outline(NAME) if scores is None else units.plan(NAME, scores, settings.seed, split="worth")
    if tokens is None or settings.target is None:
        return plan
    gauge = Gauge(settings.target, model)
    done = fewer_tokens(gauge, tokens.scores, tokens.first, plan.edits, NAME)
    return plan.model_copy(
        update={
            "settings": settings.model_dump(mode="json", exclude_defaults=True),
            "edits": list(done.edits),
            "findings": done.findings(settings.target),
        }
    )


METHOD = Method(
    name=NAME,
    title="Fewer heads, feed-forward units and tokens of images: those that move all later layers least go (OPTIN)",
    paper="arXiv 2403.17921",
    intent="prune",
    settings=Optin,
    plan=plan_optin,
    examples=pruning_example,
    needs_weights=True,
    promise="none",
    calibration=lambda settings: CalibrationSettings(samples=16),
    outline=outline_optin,
)
