"""Bytes a model takes to train and to serve, counted on shapes alone."""

import torch
from torch import Tensor, nn

from auxin.accounting.shapes import shape_only_copy
from auxin.settings import Settings

FLOAT32_BYTES = 4
ADAM_MOMENTS = 2


class TrainingMemory(Settings):
    """Bytes of one training step with AdamW and float32 master weights."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What the backward pass keeps of the forward pass; without activation checkpointing."""

    @property
    def total(self) -> int:
        """All of it, in bytes; temporaries and fragmentation come on top."""
        return self.weights + self.gradients + self.optimizer + self.activations


def has_experts(model: nn.Module) -> bool:
    """Whether feed-forward parts of `model` are mixtures of experts, by its config."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    return any(getattr(text, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))


def training_memory(
    model: nn.Module, batch_size: int, sequence_length: int, decoder_length: int | None = None
) -> TrainingMemory:
    """Count the bytes to train `model` on batches of `batch_size` sequences of `sequence_length` tokens.

    Activations are what autograd saves in a forward pass with loss, parameters left out, each storage once. With an
    encoder and a decoder, `sequence_length` is what the encoder sees and `decoder_length` what the decoder sees (None:
    as much).
    """
    saved: dict[int, tuple[Tensor, int]] = {}
    # Without data, torch takes grouped products of experts in bfloat16 only, which has half of float32's bytes.
    dtype, factor = (torch.bfloat16, 2) if has_experts(model) else (None, 1)
    with shape_only_copy(model, dtype) as copy:
        parameters = {p.untyped_storage()._cdata for p in copy.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters:
                # The tensor is held, so that no later storage can be given the address of its own.
                saved[storage._cdata] = tensor, storage.nbytes()
            return tensor

        input_ids = torch.zeros(batch_size, sequence_length, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            labels = torch.zeros(batch_size, decoder_length or sequence_length, dtype=torch.long)
            copy.train()(input_ids=input_ids, labels=labels, use_cache=False)
    parameter_bytes = FLOAT32_BYTES * sum(p.numel() for p in model.parameters())
    return TrainingMemory(
        weights=parameter_bytes,
        gradients=parameter_bytes,
        optimizer=ADAM_MOMENTS * parameter_bytes,
        activations=factor * sum(size for _, size in saved.values()),
    )
