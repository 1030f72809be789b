"""Questions and contexts as tokens, and the tokens of the context in which an answer lies.

The question comes first, as in transformers' run_qa. Of a pair that is too long the context loses its end; there are no
windows over it, so that a sample is one question. Characters and tokens are brought together by the tokenizer's
offsets: an answer is all the tokens that hold a character of it.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from auxin.data.padding import Padded, PaddingEncoder
from auxin.data.question_source import Question

NO_ROOM = "the question leaves no room for the context"
CUT_OFF = "the answer lies behind what is kept of the context"
NO_TOKEN = "the answer has no token"
"""Why a question is left out."""


class Answered(NamedTuple):
    """A question as a sample."""

    padded: Padded
    context: tuple[int, int]
    """The context's first token, and the one behind its last."""
    answer: tuple[int, int]
    """The answer's first and last token."""


class AnswerEncoder(PaddingEncoder):
    """Encodes questions with their contexts to one length; see `PaddingEncoder`.

    Args:
        tokenizer: see `padding_tokenizer`.
        length: tokens of a sample, special ones included.

    Raises:
        DataError: the length has no room for a token of each text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, length: int) -> None:
        super().__init__(tokenizer, length, is_pair=True)
        self._backend.no_truncation()  # which would not say what it does to answers

    def answers(self, questions: Sequence[Question]) -> Iterator[Answered | str]:
        """Each question as a sample, or why it can't be one; on all threads."""
        begins = [(self._begin(one.question), self._begin(one.context)) for one in questions]
        encoded = self._backend.encode_batch(begins)
        for one, (_, begin), found in zip(questions, begins, encoded, strict=True):
            yield self._answered(one, len(begin), found)

    def _answered(self, one: Question, characters: int, found: Encoding) -> Answered | str:
        """A question of which so many characters of the context were encoded."""
        over = max(0, len(found.ids) - self.length)
        context = [place for place, which in enumerate(found.sequence_ids) if which == 1]
        if over and over >= len(context):
            return NO_ROOM
        kept = context[: len(context) - over]
        offsets = found.offsets
        holding = [place for place in context if offsets[place][0] < one.end and offsets[place][1] > one.start]
        if one.end > characters or (holding and holding[-1] > kept[-1]):
            return CUT_OFF
        if not holding:
            return NO_TOKEN
        ids, kinds = ([*of[: kept[-1] + 1], *of[context[-1] + 1 :]] for of in (found.ids, found.type_ids))
        second = kinds.index(1) if 1 in kinds else self.length
        padded = Padded([*ids, *[self.padding] * (self.length - len(ids))], len(ids), second, bool(over))
        return Answered(padded, (kept[0], kept[-1] + 1), (holding[0], holding[-1]))
