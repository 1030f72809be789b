"""Texts, or pairs of texts, with a class for each: read once, split by content, and kept as rows of equal length.

Texts are cut at the end to `context_length` tokens, special ones included (see `padding`), and shorter ones are padded
to it, so that every batch has one shape, and prices and books are exact; how much is padding is told in the report.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from auxin.data.collecting import Collected
from auxin.data.dataset import DatasetKind, ProgressCallback, SampleForm, SplitName
from auxin.data.labelled_source import LabelledTextSettings, labelled_documents, labelled_form
from auxin.data.labels import classes_of, counted
from auxin.data.packing import ContextWriter, DocumentSpool, token_dtype
from auxin.data.padding import PaddingEncoder, padding_tokenizer
from auxin.data.prepared_text import PreparedText, TextManifest, TextReport, with_tokenizer
from auxin.data.preparing import Manifest, Steps, open_array, prepare_folder, write_array
from auxin.data.tokenizer import tokenizer_digest
from auxin.settings import Settings

FORMAT = 1
_BATCH, _BATCH_CHARACTERS = 1024, 2**21
"""Texts encoded at a time, and about how many characters of them."""
LABEL, TOKENS = 0, 1
"""Columns of what is kept beside a text's ids: its class, its tokens without padding, and where the second text
begins."""


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


class LabelledReport(TextReport):
    """What became of every row of the source, and what the splits hold."""

    labels: tuple[str, ...]
    """The classes, in the order of their numbers."""
    train: LabelledSplitReport
    validation: LabelledSplitReport


class _Manifest(TextManifest):
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
    write_array(directory / f"{name}-labels.npy", array)
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
