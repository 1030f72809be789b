"""FLOPs per token of any language model, counted on shapes alone.

A multiply-add is two FLOPs. Matrix products and token-token attention are counted, elementwise work is not, as in
`torch.utils.flop_counter` and in the published tables. Attention is counted over the whole T x T square, causal or not.
Where shapes can't tell, a module says it itself, see `TellsFlops`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from auxin.accounting.inputs import example_inputs, follows_length, refuse_endless, text_positions, without_cache
from auxin.accounting.shapes import shape_only_copy, without_data
from auxin.errors import ConfigError
from auxin.settings import Settings

BACKWARD_PER_FORWARD = 2
"""Every product Y = X W costs two of its size in the backward pass (for X and for W); recomputation is not counted,
since it is a property of a kernel and not of the model."""


@runtime_checkable
class TellsFlops(Protocol):
    """A module whose FLOPs its matrix products and their shapes don't tell, such as a brick."""

    def forward_flops(self, counted: float, *args: Any, **kwargs: Any) -> float:
        """FLOPs of one call of `forward` with these arguments, of which torch saw `counted`."""
        ...


class FlopsPerToken(Settings):
    """FLOPs per token at one sequence length."""

    forward: float
    sequence_length: int

    @property
    def backward(self) -> float:
        """Gradients of activations and parameters, without recomputation."""
        return BACKWARD_PER_FORWARD * self.forward

    @property
    def training(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


def flops_per_token(
    model: nn.Module, sequence_length: int, *, encoder_length: int | None = None, decoder_length: int | None = None
) -> FlopsPerToken:
    """Count the FLOPs per token of one forward pass of `model` over one sequence of `sequence_length` tokens.

    Args:
        model: a language model. Of a model of waveforms the FLOPs are those per frame; of others whose inputs are not
            tokens alone, those per sample: an image, a spectrogram, a text with its image.
        sequence_length: tokens of the sequence; attention makes the cost per token grow with it.
        encoder_length: tokens of those, and of what stands for others, that the encoder of an encoder-decoder sees;
            None: all. The FLOPs are still divided by `sequence_length`: they are those per token of text.
        decoder_length: tokens that its decoder sees; None: all.

    Raises:
        ConfigError: the model's code looks at values, so that it can't be counted on shapes, or it does not run at that
            length.
        PlanError: no inputs of the model can be made up.
    """
    refuse_endless(sequence_length)
    if isinstance(model, PreTrainedModel):
        length = encoder_length or sequence_length
        inputs = example_inputs(model, batch=1, length=length, decoder_length=decoder_length or sequence_length)
        extra, units = without_cache(model), sequence_length if follows_length(model) else 1
    else:
        inputs, extra = {"input_ids": torch.zeros(1, sequence_length, dtype=torch.long)}, {"use_cache": False}
        units = sequence_length
    try:
        forward = forward_flops(model, {**inputs, **extra})
    except RuntimeError as error:
        positions = text_positions(model)
        if positions is None or sequence_length <= positions:
            raise
        raise ConfigError(
            f"sequence_length: the model does not run on {sequence_length:,} tokens, and has positions for "
            f"{positions:,}. Give at most these."
        ) from error
    return FlopsPerToken(forward=forward / units, sequence_length=sequence_length)


def forward_flops(model: nn.Module, inputs: Mapping[str, Any]) -> float:
    """Count the FLOPs of one call of `model`, on shapes alone.

    Args:
        model: any; its weights are not looked at.
        inputs: keyword arguments of the call; of tensors only shape and type count.
    """
    with shape_only_copy(model) as copy, FlopCounterMode(display=False) as counter, countable_kernels(copy):
        # Torch's counter would follow parameters that a module hands on (DeBERTa) backwards, where no gradients are.
        copy.eval().requires_grad_(False)
        count = _Count(counter, copy)
        copy(**without_data(inputs))
    return count.total


class _Count:
    """What a counter sees while `model` runs, corrected by what its modules say of themselves."""

    def __init__(self, counter: FlopCounterMode, model: nn.Module) -> None:
        self._counter = counter
        self._unseen = 0.0
        self._starts: list[float] = []
        for module in model.modules():
            if isinstance(module, TellsFlops):
                module.register_forward_pre_hook(self._before)
                module.register_forward_hook(self._after, with_kwargs=True)

    @property
    def total(self) -> float:
        """FLOPs until now."""
        return self._counter.get_total_flops() + self._unseen

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._starts.append(self.total)

    def _after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        counted = self.total - self._starts.pop()
        self._unseen += module.forward_flops(counted, *args, **kwargs) - counted


@contextmanager
def countable_kernels(model: nn.Module) -> Iterator[None]:
    """Run `model` on kernels whose FLOPs torch's counter knows: it counts neither the CPU's fused attention nor grouped
    expert products, and would leave them out without a word."""
    if isinstance(model, PreTrainedModel):
        model.set_experts_implementation("batched_mm")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        yield
