"""What removing each sublayer, or each layer, does to a model's output.

A sublayer (attention, cross-attention, feed-forward part) is masked: what it adds to the residual stream becomes zero.
A layer is left out: its output is its input. The outputs without it are held against those of the model as it is, by
the distances of `auxin.analysis.distances`, token for token; padding (`kept_tokens`) doesn't count.

With `removed`, sublayers are masked from the start, so that the distances are those of one more removal; they are
distances from the whole model all the same. A greedy search measures so once for each sublayer that it takes.

What the layers below the one in question give is remembered: each candidate runs from its layer on, with embeddings,
masks and rotary angles, about half of the work on average.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.analysis.distances import DISTANCES, Distance, distance, loss
from auxin.analysis.layer_outputs import LayerOutputs
from auxin.analysis.measurement import (
    Batch,
    Measurement,
    Needs,
    Result,
    Table,
    Tap,
    kept_tokens,
    logits_of,
    without_loss,
)
from auxin.analysis.parts import SERIES, WHOLE, part_in_words
from auxin.analysis.spread import Estimate, Spread
from auxin.analysis.targets import label_rows, refuse_without_targets
from auxin.analysis.unit_scores import told
from auxin.errors import DataError, PlanError
from auxin.models.sublayers import Sublayer, about_none, add_nothing, refuse_run_again, refuse_shared, sublayers
from auxin.nn.calls import first_argument
from auxin.objectives.objective import IGNORED
from auxin.report.forest import Mark, Panel, Row, forest_svg
from auxin.settings import Settings

Candidates = Literal["all", "attention", "feed-forward", "layers"]
LISTED = 3
"""How many removals the findings name."""
WORDS: dict[Distance, str] = {
    "js": "The Jensen-Shannon divergence from the whole model's output (js, nats)",
    "kl": "The Kullback-Leibler divergence from the whole model's output (kl, nats)",
    "angular": "The angle between the logits and the whole model's (angular, radians)",
    "norm": "The length of what the logits change by (norm)",
    "perplexity": "The rise of the loss, the log of the ratio of perplexities (perplexity, nats; it may fall)",
}
"""Distances, as findings begin with them."""


@dataclass(frozen=True)
class Candidate:
    """What may be removed: a sublayer, or all of a layer."""

    path: str
    """Of the sublayer or the layer."""
    kind: str
    """Of a sublayer, or "layer"."""
    layer: str
    """The layer's path."""
    number: int
    """The layer's number in its stack."""
    stack: str
    """The stack's path."""
    outputs: tuple[str, ...]
    """The modules whose outputs are masked; none for a layer, which is left out."""


def candidates(model: PreTrainedModel, which: Candidates) -> list[Candidate]:
    """What of `model` may be removed, from the first layer on.

    Raises:
        PlanError: the architecture is not known, there is nothing of that kind, or layers share a module of it.
    """
    return _removable(model, _candidates(model, sublayers(model), which))


def _removable(model: PreTrainedModel, found: list[Candidate]) -> list[Candidate]:
    refuse_shared(model, [path for one in found for path in one.outputs])
    return found


def _candidates(model: PreTrainedModel, known: Sequence[Sublayer], which: Candidates) -> list[Candidate]:
    refuse_run_again(model)
    if which == "layers":
        first = {sublayer.layer: sublayer for sublayer in reversed(known)}
        found = [_candidate(first[path], path, "layer", ()) for path in dict.fromkeys(s.layer for s in known)]
    else:
        wanted = [s for s in known if which == "all" or which in s.kind]
        found = [_candidate(sublayer, sublayer.path, sublayer.kind, (sublayer.output,)) for sublayer in wanted]
    if not found:
        kinds = "sublayers" if which in ("all", "layers") else f"{which} sublayers"
        raise PlanError(about_none(model, kinds))
    return found


def _candidate(of: Sublayer, path: str, kind: str, outputs: tuple[str, ...]) -> Candidate:
    return Candidate(path, kind, of.layer, of.number, of.stack.path, outputs)


class RemovalEffect(Settings):
    """What one removal does."""

    path: str
    """Of what is removed: "model.layers.3.mlp", or "model.layers.3"."""
    kind: str
    """attention, cross-attention, feed-forward or layer."""
    stack: str
    """Path of the list of layers that it is in or of."""
    number: int
    """The layer's number, from 0."""
    distances: dict[str, Estimate]
    """By their names."""

    @property
    def words(self) -> str:
        """What is removed, for people: the module that adds a part to the stream may be named after its last matrix."""
        layer = f"{self.stack}.{self.number}"
        return layer if self.kind == "layer" else part_in_words(self.kind, layer)


class Removals(Result):
    """The effects of all removals, each alone."""

    loss: Estimate | None
    """Of the model as it is, in nats per label; None where there is not a label for each of the logits, or a sample has
    none that counts."""
    effects: list[RemovalEffect]
    """In the order of the layers."""

    def ranking(self, name: Distance) -> list[RemovalEffect]:
        """The effects, the smallest distance first; those that are equal in the order of the layers."""
        return sorted(self.effects, key=lambda effect: effect.distances[name].mean)

    def tables(self) -> list[Table]:
        """A table for each stack and distance, a row for each layer."""
        tables = []
        for stack in self._stacks():
            effects = [effect for effect in self.effects if effect.stack == stack]
            columns = list(dict.fromkeys(effect.kind for effect in effects))
            for name in effects[0].distances:
                rows = []
                for number in dict.fromkeys(effect.number for effect in effects):
                    cells = {e.kind: told(e.distances[name]) for e in effects if e.number == number}
                    rows.append([str(number), *(cells.get(kind, "") for kind in columns)])
                tables.append(Table(f"{stack}: {name}", ["layer", *columns], rows))
        return tables

    def findings(self) -> list[str]:
        """What can go at the least distance, by each measure."""
        return [
            f"{WORDS[name]} is least without "
            + ", ".join(f"{e.words} ({told(e.distances[name])})" for e in self.ranking(name)[:LISTED])
            + "."
            for name in DISTANCES
            if name in self.effects[0].distances
        ]

    def picture(self, title: str) -> str:
        """A row for each layer, a mark for what each of its removals does by the first distance."""
        name = next(iter(self.effects[0].distances))
        panels = []
        for stack in self._stacks():
            rows = []
            for number in dict.fromkeys(effect.number for effect in self.effects if effect.stack == stack):
                found = [e for e in self.effects if e.stack == stack and e.number == number]
                marks = [
                    Mark(SERIES.get(e.kind, SERIES[WHOLE]).name, e.distances[name].mean, e.distances[name].margin)
                    for e in found
                ]
                rows.append(Row(str(number), marks))
            panels.append(Panel(stack, rows))
        note = (
            f"Distance ({name}) of the output without each part from the whole model's, with 95% intervals. To the "
            "right a part is missed less; the axis is logarithmic."
        )
        return forest_svg(title, note, panels, list(SERIES.values()), near=0)

    def _stacks(self) -> list[str]:
        return list(dict.fromkeys(effect.stack for effect in self.effects))


class Removal(Measurement[Removals]):
    """The effect of removing each sublayer, or each layer."""

    name: ClassVar[str] = "removal"
    title: ClassVar[str] = "what removing each attention, feed-forward part or layer does to the output"
    needs: ClassVar[Needs] = "batches"
    result_type: ClassVar[type[Result]] = Removals

    candidates: Candidates = "all"
    """What is removed, one at a time: all sublayers, those of one kind, or whole layers."""
    distances: list[Distance] = Field(default=list(DISTANCES), min_length=1)
    """By which the outputs are held against each other."""
    removed: list[str] = []
    """Paths of sublayers or layers that are gone from the start."""

    def observe(self, model: PreTrainedModel) -> "RemovalObserver":
        """An observer of `model`.

        Raises:
            PlanError: the architecture is not known, there are no such candidates, what `removed` names is none, or
                layers share a module of theirs.
        """
        return RemovalObserver(model, self)


MEASUREMENT = Removal


class RemovalObserver:
    """Runs the model without each candidate.

    Args:
        model: of a known architecture.
        settings: of the measurement.

    Raises:
        PlanError: as `Removal.observe`.
    """

    taps: Sequence[Tap] = ()

    def __init__(self, model: PreTrainedModel, settings: Removal) -> None:
        self._model, self._settings = model, settings
        parts = sublayers(model)
        offered = _removable(model, _candidates(model, parts, settings.candidates))
        layers = _candidates(model, parts, "layers")
        known = {one.path: one for one in (*_candidates(model, parts, "all"), *layers)}
        if unknown := next((path for path in settings.removed if path not in known), None):
            raise PlanError(
                f"removed: the model has no sublayer and no layer {unknown!r}. It has {', '.join(list(known)[:3])}, ..."
            )
        self._removed = _removable(model, [known[path] for path in settings.removed])
        self.offered = [one for one in offered if one.path not in settings.removed]
        if not self.offered:
            raise PlanError("removed: nothing is left to remove. Name fewer.")
        self.runs = PrefixedRuns(model, [one.layer for one in layers])
        self._spread, self._losses = Spread(), Spread()

    def before(self, batch: Batch) -> None:
        """Run the model on the batch: whole, without what is removed, and without each candidate beside."""
        inputs = without_loss(self._model, batch)
        whole = Whole.of(self._model, batch, self.runs.start(inputs, []), self._settings.distances)
        if self._removed:
            self.runs.start(inputs, self._removed)
        if all(labels is not None and (labels != IGNORED).any() for labels in whole.labels):
            self._losses.add(torch.tensor([loss(z.float(), y) for z, y in zip(whole.rows, whole.labels, strict=True)]))
        found = [
            [whole.far(name, logits) for name in self._settings.distances]
            for logits in (self.runs.without(inputs, self._removed, one) for one in self.offered)
        ]
        self._spread.add(torch.tensor(found, dtype=torch.float64).permute(2, 0, 1))

    def after(self, batch: Batch, output: Any) -> None:
        """Nothing is left to do."""

    def result(self) -> Removals:
        """The effects in the order of the candidates."""
        estimates = iter(self._spread.estimates())
        effects = [
            RemovalEffect(
                path=one.path,
                kind=one.kind,
                stack=one.stack,
                number=one.number,
                distances={name: next(estimates) for name in self._settings.distances},
            )
            for one in self.offered
        ]
        # A mean over those samples alone that have targets would be that of other data.
        of_all = self._losses.samples == self._spread.samples
        return Removals(loss=self._losses.estimates()[0] if of_all else None, effects=effects)


@dataclass(frozen=True)
class Whole:
    """What a model as it is gives for a batch, for other outputs to be held against."""

    rows: list[Tensor]
    """The logits of each sample's tokens."""
    labels: list[Tensor | None]
    """Of the same tokens; None where there is not a label for each of the logits."""
    kept: Tensor | None
    """Which tokens are none of padding."""

    @classmethod
    def of(cls, model: PreTrainedModel, batch: Batch, logits: Tensor, distances: Sequence[Distance]) -> "Whole":
        """Of the logits of a batch.

        Raises:
            ConfigError: one of the distances looks at labels, and there are none.
        """
        kept = kept_tokens(model, batch, decoder=True)
        labels = label_rows(model, batch, kept, logits.shape)
        if labels is not None and "perplexity" in distances:
            refuse_without_targets(labels, "the distance perplexity")
        rows = _rows(logits, kept)
        return cls(rows, [None] * len(rows) if labels is None else [*_rows(labels, kept)], kept)

    def far(self, name: Distance, logits: Tensor) -> list[float]:
        """By sample, how far other logits of the batch are."""
        return [distance(name, *each) for each in zip(self.rows, _rows(logits, self.kept), self.labels, strict=True)]


class PrefixedRuns:
    """Runs a model without some of its parts, each time only from the layer on that differs from the run before.

    Args:
        model: the model; it is left as it is.
        layers: the paths of its layers.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[str]) -> None:
        self._model = model
        self._layers = {path: model.get_submodule(path) for path in layers}
        self._given = LayerOutputs(self._layers)

    def start(self, inputs: Mapping[str, Any], gone: Sequence[Candidate]) -> Tensor:
        """Run without `gone`, remember what each layer gives, and return the logits."""
        with self._given.noted(), self._masked(gone):
            return logits_of(self._model, self._model(**inputs))

    def without(self, inputs: Mapping[str, Any], gone: Sequence[Candidate], one: Candidate) -> Tensor:
        """The logits without `gone`, as at the start, and without `one`."""
        with self._given.given_before(one.layer), self._masked([*gone, one]):
            return logits_of(self._model, self._model(**inputs))

    @contextlib.contextmanager
    def _masked(self, gone: Sequence[Candidate]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for one in gone:
                if one.outputs:
                    for path in one.outputs:
                        handle = self._model.get_submodule(path).register_forward_hook(add_nothing)
                        stack.callback(handle.remove)
                else:
                    stack.callback(self._layers[one.layer].register_forward_hook(_input, with_kwargs=True).remove)
            yield


def _input(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    hidden = first_argument(arguments, named)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _rows(values: Tensor, kept: Tensor | None) -> list[Tensor]:
    """Of each sample what belongs to its tokens; what has no tokens, one row."""
    if values.dim() == 1 or (values.dim() == 2 and values.is_floating_point()):
        return [row[None] for row in values]
    if kept is None or kept.shape != values.shape[:2]:
        if kept is not None and values.is_floating_point():
            raise DataError(
                f"The logits {tuple(values.shape)} have other tokens than the mask {tuple(kept.shape)}. Give "
                "a mask of the inputs' length."
            )
        return list(values)
    return [row[mask] for row, mask in zip(values, kept, strict=True)]
