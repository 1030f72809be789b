"""Prepare a corpus once: read, deduplicate, split, tokenize, pack; then it is a folder of memory-mapped tokens."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress, TaskID
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from auxin.data.dataset import DatasetKind, ProgressCallback, SampleForm, SplitName
from auxin.data.loader import Contexts
from auxin.data.packing import DocumentSpool, SplitReport, pack, token_dtype
from auxin.data.settings import CorpusSettings, packed_form
from auxin.data.sources import Document, read_documents, source_signature
from auxin.data.tokenizer import (
    load_tokenizer,
    plain_backend,
    tokenizer_digest,
    train_tokenizer,
)
from auxin.errors import DataError
from auxin.files import flush, write_text
from auxin.settings import Settings

FORMAT = 1
_MANIFEST = "corpus.json"
_MAX_EXAMPLES = 10
_NAMES_SHOWN = 3
"""Names of skipped documents that are shown for each reason."""


class Skipped(Settings):
    """Documents that were left out for one reason."""

    count: int
    examples: tuple[str, ...]
    """The names of the first of them."""


class CorpusReport(Settings):
    """What became of every document of the source, and what the splits hold."""

    documents: int
    """Documents kept, both splits."""
    duplicates: int
    """Documents removed because an earlier one has the same bytes."""
    skipped: dict[str, Skipped]
    """Documents left out, by reason."""
    limit: str | None
    """The limit (`max_documents` or `max_bytes`) at which reading stopped; None when all was read."""
    vocab_size: int
    """The tokenizer's largest id plus one: a trained one can have fewer entries than asked for."""
    train: SplitReport
    validation: SplitReport


class _Manifest(Settings):
    """What corpus.json holds."""

    format: int
    fingerprint: str
    settings: CorpusSettings
    source_signature: str | None
    documents_digest: str
    tokenizer_digest: str
    loaded_tokenizer_digest: str | None
    separator: int
    report: CorpusReport


class PackedData:
    """A prepared corpus: two memory-mapped token arrays, their tokenizer, and what they were made of."""

    def __init__(self, directory: Path, manifest: _Manifest) -> None:
        self.directory = directory
        self._manifest = manifest
        self.train = _open_array(directory / "train.npy", manifest.report.train, manifest.settings.context_length)
        """Token ids, (num_contexts, context_length), read-only, mapped from disk."""
        self.validation = _open_array(
            directory / "validation.npy", manifest.report.validation, manifest.settings.context_length
        )
        """Token ids of the held-out documents, same form."""

    @classmethod
    def load(cls, directory: str | Path) -> "PackedData":
        """Open a prepared folder; sizes and shapes are checked, contents are not (see `verify`).

        Raises:
            DataError: no prepared corpus there, or a file of it is missing or of another size.
        """
        directory = Path(directory)
        path = directory / _MANIFEST
        try:
            manifest = _Manifest.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise DataError(f"{directory} holds no prepared corpus ({_MANIFEST} is missing). Prepare one.") from error
        except (ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is damaged or of another version: {error}. Delete the folder.") from error
        if manifest.format != FORMAT:
            raise DataError(f"{path} has format {manifest.format}, this version reads {FORMAT}. Prepare it again.")
        data = cls(directory, manifest)
        if not (directory / "tokenizer" / "tokenizer.json").is_file():
            raise DataError(
                f"{directory / 'tokenizer'} is missing its tokenizer. Delete {directory} and prepare again."
            )
        return data

    @property
    def settings(self) -> CorpusSettings:
        """The settings that it was prepared with."""
        return self._manifest.settings

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the documents, tokenizer, split, order and packing. Where the files lie does not matter."""
        return self._manifest.fingerprint

    @cached_property
    def form(self) -> SampleForm:
        """Contexts of tokens."""
        return packed_form(self.settings, self.vocab_size, self.tokenizer())

    def split(self, name: SplitName) -> Contexts:
        """The contexts of one split."""
        return Contexts(getattr(self, name))

    @property
    def context_length(self) -> int:
        """Tokens per row."""
        return self._manifest.settings.context_length

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer; every token id is below it."""
        return self._manifest.report.vocab_size

    @property
    def report(self) -> CorpusReport:
        """Documents kept, removed and skipped, and the size of the splits."""
        return self._manifest.report

    @property
    def bytes_per_unit(self) -> float:
        """UTF-8 bytes of text per token of the packed validation split.

        Separators are among the tokens and count zero bytes; the dropped tail is in neither number. So bits per byte =
        (nats per token) / ln 2 / bytes_per_unit.
        """
        return self._manifest.report.validation.packed_bytes / self._manifest.report.validation.tokens

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Load the tokenizer."""
        return load_tokenizer(self.directory / "tokenizer")

    def processor(self) -> PreTrainedTokenizerFast:
        """The tokenizer."""
        return self.tokenizer()

    def describe(self) -> dict[str, str]:
        """What the documents are, and what became of them."""
        return {
            "source": self.settings.source,
            "documents": f"{self.report.documents:,}",
            "left out": describe_left_out(self.report),
            "vocabulary": f"{self.vocab_size:,}",
            "context length": f"{self.context_length:,}",
            "training tokens": f"{self.report.train.tokens:,}",
            "validation tokens": f"{self.report.validation.tokens:,}",
        }

    def verify(self) -> None:
        """Read everything and compare it with the recorded digests.

        Raises:
            DataError: a file's content has changed.
        """
        for name, split in (("train", self.report.train), ("validation", self.report.validation)):
            array = self.train if name == "train" else self.validation
            digest = hashlib.sha256()
            for start in range(0, len(array), 4096):
                digest.update(array[start : start + 4096].tobytes())
            if digest.hexdigest() != split.sha256:
                raise DataError(f"{self.directory / name}.npy is damaged. Delete {self.directory} and prepare again.")
        if tokenizer_digest(self.tokenizer()) != self._manifest.tokenizer_digest:
            raise DataError(f"{self.directory / 'tokenizer'} has changed. Delete {self.directory} and prepare again.")


def describe_left_out(report: CorpusReport) -> str:
    """What of the source is not in the corpus, in one line: duplicates, skipped documents with examples, the limit."""
    parts = [f"{report.duplicates:,} duplicates"]
    for reason, skipped in report.skipped.items():
        examples = ", ".join(skipped.examples[:_NAMES_SHOWN]) + (", ..." if skipped.count > _NAMES_SHOWN else "")
        parts.append(f"{skipped.count:,} skipped: {reason} ({examples})")
    if report.limit is not None:
        parts.append(f"everything after {report.limit} was reached")
    return "; ".join(parts)


def prepare(settings: CorpusSettings, directory: str | Path, progress: ProgressCallback | bool = False) -> PackedData:
    """Prepare a corpus in `directory`, or open the one that is there.

    A finished folder of the same settings is opened again, after its files were checked by size and the source by
    name, size and time (then by content). The folder appears complete or not at all; a second process waits.

    Args:
        settings: the corpus.
        directory: the folder to fill; it must not exist, be empty, or hold a corpus of the same settings.
        progress: a callback, or True for progress bars.

    Raises:
        DataError: the source can't be used, a split would be empty, or the folder holds something else.
    """
    directory = Path(directory).absolute()
    if directory.exists() and not directory.is_dir():
        raise DataError(f"{directory} is a file. Give a folder for the prepared corpus.")
    for path in settings.paths:
        if path.is_dir() and directory.is_relative_to(path.absolute()):
            raise DataError(f"{directory} lies inside {path}, so that its files would become documents. Give another.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.parent / f".{directory.name}.lock"):
        if directory.exists() and any(directory.iterdir()):
            return _reuse(settings, directory)
        partial = directory.parent / f".{directory.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed: the lock is ours
        partial.mkdir()
        try:
            with _progress(progress) as advance:
                _build(settings, partial, advance)
            os.replace(partial, directory)
            flush(directory.parent)
        except OSError as error:
            raise DataError(
                f"The corpus could not be written to {directory}: {error}. Nothing was left there."
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return PackedData.load(directory)


def _build(settings: CorpusSettings, directory: Path, advance: ProgressCallback) -> None:
    # Read before the documents: a file that changes meanwhile is then noticed at the next use.
    signature = source_signature(settings)
    loaded = load_tokenizer(settings.tokenizer) if settings.tokenizer else None
    collected = _collect(settings, directory, advance)
    _save_tokenizer(loaded, collected.train, settings, directory / "tokenizer", advance)
    # What is read back later encodes the documents: saving may normalize a loaded tokenizer.
    tokenizer = load_tokenizer(directory / "tokenizer")
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    backend, separator = plain_backend(tokenizer), int(tokenizer.eos_token_id)
    dtype = token_dtype(vocab_size)
    splits = {
        name: _pack_split(name, spool, backend, separator, directory, settings, dtype, advance)
        for name, spool in (("train", collected.train), ("validation", collected.validation))
    }
    for spool in (collected.train, collected.validation):
        spool.path.unlink()
    report = CorpusReport(
        documents=len(collected.train) + len(collected.validation),
        duplicates=collected.duplicates,
        skipped={reason: Skipped(count=n, examples=tuple(names)) for reason, (n, names) in collected.skipped.items()},
        limit=collected.limit,
        vocab_size=vocab_size,
        train=splits["train"],
        validation=splits["validation"],
    )
    manifest = _Manifest(
        format=FORMAT,
        fingerprint=_fingerprint(settings, collected.digest(), tokenizer_digest(tokenizer), report),
        settings=settings,
        source_signature=signature,
        documents_digest=collected.digest(),
        tokenizer_digest=tokenizer_digest(tokenizer),
        loaded_tokenizer_digest=tokenizer_digest(loaded) if loaded else None,
        separator=separator,
        report=report,
    )
    write_text(directory / _MANIFEST, manifest.model_dump_json(indent=1))


def _save_tokenizer(
    loaded: PreTrainedTokenizerFast | None,
    documents: DocumentSpool,
    settings: CorpusSettings,
    path: Path,
    advance: ProgressCallback,
) -> None:
    texts = _announced(documents, advance)
    tokenizer = loaded or train_tokenizer(texts, settings.vocab_size, settings.context_length)
    tokenizer.save_pretrained(path)


class _Collected:
    """The distinct documents of a source, split and spooled, and a record of the others."""

    def __init__(self, directory: Path) -> None:
        self.train = DocumentSpool(directory / "train.spool")
        self.validation = DocumentSpool(directory / "validation.spool")
        self.duplicates = 0
        self.skipped: dict[str, tuple[int, list[str]]] = {}
        self.limit: str | None = None

    def skip(self, document: Document) -> None:
        count, examples = self.skipped.get(str(document.skipped), (0, []))
        if count < _MAX_EXAMPLES:
            examples.append(document.name)
        self.skipped[str(document.skipped)] = (count + 1, examples)

    def digest(self) -> str:
        return hashlib.sha256(f"{self.train.digest()} {self.validation.digest()}".encode()).hexdigest()


def _collect(settings: CorpusSettings, directory: Path, advance: ProgressCallback) -> _Collected:
    """Read the source once; drop exact duplicates; send each document to its split."""
    collected = _Collected(directory)
    seen: set[bytes] = set()
    size = 0
    for document in read_documents(settings):
        if document.data is None:
            collected.skip(document)
            continue
        key = document_key(document.data, settings.seed)
        if key in seen:
            collected.duplicates += 1
            continue
        if settings.max_documents is not None and len(seen) >= settings.max_documents:
            collected.limit = "max_documents"
            break
        if settings.max_bytes is not None and size + len(document.data) > settings.max_bytes:
            collected.limit = "max_bytes"
            break
        seen.add(key)
        size += len(document.data)
        (collected.validation if is_validation(key, settings) else collected.train).add(key, document.data)
        advance("read", size, None)
    collected.train.finish()
    collected.validation.finish()
    for name, spool in (("train", collected.train), ("validation", collected.validation)):
        if not len(spool):
            raise DataError(_empty_split(name, len(seen), settings, collected))
    return collected


def document_key(data: bytes, seed: int) -> bytes:
    """A document's digest under `seed`: decides its split and its place in it."""
    return hashlib.sha256(b"%d:" % seed + hashlib.sha256(data).digest()).digest()


def is_validation(key: bytes, settings: CorpusSettings) -> bool:
    """Whether the document with this key is held out."""
    return int.from_bytes(key[:8], "big") < settings.validation_fraction * 2**64


def _empty_split(name: str, documents: int, settings: CorpusSettings, collected: _Collected) -> str:
    skipped = ", ".join(f"{count} {reason}" for reason, (count, _) in collected.skipped.items()) or "none"
    found = f"{documents} distinct documents ({collected.duplicates} duplicates; skipped: {skipped})"
    if collected.limit:
        found += f", stopped at {collected.limit}"
    if not documents:
        return f"The source has no usable document: {found}. Give text that is not empty and encoded in UTF-8."
    return (
        f"No document fell into the {name} split at validation_fraction {settings.validation_fraction}: {found}. "
        "Use more documents (the split never cuts one), another validation_fraction, or another seed."
    )


def _pack_split(
    name: str,
    spool: DocumentSpool,
    backend: Tokenizer,
    separator: int,
    directory: Path,
    settings: CorpusSettings,
    dtype: np.dtype[Any],
    advance: ProgressCallback,
) -> SplitReport:
    return pack(
        spool,
        backend,
        separator,
        directory / f"{name}.npy",
        settings.context_length,
        dtype,
        lambda done: advance(name, done, spool.bytes),
    )


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


def _reuse(settings: CorpusSettings, directory: Path) -> PackedData:
    """Open the finished folder if it is of the same settings and its source has not changed."""
    if not (directory / _MANIFEST).is_file():
        raise DataError(f"{directory} is not empty and holds no prepared corpus. Give an empty or a new folder.")
    data = PackedData.load(directory)
    manifest = data._manifest
    if manifest.settings != settings:
        old, new = manifest.settings.model_dump(mode="json"), settings.model_dump(mode="json")
        changes = ", ".join(f"{key}: {old[key]!r} there, {new[key]!r} asked" for key in new if old[key] != new[key])
        raise DataError(f"{directory} holds a corpus of other settings ({changes}). Give another folder or delete it.")
    try:
        signature = source_signature(settings)
        tokenizer = tokenizer_digest(load_tokenizer(settings.tokenizer)) if settings.tokenizer else None
        changed = signature != manifest.source_signature and _documents_digest(settings) != manifest.documents_digest
    except DataError as error:
        warnings.warn(f"{directory} is used as prepared; its source can't be compared any more: {error}", stacklevel=3)
        return data
    if changed:
        raise DataError(
            f"The source has changed since {directory} was prepared from it. Delete the folder to prepare it again, "
            "or give another one."
        )
    if tokenizer != manifest.loaded_tokenizer_digest:
        raise DataError(f"The tokenizer {settings.tokenizer} is not the one that {directory} was prepared with.")
    return data


def _documents_digest(settings: CorpusSettings) -> str:
    """The digest of the source's documents as `_build` records it."""
    with tempfile.TemporaryDirectory() as folder:
        return _collect(settings, Path(folder), lambda stage, done, total: None).digest()


def _open_array(path: Path, split: SplitReport, context_length: int) -> np.ndarray:
    mend = f"Delete {path.parent} and prepare again."
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing. {mend}") from error
    except (ValueError, OSError) as error:
        raise DataError(f"{path} is damaged: {error}. {mend}") from error
    if array.shape != (split.contexts, context_length) or array.dtype not in (np.uint16, np.uint32):
        raise DataError(
            f"{path} is {array.dtype} of shape {array.shape}, expected ({split.contexts}, {context_length}). {mend}"
        )
    return array


def _announced(spool: DocumentSpool, advance: ProgressCallback) -> Iterator[str]:
    for done, text in enumerate(spool.texts()):
        advance("tokenizer", done, len(spool))
        yield text


@contextlib.contextmanager
def _progress(progress: ProgressCallback | bool) -> Iterator[ProgressCallback]:
    if callable(progress):
        yield progress
        return
    # Standard output belongs to what the caller prints; FORCE_COLOR would send the bars to a pipe there.
    console = Console(stderr=True)
    with Progress(console=console, disable=not (progress and console.is_terminal), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(f"corpus: {stage}", total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield advance


DATASET = DatasetKind("text", CorpusSettings, prepare)
