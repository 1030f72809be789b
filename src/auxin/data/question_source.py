"""Where questions with their answers in texts come from: the settings that say it, and how a row becomes a document."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator
from transformers import PreTrainedTokenizerFast

from auxin.data.dataset import SampleForm
from auxin.data.padding import padded_form
from auxin.data.settings import TokenizedSettings, without_stdlib
from auxin.data.sources import Document, read_rows, text_document
from auxin.errors import DataError, shown

ANSWER = ("start_positions", "end_positions")
"""What models that find answers in texts call the numbers of an answer's first and last token."""
CONTEXT = "context_mask"
"""What a batch calls the tokens in which an answer may lie: those of the context, special ones left out."""
LONGEST = 30
"""Tokens of the longest answer that measures look for, as in transformers' run_qa."""
NO_ANSWER = "no answer"
NOT_THERE = "the answer is not in the context"
ELSEWHERE = "the answer is not where its start says"
_BETWEEN = b"\xff"
"""Stands between question and context; no byte of UTF-8."""
_NUMBER = re.compile(r"([0-9]{1,18})(?:\.0*)?")
"""The number of a character as a cell of CSV has it, in a column with gaps too. No text has more characters."""


class QuestionAnsweringSettings(TokenizedSettings):
    """Questions whose answers are parts of a text: JSON, CSV, Parquet or a Hugging Face dataset whose rows hold a
    question, a context and the answer in it.

    Raises:
        pydantic.ValidationError (ConfigError through `QuestionAnsweringSettings.parse`): a value is out of range, or a
            field that the source needs is missing.
    """

    kind: Literal["question_answering"] = "question_answering"
    """Says that these are questions with answers."""
    source: Literal["files", "huggingface"] = "files"
    """`files`: the files of rows among `paths`. `huggingface`: the dataset `name`."""
    paths: tuple[Path, ...] = ()
    """For `files`: files, folders (read recursively) and globs, a list or a single one. `.jsonl`, `.ndjson`, `.json`
    (JSON lines, or an array), `.csv`, `.tsv` and `.parquet` hold rows, and all but the last may be compressed (`.gz`,
    `.bz2`, `.xz`). Other files are left out and counted."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Expected share of the contexts in the validation split. A context's side depends on its text and `seed` alone, so
    that all questions about it lie on one side, and it never changes when others are added."""
    context_length: int = Field(default=384, ge=2)
    """Tokens per sample: the question, the context and special ones. Longer contexts are cut at their end, questions
    never, shorter samples are padded, all batches have one shape. What then lacks its answer is left out and
    counted."""
    question_field: str = "question"
    """The field of a row that holds the question."""
    context_field: str = "context"
    """The field that holds the text in which the answer stands."""
    answer_field: str = "answer"
    """The field that holds the answer as it stands in the context, or SQuAD's mapping of `text` and `answer_start`,
    each a list or a single one: of several answers the first is taken. Blanks around it are no part of it. A row
    without an answer is skipped."""
    answer_start_field: str | None = None
    """The field that holds the number of the answer's first character in the context, counted from 0. None, or null in
    a row: the first place where the answer stands as words of their own, or else the first place at all."""

    @field_validator("source", mode="before")
    @classmethod
    def _has_questions(cls, value: Any) -> Any:
        return without_stdlib(value, "questions")

    @model_validator(mode="after")
    def _fields_differ(self) -> Self:
        if len(set(self.fields.values())) != len(self.fields):
            raise ValueError(f"{', '.join(self.fields)} must differ; given: {', '.join(self.fields.values())}")
        return self

    @property
    def fields(self) -> dict[str, str]:
        """What is read of a row, by the setting that names it."""
        names = ("question_field", "context_field", "answer_field", "answer_start_field")
        return {name: field for name in names if (field := getattr(self, name)) is not None}

    def form(self) -> SampleForm:
        """Questions; the vocabulary is the one asked for, or that of the tokenizer named if it is there."""
        return question_form(self)


def question_form(settings: QuestionAnsweringSettings, tokenizer: PreTrainedTokenizerFast | None = None) -> SampleForm:
    """The form of questions of `settings`, with a tokenizer as of `padded_form`."""
    return padded_form(settings, True, (CONTEXT, *ANSWER), tokenizer)


class Question(NamedTuple):
    """What a document holds."""

    question: str
    context: str
    start: int
    """The answer's first character in the context."""
    end: int
    """The one behind its last."""
    places: int
    """At how many places of the context the answer stands, 2 for more; 1 where the row says which is meant."""


def question_documents(settings: QuestionAnsweringSettings) -> Iterator[Document]:
    """The rows of the source as documents of JSON, a `Question` each, known by question and context alone.

    Raises:
        DataError: the source can't be used, or an answer is none.
    """
    for row in read_rows(settings, settings.fields):
        if row.values is None:
            yield Document(row.name, None, row.skipped)
            continue
        question, context, value, *more = row.values
        texts = [text_document(row.name, text) for text in (question, context)]
        if (reason := _unusable(settings, texts)) is not None:
            yield Document(row.name, None, reason)
            continue
        written, start = _answer(settings, value, more, row.name)
        if written is None:
            yield Document(row.name, None, NO_ANSWER)
            continue
        # A token that begins with the blank behind an answer would be one of its tokens.
        answer, before = written.strip(), len(written) - len(written.lstrip())
        begin, places = _found(context, answer) if start is None else (start + before, 1)
        if not places:
            yield Document(row.name, None, NOT_THERE)
        elif not context.startswith(answer, begin):
            yield Document(row.name, None, ELSEWHERE)
        else:
            contents = [text.data for text in texts if text.data is not None]
            found = Question(question, context, begin, begin + len(answer), places)
            yield Document(row.name, json.dumps(found).encode(), content=_BETWEEN.join(contents), side=contents[1])


def _unusable(settings: QuestionAnsweringSettings, texts: Iterable[Document]) -> str | None:
    """Why a row's question and context can't be used, with the field; None where they can."""
    fields = settings.question_field, settings.context_field
    reasons = (f"{field}: {text.skipped}" for field, text in zip(fields, texts, strict=True) if text.data is None)
    return next(reasons, None)


def _answer(
    settings: QuestionAnsweringSettings, value: Any, more: list[Any], row: str
) -> tuple[str | None, int | None]:
    """The answer of a row and where it starts; None: there is none, and: that is not said.

    Args:
        settings: the settings.
        value: of the answer's field.
        more: that of its start, if the settings name one.
        row: the row's name.

    Raises:
        DataError: what the field holds is no answer, or its start is no number.
    """
    field, start = settings.answer_field, more[0] if more else None
    text, place, without = value, settings.answer_start_field, "leave answer_start_field out"
    if isinstance(value, Mapping):
        if more:
            raise DataError(
                f"{row}: {field} is a mapping, which says itself where the answer starts. Leave answer_start_field out."
            )
        if "text" not in value:
            raise DataError(f"{row}: {field} is {shown(dict(value))}, a mapping that has no text. Give that.")
        text, start = _first(value["text"]), _first(value.get("answer_start"))
        place, without = f"{field}.answer_start", "leave it out of the mapping"
    if text is None or (isinstance(text, str) and not text.strip()):
        return None, None
    if not isinstance(text, str):
        raise DataError(
            f"{row}: {field} is {shown(value)}, and an answer is text, or a mapping of text and answer_start. Set "
            "`answer_field` to a field of answers."
        )
    return text, _start(start, f"{row}: {place}", without)


def _first(value: Any) -> Any:
    """The first of a list, None of an empty one; what is no list as it is."""
    return (value[0] if value else None) if isinstance(value, list | tuple) else value


def _start(value: Any, where: str, without: str) -> int | None:
    """The number of a character, None where none is given; DataError, which says `where` and how to do `without` it,
    where it is no such number."""
    number = value
    if isinstance(value, str):  # as in a cell of CSV
        if not value.strip():
            return None
        found = _NUMBER.fullmatch(value.strip())
        number = int(found[1]) if found else None
    elif isinstance(value, float) and value.is_integer():  # columns of whole numbers with gaps are read so
        number = int(value)
    elif value is None:
        return None
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise DataError(
            f"{where} is {shown(value)}, and has to be the number of the answer's first character, from 0. Mend it, or "
            f"{without}: the answer is then looked for."
        )
    return number


def _found(context: str, answer: str) -> tuple[int, int]:
    """The first character of the first place where the answer stands in the context, and at how many places it does, 2
    for more: as words of their own, or else anywhere."""
    anywhere = re.escape(answer)
    # Looked ahead at, and not taken, so that a place that lies over the end of another one counts.
    for pattern in (rf"(?<!\w)(?={anywhere}(?!\w))", rf"(?={anywhere})"):
        places = [match.start() for match in islice(re.finditer(pattern, context), 2)]
        if places:
            return places[0], len(places)
    return 0, 0
