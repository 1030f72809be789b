"""Strided perplexity, re-derived: one token at a time, with a fresh forward pass over its own context."""

from collections.abc import Callable, Sequence

import numpy as np


def strided_losses(
    next_token_logits: Callable[[Sequence[int]], np.ndarray], ids: Sequence[int], context_length: int, stride: int
) -> list[float]:
    """The loss, in nats, of tokens 1, 2, ... of `ids`.

    Windows begin at 0, stride, 2 stride, ...; a token belongs to the first window of `context_length` tokens that
    reaches it, and is predicted from that window's tokens before it.
    """
    losses = []
    for target in range(1, len(ids)):
        begin = 0
        while begin + context_length <= target:
            begin += stride
        logits = next_token_logits(ids[begin:target]).astype(np.float64)
        shifted = logits - logits.max()
        losses.append(float(np.log(np.exp(shifted).sum()) - shifted[ids[target]]))
    return losses
