"""Outliers of activations: how far the largest entries of what layers give lie from the others, and where they are.

Each part of a layer gives something to the residual stream, and the layer leaves the stream. Of such a tensor x, a
sample's tokens by the width of the stream, with the mean m and the unbiased standard deviation s over all entries:

| measure | definition |
|---|---|
| infinity norm | max abs(x) |
| peak | max abs(x) / s |
| kurtosis | mean of (x - m)^4 / s^4; 3 where x is Gaussian, larger with heavier tails |
| beyond | share of the entries with abs(x - m) > 6 s |
| dimensions | units of the residual stream with such an entry in more than a quarter of the samples |

All are taken over one sample and averaged over samples; kurtosis and infinity norm are those of Bondarenko et al.
(arXiv 2306.12929, section 5), who report the kurtosis averaged over layers and the largest infinity norm. Their code
adds 1e-6 to s^4, which changes the kurtosis of what is small; here nothing is added. A tensor whose entries are all
alike has no outliers: kurtosis and peak are 0.

Two numbers stand for the whole model, as that paper has them: the largest infinity norm, and the mean kurtosis, of all
these tensors and of what norms with a gain give, in the layers and behind the last. Where norms come behind sums (BERT)
what enters them counts for the infinity norm, too.

What a part gives is what `similarity` adds to the stream: the output of the part, or of the norm behind it (OLMo 2).
The stream that a layer leaves is the layer's output, in BERT with the norm behind the sum. Padding (`kept_tokens`)
doesn't count. Sums are in float32 at least.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from auxin.analysis.measurement import Batch, Measurement, Needs, Result, Table, Tap, check_mask, samples_of, wide
from auxin.analysis.parts import Kind, StackParts, refuse_blocks, refuse_maps, stack_parts
from auxin.analysis.spread import Estimate, Spread
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
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
                    "" if found.kurtosis.margin is None else f"± {found.kurtosis.margin:.2g}",
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


class OutlierMeasurement(Measurement[Outliers]):
    """How large the largest entries are of what parts give and layers leave."""

    name: ClassVar[str] = "outliers"
    title: ClassVar[str] = "largest entries, kurtosis and outlier dimensions of what each part and each layer gives"
    needs: ClassVar[Needs] = "layers"
    version: ClassVar[int] = 2
    result_type: ClassVar[type[Result]] = Outliers

    deviations: float = Field(default=6.0, gt=0)
    """From how many standard deviations on an entry is beyond."""
    sample_share: float = Field(default=0.25, ge=0, lt=1)
    """In more than which share of the samples a dimension must have an entry beyond, to be named."""

    def observe(self, model: PreTrainedModel) -> "OutlierObserver":
        """An observer of all stacks of `model`.

        Raises:
            PlanError: the architecture is not known, or its residual stream has several blocks.
        """
        return OutlierObserver(model, self)


MEASUREMENT = OutlierMeasurement


class OutlierObserver:
    """Reads what parts give and what layers leave.

    Args:
        model: of a known architecture.
        settings: what counts as an outlier.

    Raises:
        PlanError: as `OutlierMeasurement.observe`.
    """

    def __init__(self, model: PreTrainedModel, settings: OutlierMeasurement) -> None:
        refuse_blocks(model)
        refuse_maps(model)
        self._settings = settings
        self._stacks = stack_parts(model)
        self._places = {stack.stack.path: _places(stack, settings.deviations) for stack in self._stacks}
        self._norms = {stack.stack.path: _norms(stack, settings.deviations) for stack in self._stacks}
        self.taps = [place.tap for path in self._places for place in self._all(path)]

    def before(self, batch: Batch) -> None:
        """Note which tokens count."""
        for stack in self._stacks:
            kept = stack.kept(batch)
            for place in self._all(stack.stack.path):
                place.begin(samples_of(batch), kept)

    def after(self, batch: Batch, output: Any) -> None:
        """Everything was read while the batch went through."""
        for path in self._places:
            for place in self._all(path):
                place.end()

    def result(self) -> Outliers:
        """The estimates of all places."""
        stacks = []
        for path, layers in self._places.items():
            found = []
            for layer, places in layers.items():
                *parts, stream = (place.result(self._settings.sample_share) for place in places)
                found.append(LayerOutliers(path=layer, parts=parts, stream=stream))
            behind = [place.result(self._settings.sample_share) for place in self._norms[path]]
            norms, sums = ([one for one in behind if one.kind == kind] for kind in ("norm", "sum"))
            stacks.append(StackOutliers(path=path, layers=found, norms=norms, sums=sums))
        return Outliers(deviations=self._settings.deviations, stacks=stacks)

    def _all(self, path: str) -> "Iterator[_Place]":
        """The places of one stack."""
        for layer in self._places[path].values():
            yield from layer
        yield from self._norms[path]


def _places(parts: StackParts, deviations: float) -> dict[str, list["_Place"]]:
    """By layer its parts, as far as it has them, and the layer itself."""
    found = {}
    for path, layer in parts.layers.items():
        modules = dict(layer.named_modules())
        found[path] = [
            _Place(f"{path}.{name}", kind, modules[name], deviations)
            for name, kind in zip(parts.added, parts.kinds, strict=True)
            if name in modules
        ]
        found[path].append(_Place(path, STREAM, layer, deviations))
    return found


def _norms(parts: StackParts, deviations: float) -> list["_Place"]:
    """What norms with a gain along the residual give, but those whose outputs are parts; behind sums what they read."""
    body = anatomy(parts.model, part=parts.stack.tower or None)
    gains = [role for role in body.roles if role.kind == "gain" and role.along("residual") and not role.added]
    behind_sums = parts.stack.output_norms if parts.stack.norm_position == "after_residual" else ()
    end = parts.stack.end if parts.stack.ends_in_norm else ""
    found = []
    for path, module in parts.model.named_modules():
        layer = next((one for one in parts.layers if path.startswith(f"{one}.")), None)
        if (layer is None and path != end) or not any(role.matches(f"{path}.weight") for role in gains):
            continue
        name = path if layer is None else path.removeprefix(f"{layer}.")
        if name in parts.added:
            continue
        if name in behind_sums:
            found.append(_Place(path, "sum", module, deviations))
        found.append(_Place(path, "norm", module, deviations))
    return found


class _Place:
    """One tensor, over all batches."""

    def __init__(self, path: str, kind: Tracked, module: torch.nn.Module, deviations: float) -> None:
        self.tap = Tap(module, "input" if kind == "sum" else "output", self._read)
        self._path, self._kind, self._deviations = path, kind, deviations
        self._spread = Spread()
        self._hit: Tensor | None = None
        self._samples, self._times = 0, 0
        self._kept: Tensor | None = None

    def begin(self, samples: int, kept: Tensor | None) -> None:
        """A batch of so many samples comes, of whose tokens `kept` count."""
        self._samples, self._kept, self._times = samples, kept, 0

    def end(self) -> None:
        """It has gone through."""
        if self._times != 1:
            raise PlanError(
                f"{self._path} was run {self._times} times in one pass, and one is expected. Measure the model before "
                "the edit that changed that; layers that share their weights can't be told apart."
            )

    def result(self, samples: float) -> TensorOutliers:
        """The estimates, and the dimensions that have outliers in more than that share of the samples."""
        assert self._hit is not None
        norm, peak, kurtosis, beyond = self._spread.estimates()
        shares = (self._hit / self._spread.samples).tolist()
        dimensions = [OutlierDimension(dimension=n, samples=share) for n, share in enumerate(shares) if share > samples]
        return TensorOutliers(
            module=self._path,
            kind=self._kind,
            infinity_norm=norm,
            peak=peak,
            kurtosis=kurtosis,
            beyond=beyond,
            dimensions=sorted(dimensions, key=lambda found: -found.samples),
        )

    def _read(self, hidden: Tensor) -> None:
        self._times += 1
        # Some parts run on the tokens of all samples in a row.
        x = wide(hidden).reshape(self._samples, -1, hidden.shape[-1])
        if self._kept is None:
            counted = x.new_ones(x.shape[:2], dtype=torch.bool)
        else:
            check_mask(self._kept, x.shape[:2])
            counted = self._kept
        size = counted.sum(dim=1, dtype=x.dtype) * x.shape[2]
        x = torch.where(counted[..., None], x, 0)
        norm = x.abs().amax(dim=(1, 2))
        apart = torch.where(counted[..., None], x - (x.sum(dim=(1, 2)) / size)[:, None, None], 0)
        deviation = (apart.square().sum(dim=(1, 2)) / (size - 1).clamp(min=1)).sqrt()
        # Without any deviation all of `apart` is 0, and stays so.
        unit = torch.where(deviation > 0, deviation, 1)
        apart = apart / unit[:, None, None]
        beyond = apart.abs() > self._deviations
        peak = torch.where(deviation > 0, norm / unit, 0)
        kurtosis = apart.pow(4).sum(dim=(1, 2)) / size
        self._spread.add(torch.stack([norm, peak, kurtosis, beyond.sum(dim=(1, 2)) / size], dim=1))
        hit = beyond.any(dim=1).sum(dim=0).cpu()
        self._hit = hit if self._hit is None else self._hit + hit


def _named(dimensions: list[OutlierDimension], most: int) -> str:
    """The numbers of the first ones, and how many others there are."""
    more = len(dimensions) - most
    return ", ".join(str(found.dimension) for found in dimensions[:most]) + (f", +{more}" if more > 0 else "")
