"""Perplexity and bits per byte of any text with a strided window."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

from auxin.accounting.inputs import text_positions
from auxin.accounting.results import perplexity_of
from auxin.errors import DataError
from auxin.models.evaluating import evaluating
from auxin.settings import Settings

NO_TEXT_TO_SCORE = (
    "predicts only what was cut out of a text, and so has no probability of a whole one. Its held-out loss is measured "
    "by the stages of a recipe and stands in its ledger (auxin show)"
)
"""Why an encoder-decoder is not scored like a causal model."""


class Perplexity(Settings):
    """How well a model predicts a text."""

    nats_per_token: float
    """Mean negative log-likelihood of a scored token."""
    perplexity: float
    """exp(nats_per_token)."""
    bits_per_byte: float
    """Total negative log2-likelihood of the scored tokens divided by `bytes`; comparable across tokenizers."""
    tokens: int
    """Scored tokens."""
    bytes: int
    """UTF-8 bytes of the text that was scored."""
    unscored_tokens: int
    """Tokens that had nothing in front of them to be predicted from: of a text, 1 when the tokenizer has no bos or eos
    token to begin with (its text is then not in `bytes`), else 0; of packed contexts, the first of each."""


def perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    context_length: int,
    stride: int | None = None,
    batch_size: int = 8,
) -> Perplexity:
    """Score every token of a text once, with a window that moves by `stride` tokens.

    A bos (else eos) token is put in front, so that the first token is scored too; without either it is not, and
    `unscored_tokens` says so. Tokens of the first window see all that precedes them; later ones see at least
    context_length - stride tokens. Special tokens written out in the text are scored as ordinary text.

    Args:
        model: takes `input_ids` (batch, T) and returns an output with `logits` (batch, T, vocabulary).
        tokenizer: the model's tokenizer.
        text: any text that is not empty.
        context_length: tokens per window, the one in front included.
        stride: tokens by which the window moves, 1 ... context_length - 1; None is half of context_length. Smaller
            ones give more context and cost more.
        batch_size: windows per forward pass.

    Raises:
        DataError: the text has nothing to score, a number is out of range, or the model predicts no next token.
    """
    refuse_no_causal_model(model, NO_TEXT_TO_SCORE)
    stride = context_length // 2 if stride is None else stride
    _check_window(model, context_length, stride, batch_size)
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    scored_bytes = len(text.encode())
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is not None:
        ids = [first, *ids]
    elif ids:
        scored_bytes -= len(str(tokenizer.decode(ids[:1], clean_up_tokenization_spaces=False)).encode())
    if len(ids) < 2:
        raise DataError(f"The text of {len(text)} characters has no token to score. Give a longer text.")
    sequence = torch.tensor(ids)
    total = 0.0
    with evaluating(model):
        for windows, scored in _windows(len(ids), context_length, stride, batch_size):
            batch = torch.stack([sequence[start:end] for start, end in windows])
            total += float(_token_losses(model, batch)[:, -scored:].sum(dtype=torch.float64))
    tokens = len(ids) - 1
    nats = total / tokens
    return Perplexity(
        nats_per_token=nats,
        perplexity=perplexity_of(nats),
        bits_per_byte=total / math.log(2) / scored_bytes,
        tokens=tokens,
        bytes=scored_bytes,
        unscored_tokens=0 if first is not None else 1,
    )


def _windows(
    length: int, context_length: int, stride: int, batch_size: int
) -> Iterator[tuple[list[tuple[int, int]], int]]:
    """Yield batches of windows (start, end) of equal length, with how many tokens at their end are scored in each."""
    first_end = min(context_length, length)
    yield [(0, first_end)], first_end - 1
    full = [(end - context_length, end) for end in range(first_end + stride, length + 1, stride)]
    for start in range(0, len(full), batch_size):
        yield full[start : start + batch_size], stride
    covered = full[-1][1] if full else first_end
    if covered < length:
        yield [(covered + stride - context_length, length)], length - covered


def _check_window(model: nn.Module, context_length: int, stride: int, batch_size: int) -> None:
    limit = text_positions(model)
    if limit is not None and context_length > limit:
        raise DataError(
            f"context_length is {context_length}, but the model has {limit} positions. Give {limit} or less."
        )
    if context_length < 2:
        raise DataError(f"context_length is {context_length}. Give 2 or more.")
    if not 1 <= stride < context_length:
        raise DataError(f"stride is {stride}. Give 1 ... {context_length - 1}, less than context_length.")
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}. Give 1 or more.")


def _token_losses(model: nn.Module, input_ids: Tensor) -> Tensor:
    """The loss of tokens 2 ... T in float32, (batch, T - 1)."""
    input_ids = input_ids.to(next(model.parameters()).device)
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.float().transpose(1, 2), input_ids[:, 1:], reduction="none")


def refuse_no_causal_model(model: nn.Module, reason: str) -> None:
    """DataError where what is asked for has no meaning: `reason` says why not of an encoder-decoder; a model with
    another head, such as a classifier, has nothing to do with the next token at all."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise DataError(f"The model is an encoder-decoder ({config.model_type}), which {reason}.")
    if isinstance(model, PreTrainedModel) and not isinstance(model, GenerationMixin):
        raise DataError(
            f"The model is a {type(model).__name__}, which neither continues a text nor has a probability of one. Give "
            "a causal language model; what this one has learnt is measured by the stages of a recipe and stands in its "
            "ledger (auxin show)."
        )
