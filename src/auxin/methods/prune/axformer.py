"""Attentions become hard, and attentions, feed-forward parts, heads and feed-forward units go, as long as the loss on
labelled samples falls (AxFormer, Nagarajan et al. 2022, arXiv 2010.03688).

A model that was trained for one task has parts that do nothing for it, or harm. The search goes twice through the
model. From the first layer to the last, it tries attentions in which each query reads the K = 30 most probable tokens
alone (`auxin.nn.reading_few`), where samples have more than K. From the last layer to the first, in a layer the
feed-forward part before the attention, it tries what is left without a piece. A change c is kept if

    L(c) < L_best    and    #{s : l_s(c) <= l_s(0)} > N                       N = floor(benefit * samples)

where l_s is the loss of a sample, l_s(0) that of the model as it came, and L the mean over all samples: a smaller loss,
and that not by a few samples alone. Where a whole part stays and its removal costs less than `tolerance` allows (L(c) <
1.1 L_best), its heads or groups of its feed-forward units are tried one after the other; what costs more is not looked
into. Nothing is revisited, and nothing trained.

There is no size to ask for: the search stops by itself, and where it finds nothing there is no plan. Its loss falls by
construction, since up to hundreds of removals are tried on the same samples: what the result is worth only samples tell
that neither training nor search has seen.

Not as in the paper's code: the mean is one over samples, not over means of batches; masks become edits; the last head
and the last group of a part that stays, stay too; query heads that read one key-value head go together. Where a layer
has two attentions, each is made hard on its own, the one that reads its own stack first.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import floor
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from auxin.accounting.inputs import IDS
from auxin.analysis.masked_losses import Branch, Hard, MaskedLosses, Piece, attentions, branches
from auxin.analysis.measurement import Batch, kept_tokens
from auxin.analysis.unit_masks import Streams
from auxin.edits import ArrangeLayers, Edit, Plan, ReplaceModule
from auxin.edits.structure import config_values
from auxin.errors import ConfigError, DataError, PlanError
from auxin.nn.attention_functions import calls_a_function
from auxin.nn.hard_attention import HardAttention
from auxin.objectives.calibration import CalibrationSettings
from auxin.planning.bench import Bench
from auxin.planning.method import Method
from auxin.planning.removal_order import last_ones
from auxin.planning.removed_sublayers import moved, refusals, without_sublayers
from auxin.planning.removed_units import without_units
from auxin.planning.target import removal
from auxin.planning.unit_order import Place
from auxin.settings import Settings

NAME = "axformer"
Candidates = Literal["all", "attention", "feed-forward"]


class AxFormer(Settings):
    """When something goes, and what is tried; how much goes is what the search finds."""

    hard_attention: int | None = Field(default=30, gt=0)
    """Tokens that a query reads in attentions that become hard; null: none is tried. Nor is it where no sample has more
    tokens, since nothing would change."""
    candidates: Candidates = "all"
    """Parts of layers that are tried: "all", or those of one kind ("attention", "feed-forward"), without which no
    attention is made hard either."""
    streams: list[Streams] = ["heads", "ffn"]
    """What is tried of parts that stay as a whole: "heads", and groups of feed-forward units ("ffn"); none: nothing."""
    group_size: int | None = Field(default=None, gt=0)
    """Feed-forward units of a group; None: a twelfth of a layer's, rounded up to a multiple of 8. For BERT base that is
    the paper's 256."""
    tolerance: float = Field(default=1.1, ge=1, allow_inf_nan=False)
    """A part that stays is looked into where without it the loss is below this many times the best one so far."""
    benefit: float = Field(default=0.5, ge=0, lt=1)
    """More samples than this share of them, rounded down, must have no larger loss than with the model as it came."""

    @model_validator(mode="before")
    @classmethod
    def _no_size(cls, values: Any) -> Any:
        asked = [name for name in ("target", "removed", "heads", "ffn") if isinstance(values, dict) and name in values]
        if asked:
            raise ValueError(
                f"{asked[0]}: {NAME} takes no size: it removes what lowers the loss on the samples, and stops by "
                f"itself. Leave {asked[0]} out, or take finercut or taylor, which remove as much as they are told."
            )
        return values


Change = Piece | Hard


@dataclass(frozen=True)
class Try:
    """One change that was tried."""

    piece: Change
    """What goes, or becomes hard."""
    loss: float
    """The mean over all samples, with all that was taken before."""
    no_worse: int
    """Samples whose loss is no larger than with the model as it came."""
    taken: bool


@dataclass
class Search:
    """What a search found."""

    first: float
    """The loss of the model as it came."""
    best: float
    """The loss with all that was taken."""
    samples: int
    """How many there are."""
    taken: list[Change] = field(default_factory=list)
    """What was taken, in that order."""
    tries: list[Try] = field(default_factory=list)
    """Everything that was tried, in that order."""


def search(
    order: Iterable[Branch],
    whole: Tensor,
    losses: Callable[[Sequence[Change]], Tensor],
    settings: AxFormer,
    stays: Callable[[Piece, Sequence[Change]], bool] = lambda piece, taken: False,
    hard: Iterable[Hard] = (),
) -> Search:
    """Go once through some attentions and once through some parts, and keep what the loss is lower with.

    Args:
        order: the parts, in the order in which they are tried.
        whole: the losses of the model as it is, (samples,).
        losses: (changes) -> the losses with them, (samples,).
        settings: of the method.
        stays: (piece, what was taken) -> whether it can't go, whatever its removal does.
        hard: the attentions, in the order in which they are tried, before anything goes.
    """
    needed = floor(Fraction(str(settings.benefit)) * len(whole))
    found = Search(first=whole.mean().item(), best=whole.mean().item(), samples=len(whole))

    def tried(change: Change) -> Try:
        now = losses([*found.taken, change])
        loss, no_worse = now.mean().item(), int((now <= whole).sum())
        may = isinstance(change, Hard) or not stays(change, found.taken)
        done = Try(change, loss, no_worse, loss < found.best and no_worse > needed and may)
        found.tries.append(done)
        if done.taken:
            found.taken.append(change)
            found.best = loss
        return done

    for attention in hard:
        tried(attention)
    for branch in order:
        done = tried(branch.whole)
        if done.taken or not done.loss < settings.tolerance * found.best:
            continue
        taken = 0
        for piece in branch.finer:
            if taken < len(branch.finer) - 1:  # the last one stays
                taken += tried(piece).taken
    return found


def plan_axformer(bench: Bench, settings: AxFormer) -> Plan:
    """Plan the removals.

    Raises:
        PlanError: the architecture is not known, has several towers or layers that share a module, the model has no
            logits, or the search finds nothing to remove.
        DataError: the samples have no labels of which each has a loss, or a loss that is not finite.
    """
    model = bench.model
    if bench.data is None:
        raise ConfigError(f"{NAME} looks at the loss of labelled samples. Give data.")
    every = branches(model, settings.streams, settings.group_size)
    wanted = _wanted(model, every, settings)
    batches = list(bench.data.batches())
    hard, untried = _hard(model, batches, settings)
    parts = {branch.whole.sublayer.path: branch.whole.sublayer.stack.path for branch in every}
    needed = refusals(model)
    runs = MaskedLosses(model, batches, NAME)
    whole = runs.whole()
    if not torch.isfinite(whole).all():
        raise DataError(
            f"labels: the loss of {int((~torch.isfinite(whole)).sum())} of {len(whole)} samples is not finite, so that "
            "no removal can be told from another. Give samples that the model has a loss for."
        )

    def stays(piece: Piece, taken: Sequence[Change]) -> bool:
        path = piece.sublayer.path
        if piece.group is not None:
            return False
        return path in needed or path in last_ones(
            parts, [one.sublayer.path for one in _pieces(taken) if not one.group]
        )

    place = {path: number for number, path in enumerate(runs.order)}
    hard = sorted((one for one in hard if one.layer in place), key=lambda one: place[one.layer])
    result = search(_in_order(wanted, runs.order), whole, runs.without, settings, stays, hard)
    if not result.taken:
        raise PlanError(
            f"Nothing goes: of {len(result.tries)} changes that were tried none lowers the loss on the {len(whole)} "
            f"samples of the search ({result.first:.6g}) for enough of them. Keep the model as it is; or give other "
            "samples, or a smaller benefit."
        )
    edits, notes = _edits(model, result.taken)
    return Plan(
        method=NAME,
        settings=settings.model_dump(mode="json", exclude_defaults=True),
        promise="none",
        edits=edits,
        notes=[*notes, _warning(result)],
        findings=[*removal(model, edits).findings(), *untried, *_findings(result, runs.runs)],
        made_for=config_values(model.config),
    )


def _hard(model: PreTrainedModel, batches: Sequence[Batch], settings: AxFormer) -> tuple[list[Hard], list[str]]:
    """The attentions that are tried as hard ones, and where the settings would have some and there are none, why.

    Raises:
        PlanError: hard attention is asked for, and no attention of the architecture can be made hard.
    """
    if settings.hard_attention is None or settings.candidates == "feed-forward":
        return [], []
    found = attentions(model, settings.hard_attention)
    if not found:
        reason = f"a {type(model).__name__} does not hand its attention to an attention function of transformers"
        if "hard_attention" in settings.model_fields_set:
            raise PlanError(f"hard_attention = {settings.hard_attention}: {reason}. Set it to null, or leave it out.")
        return [], [f"Hard attention was not tried: {reason}."]
    lengths = [length for batch in batches for length in _lengths(model, batch)]
    if None not in lengths and max(length or 0 for length in lengths) <= settings.hard_attention:
        return [], [
            f"Hard attention was not tried: no sample has more than {settings.hard_attention} tokens, and each query "
            "reads them all."
        ]
    return found, []


def _lengths(model: PreTrainedModel, batch: Batch) -> list[int | None]:
    """Tokens of the longest sample of a batch, of each stack; None: not known, as of images."""
    if IDS not in batch:
        return [None]
    kept, labels = kept_tokens(model, batch), batch.get("labels")
    found: list[int | None] = [batch[IDS].shape[-1] if kept is None else int(kept.sum(1).max())]
    if model.config.is_encoder_decoder:  # whose decoder reads the labels, or what the encoder reads
        found.append((batch[IDS] if labels is None or labels.dim() != 2 else labels).shape[-1])
    return found


def _pieces(taken: Sequence[Change]) -> list[Piece]:
    """What goes, of what was taken."""
    return [one for one in taken if isinstance(one, Piece)]


def _wanted(model: PreTrainedModel, every: Sequence[Branch], settings: AxFormer) -> list[Branch]:
    """The parts that are to be tried; PlanError where there are none."""
    asked = settings.candidates
    found = [branch for branch in every if asked == "all" or asked in branch.whole.sublayer.kind]
    if not found:
        raise PlanError(f"candidates = {asked}: this {type(model).__name__} has none of these. Choose all.")
    return found


def _in_order(found: Sequence[Branch], layers: Sequence[str]) -> list[Branch]:
    """From the layer that runs last to the first, in each the feed-forward part first and of two attentions the one
    that reads another stack."""
    place = {path: number for number, path in enumerate(layers)}
    kinds = ("feed-forward", "cross-attention", "attention")
    return sorted(
        (branch for branch in found if branch.whole.sublayer.layer in place),
        key=lambda branch: (-place[branch.whole.sublayer.layer], kinds.index(branch.whole.sublayer.kind)),
    )


def _edits(model: PreTrainedModel, taken: Sequence[Change]) -> tuple[list[Edit], list[str]]:
    """The edits that take pieces out and make attentions hard, and what is to be said about them."""
    units: dict[Place, list[int]] = {}
    gone = _pieces(taken)
    for piece in gone:
        if piece.group is not None:
            units.setdefault(piece.group, []).extend(piece.units)
    edits, silent = without_units(model, units) if units else ([], {})
    smaller = removal(model, edits).after if edits else model
    if paths := [piece.sublayer.path for piece in gone if piece.group is None]:
        edits = [*edits, *without_sublayers(smaller, paths)]
    # Last, since no config says how to build a module with another attention anew.
    edits = [*edits, *_hardened(model, edits, [one for one in taken if isinstance(one, Hard)])]
    reasons: dict[str, list[str]] = {}
    for (stream, scope), reason in silent.items():
        reasons.setdefault(reason.removeprefix(f"{scope}: "), []).append(f"{stream} of {scope}")
    notes = [
        f"Silenced and not cut, so that they take as much memory and time as before, and get weight again where the "
        f"model is trained: {', '.join(places)}. The reason: {reason}"
        for reason, places in reasons.items()
    ]
    return edits, notes


def _hardened(model: PreTrainedModel, edits: Sequence[Edit], hard: Sequence[Hard]) -> list[Edit]:
    """The edits that make attentions hard in what `edits` leave of a model, where they may be gone by then."""
    if not hard:
        return []
    smaller = removal(model, list(edits)).after if edits else model
    kept = [edit for edit in edits if isinstance(edit, ArrangeLayers)]
    orders = {edit.layers: [number for number in edit.order if number is not None] for edit in kept}
    found: list[Edit] = []
    for one in hard:
        path = moved(one.path, orders)
        if path is not None and calls_a_function(smaller.get_submodule(path)):
            found.append(ReplaceModule(module=path, brick=HardAttention.brick_name, settings={"keep": one.keep}))
    return found


def _warning(result: Search) -> str:
    return (
        f"The loss of the search is a selected number: {len(result.tries)} changes were tried on the same "
        f"{result.samples} samples, and what lowered it there was kept. Judge the model by samples that neither "
        "training nor this search has seen."
    )


def _findings(result: Search, runs: int) -> list[str]:
    hard = [one for one in result.tries if isinstance(one.piece, Hard)]
    gone, pieces = len(_pieces(result.taken)), len(result.tries) - len(hard)
    told = f"Loss on the {result.samples} samples of the search {result.first:.6g} -> {result.best:.6g}; "
    if hard:
        told += f"{len(result.taken) - gone} of {len(hard)} attentions that were tried became hard; "
    told += f"{gone} of {pieces} pieces that were tried are gone."
    said = [f"{_word(one)} (loss {one.loss:.4g}, {one.no_worse} no worse)" for one in result.tries]
    return [told, f"Tried in this order, by {runs} passes over the samples: {'; '.join(said)}."]


def _word(one: Try) -> str:
    if isinstance(one.piece, Hard):
        return str(one.piece) if one.taken else f"{one.piece.path} stays soft"
    return f"{one.piece} {'gone' if one.taken else 'stays'}"


def _outline(bench: Bench, settings: AxFormer) -> Plan:
    """The plan of a search that finds nothing to remove, so that the model is no larger than this says."""
    _wanted(bench.model, branches(bench.model, [], settings.group_size), settings)
    return Plan(
        method=NAME,
        settings=settings.model_dump(mode="json", exclude_defaults=True),
        promise="none",
        edits=[],
        findings=["How much goes is what the search finds; sizes and prices are those of a model that loses nothing."],
        made_for=config_values(bench.model.config),
    )


def _examples(model: PreTrainedModel) -> dict[str, Any]:
    # A model that has learnt nothing has little whose removal helps most of a few samples.
    return {"benefit": 0.0, "tolerance": 2.0}


METHOD = Method(
    name=NAME,
    title="Fewer parts, heads and feed-forward units, as long as the loss on labelled samples falls (AxFormer)",
    paper="arXiv 2010.03688",
    intent="prune",
    settings=AxFormer,
    plan=plan_axformer,
    examples=_examples,
    needs_weights=True,
    promise="none",
    calibration=lambda settings: CalibrationSettings(samples=256),
    outline=_outline,
)
