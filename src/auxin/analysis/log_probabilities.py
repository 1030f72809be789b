"""What a model says of each token or sample, as log-probabilities, where its inputs come several times."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from auxin.analysis.measurement import GIVE_A_HEAD, Batch, check_mask, kept_tokens, logits_of, samples_of, wide
from auxin.errors import PlanError


def log_probabilities(
    model: PreTrainedModel, batch: Batch, output: Any, temperature: float = 1.0, copies: int = 1
) -> Tensor:
    """Log-probabilities of the tokens that are no padding, of the samples of a model that classifies samples, or of the
    places of the maps (samples, classes, height, width) of one that segments images: (copies, rows, classes), in
    float32 at least.

    Args:
        model: the model.
        batch: its inputs, once.
        output: of its call with `copies` of them, one after the other.
        temperature: by which logits are divided.
        copies: how often the inputs came.

    Raises:
        PlanError: there are no logits, or none of classes.
        DataError: a mask has another form.
    """
    logits = logits_of(model, output, f"{GIVE_A_HEAD}, or set logits_weight = 0.")
    if logits.dim() == 4:
        logits = logits.flatten(2).mT
    if logits.dim() not in (2, 3) or logits.shape[-1] == 1:
        raise PlanError(
            f"The {type(model).__name__} gives logits of shape {list(logits.shape)}, which are no classes of samples "
            "or tokens. Set logits_weight = 0."
        )
    samples = samples_of(batch)
    said = (wide(logits) / temperature).log_softmax(-1).unflatten(0, (copies, samples))
    kept = kept_tokens(model, batch, decoder=True) if logits.dim() == 3 else None
    if logits.dim() == 3:
        said = said.flatten(1, 2)
    if kept is None:
        return said
    check_mask(kept, (samples, logits.shape[1]))
    return said[:, kept.flatten()]
