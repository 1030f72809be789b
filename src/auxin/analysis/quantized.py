"""What INT8 would do to a model's loss: simulated quantization after training, and which tensors are to blame.

W8A8 as Bondarenko et al. (arXiv 2306.12929) measure it: every weight of a linear layer, an embedding and a norm is on a
grid of 8 bits around zero, and every tensor that integer arithmetic stores on one of its own, one for the whole tensor
(`auxin.analysis.quantized_sites` has the list), whose range is set beforehand and stays. Ranges come from the first
samples, losses from the others. What a model gives in floating point is what it gives; in the same sense every number
here is that of a simulation: values are rounded to the grids and computed with in floating point.

| scheme | quantized |
|---|---|
| w8a8 | weights and activations, 8 bits each |
| w8 | weights |
| a8 | activations |
| w4 | matrices, 4 bits, a grid for each output or for groups of its inputs |
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from auxin.analysis.measurement import Batch, Measurement, Needs, Result, samples_of, wide, without_loss
from auxin.analysis.parts import refuse_blocks
from auxin.analysis.quantized_losses import Losses
from auxin.analysis.quantized_real import RealModels, RealScheme
from auxin.analysis.quantized_result import QuantizationLoss, Scheme, TensorNoise
from auxin.analysis.quantized_run import Follower
from auxin.analysis.quantized_sites import Site
from auxin.analysis.quantized_weights import Weights
from auxin.analysis.quantizers import (
    ActivationRanges,
    Grid,
    RunningRange,
    WeightRanges,
    least_error_range,
    percentile_range,
    whole_range,
)
from auxin.edits.structure import refuse_quantized
from auxin.errors import DataError


class QuantizedMeasurement(Measurement[QuantizationLoss]):
    """What the loss becomes with weights and activations in 8 bits."""

    name: ClassVar[str] = "quantized"
    title: ClassVar[str] = "the loss with weights and activations in simulated INT8, and the tensors that are to blame"
    needs: ClassVar[Needs] = "batches"
    result_type: ClassVar[type[Result]] = QuantizationLoss
    version: ClassVar[int] = 2

    schemes: list[Scheme] = Field(default=["w8a8", "w8", "a8"], min_length=1)
    """What is quantized, one after the other."""
    weight_ranges: WeightRanges = "min-max"
    """How far the 8-bit grid of a weight reaches: to its largest entry, or to the threshold of the least squared error
    among 100."""
    activation_ranges: ActivationRanges = "min-max"
    """How far that of an activation does: from the smallest to the largest entry, between percentiles, or as far as
    the squared error is least."""
    percentile: float = Field(default=99.99, gt=50, le=100)
    """The upper one; the lower one is 100 minus it."""
    calibration_samples: int = Field(default=32, gt=0)
    """The first samples, from which ranges come; losses are those of the others."""
    calibration_batch: int = Field(default=2, gt=0)
    """How many of them make a batch, by which the running range moves a tenth of the way. Samples of another form than
    the ones before begin a new batch."""
    group: int | None = Field(default=None, gt=1)
    """With w4: how many inputs of an output share a grid; None: all of them. Where they can't be divided so, all."""
    alone: Literal["nothing", "families", "tensors"] = "families"
    """What is quantized alone beside the schemes: each family of activations, or each activation, which takes a run of
    the model for each."""

    real: list[RealScheme] = []
    """What torchao computes in integers beside the simulation, in copies of the model: w8, or w8a8 with a grid for each
    token's activations that is made as they come. Linear layers but heads and gates. Its time is told, too."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        asked: dict[str, Sequence[str]] = {"schemes": self.schemes, "real": self.real}
        for field, names in asked.items():
            if repeated := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{field} names {repeated[0]} more than once. Name each once.")
        default = type(self).model_fields["percentile"].default
        if self.percentile != default and self.activation_ranges != "percentile":
            raise ValueError(
                f"percentile is of activation_ranges = percentile, and they are {self.activation_ranges}. Set that, or "
                "leave percentile out."
            )
        if self.group is not None and "w4" not in self.schemes:
            raise ValueError(f"group is of w4, and schemes are {', '.join(self.schemes)}. Add w4, or leave group out.")
        return self

    def observe(self, model: PreTrainedModel) -> "QuantizedObserver":
        """An observer of `model`.

        Raises:
            PlanError: the architecture is not known, its residual stream has several blocks, it is quantized, or has no
                linear layers for `real`, or has them in float64.
            ConfigError: `real` asks for torchao, which is not installed.
        """
        return QuantizedObserver(model, self)


MEASUREMENT = QuantizedMeasurement


class QuantizedObserver:
    """Sets ranges on the first samples, and runs the model quantized on the others.

    Args:
        model: of a known architecture; it is left as it is.
        settings: of the measurement.

    Raises:
        PlanError, ConfigError: as `QuantizedMeasurement.observe`.
    """

    taps: Sequence[Any] = ()

    def __init__(self, model: PreTrainedModel, settings: QuantizedMeasurement) -> None:
        refuse_quantized(model)
        refuse_blocks(model)
        self._model, self._settings = model, settings
        self._weights = Weights(model, settings.weight_ranges)
        self._follower = Follower(model, self._weights)
        self._ranges: dict[Site, RunningRange] = {}
        self._waiting: list[dict[str, Tensor]] = []
        self._calibrated = 0
        self._noise: dict[Site, list[float]] = {}
        self._float = Losses(model)
        self._found: dict[str, Losses] = {}
        self._real = RealModels(model, settings.real, self._weights.linear_layers(), self._float)

    def before(self, batch: Batch) -> None:
        """Nothing."""

    def after(self, batch: Batch, output: Any) -> None:
        """Set ranges on the samples that are for that, and measure on the others."""
        count, start = samples_of(batch), 0
        while start < count and self._calibrated < self._settings.calibration_samples:
            self._wait({name: x[start : start + 1] for name, x in batch.items()})
            self._calibrated += 1
            start += 1
        if self._calibrated == self._settings.calibration_samples:
            self._calibrate()
        if start < count:
            self._measure({name: x[start:] for name, x in batch.items()})

    def result(self) -> QuantizationLoss:
        """What was found.

        Raises:
            DataError: there was no sample beside those for the ranges.
        """
        if not self._float.errors.samples:
            raise DataError(
                f"calibration_samples is {self._settings.calibration_samples}, and the data have no more samples: "
                "ranges are taken from some, losses from others. Give more samples, or set it lower."
            )
        schemes = list[str](self._settings.schemes)
        found = {what: losses.found(what) for what, losses in self._found.items()}
        return QuantizationLoss(
            float_loss=self._float.loss,
            float_accuracy=self._float.accuracy,
            schemes=[found[what] for what in schemes],
            alone=[one for what, one in found.items() if what not in schemes],
            tensors=[self._tensor(site) for site in self._ranges],
            weights=len(self._weights.quantized()),
            real_weights=self._real.weights,
            real=self._real.found(),
            seconds=self._real.seconds(),
        )

    def _tensor(self, site: Site) -> TensorNoise:
        grid, (error, size) = self._ranges[site].grid, self._noise[site]
        noise = (error / size) ** 0.5 if size else 0.0
        return TensorNoise(name=site.name, family=site.family, low=grid.low, high=grid.high, noise=noise)

    # Ranges.

    def _wait(self, sample: dict[str, Tensor]) -> None:
        """Add a sample to the batch that is gathered."""
        if self._waiting and (
            len(self._waiting) == self._settings.calibration_batch or _form(sample) != _form(self._waiting[0])
        ):
            self._calibrate()
        self._waiting.append(sample)

    def _calibrate(self) -> None:
        """Move ranges by the batch that was gathered."""
        if not self._waiting:
            return
        batch = {name: torch.cat([one[name] for one in self._waiting]) for name in self._waiting[0]}
        self._waiting = []

        def look(site: Site, x: Tensor) -> Tensor:
            self._ranges.setdefault(site, RunningRange()).see(*self._range_of(site, wide(x)))
            return x

        self._follower.run(without_loss(self._model, batch), look)
        for each in self._ranges.values():
            each.step()

    def _range_of(self, site: Site, x: Tensor) -> tuple[float, float]:
        if not torch.isfinite(x).all():
            raise DataError(
                f"{site.name} holds entries that are not finite, which no grid covers. Look at the samples, the "
                "model's weights and the data type in which it computes."
            )
        if self._settings.activation_ranges == "percentile":
            return percentile_range(x, self._settings.percentile)
        return whole_range(x) if self._settings.activation_ranges == "min-max" else least_error_range(x)

    # Losses.

    def _measure(self, batch: dict[str, Tensor]) -> None:
        inputs = without_loss(self._model, batch)
        grids = {site: running.grid for site, running in self._ranges.items()}

        def note(site: Site, x: Tensor) -> Tensor:
            held = wide(x)
            sums = self._noise.setdefault(site, [0.0, 0.0])
            sums[0] += (_grid(grids, site).round_trip(held) - held).double().square().sum().item()
            sums[1] += held.double().square().sum().item()
            return x

        whole = self._follower.run(inputs, note)
        self._float.add(batch, whole, whole)
        self._real.add(batch, inputs, whole)
        for one in self._variants(grids):

            def change(site: Site, x: Tensor, chosen: Collection[Site] = one.activations) -> Tensor:
                grid = _grid(grids, site)
                return grid.round_trip(x) if site in chosen else x

            rounded = self._weights.rounded(one.bits, self._settings.group) if one.bits else nullcontext()
            with rounded:
                output = self._follower.run(inputs, change)
            self._found.setdefault(one.what, Losses(self._model, self._float)).add(batch, output, whole)

    def _variants(self, grids: Mapping[Site, Grid]) -> Iterator["_Variant"]:
        for scheme in self._settings.schemes:
            bits = int(scheme[1]) if scheme.startswith("w") else None
            yield _Variant(scheme, bits, frozenset(grids if "a8" in scheme else ()))
        if self._settings.alone == "families":
            for family in dict.fromkeys(site.family for site in grids):
                yield _Variant(family, None, frozenset(site for site in grids if site.family == family))
        elif self._settings.alone == "tensors":
            for site in grids:
                yield _Variant(site.name, None, frozenset([site]))


class _Variant(NamedTuple):
    """What a run quantizes."""

    what: str
    bits: int | None
    """Of weights; None: they stay."""
    activations: frozenset[Site]


def _grid(grids: Mapping[Site, Grid], site: Site) -> Grid:
    if site not in grids:
        raise DataError(
            f"{site.name} did not arise on the calibration samples, so that its range is not known. Set "
            "calibration_samples higher."
        )
    return grids[site]


def _form(sample: dict[str, Tensor]) -> dict[str, Any]:
    return {name: (x.shape, x.dtype) for name, x in sample.items()}
