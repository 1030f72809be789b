"""Scoring the held-out split of a prepared corpus."""

import math

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from auxin.accounting.results import perplexity_of
from auxin.data.corpus import PackedData
from auxin.data.streamed_text import StreamedText
from auxin.data.tokenizer import tokenizer_digest
from auxin.errors import DataError
from auxin.evaluation.perplexity import NO_TEXT_TO_SCORE, Perplexity, refuse_no_causal_model
from auxin.objectives.causal import Causal
from auxin.objectives.measures import Loss


def score_held_out(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    data: PackedData | StreamedText,
    batch_size: int = 16,
) -> Perplexity:
    """Loss, perplexity and bits per byte on the whole held-out split, context by context, as training reports them.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, which must be the corpus's.
        data: a prepared corpus, or a stream.
        batch_size: contexts per forward pass.

    Raises:
        DataError: the corpus was prepared with another tokenizer, or the model predicts no next token.
    """
    refuse_no_causal_model(model, NO_TEXT_TO_SCORE)
    if tokenizer_digest(tokenizer) != tokenizer_digest(data.tokenizer()):
        raise DataError(
            f"{data.directory} was prepared with another tokenizer than the model's, so its tokens mean nothing to it. "
            "Prepare the corpus with the model's tokenizer, or score text files."
        )
    objective = Causal().bind(model.config, data.form)
    nats = Loss()(model, data.split("validation"), objective, batch_size)
    contexts, length = data.validation.shape
    return Perplexity(
        nats_per_token=nats,
        perplexity=perplexity_of(nats),
        bits_per_byte=nats / math.log(2) / data.bytes_per_unit,
        tokens=contexts * (length - 1),
        bytes=round(contexts * (length - 1) * data.bytes_per_unit),
        unscored_tokens=contexts,
    )
