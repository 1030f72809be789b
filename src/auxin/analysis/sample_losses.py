"""The loss of each sample, by what its labels ask for: nats per label, or squared errors where they are numbers."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from auxin.analysis.measurement import Batch, kept_tokens, logits_of, wide
from auxin.analysis.targets import label_rows, refuse_without_targets
from auxin.data.question_source import ANSWER
from auxin.errors import DataError
from auxin.models.loading import is_ctc
from auxin.objectives.objective import IGNORED

SEVERAL = "multi_label_classification"
"""What transformers calls the problem of a model whose samples have several classes at once."""


def output_losses(model: PreTrainedModel, batch: Batch, output: Any, asked_by: str) -> Tensor:
    """The loss of each sample of a batch, float64, (samples,), on the device of `output`.

    Where the model tells at which token an answer begins and at which it ends: the mean of the two cross-entropies, as
    transformers has it. Elsewhere `sample_losses` of its logits.

    Args:
        model: the model.
        batch: its inputs with labels, or with the answers' first and last tokens, on the output's device.
        output: what it gives for them.
        asked_by: what looks at the losses, for messages.

    Raises:
        DataError: as of `sample_losses`.
        PlanError: there are no logits.
    """
    if not {"start_logits", "end_logits"} <= output.keys() or not set(ANSWER) <= batch.keys():
        return sample_losses(model, batch, logits_of(model, output), asked_by)
    start, end = (
        F.cross_entropy(wide(output[logits]), batch[position], reduction="none").double()
        for logits, position in zip(("start_logits", "end_logits"), ANSWER, strict=True)
    )
    return (start + end) / 2


def sample_losses(model: PreTrainedModel, batch: Batch, logits: Tensor, asked_by: str) -> Tensor:
    """The loss of each sample of a batch, float64, (samples,), on the logits' device.

    Classes: the mean cross-entropy over a sample's labels, of which -100 and padding don't count. Numbers: the mean of
    the squared errors, or of the cross-entropies of single classes where the config's `problem_type` says that a sample
    has several. Nothing that a model adds to its loss (routers' balance) is in it.

    Args:
        model: the model.
        batch: its inputs with labels, on the logits' device.
        logits: what it gives for them.
        asked_by: what looks at the losses, for messages.

    Raises:
        DataError: a sample has no label that counts, or there is not a label for each of the logits.
    """
    labels = label_rows(model, batch, kept_tokens(model, batch, decoder=True), logits.shape)
    given = wide(logits)
    if labels is not None:
        refuse_without_targets(labels, asked_by)
        each = F.cross_entropy(given.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none")
        counted = (labels != IGNORED)[:, None].flatten(1).sum(1)
        return each.view(labels.shape)[:, None].flatten(1).double().sum(1) / counted
    numbers = batch.get("labels")
    if numbers is None or not numbers.is_floating_point() or numbers.numel() != given.numel() or is_ctc(model):
        shape = None if numbers is None else list(numbers.shape)
        raise DataError(
            f"labels: {asked_by} looks at the loss of each sample, and of labels of shape {shape} and logits of shape "
            f"{list(logits.shape)} none is known. Give a class for each sample or token, or a number for each of the "
            "logits."
        )
    wanted = numbers.to(given).view(given.shape)
    if model.config.problem_type == SEVERAL:
        return F.binary_cross_entropy_with_logits(given, wanted, reduction="none")[:, None].flatten(1).double().mean(1)
    return F.mse_loss(given, wanted, reduction="none")[:, None].flatten(1).double().mean(1)
