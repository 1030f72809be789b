"""What a model is asked for by the labels of a batch: one class for each of its logits, or something else."""

from torch import Size, Tensor
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel

from auxin.analysis.measurement import Batch
from auxin.errors import DataError
from auxin.models.loading import is_ctc
from auxin.objectives.objective import IGNORED


def targets(model: PreTrainedModel, batch: Batch, kept: Tensor | None = None) -> Tensor | None:
    """The labels of a batch, (samples, ...), those of a causal model moved to where it predicts them; None where there
    are none that are classes at places of the model's output: numbers (regression, several classes at once), or a text
    that is to be found in a recording (CTC).

    Args:
        model: the model.
        batch: its inputs with labels.
        kept: (samples, tokens), of which labels are to be told; None: of all.
    """
    labels = batch.get("labels")
    if labels is None or labels.is_floating_point():
        return None
    if is_ctc(model):
        return None
    if kept is not None and kept.shape == labels.shape:
        labels = labels.masked_fill(~kept, IGNORED)
    if isinstance(model, GenerationMixin) and not model.config.is_encoder_decoder and labels.dim() == 2:
        return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return labels


def label_rows(model: PreTrainedModel, batch: Batch, kept: Tensor | None, logits: Size) -> Tensor | None:
    """What each of the logits should say: `targets` (samples, tokens), -100 for padding, or (samples,); None where
    there is not one for each of the logits.

    Args:
        model: the model.
        batch: its inputs with labels.
        kept: (samples, tokens), which tokens are no padding; None: all.
        logits: the shape of what the model gives.
    """
    labels = targets(model, batch, kept)
    if labels is None:
        return None
    if len(logits) == 2 and labels.numel() == len(labels):
        labels = labels.flatten()  # a class for each sample may stand in a column
    return labels if labels.shape == logits[:-1] else None


def refuse_without_targets(labels: Tensor, asked_by: str) -> None:
    """DataError when samples have no label that counts, of which there is no loss.

    Args:
        labels: of a batch, as `targets` or `label_rows` gives them.
        asked_by: what looks at the loss.
    """
    lacking = (labels == IGNORED)[:, None].flatten(1).all(1)
    if lacking.any():
        raise DataError(
            f"labels: {int(lacking.sum())} of {len(lacking)} samples of a batch have no target, and so no loss, at "
            f"which {asked_by} looks. Labels of -100 count for nothing, nor does the first one of a causal model. "
            "Leave these samples out, or give them labels."
        )
