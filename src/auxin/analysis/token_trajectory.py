"""Trajectories of tokens of images: how far all that comes after a layer moves when one token does not enter it (OPTIN,
Khaki and Plataniotis 2024, arXiv 2403.17921).

Some samples are taken together. The token at one position is dropped before layer i, of all of them, and

    I = sum over z of L_MD(F_z, F_z') + logits_weight * L_KD

over layer i and the layers behind it, as of units (`auxin.analysis.trajectory`). There are other numbers of tokens in
F_z and F_z', so that L_MD compares samples: of each token the cosines of all pairs of samples, G_t = F^_t F^_t^T, their
mean G over tokens, and the sum over all pairs of (G' - G)^2. L_KD is that of units; of one sample it is all there is.

A class token and registers are never dropped, and nothing before the first layer, which makes of patches what they
tell; both are as in the paper. Its code multiplies the scores by an envelope from 1 to 100 over the layers, which is
left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from statistics import median
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
    Table,
    samples_of,
    wide,
)
from auxin.analysis.parts import refuse_blocks, stack_parts
from auxin.analysis.spread import Estimates
from auxin.analysis.together import TogetherObserver
from auxin.analysis.trajectory import AT_ONCE
from auxin.analysis.unit_scores import COLUMNS, LISTED, OfLayer, numbered, told
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.models.anatomy.vit import tokens_before_patches
from auxin.report.heat_map import Panel, Row, heat_map_svg


class TokensOfLayer(OfLayer):
    """The tokens that enter one layer."""

    scores: Estimates
    """By position, from the first patch on."""


class TokenTrajectories(Result):
    """What the tokens of images move, by the layer from which on they are missing."""

    first: int
    """The position of the first patch."""
    layers: list[TokensOfLayer]
    """From the second layer on."""

    def tables(self) -> list[Table]:
        """A row for each layer."""
        rows = []
        for layer in self.layers:
            means = layer.scores.means
            numbers = (min(means), median(means), max(means))
            rows.append([layer.label, str(len(means)), *(f"{value:.3g}" for value in numbers)])
        header = ["layer", "tokens", "smallest", "median", "largest"]
        return [Table(f"{self.layers[0].stack}: tokens that enter a layer", header, rows)]

    def findings(self) -> list[str]:
        """The tokens that move least."""
        ranked = sorted(
            (score.mean, layer.scope, self.first + place, told(score))
            for layer in self.layers
            for place, score in enumerate(layer.scores.each())
        )
        least = ", ".join(f"{numbered(place, scope)} ({score})" for _, scope, place, score in ranked[:LISTED])
        return [f"Tokens that matter least by trajectory: {least}."]

    def picture(self, title: str) -> str:
        """A row for each layer, a column for each position; where these are many, for neighbours and their median."""
        count = len(self.layers[0].scores.means)
        edges = [count * n // min(count, COLUMNS) for n in range(min(count, COLUMNS) + 1)]
        spans = list(pairwise(edges))
        rows = [Row(layer.label, [median(layer.scores.means[a:b]) for a, b in spans]) for layer in self.layers]
        labels = [str(self.first + start) for start, _ in spans]
        panel = Panel(f"{self.layers[0].stack}: tokens", rows, labels, "position", "trajectory", logarithmic=True)
        return heat_map_svg(title, [panel], "Light tokens matter more. Colours are logarithmic.")


class TokenTrajectory(Measurement[TokenTrajectories]):
    """The long-range effect of dropping each token of an image before each layer."""

    name: ClassVar[str] = "token-trajectory"
    title: ClassVar[str] = "what dropping each token of images moves in all later layers"
    needs: ClassVar[Needs] = "batches"
    result_type: ClassVar[type[Result]] = TokenTrajectories

    together: int = Field(default=16, gt=0)
    """Samples that are compared with each other. Scores are means over so many at a time, and so is their spread; where
    the number of samples is no multiple of it, the last ones are fewer."""
    logits_weight: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """What the logits' part counts beside that of the layers; at 0 no head is needed."""
    temperature: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    """By which logits are divided."""

    def observe(self, model: PreTrainedModel) -> "TokenTrajectoryObserver":
        """An observer of `model`.

        Raises:
            PlanError: it is no encoder of patches, or has a single layer.
        """
        return TokenTrajectoryObserver(model, self)


MEASUREMENT = TokenTrajectory


class TokenTrajectoryObserver(TogetherObserver):
    """Runs the model without every token.

    Args:
        model: an encoder of patches.
        settings: of the measurement.

    Raises:
        PlanError: as `TokenTrajectory.observe`.
    """

    def __init__(self, model: PreTrainedModel, settings: TokenTrajectory) -> None:
        self._first = tokens_before_patches(model)
        refuse_blocks(model)
        (parts,) = stack_parts(model)
        self._layers = parts.layers
        if len(self._layers) < 2:
            raise PlanError(
                f"{parts.stack.path} has a single layer, which needs all tokens. Give a model of several layers."
            )
        sizes = anatomy(model).sizes
        self._widest = max(sizes.residual, sizes.ffn or 0)
        super().__init__(model, settings.together, settings.logits_weight, settings.temperature)

    def result(self) -> TokenTrajectories:
        """The scores of all tokens."""
        estimates, paths = self._estimates(), list(self._layers)[1:]
        each = len(estimates.means) // len(paths)
        layers = [
            TokensOfLayer(scope=path, scores=estimates.part(place * each, (place + 1) * each))
            for place, path in enumerate(paths)
        ]
        return TokenTrajectories(first=self._first, layers=layers)

    def _measure(self, batches: Sequence[Batch]) -> None:
        """Drop every token."""
        batch = {name: torch.cat([part[name] for part in batches]) for name in batches[0]}
        given = LayerOutputs(self._layers)
        with given.noted():
            output = self._run(batch)
        said = self._said(batch, output)
        grams = {path: _mean_gram(hidden, 1) for path, hidden in given.outputs.items()}
        _, length, _ = next(iter(given.outputs.values())).shape
        logits = 0 if said is None else said.numel()
        at_once = max(1, AT_ONCE // max(samples_of(batch) * length * self._widest, logits))
        scores = [
            self._effects(batch, given, grams, said, layer, positions)
            for layer in list(self._layers)[1:]
            for positions in torch.arange(self._first, length).split(at_once)
        ]
        self._spread.add(torch.cat(scores)[None])

    def _effects(
        self,
        batch: Batch,
        given: LayerOutputs,
        grams: Mapping[str, Tensor],
        said: Tensor | None,
        layer: str,
        positions: Tensor,
    ) -> Tensor:
        """The scores of the tokens at some positions that enter a layer."""
        samples, copies, effects = samples_of(batch), len(positions), torch.zeros(len(positions), dtype=torch.float64)

        def compare(path: str, module: nn.Module, arguments: Any, output: Any) -> None:
            moved = _mean_gram(output, copies) - grams[path]
            effects.add_(moved.square().sum((1, 2)).cpu().double())

        order = list(self._layers)
        with (
            given.given_before(layer, samples, copies),
            _dropped(self._layers[layer], positions, samples),
            ExitStack() as stack,
        ):
            for path in order[order.index(layer) :]:
                stack.callback(self._layers[path].register_forward_hook(partial(compare, path)).remove)
            output = self._run({name: repeated(tensor, samples, copies) for name, tensor in batch.items()})
        if said is None or (now := self._said(batch, output, copies)) is None:
            return effects
        moved = divergence(said, now).sum(1).clamp(min=0).cpu().double()
        return effects + self._logits_weight * self._temperature**2 * moved


@contextmanager
def _dropped(layer: nn.Module, positions: Tensor, samples: int) -> Iterator[None]:
    """Within the context, of each copy of some samples the token at one of `positions` does not enter `layer`."""

    def drop(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = arguments
        stays = torch.ones(len(positions), hidden.shape[1], dtype=torch.bool).scatter(1, positions[:, None], False)
        left = stays.nonzero()[:, 1].view(len(positions), -1).to(hidden.device).repeat_interleave(samples, dim=0)
        return hidden.gather(1, left.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])), *rest

    handle = layer.register_forward_pre_hook(drop)
    try:
        yield
    finally:
        handle.remove()


def _mean_gram(hidden: Tensor, copies: int) -> Tensor:
    """Of (copies * samples, tokens, width) the cosines of all pairs of samples, means over tokens: (copies, samples,
    samples)."""
    unit = F.normalize(wide(hidden), dim=-1).unflatten(0, (copies, -1)).flatten(2)
    return unit @ unit.mT / hidden.shape[1]
