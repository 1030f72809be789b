"""Texts, or pairs of texts, with a class for each: read once, split by content, and kept as rows of equal length.

Texts are cut at the end to `context_length` tokens, special ones included (see `padding`), and shorter ones are padded
to it, so that every batch has one shape, and prices and books are exact; how much is padding is told in the report.
"""

import json
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from auxin.data.collecting import Collected
from auxin.data.dataset import DatasetKind, ProgressCallback, SampleForm, SplitName
from auxin.data.labelled_source import LabelledTextSettings, labelled_documents, labelled_form
from auxin.data.labels import classes_of, counted
from auxin.data.packing import DocumentSpool
from auxin.data.padded_text import (
    PaddedManifest,
    PaddedReport,
    PaddedRows,
    PaddedSplitReport,
    PaddedText,
    json_batches,
    padded_fingerprint,
    write_padded,
)
from auxin.data.padding import Padded, PaddingEncoder, padding_tokenizer
from auxin.data.prepared_text import with_tokenizer
from auxin.data.preparing import Manifest, Steps, prepare_folder

FORMAT = 1
LABEL = 0
"""The column of what is kept beside a text's ids in which its class stands."""


class LabelledSplitReport(PaddedSplitReport):
    """What one split holds."""

    labels: tuple[int, ...]
    """How many of its texts each class has, in the order of the classes."""


class LabelledReport(PaddedReport):
    """What became of every row of the source, and what the splits hold."""

    labels: tuple[str, ...]
    """The classes, in the order of their numbers."""
    train: LabelledSplitReport
    validation: LabelledSplitReport


class _Manifest(PaddedManifest):
    """What labelled_text.json holds."""

    settings: LabelledTextSettings
    report: LabelledReport


class LabelledRows(PaddedRows):
    """Padded texts and their labels as a split of samples.

    Facts of a text are its label, its length and the start of the second text.
    """

    def _wanted(self, facts: Tensor) -> dict[str, Tensor]:
        return {"labels": facts[:, LABEL]}


class LabelledData(PaddedText[_Manifest]):
    """Prepared labelled texts: two memory-mapped arrays of tokens with their labels, and what they were made of."""

    noun: ClassVar[str] = "set of labelled texts"
    manifest_file: ClassVar[str] = "labelled_text.json"
    manifest_class: ClassVar[type[Manifest]] = _Manifest
    version: ClassVar[int] = FORMAT
    facts: ClassVar[str] = "labels"
    columns: ClassVar[int] = 3

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
        return labelled_form(self.settings, self.report.labels, self.tokenizer())

    def split(self, name: SplitName) -> LabelledRows:
        """The texts of one split."""
        return LabelledRows(*self._arrays[name], self.form.tensors)

    def describe(self) -> dict[str, str]:
        """What the texts are, how many each class has, and what became of the others."""
        report = self.report
        return {
            "source": self.settings.source,
            "examples": f"{report.documents:,}",
            "left out": report.describe_left_out(),
            "vocabulary": f"{self.vocab_size:,}",
            "context length": self.describe_length("texts"),
            "training examples": counted(report.train.examples, report.labels, report.train.labels),
            "validation examples": counted(report.validation.examples, report.labels, report.validation.labels),
        }


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
    steps = Steps(LabelledData, labelled_documents, with_tokenizer(padding_tokenizer, _spooled_texts, _build))
    return prepare_folder(steps, settings, directory, progress)


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
    labels = classes_of(settings, counts, "texts", ", or set `label_field` to another field")
    encoder = PaddingEncoder(tokenizer, settings.context_length, is_pair=settings.text_pair_field is not None)
    splits = {name: _write_split(name, spool, encoder, labels, directory, advance) for name, spool in spools.items()}
    report = LabelledReport(
        **collected.report(),
        vocab_size=encoder.vocab_size,
        labels=labels,
        train=splits["train"],
        validation=splits["validation"],
    )
    fingerprint = padded_fingerprint(FORMAT, settings, collected, tokenizer, encoder, splits, labels=labels)
    return {"fingerprint": fingerprint, "report": report}


def _write_split(
    name: str,
    spool: DocumentSpool,
    encoder: PaddingEncoder,
    labels: tuple[str, ...],
    directory: Path,
    advance: ProgressCallback,
) -> LabelledSplitReport:
    numbers = {label: number for number, label in enumerate(labels)}

    def rows() -> Iterator[tuple[Padded, tuple[int, ...]]]:
        for batch in json_batches(spool, name, advance):
            for (label, *_), padded in zip(batch, encoder.encode([texts for _, *texts in batch]), strict=True):
                yield padded, (numbers[label],)

    array, report = write_padded(LabelledData, directory, name, encoder, rows())
    return LabelledSplitReport(**report, labels=tuple(np.bincount(array[:, LABEL], minlength=len(labels)).tolist()))


DATASET = DatasetKind("labelled_text", LabelledTextSettings, prepare)
