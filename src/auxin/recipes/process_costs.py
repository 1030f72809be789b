"""What each of several processes holds and sends while they train a model together, computed on its shapes."""

import math
from collections import Counter
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from auxin.accounting.memory import ADAM_MOMENTS, FLOAT32_BYTES
from auxin.errors import PlanError
from auxin.models.layers import layer_paths
from auxin.training.strategies import BUCKET


@dataclass(frozen=True)
class Layout:
    """How a model lies in processes."""

    processes: int
    group: int
    """Of them those that have a copy between them: 1 where each has its own, all where there is one."""
    gather_once: bool = False
    """Whether layers that were gathered stay whole until the last pass of a step is through with them."""

    @property
    def copies(self) -> int:
        """Of the model."""
        return self.processes // self.group


@dataclass(frozen=True)
class ProcessCosts:
    """Bytes of the process that holds most, in float32."""

    state: int
    """Of weights, gradients and moments between steps."""
    gradients: int
    """Of them, those of gradients: they come while the backward pass lets go of activations."""
    gathered: int
    """That are there beside weights and moments while the first backward pass of a step begins, or the last where a
    step has several, without activations."""
    adding: int
    """That are there beside the state while the last gradients are added up."""
    within: float
    """That it sends in a step to those that it has a copy with: weights, and gradients."""
    between: float
    """That it sends in a step to those that have the same piece: gradients."""

    @property
    def sent(self) -> float:
        """To all of them."""
        return self.within + self.between

    def at_once(self, activations: int) -> int:
        """Bytes at the highest, where the backward pass keeps so many of the forward pass."""
        return self.state + max(self.gathered + activations - self.gradients, self.adding)

    def room(self, memory: float) -> float:
        """Bytes of so much memory that are left for activations; below 0 where all else does not fit."""
        return -1.0 if self.at_once(0) > memory else memory - self.state - self.gathered + self.gradients


def process_costs(model: PreTrainedModel, layout: Layout, passes: int) -> ProcessCosts:
    """What a process holds and sends in a step of so many forward passes of each.

    In a ring each of N processes sends (N - 1) / N of what is gathered or added up, and twice that where all are to
    have the sum. FSDP2 gathers a layer for the forward and once more for the backward pass of each micro-batch, what
    lies outside of the layers once, and adds gradients up in the last pass of a step; with `gather_once` it gathers
    everything once in a step.

    While a layer's backward pass is computed, its weights are whole, those of the next, and its gradients; so are the
    weights and gradients of what lies outside of the layers, and in a step of several passes all gradients. What is
    added up is copied into one tensor before: a bucket of gradients of copies, a layer's, and in the end what lies
    outside of the layers. A table of embeddings that is the head's, too, gets its second gradient beside the first.

    Args:
        model: any; its weights are not looked at.
        layout: how it lies.
        passes: of each process in a step.
    """
    sizes = [(FLOAT32_BYTES * p.numel(), p.requires_grad) for p in model.parameters()]
    whole, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
    around = 2 * _ring(layout.copies)
    if layout.group == 1:
        bucket = min(trained, max(FLOAT32_BYTES * BUCKET, *(size for size, _ in sizes)))
        adding = max(bucket if layout.processes > 1 else 0, 2 * _tied(model))
        kept = trained if passes > 1 else 0
        return ProcessCosts(whole + (1 + ADAM_MOMENTS) * trained, trained, kept, adding, 0.0, around * trained)
    pieces = [(FLOAT32_BYTES * _piece(p, layout.group), p.requires_grad) for p in model.parameters()]
    gradients = sum(size for size, is_trained in pieces if is_trained)
    layers = [FLOAT32_BYTES * sum(p.numel() for p in layer.parameters()) for layer in _layers(model)]
    outside, largest = whole - sum(layers), max(layers, default=0)
    sent = whole if layout.gather_once else passes * (2 * sum(layers) + outside)
    weights = whole if layout.gather_once else outside + 2 * largest
    return ProcessCosts(
        sum(size for size, _ in pieces) + (1 + ADAM_MOMENTS) * gradients,
        gradients,
        weights + largest + (trained if passes > 1 else min(outside, trained)),
        2 * outside + max(outside, 3 * largest),
        _ring(layout.group) * (sent + trained),
        around * trained / layout.group,
    )


def converted_bytes(model: PreTrainedModel, layout: Layout, again: bool) -> int:
    """Bytes of weights in bfloat16 that a process holds as the backward pass begins.

    Autocast converts what products are with, and the graph keeps that for the backward pass, also of layers that lie in
    pieces again. Where layers are computed again it is converted anew, of one layer at a time; of copies the cache of
    autocast keeps all of it until the forward pass ends.

    Args:
        model: any; its weights are not looked at.
        layout: how it lies.
        again: whether the backward pass computes layers again.
    """

    def converted(module: nn.Module) -> int:
        owners = [owner for owner in module.modules() if not isinstance(owner, nn.Embedding)]
        return 2 * sum(
            p.numel() for p in {p for owner in owners for p in owner.parameters(recurse=False) if p.ndim > 1}
        )

    whole = converted(model)
    if layout.group == 1 or not again:
        return whole
    layers = [converted(layer) for layer in _layers(model)]
    return whole - sum(layers) + max(layers, default=0)


def _ring(processes: int) -> float:
    return (processes - 1) / processes


def _piece(parameter: nn.Parameter, processes: int) -> int:
    """Values of the largest piece: rows are not cut."""
    if parameter.ndim == 0:
        return 1
    return math.ceil(parameter.shape[0] / processes) * (parameter.numel() // max(1, parameter.shape[0]))


def _tied(model: PreTrainedModel) -> int:
    """Bytes of the largest trained parameter that has several names, such as the table of embeddings and head."""
    names = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    tied = (parameter.numel() for parameter, number in names.items() if number > 1 and parameter.requires_grad)
    return FLOAT32_BYTES * max(tied, default=0)


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    try:
        return [model.get_submodule(path) for path in layer_paths(model)]
    except PlanError:
        return []
