"""Importance of units: what a model would lose, to first order, without a head, a feed-forward unit, an expert, or a
dimension of the residual stream.

A mask m of a unit multiplies the unit's activation a at its place (`auxin.analysis.units`); it is 1, and 0 when the
unit is cut. With L the loss of one sample, the mean over its own labels, the derivative by the mask is exact, and one
backward pass gives those of all units:

    dL/dm = sum over the sample's tokens, the unit's entries and its places of  a dL/da.

| score | of a unit |
|---|---|
| taylor | mean over samples of abs(dL/dm) (Michel et al., arXiv 1905.10650, eq. 2) |
| fisher | mean over samples of (dL/dm)^2, the empirical Fisher information of its mask (Kwon et al., 2204.09656) |
| activation | root of the mean square of a over tokens: up to a factor the norm that Wanda takes (2306.11695) |
| output | the same, each entry times the length of the output's column that reads it: L2 norm of Wanda's scores |
| fluctuation | variance of each entry over tokens, times the square of that length (FLAP, 2312.11983) |

Squares are added up over a unit's entries (of a head, of all experts that have the unit), places and key-value group.
In experts an activation counts times the weight that the router gives, and as 0 where they were not chosen. Every
sample counts the same, and every token of it; padding (`kept_tokens`) doesn't. A fluctuation is no mean over samples:
the jackknife (`auxin.analysis.spread`) tells its spread.

One score is measured at a time: the last three need neither labels nor a backward pass, which is two thirds of the
work, and a result of all would be five times as long as what is asked for.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from auxin.analysis.measurement import (
    Batch,
    Measurement,
    Needs,
    Result,
    kept_by_decoder,
    result_of,
    samples_of,
)
from auxin.analysis.spread import Dealt, Estimates, Spread, jackknife
from auxin.analysis.targets import refuse_without_targets, targets
from auxin.analysis.unit_scores import UnitImportance, UnitScores
from auxin.analysis.unit_sums import OF_GRADIENTS, Gradients, Score, Statistics, add_up
from auxin.analysis.units import WORDS, Group, Place, Units, units_of
from auxin.errors import DataError, PlanError
from auxin.models.evaluating import about_inference_tensors
from auxin.objectives.objective import IGNORED


class Importances(UnitScores):
    """The importance of all units of a model by one score."""

    score: Score
    entries: dict[str, list[float]] = {}
    """Of a fluctuation the means over tokens of all entries that enter an output matrix, by the path of its module; not
    of experts, whose tokens are others."""
    of_heads: dict[str, list[float]] = {}
    """Of a fluctuation the scores of all entries of query heads, head by head, by layer; a head's score is the sum of
    its own."""

    @property
    def by(self) -> str:
        """The score."""
        return self.score


class Importance(Measurement[Importances]):
    """First-order importance of every unit that could be cut out of a model."""

    name: ClassVar[str] = "importance"
    title: ClassVar[str] = "importance of every head, feed-forward unit, expert and residual dimension"
    needs: ClassVar[Needs] = "batches"
    result_type: ClassVar[type[Result]] = Importances
    version: ClassVar[int] = 4
    score: Score = "taylor"
    """taylor, fisher: by gradients of the loss, which need labels; activation, output, fluctuation: by activations
    alone, for heads, feed-forward units and experts."""

    def observe(self, model: PreTrainedModel) -> "ImportanceObserver":
        """An observer of all units of `model`.

        Raises:
            PlanError: the architecture is not known or has several towers, nobody sees into its experts, or the score
                asks for an output matrix and there is none.
        """
        return ImportanceObserver(model, self.score)


MEASUREMENT = Importance


class ImportanceObserver:
    """Runs the model on every batch and adds up what its units do.

    Args:
        model: of a known architecture.
        score: which.

    Raises:
        PlanError: as `Importance.observe`.
    """

    def __init__(self, model: PreTrainedModel, score: Score) -> None:
        if reason := about_inference_tensors(model):
            raise PlanError(reason)
        self._model, self._score, self._units = model, score, units_of(model)
        self._gradients = score in OF_GRADIENTS
        if not self._gradients and ("residual", "") in self._units.counts:
            _leave_out_residual(self._units, score)
        if score in ("output", "fluctuation"):
            _check_columns(self._units, score)
        if not self._units.counts:
            raise PlanError(" ".join(f"Not measured: {words}. {why}" for words, why in self._units.missing.items()))
        order = {kind: number for number, kind in enumerate(WORDS)}
        self._groups = sorted(self._units.counts, key=lambda group: order[group[0]])
        self._spread = Spread()
        self._within, self._entries = Dealt(), Dealt()
        """Of a fluctuation, how much units vary within a sample, and the means of all entries over its tokens."""
        self._within_heads: dict[Group, Spread] = {}
        """Of a fluctuation, how much entries of query heads vary within a sample."""
        self._read: list[Place] = []
        """The places in the order of `_entries`, those that are run several times as often."""
        self._mixed: bool | None = None
        """Whether a batch's loss is anything but the mean of its samples' own; None until it is known."""
        self.taps = ()

    def before(self, batch: Batch) -> None:
        """Refuse samples that have no loss where scores are its gradients."""
        if self._gradients and (labels := targets(self._model, batch)) is not None:
            refuse_without_targets(labels, f"the score {self._score}")

    def after(self, batch: Batch, output: Any) -> None:
        """Run the model on the batch, and add its samples."""
        # What was made in inference mode can't be part of a graph; copies that are made outside of it can.
        with torch.inference_mode(False), torch.set_grad_enabled(self._gradients):
            inputs = {name: tensor.clone() for name, tensor in batch.items()}
            samples = samples_of(inputs)
            values: list[Tensor | None] = [None] * samples
            for rows in self._alike(inputs) if self._gradients else [list(range(samples))]:
                found = self._values({name: tensor[rows] for name, tensor in inputs.items()}, len(rows))
                for row, value in zip(rows, found, strict=True):
                    values[row] = value
        spread = self._within if self._score == "fluctuation" else self._spread
        spread.add(torch.stack([value for value in values if value is not None]))

    def result(self) -> Importances:
        """What was found."""
        estimates, start, groups = self._estimates(), 0, []
        for kind, scope in self._groups:
            stop = start + self._units.counts[kind, scope]
            groups.append(UnitImportance(stream=kind, scope=scope, scores=estimates.part(start, stop)))
            start = stop
        entries = self._means_of_entries() if self._score == "fluctuation" else {}
        of_heads = {scope: scores.tolist() for (_, scope), scores in self._scores_of_entries_of_heads().items()}
        return Importances(
            score=self._score, groups=groups, entries=entries, of_heads=of_heads, missing=self._units.missing
        )

    def _means_of_entries(self) -> dict[str, list[float]]:
        """By the path of a module the means of what enters it, over all runs of it."""
        paths = {module: path for path, module in self._model.named_modules()}
        means = self._entries.without().means()
        runs, start = dict[str, list[Tensor]](), 0
        for place in self._read:
            assert place.weights is not None
            stop = start + place.weights.numel()
            if place.where == "input":
                runs.setdefault(paths[place.module], []).append(means[start:stop])
            start = stop
        return {path: torch.stack(found).mean(0).tolist() for path, found in runs.items()}

    def _between(self, left_out: int | None = None) -> Iterator[tuple[Place, Tensor]]:
        """Of every place that was read the scores of what the means of samples vary, (1, experts, entries); without the
        samples of one group."""
        squares, start = self._entries.without(left_out).mean_squares(), 0
        for place in self._read:
            assert place.weights is not None
            part = squares[start : start + place.weights.numel()].view(1, *place.weights.shape)
            yield place, part * place.weights.cpu().double()
            start += place.weights.numel()

    def _scores_of_entries_of_heads(self) -> dict[Group, Tensor]:
        """By group of query heads the fluctuation of each of their entries, (entries,)."""
        scores = {group: within.means().clone() for group, within in self._within_heads.items()}
        for place, part in self._between() if scores else ():
            if place.group in scores:
                scores[place.group] += part.sum((0, 1))
        return scores

    def _estimates(self) -> Estimates:
        if self._score == "fluctuation":
            return jackknife(self._fluctuation, self._within.samples, len(self._within))
        found = self._spread.together()
        if self._score in OF_GRADIENTS:
            return found
        roots = [mean**0.5 for mean in found.means]
        deviations = found.deviations and [
            deviation / (2 * root) if root else 0.0 for deviation, root in zip(found.deviations, roots, strict=True)
        ]
        return Estimates(samples=found.samples, means=roots, deviations=deviations)

    def _fluctuation(self, left_out: int | None) -> Tensor:
        """Of all units, without the samples of one group: what varies within samples, and what their means vary."""
        between: dict[Group, Tensor] = {}
        for place, part in self._between(left_out):
            add_up(between, place.group, place.of_units(part))
        return self._within.without(left_out).means() + self._in_order(between)[0]

    def _values(self, inputs: Batch, samples: int) -> Tensor:
        """Of each sample what the estimates are means of, (samples, units of all groups)."""
        kept = kept_by_decoder(self._model, inputs)
        if not self._gradients:
            run = Statistics(self._score, samples, kept)
            with self._units.read_by(run):
                result_of(self._model, inputs)
            if self._score == "fluctuation":
                self._read = run.read
                self._entries.add(torch.cat(run.means, dim=1))
                for group, entries in run.of_heads.items():
                    self._within_heads.setdefault(group, Spread()).add(entries)
            return self._in_order(run.sums)
        gates = Gradients(samples, kept)
        with self._units.read_by(gates):
            # A batch's loss is the mean of its samples' losses here, so that the sum is that many times as large.
            loss = self._loss(inputs) * samples
        torch.autograd.grad(loss, gates.root)
        slopes = self._in_order(gates.sums)
        return slopes.abs() if self._score == "taylor" else slopes.square()

    def _in_order(self, sums: Mapping[Group, Tensor]) -> Tensor:
        """What was added up by group, side by side, (samples, units of all groups), float64 on the CPU."""
        parts = []
        for kind, scope in self._groups:
            asked: Group = ("query" if kind == "key_value" else kind, scope)
            if asked not in sums:
                raise PlanError(
                    f"{scope or 'The model'}: {WORDS[kind]} were not run, or have no part in the loss. Measure the "
                    "model before the edit that changed it."
                )
            part = sums[asked].cpu().double()
            parts.append(
                part.unflatten(1, (self._units.groups_of_heads[scope], -1)).sum(-1) if kind == "key_value" else part
            )
        return torch.cat(parts, dim=1)

    def _alike(self, inputs: Batch) -> list[list[int]]:
        """The samples of a batch in groups, in each of which the batch's loss weighs all samples alike: those that have
        equally many labels; or each by itself, where losses are no means over samples."""
        labels = inputs.get("labels")
        samples = samples_of(inputs)
        found: dict[tuple[int, int], list[int]] = {}
        for row in range(samples):
            # Of a causal model the first label doesn't count.
            own = labels[row].flatten() if labels is not None else torch.zeros(0)
            counts = int((own != IGNORED).sum()), int((own[1:] != IGNORED).sum())
            found.setdefault(counts, []).append(row)
        groups = list(found.values())
        if self._mixed is None and (several := next((rows for rows in groups if len(rows) > 1), None)):
            self._mixed = self._mixes({name: tensor[several] for name, tensor in inputs.items()}, len(several))
        return [[row] for row in range(samples)] if self._mixed else groups

    @torch.no_grad()
    def _mixes(self, inputs: Batch, samples: int) -> bool:
        """Whether the loss of some samples is another number than the mean of their own."""
        together = self._loss(inputs).item()
        alone = [
            self._loss({name: tensor[row : row + 1] for name, tensor in inputs.items()}).item()
            for row in range(samples)
        ]
        allowed = 1e-3 if self._model.dtype in (torch.float32, torch.float64) else 2e-2
        return not abs(together - sum(alone) / samples) <= allowed * abs(together)

    def _loss(self, inputs: Batch) -> Tensor:
        loss: Tensor | None = getattr(result_of(self._model, inputs), "loss", None)
        if loss is None:
            raise DataError(
                f"The {type(self._model).__name__} gives no loss for {', '.join(inputs)}, of which the score "
                f"{self._score} is the gradient. Give data with labels and a model with a head, or ask for the score "
                "activation, output or fluctuation."
            )
        return loss


def _leave_out_residual(units: Units, score: Score) -> None:
    del units.counts["residual", ""]
    units.places = [place for place in units.places if place.group[0] != "residual"]
    units.missing[WORDS["residual"]] = (
        f"The score {score} is of what enters one output matrix, and every matrix reads the residual stream. Ask for "
        "taylor or fisher."
    )


def _check_columns(units: Units, score: Score) -> None:
    if lacking := next((place for place in units.places if place.weights is None), None):
        what = "a convolution" if lacking.channels else "more than one matrix"
        raise PlanError(
            f"{lacking.group[1]}: {type(lacking.module).__name__} makes its output of {WORDS[lacking.group[0]]} by "
            f"{what}, so that they have no columns of which {score} could take the length. Ask for the "
            "score taylor, fisher or activation."
        )
