"""Scores of all units of a model, by kind and layer, and how a person reads them."""

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from statistics import median

from auxin.analysis.measurement import Result, Table
from auxin.analysis.spread import Estimate, Estimates
from auxin.analysis.units import WORDS, Kind
from auxin.errors import PlanError
from auxin.report.heat_map import Panel, Row, heat_map_svg
from auxin.settings import Settings

LISTED = 3
"""How many units of a kind the findings name."""
COLUMNS = 40
"""Units that a row of the picture has room for; where there are more, neighbours in the order of size share a cell."""


def numbered(number: int, scope: str) -> str:
    """One of several in a layer, in words: "number 2 of model.layers.3"; of what runs through all layers its number."""
    return f"number {number} of {scope}" if scope else f"number {number}"


def told(score: Estimate) -> str:
    """A score with its margin, in three digits."""
    return f"{score.mean:.3g}{score.plus_minus}"


class OfLayer(Settings):
    """What was found of one layer."""

    scope: str
    """The layer, "model.layers.3"; "" for the residual stream, which is one through all layers."""

    @property
    def stack(self) -> str:
        """The list of layers: "model.layers"."""
        return self.scope.rpartition(".")[0]

    @property
    def label(self) -> str:
        """The layer's number."""
        return self.scope.rpartition(".")[2] or "all"


class UnitImportance(OfLayer):
    """The units of one kind in one place."""

    stream: Kind
    """What they are; "expert": whole experts."""
    scores: Estimates
    """By unit, over samples. Of a root of a mean, the deviation is that of the mean, to first order; of what is no mean
    over samples (fluctuation, activations) that of the jackknife."""

    @property
    def uncertainty(self) -> float | None:
        """The margin of a score relative to it, in the median over units: the order of scores that lie closer to each
        other is no finding. Scores of zero are left out; None where there are no margins."""
        relative = [
            margin / mean
            for mean, margin in zip(self.scores.means, self.scores.margins or [], strict=False)
            if mean > 0
        ]
        return median(relative) if relative else None


class UnitScores(Result):
    """What all units of a model are worth by some score."""

    groups: list[UnitImportance]
    """By kind, and then by layer."""
    missing: dict[str, str]
    """Units that were not measured, and why."""

    @property
    def by(self) -> str:
        """What the score is called, in a word."""
        raise NotImplementedError

    def of(self, stream: Kind, scope: str) -> UnitImportance:
        """The units of `stream` in `scope`, as `auxin.planning.cutting` names them.

        Raises:
            PlanError: they were not measured.
        """
        found = next((group for group in self.groups if (group.stream, group.scope) == (stream, scope)), None)
        if found is None:
            why = self.missing.get(WORDS[stream], f"there are none in {scope or 'the whole model'}.")
            raise PlanError(f"The importance of {WORDS[stream]} was not measured: {why}")
        return found

    def tables(self) -> list[Table]:
        """A table for each kind of unit and stack, a row for each layer."""
        header = ["layer", "units", "smallest", "median", "largest", "margin"]
        return [Table(title, header, [_table_row(group) for group in groups]) for title, groups in self._panels()]

    def findings(self) -> list[str]:
        """The units of each kind that matter least, and which were not measured."""
        said = []
        for kind, of_kind in groupby(self.groups, key=lambda group: group.stream):
            ranked = sorted(
                (score.mean, group.scope, unit, told(score))
                for group in of_kind
                for unit, score in enumerate(group.scores.each())
            )
            least = ", ".join(f"{numbered(unit, scope)} ({score})" for _, scope, unit, score in ranked[:LISTED])
            said.append(f"{WORDS[kind].capitalize()} that matter least by {self.by}: {least}.")
        return said + [f"Not measured: {words}. {why}" for words, why in self.missing.items()]

    def picture(self, title: str) -> str:
        """A map for each kind of unit and stack, a row for each layer."""
        panels = [self._panel(name, groups) for name, groups in self._panels()]
        return heat_map_svg(
            title,
            panels,
            "Light units matter more. Colours are logarithmic, and each map has its own; compare its rows. Beside each "
            "row, how sure its scores are: the margin of half of its units is no larger.",
        )

    def _panels(self) -> Iterator[tuple[str, list[UnitImportance]]]:
        for (kind, stack), groups in groupby(self.groups, key=lambda group: (group.stream, group.stack)):
            yield f"{stack}: {WORDS[kind]}" if stack else WORDS[kind], list(groups)

    def _panel(self, name: str, groups: list[UnitImportance]) -> Panel:
        count = max(len(group.scores.means) for group in groups)
        few = count <= COLUMNS
        rows = [
            Row(
                g.label,
                g.scores.means if few else _by_size(g.scores.means),
                margins=(g.scores.margins or ()) if few else (),
                aside="" if g.uncertainty is None else f"± {g.uncertainty:.0%}",
            )
            for g in groups
        ]
        labels = [str(n) for n in range(count)] if few else [f"{100 * n // COLUMNS}%" for n in range(COLUMNS)]
        across = "number of the unit" if few else "units by size; each cell is the median of its share of them"
        return Panel(name, rows, labels, across, self.by, logarithmic=True)


def _table_row(group: UnitImportance) -> list[str]:
    means, uncertainty = group.scores.means, group.uncertainty
    numbers = [f"{value:.3g}" for value in (min(means), median(means), max(means))]
    return [group.label, str(len(means)), *numbers, "" if uncertainty is None else f"± {uncertainty:.0%}"]


def _by_size(values: Sequence[float]) -> list[float]:
    """The medians of `COLUMNS` stretches of the values, the largest ones first."""
    ranked, edges = sorted(values, reverse=True), [len(values) * n // COLUMNS for n in range(COLUMNS + 1)]
    # A layer with fewer units than columns has some of them twice.
    return [median(ranked[start : max(stop, start + 1)]) for start, stop in pairwise(edges)]
