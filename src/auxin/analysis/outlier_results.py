"""What is told of outliers of activations: numbers of each tensor, tables, sentences and a picture of all.

`auxin.analysis.outliers` has the definitions.
"""

from collections.abc import Iterator
from typing import Literal

from auxin.analysis.measurement import Result, Table
from auxin.analysis.parts import Kind
from auxin.analysis.spread import Estimate
from auxin.report.heat_map import Panel, Row, heat_map_svg
from auxin.settings import Settings

STREAM: Literal["stream"] = "stream"
Tracked = Kind | Literal["stream", "norm", "sum"]
LISTED = 3
"""How many tensors and dimensions the findings name."""
IN_A_TABLE = 1
"""How many dimensions a row of a table names."""


class OutlierDimension(Settings):
    """A unit of the residual stream that holds outliers."""

    dimension: int
    """Its number, from 0."""
    samples: float
    """Share of the samples in which it has an entry beyond."""


class TensorOutliers(Settings):
    """What a part gives, or a layer leaves."""

    module: str
    """The module whose output it is, of a sum that reads it: "model.layers.0.mlp.down_proj"."""
    kind: Tracked
    """The part's kind; "stream" is what the layer leaves, "norm" what a norm gives, "sum" what a norm behind a sum
    reads."""
    infinity_norm: Estimate
    """The largest absolute value."""
    peak: Estimate
    """That over the standard deviation of all entries."""
    kurtosis: Estimate
    """Of all entries."""
    beyond: Estimate
    """Share of the entries farther from the mean than so many standard deviations."""
    dimensions: list[OutlierDimension]
    """Those with an entry beyond in more than the wanted share of the samples, the most frequent first."""


class LayerOutliers(Settings):
    """One layer."""

    path: str
    """The layer's module: "model.layers.0"."""
    parts: list[TensorOutliers]
    """In the order in which they are run; what a layer lacks is left out."""
    stream: TensorOutliers
    """What the layer leaves in the residual stream."""


class StackOutliers(Settings):
    """One stack of layers."""

    path: str
    """The list of layers: "model.layers"."""
    layers: list[LayerOutliers]
    norms: list[TensorOutliers]
    """What norms give that have a gain, in the layers and behind the last, but those that end parts."""
    sums: list[TensorOutliers]
    """What norms behind sums read."""

    @property
    def kurtosis(self) -> float:
        """Of the residual stream behind each layer, the mean over layers."""
        return sum(layer.stream.kurtosis.mean for layer in self.layers) / len(self.layers)

    @property
    def infinity_norm(self) -> float:
        """Of the residual stream behind each layer, the mean over layers."""
        return sum(layer.stream.infinity_norm.mean for layer in self.layers) / len(self.layers)

    @property
    def largest(self) -> LayerOutliers:
        """The layer that leaves the largest infinity norm."""
        return max(self.layers, key=lambda layer: layer.stream.infinity_norm.mean)


class Outliers(Result):
    """The outliers in what all parts and layers of a model give."""

    deviations: float
    """From how many standard deviations on an entry is beyond."""
    stacks: list[StackOutliers]

    @property
    def largest(self) -> TensorOutliers:
        """Of all tensors that of the largest infinity norm."""
        sums = [one for stack in self.stacks for one in stack.sums]
        return max([*self.tensors(), *self.norms(), *sums], key=lambda found: found.infinity_norm.mean)

    @property
    def kurtosis(self) -> float:
        """The mean over all tensors but sums."""
        found = [one.kurtosis.mean for one in (*self.tensors(), *self.norms())]
        return sum(found) / len(found)

    def norms(self) -> Iterator[TensorOutliers]:
        """Of all stacks."""
        for stack in self.stacks:
            yield from stack.norms

    def tensors(self) -> Iterator[TensorOutliers]:
        """Of all layers, parts before the stream."""
        for stack in self.stacks:
            for layer in stack.layers:
                yield from layer.parts
                yield layer.stream

    def tables(self) -> list[Table]:
        """A table for each stack, a row for each part of each layer and for the stream behind it."""
        header = ["layer", "of", "inf norm", "peak", "kurtosis", "margin", "beyond", "dimensions"]
        tables = []
        for stack in self.stacks:
            rows = [
                [
                    layer.path.removeprefix(f"{stack.path}."),
                    found.kind,
                    *(f"{item.mean:.3g}" for item in (found.infinity_norm, found.peak, found.kurtosis)),
                    found.kurtosis.plus_minus.strip(),
                    f"{100 * found.beyond.mean:.2g}%",
                    _named(found.dimensions, IN_A_TABLE),
                ]
                for layer in stack.layers
                for found in [*layer.parts, layer.stream]
            ]
            tables.append(Table(stack.path, header, rows))
        return tables

    def findings(self) -> list[str]:
        """The stream's norm and kurtosis, those of all tensors, the tensors of the largest kurtosis, and the dimensions
        of outliers."""
        told = [
            f"The stream behind the layers of {stack.path} has a kurtosis of {stack.kurtosis:.4g} on average (3: "
            f"Gaussian) and an infinity norm of {stack.infinity_norm:.4g}, the largest behind {stack.largest.path}: "
            f"{stack.largest.stream.infinity_norm.mean:.4g}."
            for stack in self.stacks
        ]
        told.append(
            f"Of all tensors, with those of norms, the largest infinity norm is {self.largest.infinity_norm.mean:.4g} "
            f"({self.largest.module}, {self.largest.kind}), the mean kurtosis {self.kurtosis:.4g}."
        )
        ranked = sorted(self.tensors(), key=lambda found: -found.kurtosis.mean)[:LISTED]
        told.append(
            "Largest kurtosis: " + ", ".join(f"{found.module} {found.kurtosis.mean:.4g}" for found in ranked) + "."
        )
        for stack in self.stacks:
            places: dict[int, int] = {}
            for layer in stack.layers:
                for found in layer.stream.dimensions:
                    places[found.dimension] = places.get(found.dimension, 0) + 1
            most = sorted(places, key=lambda dimension: (-places[dimension], dimension))[:LISTED]
            named = ", ".join(f"{dimension} (behind {places[dimension]} layers)" for dimension in most)
            told.append(
                f"Dimensions of {stack.path} with entries beyond {self.deviations:g} standard deviations: {len(places)}"
                + (f", first {named}." if most else ".")
            )
        return told

    def picture(self, title: str) -> str:
        """Panels of kurtosis and peak for each stack: a row for each layer, a cell for each part and the stream."""
        panels = []
        for stack in self.stacks:
            kinds = list(dict.fromkeys(found.kind for layer in stack.layers for found in [*layer.parts, layer.stream]))
            kinds.sort(key=lambda kind: kind == STREAM)
            for name, unit in (("kurtosis", "3: Gaussian"), ("peak", "standard deviations")):
                rows = []
                for layer in stack.layers:
                    found = {item.kind: getattr(item, name).mean for item in [*layer.parts, layer.stream]}
                    rows.append(Row(layer.path.removeprefix(f"{stack.path}."), [found.get(kind) for kind in kinds]))
                panels.append(
                    Panel(f"{name} ({stack.path})", rows, [_SHORT[k] for k in kinds], "", unit, logarithmic=True)
                )
        note = (
            "Of what attention (A), cross-attention (C) and feed-forward part (F) give, and of the residual stream "
            "that each layer leaves (S). The colours are logarithmic."
        )
        return heat_map_svg(title, panels, note)


_SHORT = {"attention": "A", "cross-attention": "C", "feed-forward": "F", STREAM: "S"}


def _named(dimensions: list[OutlierDimension], most: int) -> str:
    """The numbers of the first ones, and how many others there are."""
    more = len(dimensions) - most
    return ", ".join(str(found.dimension) for found in dimensions[:most]) + (f", +{more}" if more > 0 else "")
