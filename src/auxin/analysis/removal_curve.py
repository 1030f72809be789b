"""What removing more and more of a model does to its output: parts that do least alone go first, one after the other.

First each candidate is removed alone (`auxin.analysis.removal`). Then the output without the first k of that order is
held against the whole model's, for every k up to a share of the candidates. It is what a choice by single effects costs
(`one_shot` of FinerCut, arXiv 2405.18218): parts that are each dispensable may not be so together, so that the distance
of k together may be far from the sum of their own. A search step by step finds better removals, and takes longer.

For the second part the samples' inputs are kept; of what layers give nothing is.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from auxin.analysis.distances import Distance
from auxin.analysis.measurement import Batch, Measurement, Needs, Result, Table, Tap, without_loss
from auxin.analysis.removal import WORDS, Candidate, Candidates, Removal, RemovalEffect, RemovalObserver, Whole
from auxin.analysis.spread import Estimate, Spread
from auxin.analysis.unit_scores import told
from auxin.models.evaluating import evaluation_mode
from auxin.report.curve import Step, curve_svg
from auxin.settings import Settings

LETTERS = {"attention": "A", "cross-attention": "X", "feed-forward": "F", "layer": "L"}
"""Kinds of what goes, in the picture."""


class Going(Settings):
    """One of those that go."""

    effect: RemovalEffect
    """What it is, and what removing it alone does."""
    together: Estimate
    """The distance without it and all before it."""


class Curve(Result):
    """What is left of the output, the more goes."""

    distance: Distance
    """By which the outputs are held against each other."""
    candidates: int
    """How many there are."""
    steps: list[Going]
    """In the order in which they go."""

    def tables(self) -> list[Table]:
        """A row for each step."""
        rows = [
            [str(number), step.effect.words, told(step.effect.distances[self.distance]), told(step.together)]
            for number, step in enumerate(self.steps, start=1)
        ]
        return [Table(f"{self.distance}, of {self.candidates} candidates", ["gone", "last", "alone", "together"], rows)]

    def findings(self) -> list[str]:
        """How far the output is at the end, and how far the effects of single removals would have it."""
        last, count = self.steps[-1], len(self.steps)
        summed = sum(step.effect.distances[self.distance].mean for step in self.steps)
        before = [Estimate(mean=0.0, deviation=None, margin=None), *(step.together for step in self.steps)]
        jumps = [after.together.mean - old.mean for after, old in zip(self.steps, before, strict=False)]
        most = self.steps[jumps.index(max(jumps))]
        return [
            f"{WORDS[self.distance]} is {told(last.together)} without {count} of {self.candidates} candidates. "
            f"Each alone, they add up to {summed:.3g}.",
            f"It rises most by {most.effect.words}, by {max(jumps):.3g}.",
        ]

    def picture(self, title: str) -> str:
        """A line over the number of those that are gone."""
        stacks, steps = _initials(list(dict.fromkeys(step.effect.stack for step in self.steps))), []
        for step in self.steps:
            name = f"{LETTERS[step.effect.kind]} {stacks[step.effect.stack]}{step.effect.number}"
            steps.append(Step(name, step.together.mean, step.together.margin))
        kinds = ", ".join(f"{LETTERS[kind]} {kind}" for kind in dict.fromkeys(s.effect.kind for s in self.steps))
        note = (
            f"Distance ({self.distance}) of the output from the whole model's over the number of parts that are gone, "
            f"with 95% intervals; below, the last one and its layer ({kinds})."
        )
        return curve_svg(title, note, steps)


def _initials(stacks: Sequence[str]) -> dict[str, str]:
    """By stack the first letter of what tells it from the others: "encoder.block" and "decoder.block" are e and d; none
    of a single one."""
    names = zip(*(stack.split(".") for stack in stacks), strict=False)
    apart = next((parts for parts in names if len(set(parts)) > 1), ("",) * len(stacks))
    return {stack: part[:1] for stack, part in zip(stacks, apart, strict=True)}


class RemovalCurve(Measurement[Curve]):
    """What removing more and more does."""

    name: ClassVar[str] = "removal-curve"
    title: ClassVar[str] = "what removing more and more does to the output, what does least alone first"
    needs: ClassVar[Needs] = "batches"
    result_type: ClassVar[type[Result]] = Curve

    candidates: Candidates = "all"
    """What goes: all sublayers, those of one kind, or whole layers."""
    distance: Distance = "js"
    """By which the outputs are held against each other."""
    share: float = Field(default=0.5, gt=0, le=1)
    """Of the candidates that go in the end, rounded down; one at least."""

    def observe(self, model: PreTrainedModel) -> "RemovalCurveObserver":
        """An observer of `model`.

        Raises:
            PlanError: the architecture is not known, there are no such candidates, or layers share a module of theirs.
        """
        return RemovalCurveObserver(model, self)


MEASUREMENT = RemovalCurve


class RemovalCurveObserver:
    """Runs the model without each candidate, and at the end without the first ones in their order.

    Args:
        model: of a known architecture.
        settings: of the measurement.

    Raises:
        PlanError: as `RemovalCurve.observe`.
    """

    taps: tuple[Tap, ...] = ()

    def __init__(self, model: PreTrainedModel, settings: RemovalCurve) -> None:
        self._model, self._settings = model, settings
        self._alone = RemovalObserver(model, Removal(candidates=settings.candidates, distances=[settings.distance]))
        self._batches: list[Batch] = []

    def before(self, batch: Batch) -> None:
        """Remove each candidate alone."""
        self._alone.before(batch)
        self._batches.append(batch)

    def after(self, batch: Batch, output: Any) -> None:
        """Nothing is left to do."""

    def result(self) -> Curve:
        """Remove the first ones together, and say what came of it."""
        name, offered = self._settings.distance, {one.path: one for one in self._alone.offered}
        order = self._alone.result().ranking(name)[: max(1, int(self._settings.share * len(offered)))]
        gone, spread = [offered[effect.path] for effect in order], Spread()
        with evaluation_mode(self._model), torch.no_grad():
            for batch in self._batches:
                spread.add(self._without(batch, gone))
        steps = [
            Going(effect=effect, together=together) for effect, together in zip(order, spread.estimates(), strict=True)
        ]
        return Curve(distance=name, candidates=len(offered), steps=steps)

    def _without(self, batch: Batch, gone: list[Candidate]) -> Tensor:
        """The distances without the first one, the first two, ... of a batch: (samples, as many)."""
        name, runs, inputs = self._settings.distance, self._alone.runs, without_loss(self._model, batch)
        whole = Whole.of(self._model, batch, runs.start(inputs, []), [name])
        found = [whole.far(name, runs.start(inputs, gone[:count])) for count in range(1, len(gone) + 1)]
        return torch.tensor(found, dtype=torch.float64).mT
