"""Trajectories of units: how far all that comes after a head or a feed-forward unit moves when it alone is masked
(OPTIN, Khaki and Plataniotis 2024, arXiv 2403.17921).

Samples are taken a few at a time, and of their tokens (padding is none, `kept_tokens`) some are drawn, the same ones
for all units. A unit of layer i is masked, and

    I = sum over z of L_MD(F_z, F_z') + logits_weight * L_KD            (algorithm 1 of the paper)

* L_MD, of the residual stream F behind layer i and behind every layer that runs after it (of an encoder's unit, those
  of the decoder too): the drawn rows at length 1 are F^, G is F^ F^^T, and L_MD the sum over all pairs of (G' - G)^2.
  It compares the cosines of tokens, within samples and between them: neither a rotation of the stream nor the length of
  a token counts.
* L_KD = T^2 sum over rows of KL(softmax(logits / T), softmax(logits' / T)); a row for each token, for each sample of a
  model that classifies samples, or for each place of the map that a model of segments gives.

Tokens of a convolutional network are the places of its layers' maps, and its units the channels between convolutions.

The stream behind layer i is what enters the next one, so that the sum is the paper's from F_{i+1} to F_N, which leaves
the last layer. Scores of the last layer and of heads are multiplied by no constants of their own, as they are in the
paper's code.

Nothing is differentiated. Layers before the masked one give what they gave, and several masks run side by side, each on
a copy of the samples.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, groupby
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.analysis.distances import divergence
from auxin.analysis.layer_outputs import LayerOutputs, repeated
from auxin.analysis.measurement import (
    Batch,
    Measurement,
    Needs,
    Result,
    check_mask,
    kept_by_decoder,
    samples_of,
    wide,
)
from auxin.analysis.parts import refuse_blocks, stack_parts
from auxin.analysis.together import TogetherObserver
from auxin.analysis.unit_masks import Mask, Streams, maskable, masked
from auxin.analysis.unit_scores import UnitImportance, UnitScores
from auxin.analysis.unit_sums import Score, Statistics
from auxin.analysis.units import Group, units_of
from auxin.errors import PlanError
from auxin.settings import Settings
from auxin.words.widths import FEED_FORWARD

AT_ONCE = 2**20
"""Masks run side by side as long as the largest tensor has no more numbers than this, and one at least. On a CPU larger
ones are slower."""


class TrajectorySettings(Settings):
    """What is compared, and how."""

    tokens: int = Field(default=768, gt=1)
    """Tokens that are compared with each other, drawn at random; all where there are fewer."""
    together: int = Field(default=4, gt=0)
    """Samples whose tokens are compared with each other. Scores are means over so many at a time, and so is their
    spread; where the number of samples is no multiple of it, the last ones are fewer."""
    logits_weight: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """What the logits' part counts beside that of the layers; at 0 no head is needed."""
    temperature: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    """By which logits are divided."""
    group_size: int = Field(default=1, gt=0)
    """Feed-forward units of a layer that are masked at once and share their score: neighbours by the size of what they
    give on the first samples (activation times column)."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the tokens that are drawn."""


class Trajectories(UnitScores):
    """What heads and feed-forward units move."""

    logits_share: float
    """What part of the sum of all scores comes from the logits."""

    @property
    def by(self) -> str:
        """The score's name."""
        return "trajectory"

    def findings(self) -> list[str]:
        """The units of each kind that move least, and how much of it is in the logits."""
        return [*super().findings(), f"Of the sum of all scores {self.logits_share:.1%} comes from the logits."]


class Trajectory(TrajectorySettings, Measurement[Trajectories]):
    """The long-range effect of masking each head and each feed-forward unit alone."""

    name: ClassVar[str] = "trajectory"
    title: ClassVar[str] = "what masking each head or feed-forward unit moves in all later layers"
    needs: ClassVar[Needs] = "batches"
    result_type: ClassVar[type[Result]] = Trajectories

    streams: list[Streams] = Field(default=["heads", "ffn"], min_length=1)
    """What is masked: heads, by key-value groups or one by one where all read a single key-value head; feed-forward
    units."""

    def observe(self, model: PreTrainedModel) -> "TrajectoryObserver":
        """An observer of `model`.

        Raises:
            PlanError: the architecture is not known, has several towers, layers that share their parameters or a stream
                of several blocks, or there are no such units.
        """
        return TrajectoryObserver(model, self)


MEASUREMENT = Trajectory


@dataclass
class _Piece:
    """Samples that run together, and what the model as it is gives for them."""

    batch: Batch
    samples: int
    given: LayerOutputs
    said: Tensor | None = None
    """Log-probabilities, (1, rows, classes); None where they are not asked for."""
    drawn: dict[str, Tensor] = field(default_factory=dict)
    """By stack the numbers of its tokens that are compared, sample by sample."""


class TrajectoryObserver(TogetherObserver):
    """Runs the model with every mask.

    Args:
        model: of a known architecture.
        settings: of the measurement.

    Raises:
        PlanError: as `Trajectory.observe`.
    """

    def __init__(self, model: PreTrainedModel, settings: Trajectory) -> None:
        refuse_blocks(model)
        self._settings, self._units = settings, units_of(model)
        self._stacks = {parts.stack.path: parts for parts in stack_parts(model)}
        if shared := next((path for path, parts in self._stacks.items() if parts.stack.layers_shared), None):
            raise PlanError(
                f"The layers of {shared} share their parameters and are run several times, so that no layer is the one "
                "from which on a unit has its effect. Ask for the measurement importance, or prune by taylor."
            )
        self._groups = maskable(self._units, settings.streams)
        if not self._groups:
            raise PlanError(
                f"streams = {', '.join(settings.streams)}: the {type(model).__name__} has no such units. Name others."
            )
        self._layers = {path: module for parts in self._stacks.values() for path, module in parts.layers.items()}
        self._stack_of = {path: name for name, parts in self._stacks.items() for path in parts.layers}
        super().__init__(model, settings.together, settings.logits_weight, settings.temperature)
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._masks: list[Mask] = []
        self._moved, self._of_logits = 0.0, 0.0

    def result(self) -> Trajectories:
        """The scores of all units."""
        estimates, start, groups = self._estimates(), 0, []
        for kind, scope in self._groups:
            stop = start + self._units.counts[kind, scope]
            groups.append(UnitImportance(stream=kind, scope=scope, scores=estimates.part(start, stop)))
            start = stop
        share = self._of_logits / self._moved if self._moved else 0.0
        return Trajectories(groups=groups, missing={}, logits_share=share)

    def _measure(self, batches: Sequence[Batch]) -> None:
        """Mask every unit."""
        pieces = [self._piece(batch) for batch in batches]
        self._draw(pieces)
        self._masks = self._masks or self._all_masks(pieces)
        grams = {
            path: _gram([self._rows(piece, path, piece.given.outputs[path]) for piece in pieces])
            for path in pieces[0].given.outputs
        }
        scores = {group: torch.zeros(self._units.counts[group], dtype=torch.float64) for group in self._groups}
        at_once = self._side_by_side(pieces, grams)
        for group, of_group in groupby(self._masks, key=lambda mask: mask.group):
            masks = list(of_group)
            if group[1] not in grams:
                raise PlanError(f"{group[1]} was not run on the data, so that its units move nothing. Give other data.")
            for start in range(0, len(masks), at_once):
                several = masks[start : start + at_once]
                manifold, logits = self._effects(pieces, grams, several)
                logits = self._settings.logits_weight * logits
                self._moved += (manifold + logits).sum().item()
                self._of_logits += logits.sum().item()
                for mask, effect in zip(several, manifold + logits, strict=True):
                    scores[group][list(mask.units)] = effect / len(mask.units)
        self._spread.add(torch.cat([scores[group] for group in self._groups])[None])

    def _piece(self, batch: Batch) -> _Piece:
        """Run the model as it is."""
        piece = _Piece(batch, samples_of(batch), LayerOutputs(self._layers))
        with piece.given.noted():
            output = self._run(batch)
        piece.said = self._said(batch, output)
        return piece

    def _draw(self, pieces: Sequence[_Piece]) -> None:
        """Draw the tokens that are compared."""
        for name, parts in self._stacks.items():
            first = next(iter(parts.layers), None)
            if first not in pieces[0].given.outputs:
                continue
            kept = []
            for piece in pieces:
                length = _hidden(piece, first, piece.given.outputs[first]).shape[1]
                mask = parts.kept(piece.batch)
                if mask is not None:
                    check_mask(mask, (piece.samples, length))
                everything = torch.ones(piece.samples, length) if mask is None else mask
                kept.append(everything.flatten().nonzero().flatten().cpu())
            shuffled = torch.randperm(sum(map(len, kept)), generator=self._generator)
            order = shuffled[: self._settings.tokens].sort().values
            for piece, numbers, start in zip(pieces, kept, accumulate(map(len, kept), initial=0), strict=False):
                own = order[(order >= start) & (order < start + len(numbers))] - start
                piece.drawn[name] = numbers[own]

    def _all_masks(self, pieces: Sequence[_Piece]) -> list[Mask]:
        """The masks, group by group."""
        size, found = self._settings.group_size, []
        sizes = self._sizes_of_output(pieces) if size > 1 else {}
        for group in self._groups:
            count = self._units.counts[group]
            order = sizes[group].argsort(stable=True).tolist() if group in sizes else list(range(count))
            step = size if group in sizes else 1
            found += [Mask(group, tuple(order[start : start + step])) for start in range(0, count, step)]
        return found

    def _sizes_of_output(self, pieces: Sequence[_Piece]) -> dict[Group, Tensor]:
        """By group of feed-forward units the squared size of what they give, or where that is no activation times a
        column, of the activation."""
        groups = [group for group in self._groups if group[0] in FEED_FORWARD]
        columns = all(place.weights is not None for place in self._units.places if place.group in groups)
        score: Score = "output" if columns else "activation"
        found: dict[Group, Tensor] = {}
        for piece in pieces:
            kept = kept_by_decoder(self._model, piece.batch)
            run = Statistics(score, piece.samples, kept)
            with self._units.read_by(run, groups):
                self._run(piece.batch)
            for group, sums in run.sums.items():
                found[group] = found.get(group, 0) + sums.sum(0).cpu()
        return found

    def _side_by_side(self, pieces: Sequence[_Piece], grams: Mapping[str, Tensor]) -> int:
        """How many masks run at once."""
        widest = max(self._units.counts.values())
        largest = max(gram.numel() for gram in grams.values())
        for piece in pieces:
            outputs = [_hidden(piece, path, output) for path, output in piece.given.outputs.items()]
            tokens = max(output.shape[0] * output.shape[1] for output in outputs)
            logits = 0 if piece.said is None else piece.said.numel()
            largest = max(largest, logits, tokens * widest, *(output.numel() for output in outputs))
        return max(1, AT_ONCE // largest)

    def _effects(
        self, pieces: Sequence[_Piece], grams: Mapping[str, Tensor], masks: Sequence[Mask]
    ) -> tuple[Tensor, Tensor]:
        """The sums of L_MD over layers, and L_KD, of each of some masks of one layer; (masks,) each."""
        layer, copies = masks[0].group[1], len(masks)
        order = list(grams)
        rows: dict[str, list[Tensor]] = {path: [] for path in order[order.index(layer) :]}
        manifold, logits = torch.zeros(2, copies, dtype=torch.float64)
        for piece in pieces:
            with (
                piece.given.given_before(layer, piece.samples, copies),
                masked(self._units, masks),
                self._read(piece, rows, copies),
            ):
                output = self._run({n: repeated(tensor, piece.samples, copies) for n, tensor in piece.batch.items()})
            if piece.said is not None:
                said = self._said(piece.batch, output, copies)
                assert said is not None
                logits += divergence(piece.said, said).sum(1).clamp(min=0).cpu().double()
        for path, parts in rows.items():
            manifold += (_gram(parts) - grams[path]).square().sum((1, 2)).cpu().double()
        return manifold, self._settings.temperature**2 * logits

    @contextlib.contextmanager
    def _read(self, piece: _Piece, rows: Mapping[str, list[Tensor]], copies: int) -> Iterator[None]:
        """Within the context, the drawn rows behind layers are added to their lists."""

        def read(path: str, module: nn.Module, arguments: Any, output: Any) -> None:
            rows[path].append(self._rows(piece, path, output, copies))

        with contextlib.ExitStack() as stack:
            for path in rows:
                stack.callback(self._layers[path].register_forward_hook(partial(read, path)).remove)
            yield

    def _rows(self, piece: _Piece, path: str, output: Any, copies: int = 1) -> Tensor:
        """The drawn rows of what a layer gave, at length 1: (copies, rows, width)."""
        hidden = _hidden(piece, path, output, copies).unflatten(0, (copies, piece.samples)).flatten(1, 2)
        drawn = piece.drawn[self._stack_of[path]].to(hidden.device)
        return F.normalize(wide(hidden[:, drawn]), dim=-1)


def _hidden(piece: _Piece, path: str, output: Any, copies: int = 1) -> Tensor:
    """The hidden states that a layer gave, (copies * samples, tokens, width). Of maps (samples, width, rows, columns)
    the places are tokens, row by row."""
    hidden = output if isinstance(output, Tensor) else output[0]
    hidden = hidden.flatten(2).mT if hidden.dim() == 4 else hidden
    if hidden.dim() != 3 or len(hidden) != copies * piece.samples:
        raise PlanError(
            f"{path} gives hidden states of shape {list(hidden.shape)} for {copies * piece.samples} samples. Only "
            "models whose layers give (samples, tokens, width), or maps of such, can be measured so."
        )
    return hidden


def _gram(rows: Sequence[Tensor]) -> Tensor:
    """The cosines of all pairs of some rows at length 1, (copies, rows, rows)."""
    together = torch.cat(list(rows), dim=1)
    return together @ together.mT
