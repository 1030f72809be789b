"""Texts, or pairs of texts, with a class for each: read once, split by content, and kept as rows of equal length.

Texts are cut at the end to `context_length` tokens, special ones included (see `padding`), and shorter ones are padded
to it, so that every batch has one shape, and prices and books are exact; how much is padding is told in the report.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, StrictBool, StrictInt, StrictStr, field_validator, model_validator
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from auxin.data.collecting import Collected, ReadReport
from auxin.data.dataset import DatasetKind, ProgressCallback, SampleForm, SplitName
from auxin.data.packing import ContextWriter, DocumentSpool, token_dtype
from auxin.data.padding import PaddingEncoder, padding_tokenizer
from auxin.data.preparing import Manifest, PreparedText, Steps, open_array, prepare_folder
from auxin.data.settings import TextSettings
from auxin.data.sources import Document, read_rows, text_document
from auxin.data.tokenizer import tokenizer_digest, vocabulary_fields
from auxin.errors import DataError
from auxin.settings import Settings

FORMAT = 1
_BATCH, _BATCH_CHARACTERS = 1024, 2**21
"""Texts encoded at a time, and about how many characters of them."""
_BETWEEN = b"\xff"
"""Stands between the texts of a pair; no byte of UTF-8."""
LABEL, TOKENS = 0, 1
"""Columns of what is kept beside a text's ids: its class, its tokens without padding, and where the second text
begins."""


class LabelledTextSettings(TextSettings):
    """Labelled texts: JSON lines, Parquet or a Hugging Face dataset whose rows hold a text and its class.

    Raises:
        pydantic.ValidationError (ConfigError through `LabelledTextSettings.parse`): a value is out of range, or a field
            that the source needs is missing.
    """

    kind: Literal["labelled_text"] = "labelled_text"
    """Says that these are labelled texts."""
    source: Literal["files", "huggingface"] = "files"
    """`files`: the `.jsonl`, `.jsonl.gz` and `.parquet` files among `paths`. `huggingface`: the dataset `name`."""
    paths: tuple[Path, ...] = ()
    """For `files`: files, folders (read recursively) and globs. Other files than `.jsonl`, `.jsonl.gz` and `.parquet`
    hold no rows; they are left out and counted."""
    context_length: int = Field(default=128, ge=2)
    """Tokens per text, special ones included: longer texts are cut, shorter ones padded, all batches have one shape."""
    text_pair_field: str | None = None
    """The field of a second text, for classes of pairs."""
    label_field: str = "label"
    """The field that holds the class: text, a whole number, true or false. A row with null is skipped."""
    labels: tuple[StrictBool | StrictInt | StrictStr, ...] | None = Field(default=None, min_length=2)
    """The classes in the order of their numbers. Where none of them is a number itself, a number in the rows is the
    place of one in this list, counted from 0. None: the distinct ones of the source, sorted; a price before the data is
    prepared is then that of two classes."""

    @field_validator("source", mode="before")
    @classmethod
    def _has_labels(cls, value: Any) -> Any:
        if value == "stdlib":
            raise ValueError("the standard library's files have no labels. Set source: files, or huggingface")
        return value

    @model_validator(mode="after")
    def _fields_differ(self) -> Self:
        fields = [name for name in (self.text_field, self.text_pair_field, self.label_field) if name is not None]
        if len(set(fields)) != len(fields):
            raise ValueError(f"text_field, text_pair_field and label_field must differ; given: {', '.join(fields)}")
        names = self.label_names or ()
        if len(set(names)) != len(names):
            raise ValueError(f"labels must differ; given: {', '.join(names)}")
        return self

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """`labels` as text."""
        return None if self.labels is None else tuple(map(_written, self.labels))

    @property
    def fields(self) -> dict[str, str]:
        """What is read of a row, by the setting that names it."""
        pair = {} if self.text_pair_field is None else {"text_pair_field": self.text_pair_field}
        return {"text_field": self.text_field, **pair, "label_field": self.label_field}

    def form(self) -> SampleForm:
        """Labelled texts; the vocabulary is the one asked for, or that of the tokenizer named if it is there."""
        if self.tokenizer is None:
            return labelled_form(self, self.label_names, self.vocab_size)
        if not self.tokenizer.exists():
            return labelled_form(self, self.label_names, None)
        return labelled_form(self, self.label_names, None, padding_tokenizer(self.tokenizer))


def labelled_form(
    settings: LabelledTextSettings,
    labels: tuple[str, ...] | None,
    vocab_size: int | None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> SampleForm:
    """The form of labelled texts of `settings`.

    Args:
        settings: the settings.
        labels: the classes, where they are known.
        vocab_size: of a tokenizer that is not there yet.
        tokenizer: the tokenizer, where it is there.
    """
    fields = {} if vocab_size is None else {"vocab_size": vocab_size}
    tensors = ["input_ids", "attention_mask", "labels"]
    if tokenizer is not None:
        fields = vocabulary_fields(tokenizer)
        if settings.text_pair_field is not None and "token_type_ids" in tokenizer.model_input_names:
            tensors.insert(2, "token_type_ids")
    return SampleForm(
        unit="example",
        units=1,
        tensors=tuple(tensors),
        length=settings.context_length,
        vocab_size=fields.get("vocab_size"),
        mask_token_id=None if tokenizer is None else tokenizer.mask_token_id,
        labels=labels,
        config_values=fields,
    )


class LabelledSplitReport(Settings):
    """What one split holds."""

    examples: int
    """Labelled texts."""
    labels: tuple[int, ...]
    """How many of them each class has, in the order of the classes."""
    cut: int
    """Texts that were longer than the context and lost their end."""
    tokens: int
    """Tokens without padding, special ones included."""
    sha256: str
    """Digest of the tokens."""
    rows_sha256: str
    """Digest of the labels and lengths."""


class LabelledReport(ReadReport):
    """What became of every row of the source, and what the splits hold."""

    labels: tuple[str, ...]
    """The classes, in the order of their numbers."""
    train: LabelledSplitReport
    validation: LabelledSplitReport


class _Manifest(Manifest):
    """What labelled_text.json holds."""

    settings: LabelledTextSettings
    report: LabelledReport


class LabelledRows:
    """Padded texts and their labels as a split of samples; see `dataset.Split`.

    Args:
        tokens: ids, (texts, context_length).
        facts: label, length and start of the second text, (texts, 3).
        tensors: names of what a batch holds.
    """

    def __init__(self, tokens: np.ndarray, facts: np.ndarray, tensors: tuple[str, ...]) -> None:
        self.tokens, self.facts, self.tensors = tokens, facts, tensors

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and, of pairs, `token_type_ids` (rows, context_length); `labels` (rows,); all
        64-bit integers."""
        chosen = list(rows)
        tokens = torch.from_numpy(self.tokens[chosen].astype(np.int64))
        labels, lengths, seconds = torch.from_numpy(self.facts[chosen].astype(np.int64)).unbind(1)
        places = torch.arange(tokens.shape[1])
        mask = places < lengths[:, None]
        found = {
            "input_ids": tokens,
            "attention_mask": mask.long(),
            "token_type_ids": (mask & (places >= seconds[:, None])).long(),
            "labels": labels,
        }
        return {name: found[name] for name in self.tensors}


class LabelledData(PreparedText[_Manifest]):
    """Prepared labelled texts: two memory-mapped arrays of tokens with their labels, and what they were made of."""

    noun: ClassVar[str] = "set of labelled texts"
    manifest_file: ClassVar[str] = "labelled_text.json"
    manifest_class: ClassVar[type[Manifest]] = _Manifest
    version: ClassVar[int] = FORMAT
    bytes_per_unit: ClassVar[None] = None
    """Losses are those of classes, not of a text."""

    def _open(self) -> None:
        self._arrays: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name in ("train", "validation"):
            examples = self._of(name).examples
            tokens = open_array(self.directory / f"{name}.npy", (examples, self.context_length), (np.uint16, np.uint32))
            self._arrays[name] = tokens, open_array(self.directory / f"{name}-labels.npy", (examples, 3), (np.int32,))

    def _of(self, name: str) -> LabelledSplitReport:
        return self.report.train if name == "train" else self.report.validation

    def _digests(self) -> Iterator[tuple[str, np.ndarray, str]]:
        for name, (tokens, facts) in self._arrays.items():
            yield f"{name}.npy", tokens, self._of(name).sha256
            yield f"{name}-labels.npy", facts, self._of(name).rows_sha256

    @property
    def settings(self) -> LabelledTextSettings:
        """The settings that they were prepared with."""
        return self.manifest.settings

    @property
    def report(self) -> LabelledReport:
        """Rows kept, removed and skipped, and what the splits hold."""
        return self.manifest.report

    @cached_property
    def form(self) -> SampleForm:
        """Labelled texts."""
        return labelled_form(self.settings, self.report.labels, None, self.tokenizer())

    def split(self, name: SplitName) -> LabelledRows:
        """The texts of one split."""
        return LabelledRows(*self._arrays[name], self.form.tensors)

    def describe(self) -> dict[str, str]:
        """What the texts are, how many each class has, and what became of the others."""
        report = self.report
        cut, tokens = report.train.cut + report.validation.cut, report.train.tokens + report.validation.tokens
        filled = tokens / (report.documents * self.context_length)
        return {
            "source": self.settings.source,
            "examples": f"{report.documents:,}",
            "left out": report.describe_left_out(),
            "vocabulary": f"{self.vocab_size:,}",
            "context length": f"{self.context_length:,}; {cut:,} texts cut to it, {1 - filled:.0%} of it padding",
            "training examples": self._counted(report.train),
            "validation examples": self._counted(report.validation),
        }

    def _counted(self, split: LabelledSplitReport) -> str:
        counts = ", ".join(f"{label} {n:,}" for label, n in zip(self.report.labels, split.labels, strict=True))
        return f"{split.examples:,} ({counts})"


def prepare(
    settings: LabelledTextSettings, directory: str | Path, progress: ProgressCallback | bool = False
) -> LabelledData:
    """Prepare labelled texts in `directory`, or open those that are there; see `prepare_folder`.

    Of rows with the same text (or pair) and the same label one is kept; of rows with the same text and another label
    the first is kept and the others are reported.

    Raises:
        DataError: the source can't be used, a label is unknown, a class has no training example, a split would be
            empty, or the folder holds something else.
    """
    steps = Steps(LabelledData, labelled_documents, padding_tokenizer, _spooled_texts, _build)
    return prepare_folder(steps, settings, directory, progress)


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
        elif label is None:
            yield Document(row.name, None, "no label")
        else:
            contents = [text.data for text in texts if text.data is not None]
            written = json.dumps([label_name(label, row.name, settings), *(data.decode() for data in contents)])
            yield Document(row.name, written.encode(), content=_BETWEEN.join(contents))


def label_name(value: Any, row: str, settings: LabelledTextSettings) -> str:
    """The name of the class that a row's label stands for.

    Raises:
        DataError: it is none of the settings' labels, or no class at all.
    """
    if isinstance(value, float) and value.is_integer():  # columns of whole numbers with gaps are read so
        value = int(value)
    if not isinstance(value, bool | int | str):
        raise DataError(
            f"{row}: {settings.label_field} is {value!r}, and a class is text, a whole number, true or false. Set "
            "`label_field` to a field of classes."
        )
    name, known = _written(value), settings.label_names
    if known is None or name in known:
        return name
    is_place = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(known)
    # Places among numbers would make one class of two: 0 and 1 of the classes 1, 2 and 3.
    if is_place and not any(other.removeprefix("-").isdecimal() for other in known):
        return known[int(value)]
    raise DataError(
        f"{row}: {settings.label_field} is {value!r}, which is none of `labels` ({', '.join(known)}). Add it there, or "
        "leave the row out."
    )


def _written(label: bool | int | str) -> str:
    """As YAML writes it."""
    return str(label).lower() if isinstance(label, bool) else str(label)


def _spooled_texts(spool: DocumentSpool) -> Iterator[str]:
    for written in spool.texts():
        yield from json.loads(written)[1:]


def _build(
    settings: LabelledTextSettings,
    collected: Collected,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    advance: ProgressCallback,
) -> dict[str, Any]:
    spools = {"train": collected.train, "validation": collected.validation}
    counts = {name: Counter(json.loads(text)[0] for text in spool.texts()) for name, spool in spools.items()}
    labels = settings.label_names or _sorted_labels(counts["train"] | counts["validation"])
    _check_classes(labels, counts, settings)
    encoder = PaddingEncoder(tokenizer, settings.context_length, is_pair=settings.text_pair_field is not None)
    splits = {name: _write_split(name, spool, encoder, labels, directory, advance) for name, spool in spools.items()}
    report = LabelledReport(
        **collected.report(encoder.vocab_size), labels=labels, train=splits["train"], validation=splits["validation"]
    )
    content = {
        "format": FORMAT,
        "documents": collected.digest(),
        "tokenizer": tokenizer_digest(tokenizer),
        "padding": encoder.padding,
        "validation_fraction": settings.validation_fraction,
        "seed": settings.seed,
        "labels": labels,
        "splits": [[split.sha256, split.rows_sha256] for split in splits.values()],
    }
    fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return {"fingerprint": fingerprint, "report": report}


def _sorted_labels(found: Counter[str]) -> tuple[str, ...]:
    """Whole numbers by size, all else by the alphabet."""
    try:
        return tuple(sorted(found, key=int))
    except ValueError:
        return tuple(sorted(found))


def _check_classes(labels: tuple[str, ...], counts: dict[str, Counter[str]], settings: LabelledTextSettings) -> None:
    """Refuse what can't be learnt: one class only, or one without a training example; DataError."""
    if len(labels) == 1:
        raise DataError(
            f"All texts have the {settings.label_field} {labels[0]!r}: there is nothing to tell apart. Give texts of "
            "two classes or more, or set `label_field` to another field."
        )
    if missing := [label for label in labels if not counts["train"][label]]:
        held_out = counts["validation"][missing[0]]
        raise DataError(
            f"The class {missing[0]!r} has no training example ({held_out} held out), so that it can't be learnt. Give "
            "more of them, a smaller validation_fraction or another seed, or leave the class out."
        )


def _write_split(
    name: str,
    spool: DocumentSpool,
    encoder: PaddingEncoder,
    labels: tuple[str, ...],
    directory: Path,
    advance: ProgressCallback,
) -> LabelledSplitReport:
    writer = ContextWriter(directory / f"{name}.npy", encoder.length, token_dtype(encoder.vocab_size))
    numbers = {label: number for number, label in enumerate(labels)}
    facts: list[tuple[int, int, int]] = []
    cut = 0
    for batch in _batches(spool):
        for (label, *_), padded in zip(batch, encoder.encode([texts for _, *texts in batch]), strict=True):
            writer.write(padded.ids)
            facts.append((numbers[label], padded.tokens, padded.second))
            cut += padded.is_cut
        advance(name, len(facts), len(spool))
    _, digest = writer.finish()
    array = np.array(facts, dtype=np.int32)
    with (directory / f"{name}-labels.npy").open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    return LabelledSplitReport(
        examples=len(array),
        labels=tuple(np.bincount(array[:, LABEL], minlength=len(labels)).tolist()),
        cut=cut,
        tokens=int(array[:, TOKENS].sum()),
        sha256=digest,
        rows_sha256=hashlib.sha256(array.tobytes()).hexdigest(),
    )


def _batches(spool: DocumentSpool) -> Iterator[list[list[str]]]:
    """[label, text, ...] of the documents, many at a time."""
    batch: list[list[str]] = []
    waiting = 0
    for written in spool.texts():
        batch.append(json.loads(written))
        waiting += len(written)
        if len(batch) == _BATCH or waiting >= _BATCH_CHARACTERS:
            yield batch
            batch, waiting = [], 0
    if batch:
        yield batch


DATASET = DatasetKind("labelled_text", LabelledTextSettings, prepare)
