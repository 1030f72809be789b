"""Bytes a model takes to train and to serve, counted on shapes alone."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from auxin.accounting.inputs import call_arguments, example_inputs, needs_length, without_cache
from auxin.accounting.recomputation import recomputed
from auxin.accounting.shapes import shape_only_copy, without_data
from auxin.errors import ConfigError
from auxin.settings import Settings

FLOAT32_BYTES = 4
ADAM_MOMENTS = 2


class ServingMemory(Settings):
    """Bytes that a model holds while it answers: what lies there between two tokens."""

    weights: int
    """Of all parameters, tied ones once."""
    cache: int
    """Of keys and values, or whatever the model keeps of tokens for later ones; 0 where it keeps nothing."""

    @property
    def total(self) -> int:
        """Both, in bytes; what a forward pass needs for itself comes on top."""
        return self.weights + self.cache


def serving_memory(
    model: nn.Module,
    batch_size: int = 1,
    sequence_length: int | None = None,
    dtype: torch.dtype | None = None,
) -> ServingMemory:
    """Count the bytes of the weights, and of the cache after `sequence_length` tokens of each sequence.

    Args:
        model: any; its weights are not looked at.
        batch_size: sequences at once.
        sequence_length: tokens in the cache; None: no cache is counted.
        dtype: of weights and cache; None: what they are.

    Raises:
        ConfigError: the model's code looks at values.
        PlanError: no inputs of the model can be made up.
    """
    weights = sum(parameter.numel() * (dtype or parameter.dtype).itemsize for parameter in model.parameters())
    cache = 0
    if sequence_length is not None and isinstance(model, PreTrainedModel) and model.can_generate():
        with shape_only_copy(model, dtype) as copy, torch.no_grad():
            assert isinstance(copy, PreTrainedModel)
            copy.eval().set_experts_implementation("batched_mm")  # which runs on shapes of any type
            inputs = without_data(example_inputs(copy, batch_size, sequence_length))
            kept = getattr(copy(**inputs, use_cache=True), "past_key_values", None)
            cache = sum({id(tensor): tensor.nbytes for tensor in _tensors(kept)}.values())
    return ServingMemory(weights=weights, cache=cache)


def _tensors(kept: Any) -> list[Tensor]:
    """The floating-point tensors of a cache, however deep they lie."""
    if isinstance(kept, Tensor):
        return [kept] if kept.is_floating_point() else []
    if isinstance(kept, list | tuple | dict):
        return [tensor for part in (kept.values() if isinstance(kept, dict) else kept) for tensor in _tensors(part)]
    # Caches of transformers, and their layers, are plain objects.
    plain = hasattr(kept, "__dict__") and not isinstance(kept, type | torch.dtype | torch.device | nn.Module)
    return _tensors([value for name, value in vars(kept).items() if name != "config"]) if plain else []


class TrainingMemory(Settings):
    """Bytes of one training step with AdamW and float32 master weights."""

    weights: int
    gradients: int
    """Of the parameters that are trained."""
    optimizer: int
    activations: int
    """What the backward pass keeps of the forward pass; where layers are computed again, what is kept of them, and all
    that the largest keeps while it is."""

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
    model: nn.Module,
    batch_size: int,
    sequence_length: int | None = None,
    decoder_length: int | None = None,
    *,
    inputs: Mapping[str, Any] | None = None,
    recompute: bool = False,
) -> TrainingMemory:
    """Count the bytes to train `model` on batches of `batch_size` samples.

    Activations are what autograd saves in a forward pass, with the loss where the model has one of its logits;
    parameters left out, each storage once.

    Args:
        model: any that `example_inputs` knows inputs of; its weights are not looked at.
        batch_size: samples in a forward pass.
        sequence_length: tokens of each, or frames of a waveform; what the encoder sees of an encoder-decoder.
        decoder_length: tokens that the decoder sees; None: as many.
        inputs: keyword arguments of the forward pass, labels among them, in place of made-up ones; of tensors only
            shape and type count.
        recompute: whether the backward pass computes layers again (activation checkpointing).

    Raises:
        ConfigError: a length is needed, or the model's code looks at values, as wav2vec2's does to drop layers.
        PlanError: no inputs of the model can be made up.
    """
    # The tensors are held, so that no later storage can be given the address of their own.
    saved: dict[int, Tensor] = {}
    largest = 0
    # Without data, torch takes grouped products of experts in bfloat16 only, which has half of float32's bytes.
    dtype, factor = (torch.bfloat16, 2) if has_experts(model) else (None, 1)
    with shape_only_copy(model, dtype) as copy:
        parameters = {p.untyped_storage()._cdata for p in copy.parameters()}

        def keep(kept: dict[int, Tensor], tensor: Tensor) -> Tensor:
            if (place := tensor.untyped_storage()._cdata) not in parameters:
                kept[place] = tensor
            return tensor

        def layer(forward: Callable[..., Any], *arguments: Any) -> Any:
            nonlocal largest
            for tensor in _tensors([*arguments, *getattr(forward, "keywords", {}).values()]):
                keep(saved, tensor)
            within: dict[int, Tensor] = {}
            with saved_tensors_hooks(partial(keep, within), lambda tensor: tensor):
                result = forward(*arguments)
            largest = max(largest, _bytes({place: within[place] for place in within.keys() - saved.keys()}))
            return result

        if inputs is None:
            inputs = _inputs(copy, batch_size, sequence_length, decoder_length)
        given = without_data(inputs)
        with recomputed(copy, recompute, layer), saved_tensors_hooks(partial(keep, saved), lambda tensor: tensor):
            copy.train()(**given)
    trained_bytes = FLOAT32_BYTES * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return TrainingMemory(
        weights=FLOAT32_BYTES * sum(p.numel() for p in model.parameters()),
        gradients=trained_bytes,
        optimizer=ADAM_MOMENTS * trained_bytes,
        activations=factor * (_bytes(saved) + largest),
    )


def _bytes(tensors: Mapping[int, Tensor]) -> int:
    """Of their storages, by which they are named."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


def _inputs(model: nn.Module, batch_size: int, length: int | None, decoder_length: int | None) -> dict[str, Any]:
    """Inputs and labels that `model`, on fake tensors, takes: a label for each token, or for each sample. No labels
    where it has no loss for such."""
    if length is None and (not isinstance(model, PreTrainedModel) or needs_length(model)):
        raise ConfigError("sequence_length: needed to count the memory of a model of text. Give it, or inputs.")
    if not isinstance(model, PreTrainedModel):
        ids = torch.zeros(batch_size, length or 0, dtype=torch.long)
        return {"input_ids": ids, "labels": ids, "use_cache": False}
    inputs: dict[str, Any] = {**example_inputs(model, batch_size, length or 0, decoder_length=decoder_length)}
    inputs |= without_cache(model)
    with torch.no_grad():
        logits = getattr(model(**inputs), "logits", None)
    if logits is None or "labels" not in call_arguments(model):
        return inputs
    return {**inputs, "labels": torch.zeros(logits.shape[:-1], dtype=torch.long)}
