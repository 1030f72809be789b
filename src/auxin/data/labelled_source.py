"""Where labelled texts come from: the settings that say it, and how a row becomes a document with its class."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerFast

from auxin.data.dataset import SampleForm
from auxin.data.labels import LabelSettings
from auxin.data.padding import padded_form
from auxin.data.settings import TextSettings
from auxin.data.sources import Document, read_rows, text_document

_BETWEEN = b"\xff"
"""Stands between the texts of a pair; no byte of UTF-8."""


class LabelledTextSettings(LabelSettings, TextSettings):
    """Labelled texts: JSON, CSV, Parquet or a Hugging Face dataset whose rows hold a text and its class.

    Raises:
        pydantic.ValidationError (ConfigError through `LabelledTextSettings.parse`): a value is out of range, or a field
            that the source needs is missing.
    """

    kind: Literal["labelled_text"] = "labelled_text"
    """Says that these are labelled texts."""
    source: Literal["files", "huggingface"] = "files"
    """`files`: the files of rows among `paths`. `huggingface`: the dataset `name`."""
    paths: tuple[Path, ...] = ()
    """For `files`: files, folders (read recursively) and globs, a list or a single one. `.jsonl`, `.ndjson`, `.json`
    (JSON lines, or an array), `.csv`, `.tsv` and `.parquet` hold rows, and all but the last may be compressed (`.gz`,
    `.bz2`, `.xz`). Other files are left out and counted."""
    context_length: int = Field(default=128, ge=2)
    """Tokens per text, special ones included: longer texts are cut, shorter ones padded, all batches have one shape."""
    text_pair_field: str | None = None
    """The field of a second text, for classes of pairs."""

    @model_validator(mode="after")
    def _fields_differ(self) -> Self:
        fields = [name for name in (self.text_field, self.text_pair_field, self.label_field) if name is not None]
        if len(set(fields)) != len(fields):
            raise ValueError(f"text_field, text_pair_field and label_field must differ; given: {', '.join(fields)}")
        return self

    @property
    def fields(self) -> dict[str, str]:
        """What is read of a row, by the setting that names it."""
        pair = {} if self.text_pair_field is None else {"text_pair_field": self.text_pair_field}
        return {"text_field": self.text_field, **pair, "label_field": self.label_field}

    def form(self) -> SampleForm:
        """Labelled texts; the vocabulary is the one asked for, or that of the tokenizer named if it is there."""
        return labelled_form(self, self.label_names)


def labelled_form(
    settings: LabelledTextSettings,
    labels: tuple[str, ...] | None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> SampleForm:
    """The form of labelled texts of `settings`.

    Args:
        settings: the settings.
        labels: the classes, where they are known.
        tokenizer: as of `padded_form`.
    """
    form = padded_form(settings, settings.text_pair_field is not None, ("labels",), tokenizer)
    return replace(form, labels=labels)


def labelled_documents(settings: LabelledTextSettings) -> Iterator[Document]:
    """The rows of the source as documents of JSON, [label, text, ...], known by their texts alone.

    Raises:
        DataError: the source can't be used, or a label is none of `labels`.
    """
    for row in read_rows(settings, settings.fields):
        if row.values is None:
            yield Document(row.name, None, row.skipped)
            continue
        *values, label = row.values
        texts = [text_document(row.name, value) for value in values]
        if skipped := next((text.skipped for text in texts if text.data is None), None):
            yield Document(row.name, None, skipped)
        elif label is None or label == "":  # as in a cell of CSV
            yield Document(row.name, None, "no label")
        else:
            contents = [text.data for text in texts if text.data is not None]
            written = json.dumps([settings.label_name(label, row.name), *(data.decode() for data in contents)])
            yield Document(row.name, written.encode(), content=_BETWEEN.join(contents))
