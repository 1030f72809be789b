"""What a model gives with something quantized, beside what it gives in floating point: errors, losses, hits."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from auxin.analysis.measurement import Batch, kept_tokens, logits_of, wide
from auxin.analysis.sample_losses import output_losses
from auxin.analysis.spread import Estimate, Spread
from auxin.analysis.targets import label_rows
from auxin.data.question_source import ANSWER
from auxin.errors import PlanError
from auxin.models.loading import is_ctc
from auxin.objectives.objective import IGNORED
from auxin.settings import Settings


class Quantized(Settings):
    """What a model gives with something quantized."""

    what: str
    """A scheme, a family of activations, or a tensor's name."""
    error: Estimate
    """Length of what the output changes by, over the output's own, of a sample."""
    loss: Estimate | None
    """In nats per label, or squared errors; None where the data have no labels, or no loss of a sample is known."""
    change: Estimate | None
    """That minus the loss in floating point, sample by sample."""
    accuracy: Estimate | None
    """Share of a sample's labels that get the largest logit; None where labels are no classes."""


class Losses:
    """Losses and errors over samples.

    Args:
        model: what gives the outputs.
        of: those in floating point, of the same samples; None: these are they.
    """

    def __init__(self, model: PreTrainedModel, of: "Losses | None" = None) -> None:
        self._model, self._of = model, of
        self.errors, self._losses, self._changes, self._hits = Spread(), Spread(), Spread(), Spread()
        self._last: Tensor | None = None

    @property
    def loss(self) -> Estimate | None:
        return _known(self._losses)

    @property
    def accuracy(self) -> Estimate | None:
        return _known(self._hits)

    def found(self, what: str) -> Quantized:
        (error,) = self.errors.estimates()
        return Quantized(what=what, error=error, loss=self.loss, change=_known(self._changes), accuracy=self.accuracy)

    def add(self, batch: Batch, output: Any, whole: Any) -> None:
        """Add a batch's output, beside that in floating point."""
        held, is_ = (_main(self._model, one) for one in (whole, output))
        kept = kept_tokens(self._model, batch, decoder=True)
        self.errors.add(_distance(is_ - held, kept) / _distance(held, kept).clamp(min=torch.finfo(held.dtype).tiny))
        if not _has_losses(self._model, batch, output):
            return
        self._last = output_losses(self._model, batch, output, "quantized")
        self._losses.add(self._last)
        if self._of is not None:
            assert self._of._last is not None
            self._changes.add(self._last - self._of._last)
        if "logits" in output and isinstance(batch.get("labels"), Tensor):
            logits = logits_of(self._model, output)
            rows = label_rows(self._model, batch, kept, logits.shape)
            if rows is not None:
                told = (rows != IGNORED)[:, None].flatten(1)
                hits = (logits.argmax(-1) == rows)[:, None].flatten(1) & told
                self._hits.add(hits.sum(1) / told.sum(1))


def _known(spread: Spread) -> Estimate | None:
    return spread.estimates()[0] if spread.samples else None


def _main(model: PreTrainedModel, output: Any) -> Tensor:
    """What is compared of an output, (samples, ...)."""
    for name in _COMPARED:
        if isinstance(found := output.get(name), Tensor):
            return wide(found)
    raise PlanError(f"The {type(model).__name__} gives {', '.join(output)}, of which nothing is known to compare.")


_COMPARED = ("logits", "reconstruction", "start_logits", "image_embeds", "text_embeds", "last_hidden_state")


def _distance(x: Tensor, kept: Tensor | None) -> Tensor:
    """The length of each sample, padding left out."""
    if kept is not None and x.dim() > 2 and kept.shape == x.shape[:2]:
        x = torch.where(kept[(..., *[None] * (x.dim() - 2))], x, 0)
    return x[:, None].flatten(1).norm(dim=1)


def _has_losses(model: PreTrainedModel, batch: Batch, output: Any) -> bool:
    if set(ANSWER) <= batch.keys() and "start_logits" in output:
        return True
    return "labels" in batch and isinstance(output.get("logits"), Tensor) and not is_ctc(model)
