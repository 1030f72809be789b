"""Questions whose answers are parts of a text: read once, split by the texts, and kept as rows of equal length.

All questions about a text lie on one side of the split, so that no held-out answer stands in a text that was learnt.
What is left out for its length is counted: there are no windows over texts that are too long; see `answer_encoder`.
"""

import json
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from auxin.data.answer_encoder import AnswerEncoder
from auxin.data.collecting import Collected
from auxin.data.dataset import DatasetKind, ProgressCallback, SampleForm, SplitName
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
from auxin.data.padding import Padded, padding_tokenizer
from auxin.data.prepared_text import with_tokenizer
from auxin.data.preparing import Manifest, Steps, prepare_folder
from auxin.data.question_source import (
    ANSWER,
    CONTEXT,
    LONGEST,
    Question,
    QuestionAnsweringSettings,
    question_documents,
    question_form,
)
from auxin.errors import DataError

FORMAT = 1


class QuestionSplitReport(PaddedSplitReport):
    """What one split holds."""

    left_out: dict[str, int]
    """Questions that its rows can't hold, by reason."""
    repeated: int
    """Those whose answers stand at several places of their context, of which the first was taken."""


class QuestionReport(PaddedReport):
    """What became of every row of the source, and what the splits hold."""

    train: QuestionSplitReport
    validation: QuestionSplitReport


class _Manifest(PaddedManifest):
    """What question_answering.json holds."""

    settings: QuestionAnsweringSettings
    report: QuestionReport


class QuestionRows(PaddedRows):
    """Questions with their contexts and answers as a split of samples.

    Facts of a question are the first token of its answer and the last, the first token of its context and the one
    behind the last, its length and the start of the second text as the model counts it.
    """

    def _wanted(self, facts: Tensor) -> dict[str, Tensor]:
        start, end, first, behind = facts[:, :4].unbind(1)
        places = torch.arange(self.tokens.shape[1])
        context = (places >= first[:, None]) & (places < behind[:, None])
        return {CONTEXT: context.long(), **dict(zip(ANSWER, (start, end), strict=True))}


class QuestionData(PaddedText[_Manifest]):
    """Prepared questions: two memory-mapped arrays of tokens with where the answers lie, and what they were made of."""

    noun: ClassVar[str] = "set of questions"
    manifest_file: ClassVar[str] = "question_answering.json"
    manifest_class: ClassVar[type[Manifest]] = _Manifest
    version: ClassVar[int] = FORMAT
    facts: ClassVar[str] = "answers"
    columns: ClassVar[int] = 6

    @property
    def settings(self) -> QuestionAnsweringSettings:
        """The settings that they were prepared with."""
        return self.manifest.settings

    @property
    def report(self) -> QuestionReport:
        """Rows kept, removed and skipped, and what the splits hold."""
        return self.manifest.report

    @cached_property
    def form(self) -> SampleForm:
        """Questions with answers."""
        return question_form(self.settings, self.tokenizer())

    def split(self, name: SplitName) -> QuestionRows:
        """The questions of one split."""
        return QuestionRows(*self._arrays[name], self.form.tensors)

    def describe(self) -> dict[str, str]:
        """What the questions are, and what became of the others."""
        report, splits = self.report, (self.report.train, self.report.validation)
        left_out = Counter[str]()
        for split in splits:
            left_out.update(split.left_out)
        parts = [report.describe_left_out(), *(f"{count:,} for their length: {why}" for why, count in left_out.items())]
        repeated = sum(split.repeated for split in splits)
        tokens = np.concatenate([facts[:, 1] - facts[:, 0] + 1 for _, facts in self._arrays.values()])
        return {
            "source": self.settings.source,
            "examples": f"{sum(split.examples for split in splits):,}",
            "left out": "; ".join(parts),
            "answers at several places": f"{repeated:,}, of which the first is taken",
            "tokens of the longest answer": f"{tokens.max():,}; {(tokens > LONGEST).sum():,} answers have more than "
            f"{LONGEST}, and no measure finds them",
            "vocabulary": f"{self.vocab_size:,}",
            "context length": self.describe_length("contexts"),
            "training examples": f"{report.train.examples:,}",
            "validation examples": f"{report.validation.examples:,}",
        }


def prepare(
    settings: QuestionAnsweringSettings, directory: str | Path, progress: ProgressCallback | bool = False
) -> QuestionData:
    """Prepare questions in `directory`, or open those that are there; see `prepare_folder`.

    Of rows with the same question, context and answer one is kept; of rows with another answer the first is kept and
    the others are reported.

    Raises:
        DataError: the source can't be used, a split would be empty, or the folder holds something else.
    """
    steps = Steps(QuestionData, question_documents, with_tokenizer(padding_tokenizer, _spooled_texts, _build))
    return prepare_folder(steps, settings, directory, progress)


def _spooled_texts(spool: DocumentSpool) -> Iterator[str]:
    for written in spool.texts():
        yield from json.loads(written)[:2]


def _build(
    settings: QuestionAnsweringSettings,
    collected: Collected,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    advance: ProgressCallback,
) -> dict[str, Any]:
    spools = {"train": collected.train, "validation": collected.validation}
    encoder = AnswerEncoder(tokenizer, settings.context_length)
    splits = {name: _write_split(name, spool, encoder, directory, advance) for name, spool in spools.items()}
    report = QuestionReport(
        **collected.report(), vocab_size=encoder.vocab_size, train=splits["train"], validation=splits["validation"]
    )
    fingerprint = padded_fingerprint(FORMAT, settings, collected, tokenizer, encoder, splits)
    return {"fingerprint": fingerprint, "report": report}


def _write_split(
    name: str, spool: DocumentSpool, encoder: AnswerEncoder, directory: Path, advance: ProgressCallback
) -> QuestionSplitReport:
    left_out, repeated = Counter[str](), 0

    def rows() -> Iterator[tuple[Padded, tuple[int, ...]]]:
        nonlocal repeated
        for batch in json_batches(spool, name, advance):
            questions = [Question(*values) for values in batch]
            for one, found in zip(questions, encoder.answers(questions), strict=True):
                if isinstance(found, str):
                    left_out[found] += 1
                else:
                    repeated += one.places > 1
                    yield found.padded, (*found.answer, *found.context)

    _, report = write_padded(QuestionData, directory, name, encoder, rows())
    if not report["examples"]:
        reasons = "; ".join(f"{count:,}: {why}" for why, count in left_out.items())
        raise DataError(
            f"context_length: with {encoder.length} tokens no question of the {name} split is left ({reasons}). Give "
            "more, or shorter texts."
        )
    return QuestionSplitReport(**report, left_out=dict(left_out), repeated=repeated)


DATASET = DatasetKind("question_answering", QuestionAnsweringSettings, prepare)
