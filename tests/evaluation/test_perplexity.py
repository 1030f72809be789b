"""Perplexity against an oracle that recomputes everything for each token."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auxin.data.tokenizer import SEPARATOR, train_tokenizer
from auxin.errors import DataError
from auxin.evaluation import perplexity
from oracles.perplexity import strided_losses
from tiny_models import fresh_llama

TOKENIZER = train_tokenizer(["the cat sat on the mat and the hat"] * 3, 280, 32)
TEXT = "the cat sat on a \N{SNOWMAN} hat, twice. "


MODEL = fresh_llama(vocab_size=280, initializer_range=0.5).double()


def next_token_logits(ids: Sequence[int]) -> np.ndarray:
    with torch.no_grad():
        return MODEL(torch.tensor([list(ids)])).logits[0, -1].numpy()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(2, 12), st.data(), st.integers(1, 4))
def test_strided_perplexity(characters: int, context_length: int, data: st.DataObject, batch_size: int) -> None:
    stride = data.draw(st.integers(1, context_length - 1))
    text = TEXT[:characters]
    ids = [TOKENIZER.bos_token_id, *TOKENIZER(text)["input_ids"]]
    expected = strided_losses(next_token_logits, ids, context_length, stride)
    result = perplexity(MODEL, TOKENIZER, text, context_length, stride, batch_size)
    assert result.tokens == len(expected) == len(ids) - 1
    assert result.nats_per_token == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-4)
    assert result.bytes == len(text.encode())
    assert result.bits_per_byte == pytest.approx(sum(expected) / math.log(2) / result.bytes, rel=1e-5)
    assert result.unscored_tokens == 0


def test_without_a_token_in_front_the_first_is_not_scored() -> None:
    bare = train_tokenizer(["the cat sat on the mat and the hat"] * 3, 280, 32)
    bare.bos_token = bare.eos_token = None
    ids = bare(TEXT)["input_ids"]
    result = perplexity(MODEL, bare, TEXT, 8, 4)
    expected = strided_losses(next_token_logits, ids, 8, 4)
    assert result.unscored_tokens == 1
    assert result.tokens == len(ids) - 1
    assert result.nats_per_token == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert result.bytes == len(TEXT.encode()) - len(bare.decode(ids[:1]).encode())
    with pytest.raises(DataError, match="no token to score"):
        perplexity(MODEL, bare, "a", 8, 4)


def test_a_special_token_in_the_text_is_text() -> None:
    result = perplexity(MODEL, TOKENIZER, SEPARATOR, 32, 16)
    assert result.tokens > 1
    assert result.bytes == len(SEPARATOR)


@pytest.mark.parametrize(
    ("text", "context_length", "stride", "message"),
    [
        ("", 8, 4, "no token to score"),
        ("a", 33, 4, "the model has 32 positions"),
        ("a", 8, 8, "stride is 8"),
        ("a", 8, 0, "stride is 0"),
        ("a", 1, 1, "context_length is 1"),
    ],
)
def test_windows_that_can_not_be(text: str, context_length: int, stride: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        perplexity(MODEL, TOKENIZER, text, context_length, stride)
