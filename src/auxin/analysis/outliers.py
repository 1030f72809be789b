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
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from auxin.analysis.measurement import Batch, Measurement, Needs, Result, Tap, check_mask, samples_of, wide
from auxin.analysis.outlier_results import (
    STREAM,
    LayerOutliers,
    OutlierDimension,
    Outliers,
    StackOutliers,
    TensorOutliers,
    Tracked,
)
from auxin.analysis.parts import StackParts, refuse_blocks, refuse_maps, stack_parts
from auxin.analysis.spread import Spread
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy


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
