"""Widths, and whole attentions and feed-forward parts, pruned by noisy gates that are learned on samples and whose
means stay in the weights (VTrans, Dutta et al. 2024, arXiv 2406.05276; in the form of TVA-Prune by the same authors,
whose code is public, on VIBNet, 1802.10399).

A gate multiplies what every head, feed-forward unit, unit of the residual stream or whole part of a layer gives by a
number with noise, for every token another draw (`auxin.analysis.gates`). A unit's score is minus log alpha, how much of
its gate is signal. The units that go are those of the lowest scores, as many as the shares, counts or the target ask
for; a target takes from all streams by one ranking, parts included. What stays is multiplied by the means of its gates,
the weighted mask, once and for all (`auxin.planning.folding`); with `masks: hard` it stays as it is.

* Gates are told what is wanted: shares and counts are goals of every layer, or of all together where layers may differ;
  a target is one of the whole model's expected parameters, or for FLOPs and latencies of those that are multiplied with
  every token. What is in a part stays if the part does, too, so that its share is multiplied by the part's. That layers
  have to keep as many, gates do not know of a target.
* kappa, what the KL of a unit counts, is the number of parameters that go with it, so that a head weighs as much as
  feed-forward units of its size, and a part as much as all that is in it. TVA-Prune's 256 for a head of Llama-7B would
  be 171 by this rule.
* Means and noise are learned alone, with the model's weights as they are (the paper's Faster-VTrans), or the weights
  with them (`weight_learning_rate`: VTrans; on a small share of the data Fast-VTrans), taught by the whole model, too.
  They are trained in a copy, float32 at least, and the plan has their values: it is as large as the model.

Not carried over: the best of several evaluations near the target, LoRA afterwards, distillation of hidden states. Nor
the threshold log alpha = 0, which need not meet the target; the plan's findings say what it would leave.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, Literal, Self

import torch
from pydantic import Field, StrictFloat, StrictInt, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.analysis.gates import Gates, GateSettings, Goal, Shares, learn, losses_of
from auxin.analysis.unit_masks import maskable
from auxin.analysis.units import WORDS, Group, Units, units_of, why_no_residual, with_sublayers
from auxin.edits import Plan
from auxin.models.sublayers import Sublayer
from auxin.objectives.calibration import CalibrationSettings
from auxin.planning.bench import Bench
from auxin.planning.expected_size import ExpectedSize
from auxin.planning.folding import folding
from auxin.planning.method import Method
from auxin.planning.pruning import Prunable, Pruning, prunable, pruning_example
from auxin.planning.pruning_settings import STREAMS, Part, check_amount
from auxin.planning.removed_sublayers import parameters_of_sublayers
from auxin.planning.trained_weights import trainable_copy, with_weights
from auxin.planning.unit_order import Place
from auxin.words.paths import encloses
from auxin.words.widths import Stream

NAME = "vtrans"
BATCH_SIZE = 8
"""Samples per step, unless the data comes in other batches."""


class VTrans(Pruning, GateSettings):
    """What stays, and how gates are learned."""

    masks: Literal["weighted", "hard"] = "weighted"
    """Whether what stays is multiplied by the means of its gates, or stays as it is."""
    normalised: bool = False
    """Where layers may differ, whether scores are standardised within the layer: less their mean, by their spread."""
    sublayers: StrictInt | StrictFloat | None = Field(default=None, gt=0)
    """Attentions and feed-forward parts that stay, of all layers together; the others go whole. With a target, those
    that stay at least: it takes from them, too, by the same ranking. None: all."""

    @model_validator(mode="after")
    def _is_a_share(self) -> Self:
        if isinstance(self.sublayers, float):
            check_amount("sublayers", self.sublayers, alike=True)
        return self

    @property
    def parts_left(self) -> int | float | None:
        """As `sublayers` says."""
        return self.sublayers


def plan_vtrans(bench: Bench, settings: VTrans) -> Plan:
    """Learn gates for the bench's model, which stays as it is, and plan a model without the units of the most noise.

    Args:
        bench: the model, with weights, and a batch of samples with labels for each step; it is read from the start
            again when it ends. The files of the gates' means, and of weights that are trained, go to the bench's
            folder.
        settings: what stays, and how gates are learned.

    Raises:
        PlanError: see `auxin.planning.pruning`; experts; a residual that has no places known for its gates, or whose
            weighted mask the weights can't take up; no part that can go alone; weights that are to be trained, and none
            asks for gradients; a loss that is not finite.
        DataError: the samples have no labels.
    """
    settings = bench.seeded(settings)
    found = _prunable(bench.model, settings)
    streams = found.refuse_impossible(NAME)  # before the model is run
    units = units_of(bench.model)
    groups = _groups(units, settings, streams)
    whole = found.whole.chosen if found.whole is not None and "sublayer" in streams else []
    folded = None
    if settings.masks == "weighted":
        counts = {_place(group): units.counts[group] for group in groups}
        folded = folding(bench.model, found.body, counts, whole)
    groups += [("sublayer", one.path) for one in whole]
    places: dict[Place, Group] = {_place(group): group for group in groups}
    gates, losses, trained = _learned(bench, found, groups, whole, settings)
    log_alpha = {group: values.tolist() for group, values in gates.by_group(gates.log_alpha().detach()).items()}
    if folded is not None:
        means = gates.by_group(gates.mu.detach())
        folded = folded.filled({place: means[group].tolist() for place, group in places.items()}, bench.folder)
    scores = {place: _scores(place, count, log_alpha, streams) for place, count in found.units.items()}
    said = [_about_threshold(log_alpha), _about_losses(losses)]
    plan = found.plan(NAME, scores, settings.seed, split="score", folded=folded, findings=said)
    return with_weights(plan, bench.model, trained, bench.folder)


def _prunable(model: PreTrainedModel, settings: VTrans) -> Prunable:
    refused: dict[Part, str] = {
        "experts": f"{NAME} has gates for heads, feed-forward units and the residual. Leave experts out, or choose "
        "expert-dropping."
    }
    if why := why_no_residual(model):
        refused["hidden"] = f"{why} Leave it out."
    return prunable(model, settings, refused)


def _groups(units: Units, settings: VTrans, streams: Sequence[Stream]) -> list[Group]:
    """The units that get gates: those of which something can go."""
    parts = [part for part in settings.chosen if set(STREAMS[part]) & set(streams)]
    found = maskable(units, [part for part in parts if part in ("heads", "ffn")])
    if "hidden" in parts:
        found.append(("residual", ""))
    return found


def _place(group: Group) -> Place:
    """Where planning has the units of a group: query heads go by key-value groups."""
    kind, scope = group
    return "query" if kind == "key_value" else kind, scope


def _learned(
    bench: Bench, found: Prunable, groups: Sequence[Group], whole: Sequence[Sublayer], settings: VTrans
) -> tuple[Gates, list[float], dict[str, nn.Parameter]]:
    """Gates that have been learned, the loss at every step, and the weights that were trained with them by name, of a
    copy of the model; none where they stay as they are."""
    assert bench.data is not None
    model, target, trained = bench.model, settings.target, dict[str, nn.Parameter]()
    if settings.weight_learning_rate is not None:
        model, trained = trainable_copy(model, "weight_learning_rate")
    units = with_sublayers(model, units_of(model), whole)
    counts: dict[Place, int] = {(kind, s): units.counts[kind, s] for kind, s in groups if kind != "sublayer"}
    expected = ExpectedSize(
        model,
        found.body,
        counts,
        multiplied=target is not None and target.parameters is None,
        sublayers=parameters_of_sublayers(model, [one.path for one in whole]) if whole else {},
    )
    if target is None:
        goals = [goal for part in settings.chosen for goal in _goals(part, found, groups, settings)]
        goals += _goals_of_sublayers(found, whole, settings)
    else:
        goals = [Goal(partial(_left, expected), float(found.gauge.limit) / found.gauge.have)]
    parameters = expected.of_a_unit()
    kappas = {(kind, scope): parameters[kind, scope] for kind, scope in groups}
    gates = Gates(units, groups, kappas, settings.seed, next(model.parameters()).device)
    weights = list(trained.values())
    teacher = bench.model if weights and settings.distillation else None
    with losses_of(model, bench.data, NAME, weights, teacher, settings.distillation) as task:
        losses = learn(gates, task, settings, goals, weights)
    return gates, losses, trained


def _left(expected: ExpectedSize, shares: Shares) -> Tensor:
    """The share of the model that is expected to be left."""
    return expected.left({(kind, scope): values for (kind, scope), values in shares.items()})


def _goals(part: Part, found: Prunable, groups: Sequence[Group], settings: VTrans) -> Iterator[Goal]:
    """The goals of a share, or of a count, of heads, feed-forward units or the residual: in every layer, where layers
    keep as many, or over all."""
    amount: int | float = getattr(settings, part)
    own = [group for group in groups if _place(group)[0] in STREAMS[part]]
    if isinstance(amount, int):
        amount /= max(found.body.sizes.units(*_place(group)) or 1 for group in own)
    for together in [[group] for group in own] if settings.uniform else [own]:
        yield Goal(partial(_mean, together), amount)


def _goals_of_sublayers(found: Prunable, whole: Sequence[Sublayer], settings: VTrans) -> Iterator[Goal]:
    """The goal of a share, or of a count, of sublayers: over all, those included that have no gate and stay."""
    amount = settings.sublayers
    if not whole or found.whole is None or amount is None:
        return
    total = sum(map(len, found.whole.of_stacks.values()))
    stay = amount * total if isinstance(amount, float) else amount
    groups: list[Group] = [("sublayer", one.path) for one in whole]
    yield Goal(partial(_mean, groups), max(0.0, (stay - total + len(whole)) / len(whole)))


def _mean(groups: Sequence[Group], shares: Shares) -> Tensor:
    """The share of the units of some groups that is expected to be left."""
    return torch.cat([shares[group] for group in groups]).mean()


def _scores(
    place: Place, count: int, log_alpha: Mapping[Group, Sequence[float]], streams: Sequence[Stream]
) -> Sequence[float]:
    """Minus log alpha of the units of a place; means over layers where units go from several at once; zeros where
    nothing can go."""
    stream, scope = place
    inner = [values for group, values in log_alpha.items() if _place(group)[0] == stream and encloses(scope, group[1])]
    if stream not in streams:
        return [0.0] * count
    return [-sum(unit) / len(unit) for unit in zip(*inner, strict=True)]


def _about_threshold(log_alpha: Mapping[Group, Sequence[float]]) -> str:
    """What the threshold alone would leave, which is not what was asked for."""
    words = []
    for kind, groups in groupby(log_alpha, key=lambda group: group[0]):
        values = [value for group in groups for value in log_alpha[group]]
        words.append(f"{sum(value < 0 for value in values)} of {len(values)} {WORDS[kind]}")
    return f"By the threshold (log alpha < 0) {', '.join(words)} would stay."


def _about_losses(losses: Sequence[float]) -> str:
    last = losses[-max(1, len(losses) // 10) :]
    return (
        f"The loss with gates was {losses[0]:.3f} at the first of {len(losses)} steps, and {sum(last) / len(last):.3f} "
        "over the last tenth."
    )


def _examples(model: PreTrainedModel) -> dict[str, Any]:
    """A few steps, on a batch: a tiny model has no data."""
    return {**pruning_example(model), "steps": 4}


METHOD = Method(
    name=NAME,
    title="Fewer heads, feed-forward or residual units, or whole parts, by noisy gates learned on samples (VTrans)",
    paper="arXiv 2406.05276",
    intent="prune",
    settings=VTrans,
    plan=plan_vtrans,
    examples=_examples,
    needs_weights=True,
    promise="none",
    calibration=lambda settings: CalibrationSettings(samples=settings.steps * BATCH_SIZE, batch_size=BATCH_SIZE),
    outline=lambda bench, settings: _prunable(bench.model, settings).outline(NAME),
)
