"""What a model's weights are known by."""

import hashlib
from typing import Any

import torch
from transformers import PreTrainedModel

from auxin.errors import ConfigError


def add_weights(digest: Any, model: PreTrainedModel) -> None:
    """Put a model's parameters and buffers into a digest of hashlib, read one after the other; where they lie and how
    the module tree came about doesn't matter.

    Raises:
        ConfigError: the model has no weights.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ConfigError(f"{name}: the model is a skeleton without weights. Load its weights to measure it.")
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Hex SHA-256 of a model's parameters and buffers; ConfigError where it has none."""
    digest = hashlib.sha256()
    add_weights(digest, model)
    return digest.hexdigest()
