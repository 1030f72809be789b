"""Whole attentions and feed-forward parts go, one after the other (FinerCut, Zhang et al. 2024, arXiv 2405.18218).

Each step takes the sublayer without which the output is least far from that of the whole model,

    S(k+1) = S(k) + argmin over c of D(Z, Z without S(k) and c),

where Z is always the output of the model as it came, on calibration samples. The choice of one step changes what the
next one sees: a list of single effects (`one_shot`) is another, worse one. Nothing is trained or repaired.

The steps are measurements (`auxin.analysis.removal`), each kept in the cache: a search that was broken off goes on
where it was, and one that removes more begins with what one that removed less has found. The plan's cost is that of the
whole search all the same. For Llama 3 the paper's code has the Jensen-Shannon divergence as D, ten contexts of 256
tokens, and spares the lower 40 % of the layers at first (`spared`: 0.4).

The ratio counts sublayers and not parameters: an attention of Llama 3 8B has a quarter of a feed-forward part's. The
plan's findings have both.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import partial
from math import floor
from typing import Any

from pydantic import Field
from transformers import PreTrainedModel

from auxin.analysis.distances import Distance
from auxin.analysis.removal import Candidates, Removal, RemovalEffect, candidates
from auxin.analysis.run import measure
from auxin.edits import Edit, Plan
from auxin.objectives.calibration import CalibrationSettings
from auxin.planning.bench import Bench
from auxin.planning.method import Method
from auxin.planning.removal_order import Going, HowMuch, from_the_top, last_ones, taken
from auxin.planning.removed_sublayers import layers_to_leave_out, refusals, without_layers, without_sublayers


class FinerCut(HowMuch):
    """How much goes, of what, and how it is chosen; give exactly one of `removed` and `target`."""

    candidates: Candidates = "all"
    """What may go: every sublayer ("all"), those of one kind ("attention", "feed-forward"), or whole "layers"."""
    distance: Distance = "js"
    """By which the outputs are held against each other."""
    spared: float = Field(default=0.0, ge=0, lt=1)
    """Share of the candidates, from the first layer on, that stay until more than as many are gone: from 0.5 on for
    good, since the others are no more."""
    one_shot: bool = False
    """Whether all are chosen by the effects that they have alone: one pass instead of one for each step."""

    def spared_at_first(self, offered: Sequence[str]) -> Sequence[str]:
        """The first ones, as `spared` says."""
        return offered[: floor(len(offered) * Fraction(str(self.spared)))]


def plan_finercut(bench: Bench, settings: FinerCut) -> Plan:
    """Plan the removals.

    Raises:
        PlanError: the architecture is not known, less or more is to go than can, or the target can't be reached.
    """
    offered, edits = _offered(bench.model, settings), partial(_edits, bench.model, settings)
    return taken(bench.model, settings, offered, _search(bench, settings, offered), edits, METHOD.name)


def _outline(bench: Bench, settings: FinerCut) -> Plan:
    """A plan that removes as many, from the top: which ones go is not known, nor how large they are."""
    offered, edits = _offered(bench.model, settings), partial(_edits, bench.model, settings)
    return taken(bench.model, settings, offered, from_the_top(offered, settings), edits, METHOD.name)


def _search(bench: Bench, settings: FinerCut, offered: dict[str, str]) -> Iterator[Going]:
    """The candidates in the order in which they go, each with the distance that it leads to."""
    gone: list[str] = []
    ranking: list[RemovalEffect] = []
    spared, kept = settings.spared_at_first(list(offered)), settings.kept(offered)
    while len(gone) < len(offered):
        if not ranking or not settings.one_shot:
            wanted = Removal(candidates=settings.candidates, distances=[settings.distance], removed=gone)
            ranking = measure(wanted, bench.model, bench.data).ranking(settings.distance)
        stays = {*gone, *kept, *(spared if len(gone) <= len(spared) else ()), *last_ones(offered, gone)}
        possible = [effect for effect in ranking if effect.path in offered and effect.path not in stays]
        if not possible:
            return
        gone.append(possible[0].path)
        yield _going(bench.model, possible[0], settings.distance)


def _going(model: PreTrainedModel, effect: RemovalEffect, name: Distance) -> Going:
    """What is said of a part that goes; a part that is named after its last matrix (BERT's) doesn't say what it is."""
    far = effect.distances[name]
    kind = f"{effect.kind}: " if hasattr(model.get_submodule(effect.path), "weight") else ""
    return Going(effect.path, f"{kind}{name} {far.mean:.3g}", far.margin)


def _offered(model: PreTrainedModel, settings: FinerCut) -> dict[str, str]:
    """What may go: the stack of each, by its path."""
    if settings.candidates == "layers":
        return layers_to_leave_out(model)
    found = {one.path: one.stack for one in candidates(model, settings.candidates)}
    refused = refusals(model)
    return {path: stack for path, stack in found.items() if path not in refused}


def _edits(model: PreTrainedModel, settings: FinerCut, gone: Sequence[str]) -> list[Edit]:
    return (without_layers if settings.candidates == "layers" else without_sublayers)(model, gone)


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
