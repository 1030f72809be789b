"""Sizes of activations: what units do on samples, by forward passes alone (Minitron, Muralidharan et al. 2024,
arXiv 2407.14679, section 2.2).

At a token a unit is one number s:

| unit | s |
|---|---|
| head | the length of its attention's output, in front of the output matrix |
| feed-forward unit | its activation, in front of the output matrix |
| expert | the length of its output, times the router's weight; 0 where it was not chosen |
| unit of the residual | its entry in the output of a norm |

s becomes one number for each sample (`over_tokens`), these become one (`over_samples`), and of units that are cut
together (a unit of all norms of all layers, of all experts of a layer, of two attentions of a layer, of several calls
of a layer) the results are added up. With S numbers s,

    mean: 1/S sum abs(s)     l2: sqrt(1/S sum s^2)     variance: 1/S sum (s - mean(s))^2.

A score is no mean over samples, so that its spread is that of the jackknife (`auxin.analysis.spread`).

The paper's L2 norm is the root of a sum, and so larger by a factor that all units share. Its best are the mean over
tokens and L2 over samples, the defaults. Its equation takes feed-forward units before the activation function; behind
it is where its authors' code takes them, and the one place there is where a gate multiplies them.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from auxin.analysis.measurement import Batch, Measurement, Needs, Result, kept_by_decoder, result_of, samples_of
from auxin.analysis.spread import Dealt, Spread, jackknife
from auxin.analysis.unit_scores import UnitImportance, UnitScores
from auxin.analysis.unit_sums import Aggregation, OverTokens, add_up
from auxin.analysis.units import WORDS, Group, Place, units_of
from auxin.errors import PlanError
from auxin.settings import Settings


class ActivationSettings(Settings):
    """What is made of a unit's numbers."""

    over_tokens: Aggregation = "mean"
    """Of a sample's: "mean" (of absolute values), "l2" or "variance"."""
    over_samples: Aggregation = "l2"
    """Of the samples' numbers: the same."""


class ActivationSizes(UnitScores):
    """How large the activations of units are."""

    @property
    def by(self) -> str:
        """The score's name."""
        return "activations"


class Activations(ActivationSettings, Measurement[ActivationSizes]):
    """The size of the activations of every unit that could be cut out of a model."""

    name: ClassVar[str] = "activations"
    title: ClassVar[str] = "size of the activations of every head, feed-forward unit, expert and residual dimension"
    needs: ClassVar[Needs] = "batches"
    version: ClassVar[int] = 2
    result_type: ClassVar[type[Result]] = ActivationSizes

    def observe(self, model: PreTrainedModel) -> "ActivationsObserver":
        """An observer of all units of `model`.

        Raises:
            PlanError: the architecture is not known or has several towers, or nobody sees into its experts.
        """
        return ActivationsObserver(model, self)


MEASUREMENT = Activations


class ActivationsObserver:
    """Runs the model on every batch and adds up what its units do.

    Args:
        model: of a known architecture.
        settings: what is made of it.

    Raises:
        PlanError: as `Activations.observe`.
    """

    def __init__(self, model: PreTrainedModel, settings: ActivationSettings) -> None:
        self._model, self._settings = model, settings
        self._units = units_of(model, stream="normed")
        self._dealt = Dealt()
        self._read: list[tuple[Place, torch.Size]] = []
        """Runs of places, in their order, and what is found of a sample in each: (experts, units)."""
        self.taps = ()

    def before(self, batch: Batch) -> None:
        """Nothing: no labels are needed."""

    def after(self, batch: Batch, output: Any) -> None:
        """Run the model on the batch, and add its samples."""
        run = OverTokens(self._settings.over_tokens, samples_of(batch), kept_by_decoder(self._model, batch))
        with self._units.read_by(run):
            result_of(self._model, batch)
        self._read = [(place, found.shape[1:]) for place, found in run.found]
        self._dealt.add(torch.cat([found.flatten(1).cpu().double() for _, found in run.found], dim=1))

    def result(self) -> ActivationSizes:
        """What was found."""
        order = sorted(self._units.counts, key=lambda group: list(WORDS).index(group[0]))

        def made(left_out: int | None) -> Tensor:
            sums = self._sums(self._over_samples(self._dealt.without(left_out)))
            return torch.cat([sums[group] for group in order])

        scores, start, groups = jackknife(made, self._dealt.samples, len(self._dealt)), 0, []
        for kind, scope in order:
            stop = start + self._units.counts[kind, scope]
            groups.append(UnitImportance(stream=kind, scope=scope, scores=scores.part(start, stop)))
            start = stop
        return ActivationSizes(groups=groups, missing=self._units.missing)

    def _sums(self, sizes: Tensor) -> dict[Group, Tensor]:
        """Of every group the scores of its units, from what is made of the samples' numbers in each place."""
        sums, start = dict[Group, Tensor](), 0
        for place, shape in self._read:
            found = sizes[start : start + shape.numel()].view(shape)
            # Whole experts are rows of one number, other units columns with a row for each expert.
            add_up(sums, place.group, found.sum(0) if place.entries else found.sum(1))
            start += shape.numel()
        for scope, groups in self._units.groups_of_heads.items():
            sums["key_value", scope] = sums["query", scope].view(groups, -1).sum(1)
        if missing := next((group for group in self._units.counts if group not in sums), None):
            raise PlanError(f"{missing[1] or 'The model'}: {WORDS[missing[0]]} were not run. Measure the whole model.")
        return sums

    def _over_samples(self, spread: Spread) -> Tensor:
        """What is made of the samples' numbers, which are none below zero."""
        means, variances = spread.means(), spread.mean_squares()
        if self._settings.over_samples == "mean":
            return means
        return variances if self._settings.over_samples == "variance" else (means.square() + variances).sqrt()
