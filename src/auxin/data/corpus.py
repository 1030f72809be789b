"""Prepare a corpus once: read, deduplicate, split, tokenize, pack; then it is a folder of memory-mapped tokens."""

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from transformers import PreTrainedTokenizerFast

from auxin.data.collecting import Collected
from auxin.data.dataset import SPLITS, DatasetKind, ProgressCallback, SampleForm, SplitName
from auxin.data.loader import Contexts
from auxin.data.packing import DocumentSpool, SplitReport, pack, token_dtype
from auxin.data.prepared_text import PreparedText, TextManifest, TextReport, with_tokenizer
from auxin.data.preparing import Manifest, Steps, open_array, prepare_folder
from auxin.data.settings import CorpusSettings, packed_form
from auxin.data.sources import read_documents
from auxin.data.tokenizer import load_tokenizer, plain_backend, tokenizer_digest, vocabulary_fields
from auxin.errors import DataError

FORMAT = 1


class CorpusReport(TextReport):
    """What became of every document of the source, and what the splits hold."""

    train: SplitReport
    validation: SplitReport


class _Manifest(TextManifest):
    """What corpus.json holds."""

    settings: CorpusSettings
    separator: int
    report: CorpusReport


class PackedData(PreparedText[_Manifest]):
    """A prepared corpus: two memory-mapped token arrays, their tokenizer, and what they were made of."""

    noun: ClassVar[str] = "corpus"
    manifest_file: ClassVar[str] = "corpus.json"
    manifest_class: ClassVar[type[Manifest]] = _Manifest
    version: ClassVar[int] = FORMAT

    def _open(self) -> None:
        self.train = self._array("train", self.report.train)
        """Token ids, (num_contexts, context_length), read-only, mapped from disk."""
        self.validation = self._array("validation", self.report.validation)
        """Token ids of the held-out documents, same form."""

    def _array(self, name: str, split: SplitReport) -> np.ndarray:
        shape = (split.contexts, self.context_length)
        return open_array(self.directory / f"{name}.npy", shape, (np.uint16, np.uint32))

    def _digests(self) -> Iterator[tuple[str, np.ndarray, str]]:
        yield "train.npy", self.train, self.report.train.sha256
        yield "validation.npy", self.validation, self.report.validation.sha256

    @property
    def settings(self) -> CorpusSettings:
        """The settings that it was prepared with."""
        return self.manifest.settings

    @property
    def report(self) -> CorpusReport:
        """Documents kept, removed and skipped, and the size of the splits."""
        return self.manifest.report

    @cached_property
    def form(self) -> SampleForm:
        """Contexts of tokens."""
        return packed_form(self.settings, self.vocab_size, self.tokenizer())

    def split(self, name: SplitName) -> Contexts:
        """The contexts of one split.

        Raises:
            DataError: it was not needed when the corpus was prepared, and has none.
        """
        contexts = getattr(self, name)
        if not len(contexts):
            raise DataError(
                f"{self.directory} was prepared without a context in the {name} split. Prepare the corpus in another "
                "folder, and with more text."
            )
        return Contexts(contexts)

    @property
    def bytes_per_unit(self) -> float:
        """UTF-8 bytes of text per token of the packed validation split.

        Separators are among the tokens and count zero bytes; the dropped tail is in neither number. So bits per byte =
        (nats per token) / ln 2 / bytes_per_unit.
        """
        return self.report.validation.packed_bytes / self.report.validation.tokens

    def describe(self) -> dict[str, str]:
        """What the documents are, and what became of them."""
        return {
            "source": self.settings.source,
            "documents": f"{self.report.documents:,}",
            "left out": self.report.describe_left_out(),
            "vocabulary": f"{self.vocab_size:,}",
            "context length": f"{self.context_length:,}",
            "training tokens": f"{self.report.train.tokens:,}",
            "validation tokens": f"{self.report.validation.tokens:,}",
        }


def prepare(
    settings: CorpusSettings,
    directory: str | Path,
    progress: ProgressCallback | bool = False,
    needed: tuple[SplitName, ...] = SPLITS,
) -> PackedData:
    """Prepare a corpus in `directory`, or open the one that is there; see `prepare_folder`.

    Args:
        settings: the corpus.
        directory: the folder to fill.
        progress: a callback, or True for progress bars.
        needed: the splits of which something is to be read: the others may be empty.

    Raises:
        DataError: the source can't be used, a split that is needed would be empty, or the folder holds something else.
    """
    begin = with_tokenizer(load_tokenizer, DocumentSpool.texts, partial(_build, needed=needed))
    return prepare_folder(Steps(PackedData, read_documents, begin, needed=needed), settings, directory, progress)


def _build(
    settings: CorpusSettings,
    collected: Collected,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    advance: ProgressCallback,
    needed: tuple[SplitName, ...],
) -> dict[str, Any]:
    vocab_size = vocabulary_fields(tokenizer)["vocab_size"]
    backend, separator = plain_backend(tokenizer), int(tokenizer.eos_token_id)

    def packed(name: SplitName, spool: DocumentSpool) -> SplitReport:
        path, dtype = directory / f"{name}.npy", token_dtype(vocab_size)
        length = settings.context_length

        def told(done: int) -> None:
            advance(name, done, spool.size)

        return pack(spool, backend, separator, path, length, dtype, told, name in needed)

    report = CorpusReport(
        **collected.report(),
        vocab_size=vocab_size,
        train=packed("train", collected.train),
        validation=packed("validation", collected.validation),
    )
    fingerprint = _fingerprint(settings, collected.digest(), tokenizer_digest(tokenizer), report)
    return {"fingerprint": fingerprint, "report": report, "separator": separator}


def _fingerprint(settings: CorpusSettings, documents: str, tokenizer: str, report: CorpusReport) -> str:
    content = {
        "format": FORMAT,
        "documents": documents,
        "tokenizer": tokenizer,
        "context_length": settings.context_length,
        "validation_fraction": settings.validation_fraction,
        "seed": settings.seed,
        "train": report.train.sha256,
        "validation": report.validation.sha256,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


DATASET = DatasetKind("text", CorpusSettings, prepare)
