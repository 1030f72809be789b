"""What is compared of a model's result; imports nothing of auxin, so that models can be run without it."""

from typing import Any

import torch
from torch import Tensor


def output(result: Any) -> Tensor:
    """The logits, those of pairs too; else the image that is made, the embedding of one tower with a projection, the
    beginnings and ends of answers, or the last hidden states."""
    if "logits" in result:
        return result.logits
    if "reconstruction" in result:
        return result.reconstruction
    for name in ("logits_per_image", "image_embeds", "text_embeds"):
        if name in result:
            return result[name]
    if "start_logits" in result:
        return torch.stack([result.start_logits, result.end_logits])
    return result.last_hidden_state
