"""FLOPs per token of any language model, counted on shapes alone.

A multiply-add is two FLOPs. Matrix products and token-token attention are counted, elementwise work is not, as in
`torch.utils.flop_counter` and in the published tables. Attention is counted over the whole T x T square, causal or not.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from auxin.accounting.inputs import example_inputs
from auxin.accounting.shapes import shape_only_copy
from auxin.settings import Settings

BACKWARD_PER_FORWARD = 2
"""Every product Y = X W costs two of its size in the backward pass (for X and for W); recomputation is not counted,
since it is a property of a kernel and not of the model."""


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
        model: a language model. Of a model of images the FLOPs are those per image.
        sequence_length: tokens of the sequence; attention makes the cost per token grow with it.
        encoder_length: tokens of those, and of what stands for others, that the encoder of an encoder-decoder sees;
            None: all. The FLOPs are still divided by `sequence_length`: they are those per token of text.
        decoder_length: tokens that its decoder sees; None: all.
    """
    with shape_only_copy(model) as copy, FlopCounterMode(display=False) as counter, countable_kernels(copy):
        copy.eval()
        if isinstance(copy, PreTrainedModel):
            inputs = example_inputs(
                copy,
                batch=1,
                length=encoder_length or sequence_length,
                decoder_length=decoder_length or sequence_length,
            )
            extra = {"use_cache": False} if copy.can_generate() else {}
        else:
            inputs, extra = {"input_ids": torch.zeros(1, sequence_length, dtype=torch.long)}, {"use_cache": False}
        copy(**inputs, **extra)
    tokens = sequence_length if "input_ids" in inputs else 1
    return FlopsPerToken(forward=counter.get_total_flops() / tokens, sequence_length=sequence_length)


@contextmanager
def countable_kernels(model: nn.Module) -> Iterator[None]:
    """Run `model` on kernels whose FLOPs torch's counter knows: it counts neither the CPU's fused attention nor grouped
    expert products, and would leave them out without a word."""
    if isinstance(model, PreTrainedModel):
        model.set_experts_implementation("batched_mm")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        yield
