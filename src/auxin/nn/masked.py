"""Masks for masked structural growth (MSG, arXiv 2305.02869, section 3).

New units of a grown model are multiplied by a strength c that goes from 0 (the old model, to rounding) to 1 (the plain
grown architecture). The bricks here are put around a model's own modules and taken off again when c is 1:

| brick | around | what it computes |
|---|---|---|
| masked | a linear layer | inner(m_in * x) * m_out |
| masked_norm | an RMSNorm or a LayerNorm | the norm with statistics weighted by m, times m |
| masked_block | a layer | inner(m_in * x), or for a new layer c inner(x) + (1 - c) x |

A mask m is 1 on old units and c on new ones. Masks are persistent buffers, so that a checkpoint saved on the way goes
on where it was. A norm must weight its statistics: with plain ones the new units' zeros change mean and variance.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from auxin.errors import ConfigError, PlanError
from auxin.nn.bricks import Around, brick, wide_type
from auxin.nn.calls import as_if_called
from auxin.words.widths import Stream

Spans = Sequence[Sequence[int]]
"""Stretches [first, end) of new units on an axis."""


class Masked(Around):
    """A module with masks around `inner`."""

    plain_form = (
        "train with the hook MaskRamp until the masks are at 1, then take them off: method masked with finish = true"
    )
    temporary = "masks of an earlier growth"
    wide = ("mask", "input_mask", "output_mask")

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self._spans: dict[str, Spans] = {}

    def set_strength(self, strength: float) -> None:
        """Give the new units the weight `strength`, 0 (absent) to 1 (as all others)."""
        for name, spans in self._spans.items():
            mask = cast(Tensor, getattr(self, name))
            for first, end in spans:
                mask[first:end] = strength

    def reset_buffers(self) -> None:
        """Masks as at the growth: 1 on old units, 0 on new ones. New tensors: those that were loaded may be kept."""
        for name in self._spans:
            setattr(self, name, torch.ones_like(getattr(self, name)))
        self.set_strength(0.0)

    def strengths(self) -> Tensor:
        """The weights of the new units, (number of new units,)."""
        parts = [getattr(self, name)[first:end] for name, spans in self._spans.items() for first, end in spans]
        return torch.cat(parts)

    def fixed_widths(self) -> Mapping[Stream, str]:
        """All: which units are new is a setting, and masks have a size."""
        return dict.fromkeys(
            get_args(Stream),
            "the model has masks of an earlier growth, which have the old size. Train with MaskRamp until they are at "
            "1 and take them off (masked with finish = true), then grow again.",
        )

    def _add_mask(self, name: str, size: int | None, spans: Spans) -> None:
        """Register the mask `name` of `size` units; None where there are no spans."""
        if not spans:
            self.register_buffer(name, None)
            return
        if size is None or any(not 0 <= first < end <= size for first, end in spans):
            raise ConfigError(f"{type(self).__name__}: the new units {list(spans)} don't lie within 0..{size}.")
        reference = next((p for p in self.inner.parameters() if p.is_floating_point()), torch.empty(0))
        self._spans[name] = [tuple(span) for span in spans]
        self.register_buffer(name, torch.ones(size, device=reference.device, dtype=wide_type(reference.dtype)))
        self.set_strength(0.0)


@brick("masked")
class MaskedModule(Masked):
    """A module whose input and output have masks on their last axis.

    Args:
        inner: the module; its first argument and its result (or the first of them) are tensors (..., units).
        input_size: units of the input; needed where `new_inputs` is given.
        new_inputs: the new units of the input, [first, end) each.
        output_size: units of the output; needed where `new_outputs` is given.
        new_outputs: the new units of the output.
    """

    input_mask: Tensor | None
    output_mask: Tensor | None

    def __init__(
        self,
        inner: nn.Module,
        input_size: int | None = None,
        new_inputs: Spans = (),
        output_size: int | None = None,
        new_outputs: Spans = (),
    ) -> None:
        super().__init__(inner)
        self._add_mask("input_mask", input_size, new_inputs)
        self._add_mask("output_mask", output_size, new_outputs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the inner module returns, masked."""
        if self.input_mask is not None:
            x = _masked(x, self.input_mask)
        result = self.inner(x, *args, **kwargs)
        if self.output_mask is None:
            return result
        return _with_first(result, _masked(_first(result), self.output_mask))


@brick("masked_norm")
class MaskedNorm(Masked):
    """A norm over the last axis with statistics weighted by its mask m, and a masked result.

    layer: m * (g (x - mu) / sqrt(var + eps) + b), mu = sum m x / sum m, var = sum m (x - mu)^2 / sum m;
    rms: m * g x / sqrt(sum m x^2 / sum m + eps). Computed in float32 at least.

    Args:
        inner: the norm; `weight` and `bias` are read where it has them.
        kind: "rms" or "layer".
        eps: its epsilon.
        size: units of the axis.
        new: the new units, [first, end) each.
        gain_offset: what the norm adds to its stored gain (Gemma: 1).
    """

    mask: Tensor

    def __init__(
        self,
        inner: nn.Module,
        kind: Literal["rms", "layer"],
        eps: float,
        size: int,
        new: Spans,
        gain_offset: float = 0.0,
    ) -> None:
        super().__init__(inner)
        self.kind, self.eps, self.gain_offset = kind, eps, gain_offset
        self._add_mask("mask", size, new)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size), in the type of x."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        mask, normed = self.mask.to(dtype), x.to(dtype)
        total = mask.sum()
        if self.kind == "layer":
            normed = normed - (normed * mask).sum(-1, keepdim=True) / total
        variance = (normed.square() * mask).sum(-1, keepdim=True) / total
        normed = normed * torch.rsqrt(variance + self.eps)
        with as_if_called(self.inner):
            weight, bias = getattr(self.inner, "weight", None), getattr(self.inner, "bias", None)
            if weight is not None:
                normed = normed * (weight.to(dtype) + self.gain_offset)
            if bias is not None:
                normed = normed + bias.to(dtype)
        return (normed * mask).to(x.dtype)


@brick("masked_block")
class MaskedBlock(Masked):
    """A layer that is not all there yet, c inner(x) + (1 - c) x, with c the mask of one entry; or one whose input is
    masked, inner(m * x).

    Args:
        inner: the layer; its first argument and its result (or the first of them) are tensors of one shape.
        input_size: units of the input; needed where `new_inputs` is given.
        new_inputs: the new units of the input, [first, end) each.
    """

    mask: Tensor | None
    input_mask: Tensor | None

    def __init__(self, inner: nn.Module, input_size: int | None = None, new_inputs: Spans = ()) -> None:
        super().__init__(inner)
        self._add_mask("mask", 1, () if new_inputs else [(0, 1)])
        self._add_mask("input_mask", input_size, new_inputs)

    def scaled(self, factor: float, plain: Mapping[str, float]) -> dict[str, float]:
        """As the layer.

        Raises:
            PlanError: for 0, where the input is masked: a layer that adds nothing gives what it gets, less what is
                masked.
        """
        if factor == 0 and self.input_mask is not None:
            raise PlanError(
                "what comes in is masked, so that no copy of the layer is an identity block. Train with MaskRamp until "
                "the masks are at 1 and take them off (masked with finish = true) before."
            )
        return super().scaled(factor, plain)

    def fixed_widths(self) -> Mapping[Stream, str]:
        """None where it has but the mask of one entry."""
        return {} if self.input_mask is None else super().fixed_widths()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The inner layer's result with its first tensor mixed, or of an input that is masked."""
        if self.input_mask is not None:
            return self.inner(_masked(x, self.input_mask), *args, **kwargs)
        assert self.mask is not None
        result = self.inner(x, *args, **kwargs)
        mixed = self.mask * _first(result) + (1 - self.mask) * x
        return _with_first(result, mixed.to(x.dtype))


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    """The product, rounded to the type of x once, so that a mask on its way has all its values."""
    return (x * mask).to(x.dtype)


def _first(result: Any) -> Tensor:
    return cast(Tensor, result[0] if isinstance(result, tuple) else result)


def _with_first(result: Any, tensor: Tensor) -> Any:
    return (tensor, *result[1:]) if isinstance(result, tuple) else tensor
