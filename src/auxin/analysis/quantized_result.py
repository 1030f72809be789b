"""What quantization costs: losses by scheme, harm alone, the noisiest tensors."""

from typing import Literal

from auxin.analysis.measurement import Result, Table
from auxin.analysis.quantized_losses import Quantized
from auxin.analysis.quantized_sites import Family
from auxin.analysis.spread import Estimate
from auxin.report.forest import Mark, Panel, Row, Series, forest_svg
from auxin.settings import Settings

Scheme = Literal["w8a8", "w8", "a8", "w4"]
LISTED = 3
"""How many tensors the findings name."""
IN_A_TABLE = 12
"""How many tensors a table, and the picture, has."""
LABEL_CHARACTERS = 32
"""Of a row of the picture, the last ones of a tensor's name."""
ERROR = Series("output error", "#2F8AC9", "circle")


class TensorNoise(Settings):
    """An activation on its grid."""

    name: str
    """Where it arises."""
    family: Family
    low: float
    """Where its range begins."""
    high: float
    """Where it ends."""
    noise: float
    """Root of the sum of squares of what the round trip changes, over that of the tensor, on the samples that are
    looked at."""


class QuantizationLoss(Result):
    """What quantization costs."""

    float_loss: Estimate | None
    """In floating point."""
    float_accuracy: Estimate | None
    schemes: list[Quantized]
    """Each scheme."""
    alone: list[Quantized]
    """With one family of activations, or one tensor, quantized and all else in floating point."""
    tensors: list[TensorNoise]
    """All activations, in the order in which they arise."""
    weights: int
    """How many weights are quantized."""
    real_weights: int = 0
    """How many of them torchao quantizes; 0 where it was not asked to."""
    real: list[Quantized] = []
    """With what torchao computes in integers, by scheme."""
    seconds: dict[str, float] = {}
    """What a sample takes in a run of the model as it is ("nothing") and of torchao's, where those were asked for."""

    def of(self, scheme: Scheme) -> Quantized:
        """What was found for `scheme`."""
        return next(found for found in self.schemes if found.what == scheme)

    def tables(self) -> list[Table]:
        """Losses by scheme, what is quantized alone by its harm, and the noisiest tensors."""
        has_loss, has_accuracy = self.float_loss is not None, self.float_accuracy is not None
        header = ["quantized", *(["loss", "change"] if has_loss else []), *(["accuracy"] if has_accuracy else [])]
        none = ["nothing", *([_mean(self.float_loss), ""] if has_loss else [])]
        none += [_short(self.float_accuracy)] if has_accuracy else []
        tables = [Table("loss", [*header, "output error"], [[*none, ""], *(_row(found) for found in self.schemes)])]
        if self.real:
            rows = [[*_row(found), f"{self.seconds[found.what]:.3g}"] for found in self.real]
            rows = [[*none, "", f"{self.seconds['nothing']:.3g}"], *rows]
            tables.append(Table("in integers, by torchao", [*header, "output error", "s per sample"], rows))
        if self.alone:
            rows = [[found.what, _short(found.change or found.error)] for found in self._most_harmful[:IN_A_TABLE]]
            tables.append(
                Table("activations in 8 bits alone", ["quantized", "change" if has_loss else "output error"], rows)
            )
        noisy = sorted(self.tensors, key=lambda found: -found.noise)[:IN_A_TABLE]
        rows = [[found.name, f"{max(-found.low, found.high):.3g}", f"{found.noise:.2g}"] for found in noisy]
        tables.append(Table("activations that change most on their grids", ["tensor", "reach", "noise"], rows))
        return tables

    @property
    def _most_harmful(self) -> list[Quantized]:
        return sorted(self.alone, key=lambda found: _harm(found).mean, reverse=True)

    def findings(self) -> list[str]:
        """What it costs, and where."""
        told = []
        for whose, found in [("", found) for found in self.schemes] + [(" of torchao", found) for found in self.real]:
            by = f"the output by {100 * found.error.mean:.2g}%"
            if found.change is not None:
                by = f"the loss by {found.change.mean:+.4f}{found.change.plus_minus} and {by}"
            told.append(f"{found.what.upper()}{whose} changes {by}.")
        if self.alone:
            what = "output error" if self.float_loss is None else "change of the loss"
            worst = ", ".join(
                f"{one.what} ({_harm(one).mean:.2g}{_harm(one).plus_minus})" for one in self._most_harmful[:LISTED]
            )
            told.append(f"Most harm alone, by the {what}: {worst}.")
        counts = dict.fromkeys(tensor.family for tensor in self.tensors)
        by_torchao = f", {self.real_weights} by torchao" if self.real else ""
        told.append(
            f"Quantized: {self.weights} weights{by_torchao}; of activations "
            + ", ".join(f"{sum(t.family == family for t in self.tensors)} {family}" for family in counts)
            + "."
        )
        return told

    def picture(self, title: str) -> str:
        """How far the output moves: a row for each scheme, and for what harms most alone."""
        panels = [Panel("quantized", [_mark_row(found) for found in self.schemes])]
        if self.alone:
            worst = sorted(self.alone, key=lambda found: found.error.mean, reverse=True)[:IN_A_TABLE]
            panels.append(Panel("activations in 8 bits alone", [_mark_row(found) for found in worst]))
        note = (
            "Length of what the output changes by over the output's own, with 95% intervals. To the right it moves "
            "less; the axis is logarithmic."
        )
        return forest_svg(title, note, panels, [ERROR], near=0)


def _mark_row(found: Quantized) -> Row:
    name = found.what if len(found.what) <= LABEL_CHARACTERS else "…" + found.what[1 - LABEL_CHARACTERS :]
    return Row(name, [Mark(ERROR.name, found.error.mean, found.error.margin)])


def _row(found: Quantized) -> list[str]:
    cells = [found.what]
    if found.loss is not None:
        cells += [_mean(found.loss), _short(found.change)]
    if found.accuracy is not None:
        cells.append(_short(found.accuracy))
    return [*cells, _short(found.error)]


def _mean(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{estimate.mean:.4f}"


def _short(estimate: Estimate | None) -> str:
    return "" if estimate is None else str(estimate)


def _harm(found: Quantized) -> Estimate:
    return found.error if found.change is None else found.change
