"""The gradients of one optimizer step, micro-batch by micro-batch."""

import math
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedModel

from auxin.nn.autocast import bfloat16_autocast
from auxin.objectives.objective import Objective
from auxin.training.hardware import choose_precision
from auxin.training.settings import TrainingSettings


class BatchGradients:
    """Leaves the gradients of a batch in a model's parameters.

    Args:
        model: on the device on which it learns.
        objective: what it learns, bound to it.
        settings: of the stage: precision, micro-batch, clipping, compilation.
    """

    def __init__(self, model: PreTrainedModel, objective: Objective, settings: TrainingSettings) -> None:
        self.objective, self.settings, self.device = objective, settings, model.device
        self.precision = choose_precision(settings.precision, self.device)
        """Of matrix products."""
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.forward = torch.compile(model) if settings.compile else model

    def autocast(self) -> AbstractContextManager[None]:
        """In which the model runs, to learn and to be measured."""
        return bfloat16_autocast(self.device.type, self.precision == torch.bfloat16)

    def of(self, inputs: dict[str, Tensor]) -> tuple[float, float]:
        """Leave the clipped gradients of the mean loss over the batch's targets; return loss and norm before clipping,
        both NaN where there is nothing to learn from.

        A micro-batch weighs as many targets as it has, so that how a batch is cut changes nothing but rounding, where
        the objective adds up (`Objective.adds_up`).

        Args:
            inputs: the objective's, by name, each with the batch as its first axis, on any device.
        """
        for parameter in self.parameters:
            parameter.grad = None
        parts = _parts(inputs, self.settings.samples_per_forward)
        counts = [self.objective.targets(part) for part in parts]
        if self.device.type == "cuda":
            parts = [
                {name: value.pin_memory().to(self.device, non_blocking=True) for name, value in part.items()}
                for part in parts
            ]
        total = sum(counts)
        if not total:
            return math.nan, math.nan
        # A mean over nothing is not a number.
        losses = [self.add(part, count / total) for part, count in zip(parts, counts, strict=True) if count]
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.settings.gradient_clip is not None:
            clip_grads_with_norm_(self.parameters, self.settings.gradient_clip, norm)
        # One transfer, so that CUDA is waited for once per step.
        values = torch.stack([torch.stack(losses).sum(), norm.to(losses[0].dtype)]).tolist()
        return values[0], values[1]

    def add(self, part: dict[str, Tensor], share: float) -> Tensor:
        """Add the gradients of one micro-batch, on the model's device, of which the batch's loss has `share`; returns
        what it adds to that loss."""
        with self.autocast():
            loss = self.objective.loss(self.forward, part) * share
        loss.backward()
        return loss.detach()


def _parts(inputs: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """`inputs` cut into micro-batches of `size` samples."""
    pieces = {name: value.split(size) for name, value in inputs.items()}
    count = len(next(iter(pieces.values())))
    return [{name: piece[number] for name, piece in pieces.items()} for number in range(count)]
