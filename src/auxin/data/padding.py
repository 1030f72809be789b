"""Texts one by one, cut and padded to one length, with a tokenizer's own special tokens.

Where the tokenizer's rule adds none, as with many decoders, the end-of-text token ends each text, also the first of a
pair. Padding is on the right: positions are then those of the text, and decoders look for the last token that is none.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from auxin.data.dataset import SampleForm
from auxin.data.settings import TokenizedSettings
from auxin.data.tokenizer import load_tokenizer, plain_backend, read_tokenizer, vocabulary_fields
from auxin.errors import DataError, placed

SEGMENTS = "token_type_ids"
"""What tells the second text of a pair from the first, where the model's tokenizer does."""
_ENOUGH = 2**16
"""Characters at the begin of a text that are encoded at first."""


def padding_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """As `read_tokenizer`, for texts of their own: it has special tokens, or an end-of-text token, and one to pad with
    (the end-of-text token where it has no other).

    Raises:
        DataError: as `read_tokenizer`, or there are no such tokens.
    """
    tokenizer = read_tokenizer(path)
    if not tokenizer.num_special_tokens_to_add(pair=False):
        tokenizer = load_tokenizer(path)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"The tokenizer {path} has no token to pad texts with. Set its pad_token to a token that it has."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def padded_form(
    settings: TokenizedSettings, is_pair: bool, wanted: tuple[str, ...], tokenizer: PreTrainedTokenizerFast | None
) -> SampleForm:
    """The form of texts that are padded to one length.

    Args:
        settings: of the texts.
        is_pair: whether samples are pairs.
        wanted: what a batch holds beside the texts.
        tokenizer: the data's; None: the one that the settings name, if it is there, or else what they say of it.

    Raises:
        DataError: the tokenizer that is named can't be used.
    """
    if tokenizer is None and settings.tokenizer is not None and settings.tokenizer.exists():
        with placed("tokenizer: "):
            tokenizer = padding_tokenizer(settings.tokenizer)
    fields = {"vocab_size": settings.vocab_size} if settings.tokenizer is None else {}
    tensors = ["input_ids", "attention_mask"]
    if tokenizer is not None:
        fields = vocabulary_fields(tokenizer)
        tensors += [SEGMENTS] if is_pair and SEGMENTS in tokenizer.model_input_names else []
    return SampleForm(
        unit="example",
        units=1,
        tensors=(*tensors, *wanted),
        length=settings.context_length,
        vocab_size=fields.get("vocab_size"),
        mask_token_id=None if tokenizer is None else tokenizer.mask_token_id,
        config_values=fields,
    )


class Padded(NamedTuple):
    """A text, or a pair, as a sample."""

    ids: list[int]
    """Padding included."""
    tokens: int
    """Without padding."""
    second: int
    """Where the second text begins, as the tokenizer counts it; the whole length where there is none."""
    is_cut: bool
    """Whether it was too long."""


class PaddingEncoder:
    """Encodes texts to one length; special tokens that are spelled out in a text stay text.

    Args:
        tokenizer: see `padding_tokenizer`.
        length: tokens of a sample, special ones included.
        is_pair: whether samples are pairs, of which the longer text is cut first.

    Raises:
        DataError: the length has no room for a token of each text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, length: int, is_pair: bool) -> None:
        self.length, self.padding = length, int(tokenizer.pad_token_id)
        self.vocab_size = vocabulary_fields(tokenizer)["vocab_size"]
        self._backend, self._plain = plain_backend(tokenizer), plain_backend(tokenizer)
        if not self._backend.num_special_tokens_to_add(is_pair=False):
            end = {"id": "end", "ids": [tokenizer.eos_token_id], "tokens": [tokenizer.eos_token]}
            self._backend.post_processor = processors.TemplateProcessing(
                single=["$A", "end"], pair=["$A", "end", "$B:1", "end:1"], special_tokens=[end]
            )
        special, texts = self._backend.num_special_tokens_to_add(is_pair=is_pair), 1 + is_pair
        if length < special + texts:
            raise DataError(
                f"context_length: {length} has no room for {special} special tokens and one of each text. Give "
                f"{special + texts} or more."
            )
        self._backend.enable_truncation(length, strategy="longest_first")

    def encode(self, texts: Sequence[Sequence[str]]) -> Iterator[Padded]:
        """Each text, or pair of texts, on all threads."""
        begins = [tuple(map(self._begin, one)) for one in texts]
        for found in self._backend.encode_batch([one[0] if len(one) == 1 else one for one in begins]):
            padding = [self.padding] * (self.length - len(found.ids))
            second = found.type_ids.index(1) if 1 in found.type_ids else self.length
            yield Padded([*found.ids, *padding], len(found.ids), second, bool(found.overflowing))

    def _begin(self, text: str) -> str:
        """As much of a text as has more tokens than a sample: the rest is cut off, and would take its memory before.
        Of a pair of such texts, the longer of these begins keeps the odd token."""
        size = _ENOUGH
        while size < len(text) and len(self._plain.encode(text[:size], add_special_tokens=False)) <= self.length:
            size *= 2
        return text[:size]
