"""Hard attention: each query reads the tokens with its K largest attention probabilities, and no others.

    A = softmax(Q K^T / sqrt(d) + mask),    A'_ij = A_ij where it is one of the K largest of row i, else 0,    O = A' V

A' is not renormalised, so that its rows sum to 1 or less (AxFormer, Nagarajan et al. 2022, arXiv 2010.03688). As in the
paper's code, dropout of the probabilities, where a model is trained with some, comes before the choice. Of equal
probabilities at the border any may be taken. Where there are at most K keys the model's own implementation computes
what it always does.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from auxin.nn.attention_functions import handed, handing_to, reading

HARD = "auxin_hard_attention"
"""What the function is called in transformers' table of attention functions."""


def reading_few(module: nn.Module, keep: int) -> contextlib.AbstractContextManager[None]:
    """Within the context, the queries of `module` read the `keep` most probable tokens alone.

    Args:
        module: an attention that `calls_a_function`.
        keep: K, 1 or more.

    Raises:
        PlanError: the model's implementation of attention is one that makes masks of its own kind.
    """
    return handing_to(module, HARD, keep, "hard_attention computes attention probabilities")


def hard(probabilities: Tensor, keep: int) -> Tensor:
    """The `keep` largest of each row, (..., keys), and zeros for the others."""
    largest = probabilities.topk(keep, dim=-1)
    return torch.zeros_like(probabilities).scatter(-1, largest.indices, largest.values)


def hard_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **named: Any
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in the place of an attention function; see `reading`.

    Returns:
        What the heads give, (samples, queries, heads, head width), and A', (samples, heads, queries, keys).
    """
    (keep, attend), keys = handed(module), key.shape[-2]
    if keys <= keep:
        return attend(module, query, key, value, attention_mask, **named)
    return reading(module, query, key, value, attention_mask, lambda found: hard(found, keep), **named)


ALL_ATTENTION_FUNCTIONS.register(HARD, hard_attention)
