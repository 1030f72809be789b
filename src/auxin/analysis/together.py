"""Samples that are compared with each other, so many at a time, whatever the size of the batches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from auxin.analysis.log_probabilities import log_probabilities
from auxin.analysis.measurement import Batch, Tap, samples_of, without_loss
from auxin.analysis.run import forward_through_layers
from auxin.analysis.spread import Estimates, Spread
from auxin.models.evaluating import evaluation_mode


class TogetherObserver:
    """The base of observers that run the model themselves on so many samples together, with its logits or without.

    Args:
        model: the model.
        together: how many samples; the last ones may be fewer.
        logits_weight: what logits count; at 0 the model runs without its head.
        temperature: by which logits are divided.
    """

    taps: Sequence[Tap] = ()

    def __init__(self, model: PreTrainedModel, together: int, logits_weight: float, temperature: float) -> None:
        self._model, self._together = model, together
        self._logits_weight, self._temperature = logits_weight, temperature
        self._without_head = forward_through_layers(model)
        self._waiting: list[Batch] = []
        self._spread = Spread()

    def before(self, batch: Batch) -> None:
        """Take the samples, and measure whenever there are enough."""
        start = 0
        while start < samples_of(batch):
            lacking = self._together - sum(map(samples_of, self._waiting))
            self._waiting.append({name: tensor[start : start + lacking] for name, tensor in batch.items()})
            start += lacking
            if sum(map(samples_of, self._waiting)) == self._together:
                self._measure_waiting()

    def after(self, batch: Batch, output: Any) -> None:
        """Nothing is left to do."""

    def _measure(self, batches: Sequence[Batch]) -> None:
        """Measure the samples of some batches together, and add what was found to `_spread`."""
        raise NotImplementedError

    def _measure_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._measure(waiting)

    def _estimates(self) -> Estimates:
        """What was found, that of the last samples included."""
        if self._waiting:
            with evaluation_mode(self._model), torch.no_grad():
                self._measure_waiting()
        return self._spread.together()

    def _run(self, batch: Batch) -> Any:
        """Run the model, without its head where logits don't count."""
        if not self._logits_weight:
            return self._without_head(**batch)
        return self._model(**without_loss(self._model, batch))

    def _said(self, batch: Batch, output: Any, copies: int = 1) -> Tensor | None:
        """See `log_probabilities`; None where logits don't count."""
        if not self._logits_weight:
            return None
        return log_probabilities(self._model, batch, output, self._temperature, copies)
