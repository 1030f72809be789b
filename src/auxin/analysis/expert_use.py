"""How routers use the experts of a mixture: how many tokens get an expert, with which weight, and what it gives them.

With X_j the tokens for which the router chooses expert j, T the number of all tokens, g_j(x) the weight that the router
gives it (as the model uses it: a share among the chosen ones, where they are made so) and f_j(x) the expert's output:

| use | of expert j |
|---|---|
| frequency | the share of tokens that get it, count(X_j) / T (SEER-MoE, arXiv 2404.05089) |
| gate | the sum of g_j(x) over X_j, divided by T: counting with weights (SEER-MoE) |
| reap | the mean of g_j(x) norm(f_j(x)) over X_j, 0 where there are none (REAP, arXiv 2510.13999, eq. 9) |

Experts that all tokens share are not among them. Padding (`kept_tokens`) doesn't count. Each use is a ratio of sums
over all samples, so that its spread is that of the jackknife (`auxin.analysis.spread`).
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from statistics import median
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from auxin.analysis.measurement import (
    Batch,
    Measurement,
    Needs,
    Result,
    Table,
    kept_by_decoder,
    result_of,
    samples_of,
)
from auxin.analysis.spread import Dealt, Estimate, Spread, jackknife
from auxin.analysis.unit_scores import LISTED, OfLayer, numbered, told
from auxin.analysis.unit_sums import Uses
from auxin.analysis.units import units_of
from auxin.errors import PlanError
from auxin.report.heat_map import Panel, Row, heat_map_svg

Use = Literal["frequency", "gate", "reap"]


class LayerExperts(OfLayer):
    """How the experts of one layer are used, each list by expert."""

    frequency: list[float]
    gate: list[float]
    reap: list[float]
    margins: dict[Use, list[float]] | None = None
    """Half the widths of the 95% intervals over samples, by use and expert, as in `Estimate`; None with one sample."""

    def of(self, use: Use) -> list[float]:
        """One of the lists by its name."""
        found: list[float] = getattr(self, use)
        return found

    @property
    def uncertainty(self) -> float | None:
        """The margin of a reap relative to it, in the median over the experts that some token got; None where there
        are no margins."""
        margins = self.margins["reap"] if self.margins else ()
        relative = [margin / reap for reap, margin in zip(self.reap, margins, strict=False) if reap > 0]
        return median(relative) if relative else None


class ExpertUses(Result):
    """How all experts of a model are used."""

    layers: list[LayerExperts]

    def of(self, use: Use) -> dict[str, list[float]]:
        """One use of every expert, by layer."""
        return {layer.scope: layer.of(use) for layer in self.layers}

    def tables(self) -> list[Table]:
        """A table for each stack, a row for each layer with experts."""
        header = ["layer", "experts", "never", "least often", "most often", "least reap", "most reap", "margin"]
        return [
            Table(f"{stack}: experts", header, [_row(layer) for layer in layers]) for stack, layers in self._stacks()
        ]

    def findings(self) -> list[str]:
        """Which experts matter least, and how many were never chosen."""
        ranked = sorted(
            (value, layer.scope, number, layer.margins["reap"][number] if layer.margins else None)
            for layer in self.layers
            for number, value in enumerate(layer.reap)
        )
        least = ", ".join(
            f"{numbered(number, scope)} ({told(Estimate(mean=value, deviation=None, margin=margin))})"
            for value, scope, number, margin in ranked[:LISTED]
        )
        never = sum(value == 0 for layer in self.layers for value in layer.frequency)
        return [f"Experts that matter least by reap: {least}.", f"Experts that no token got: {never} of {len(ranked)}."]

    def picture(self, title: str) -> str:
        """A map of frequencies for each stack, a row for each layer."""
        panels = [self._panel(stack, layers) for stack, layers in self._stacks()]
        return heat_map_svg(title, panels, "Light experts get more of the tokens.")

    def _stacks(self) -> Iterator[tuple[str, list[LayerExperts]]]:
        for stack, layers in groupby(self.layers, key=lambda layer: layer.stack):
            yield stack, list(layers)

    def _panel(self, stack: str, layers: Sequence[LayerExperts]) -> Panel:
        labels = [str(number) for number in range(max(len(layer.frequency) for layer in layers))]
        rows = [
            Row(layer.label, layer.frequency, margins=layer.margins["frequency"] if layer.margins else ())
            for layer in layers
        ]
        return Panel(f"{stack}: experts", rows, labels, "number of the expert", "share of tokens")


def _row(layer: LayerExperts) -> list[str]:
    numbers = [min(layer.frequency), max(layer.frequency), min(layer.reap), max(layer.reap)]
    never = sum(value == 0 for value in layer.frequency)
    margin = "" if layer.uncertainty is None else f"± {layer.uncertainty:.0%}"
    return [layer.label, str(len(layer.frequency)), str(never), *(f"{value:.3g}" for value in numbers), margin]


class ExpertUse(Measurement[ExpertUses]):
    """How often every expert is chosen, with which weight, and how much it gives."""

    name: ClassVar[str] = "expert-use"
    title: ClassVar[str] = "how routers use every expert: how often, with which weight, to which effect"
    needs: ClassVar[Needs] = "batches"
    version: ClassVar[int] = 2
    result_type: ClassVar[type[Result]] = ExpertUses

    def observe(self, model: PreTrainedModel) -> "ExpertUseObserver":
        """An observer of all routed experts of `model`.

        Raises:
            PlanError: the architecture is not known or has no such experts, or nobody sees into them.
        """
        return ExpertUseObserver(model)


MEASUREMENT = ExpertUse


class ExpertUseObserver:
    """Runs the model on every batch and counts what its routers choose.

    Args:
        model: of a known architecture with experts.

    Raises:
        PlanError: as `ExpertUse.observe`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._units = model, units_of(model)
        self._units.places = [place for place in self._units.places if place.where == "inside"]
        if not self._units.places:
            raise PlanError(
                f"The {model.config.model_type} model has no experts among which a router chooses. Measure a mixture "
                "of experts, or its heads and feed-forward units by importance."
            )
        self._dealt: dict[str, Dealt] = {}
        """By layer, of each sample: its tokens, then of each expert tokens, weights and norms."""
        self.taps = ()

    def before(self, batch: Batch) -> None:
        """Nothing to note."""

    @torch.no_grad()
    def after(self, batch: Batch, output: Any) -> None:
        """Run the model on the batch, and count."""
        uses = Uses(samples_of(batch), kept_by_decoder(self._model, batch))
        with self._units.read_by(uses):
            result_of(self._model, batch)
        for scope, tokens in uses.tokens.items():
            chosen = next(sums for (kind, place), sums in uses.sums.items() if place == scope and kind != "expert")
            of_experts = torch.cat([chosen, uses.sums["expert", scope]], dim=2).flatten(1)
            values = torch.cat([tokens[:, None].to(of_experts), of_experts], dim=1)
            self._dealt.setdefault(scope, Dealt()).add(values.cpu().double())

    def result(self) -> ExpertUses:
        """What was found."""
        return ExpertUses(layers=[_of_layer(scope, dealt) for scope, dealt in self._dealt.items()])


def _of_layer(scope: str, dealt: Dealt) -> LayerExperts:
    names: tuple[Use, ...] = get_args(Use)
    found = jackknife(lambda left_out: _uses(dealt.without(left_out)), dealt.samples, len(dealt))
    experts = len(found.means) // len(names)
    parts = {name: found.part(number * experts, (number + 1) * experts) for number, name in enumerate(names)}
    margins = {name: part.margins for name, part in parts.items() if part.margins is not None}
    return LayerExperts(
        scope=scope, **{name: part.means for name, part in parts.items()}, margins=margins if margins else None
    )


def _uses(spread: Spread) -> Tensor:
    """Frequencies, gates and reaps of all experts, (3, experts)."""
    tokens, of_experts = spread.means()[0], spread.means()[1:]
    counts, gates, norms = of_experts.view(-1, 3).unbind(1)
    return torch.stack([counts / tokens, gates / tokens, torch.where(counts > 0, norms / counts, 0)])
