"""Whole attentions and feed-forward parts go, one after the other (FinerCut, Zhang et al. 2024, arXiv 2405.18218).

Each step takes the sublayer without which the output is least far from that of the whole model,

    S(k+1) = S(k) + argmin over c of D(Z, Z without S(k) and c),

where Z is always the output of the model as it came, on calibration samples. The choice of one step changes what the
next one sees: a list of single effects (`one_shot`) is another, worse one. Nothing is trained or repaired.

The steps are measurements (`auxin.analysis.removal`), each kept in the cache: a search that was broken off goes on
where it was, and one that removes more begins with what one that removed less has found. For Llama 3 the paper's code
has the Jensen-Shannon divergence as D, ten contexts of 256 tokens, and spares the lower 40 % of the layers at first
(`spared`: 0.4).

The ratio counts sublayers and not parameters: an attention of Llama 3 8B has a quarter of a feed-forward part's. The
plan's notes have both.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import floor, isnan, nan
from typing import Any, Self

from pydantic import Field, model_validator
from transformers import PreTrainedModel

from auxin.analysis.distances import Distance
from auxin.analysis.removal import Candidate, Candidates, Removal, candidates
from auxin.analysis.run import measure
from auxin.edits import Edit, Plan
from auxin.edits.structure import config_values
from auxin.errors import PlanError
from auxin.objectives.calibration import CalibrationSettings
from auxin.planning.bench import Bench
from auxin.planning.method import Method
from auxin.planning.removed_sublayers import refusals, without_layers, without_sublayers
from auxin.planning.target import Target, removal
from auxin.settings import Settings


class FinerCut(Settings):
    """How much goes, of what, and how it is chosen; give exactly one of `removed` and `target`."""

    removed: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """How many of the candidates go: a share of them below 1 (0.25), rounded down, otherwise their number."""
    target: Target | None = None
    """How small the model is to be; the search stops at the first step that meets it."""
    candidates: Candidates = "all"
    """What may go: every sublayer ("all"), those of one kind ("attention", "feed-forward"), or whole "layers"."""
    distance: Distance = "js"
    """By which the outputs are held against each other."""
    spared: float = Field(default=0.0, ge=0, lt=1)
    """Share of the candidates, from the first layer on, that stay until as large a share is gone."""
    one_shot: bool = False
    """Whether all are chosen by the effects that they have alone: one pass instead of one for each step."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.removed is None) == (self.target is None):
            raise ValueError("give exactly one of removed (0.25, or a number of sublayers) and target.")
        if self.removed is not None and self.removed >= 1 and self.removed != int(self.removed):
            raise ValueError(f"removed = {self.removed:g} is neither a share below 1 nor a whole number.")
        return self


def plan_finercut(bench: Bench, settings: FinerCut) -> Plan:
    """Plan the removals.

    Raises:
        PlanError: the architecture is not known, less or more is to go than can, or the target can't be reached.
    """
    offered = _offered(bench.model, settings)
    _refuse_impossible(bench.model, settings, offered)
    return _taken(bench.model, settings, offered, _search(bench, settings, offered))


def _taken(
    model: PreTrainedModel, settings: FinerCut, offered: Sequence[Candidate], order: Iterator[tuple[str, float]]
) -> Plan:
    """The plan that takes candidates out in `order`, each given with the distance that this leads to, until as much is
    gone as was asked for."""
    count, target = _count(settings, len(offered)), settings.target
    gone: list[tuple[str, float]] = []
    for path, distance in order:
        gone.append((path, distance))
        if count is not None and len(gone) < count:
            continue
        found = removal(model, _edits(model, settings, [path for path, _ in gone]))
        if target is None or target.of(found.after) <= target.limit(target.of(found.before)):
            told = ", ".join(path if isnan(distance) else f"{path} ({distance:.3g})" for path, distance in gone)
            return Plan(
                method="finercut",
                settings=settings.model_dump(mode="json", exclude_defaults=True),
                promise="none",
                edits=list(found.edits),
                notes=[
                    found.reached(target),
                    f"Removed, in this order (in brackets the {settings.distance} that each led to): {told}.",
                ],
                made_for=config_values(model.config),
            )
    raise PlanError(
        f"After {len(gone)} of {len(offered)} candidates nothing more can go without a stack losing all of its parts. "
        "Ask for less."
    )


def _search(bench: Bench, settings: FinerCut, offered: Sequence[Candidate]) -> Iterator[tuple[str, float]]:
    """The candidates in the order in which they go, each with the distance then."""
    model, gone = bench.model, list[str]()
    known = {one.path: one for one in offered}
    ranking = list[tuple[str, float]]()
    while len(gone) < len(offered):
        if not ranking or not settings.one_shot:
            # Order of the list: the cache's; a longer search begins with the same ones.
            wanted = Removal(candidates=settings.candidates, distances=[settings.distance], removed=gone)
            found = measure(wanted, model, bench.data)
            ranking = [(e.path, e.distances[settings.distance].mean) for e in found.ranking(settings.distance)]
        spared = {one.path for one in _spared(settings, offered, len(gone))}
        last = _last_ones(offered, gone)
        possible = [(p, d) for p, d in ranking if p in known and p not in gone and p not in spared | last]
        if not possible:
            return
        gone.append(possible[0][0])
        yield possible[0]


def _spared(settings: FinerCut, offered: Sequence[Candidate], gone: int) -> Sequence[Candidate]:
    """The candidates that stay for now."""
    first = floor(len(offered) * settings.spared)
    return offered[:first] if gone <= first and first else []


def _last_ones(offered: Sequence[Candidate], gone: Sequence[str]) -> set[str]:
    """The candidates that are the last ones of their stack."""
    left: dict[str, list[str]] = {}
    for one in offered:
        left.setdefault(one.stack, []).extend([] if one.path in gone else [one.path])
    return {paths[0] for paths in left.values() if len(paths) == 1}


def _offered(model: PreTrainedModel, settings: FinerCut) -> list[Candidate]:
    """What may go."""
    found = candidates(model, settings.candidates)
    if settings.candidates == "layers":
        return found
    refused = refusals(model)
    return [one for one in found if one.path not in refused]


def _count(settings: FinerCut, offered: int) -> int | None:
    """How many candidates go; None: until the target is met."""
    if settings.removed is None:
        return None
    count = floor(offered * Fraction(str(settings.removed))) if settings.removed < 1 else int(settings.removed)
    if not 0 < count < offered:
        raise PlanError(
            f"removed = {settings.removed:g} of {offered} candidates is {count}. Ask for 1 to {offered - 1}, or for a "
            f"share from {1 / offered:.4f} on."
        )
    return count


def _refuse_impossible(model: PreTrainedModel, settings: FinerCut, offered: Sequence[Candidate]) -> None:
    """Raise PlanError, before any work, when no number of removals is what was asked for."""
    _count(settings, len(offered))
    if (target := settings.target) is None:
        return
    have = target.of(model)
    limit = target.limit(have)
    if have <= limit:
        raise PlanError(f"{target}: the model is no larger, so that nothing has to go. Ask for less.")
    last = {one.stack: one.path for one in offered}.values()
    most = [one.path for one in offered if one.path not in last]
    smallest = target.of(removal(model, _edits(model, settings, most)).after) if most else have
    if smallest > limit:
        raise PlanError(
            f"{target} asks for at most {int(limit):,} of {have:,.0f}, and with all candidates but the last gone "
            f"{smallest:,.0f} would be left. Ask for at least that."
        )


def _edits(model: PreTrainedModel, settings: FinerCut, gone: Sequence[str]) -> list[Edit]:
    return (without_layers if settings.candidates == "layers" else without_sublayers)(model, gone)


def _outline(bench: Bench, settings: FinerCut) -> Plan:
    """A plan that removes as many, from the top: which ones go is not known, nor how large they are."""
    offered = _offered(bench.model, settings)
    _refuse_impossible(bench.model, settings, offered)
    last = {one.stack: one.path for one in reversed(offered)}.values()
    order = ((one.path, nan) for one in reversed(offered) if one.path not in last)
    return _taken(bench.model, settings, offered, order)


def _examples(model: PreTrainedModel) -> dict[str, Any]:
    return {"removed": 1}


METHOD = Method(
    name="finercut",
    title="Fewer attentions and feed-forward parts, those that the output misses least (FinerCut)",
    paper="arXiv 2405.18218",
    intent="prune",
    settings=FinerCut,
    plan=plan_finercut,
    examples=_examples,
    needs_weights=True,
    promise="none",
    calibration=lambda settings: CalibrationSettings(samples=16),
    outline=_outline,
)
