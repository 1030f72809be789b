"""Tokenized shards on the disk: made when they are needed, checked when they are opened, removed when room is needed.

The folder holds an array of contexts for each shard that is kept, and `index.jsonl`: a line for each shard that was
ever tokenized, with what came of it. A line takes little room and stays, so that how many contexts a shard has, and by
that what a position in the data means, is known without its tokens. An array appears whole, by renaming; it is compared
with the line's sum when it is opened. So is each line with its own, and what does not fit is made anew. Several
processes may use one folder: a shard is tokenized by one, while the others wait for it."""

import contextlib
import hashlib
import json
import os
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from auxin.data.collecting import document_key, is_validation
from auxin.data.packing import ContextWriter
from auxin.data.preparing import array_digest
from auxin.data.settings import SourceSettings
from auxin.data.sources import Document
from auxin.data.tokenizer import encode_documents
from auxin.errors import ConfigError, DataError, reason
from auxin.locks import in_turn
from auxin.settings import Settings

INDEX = "index.jsonl"
_LOCKS = 1024
"""Lock files: shards whose numbers differ by a multiple of it wait for each other."""
_BATCH_CHARACTERS = 2**19
"""Of documents that are encoded at a time."""


class ShardRecord(Settings):
    """What came of a shard."""

    shard: int
    """Its number."""
    contexts: int
    """Rows of its array; one without any has no array."""
    dropped_tokens: int
    """Tokens behind the last whole context, which are left out."""
    documents: int
    """Documents packed."""
    bytes: int
    """UTF-8 bytes of them."""
    held_out: int
    """Documents of the validation side."""
    duplicates: int
    """Documents that stand in the shard once more."""
    skipped: dict[str, int]
    """Documents that are none, by reason."""
    documents_sha256: str
    """Digest of the documents, held-out ones too, in order."""
    tokens_sha256: str
    """Digest of the packed tokens."""


class Cutting:
    """How the documents of a shard become contexts.

    Args:
        settings: the split.
        backend: encodes a text; special tokens in it are text.
        separator: id that ends each document.
        context_length: tokens of a context.
        dtype: of the arrays.
    """

    def __init__(
        self, settings: SourceSettings, backend: Tokenizer, separator: int, context_length: int, dtype: np.dtype[Any]
    ) -> None:
        self._settings, self._backend, self._separator = settings, backend, separator
        self.context_length, self.dtype = context_length, dtype

    def cut(self, number: int, documents: Iterable[Document], path: Path) -> ShardRecord:
        """Write the contexts of shard `number` to `path`.

        Memory holds one document and a part of the tokens at a time, and a digest of each document.
        """
        writer, counts = ContextWriter(path, self.context_length, self.dtype), _Counts(self._settings)
        for _, ids, is_last in encode_documents(self._backend, counts.learnt(documents), _BATCH_CHARACTERS):
            writer.write([*ids, self._separator] if is_last else ids)
        dropped, digest = writer.finish()
        return ShardRecord(
            shard=number,
            contexts=writer.contexts,
            dropped_tokens=dropped,
            documents=counts.documents,
            bytes=counts.bytes,
            held_out=counts.held_out,
            duplicates=counts.duplicates,
            skipped=dict(counts.skipped),
            documents_sha256=counts.digest.hexdigest(),
            tokens_sha256=digest,
        )

    def documents_digest(self, documents: Iterable[Document]) -> str:
        """The digest that `cut` would record of these documents."""
        counts = _Counts(self._settings)
        for _ in counts.learnt(documents):
            pass
        return counts.digest.hexdigest()


class _Counts:
    """What becomes of the documents of a shard."""

    def __init__(self, settings: SourceSettings) -> None:
        self._settings = settings
        self.documents = self.bytes = self.held_out = self.duplicates = 0
        self.skipped = Counter[str]()
        self.digest = hashlib.sha256()

    def learnt(self, documents: Iterable[Document]) -> Iterator[str]:
        """The texts of the training side, each once."""
        seen: set[bytes] = set()
        for document in documents:
            if document.data is None:
                self.skipped[str(document.skipped)] += 1
                continue
            key = document_key(document.data, self._settings.seed)
            self.digest.update(key)
            if key in seen:
                self.duplicates += 1
                continue
            seen.add(key)
            if is_validation(key, self._settings):
                self.held_out += 1
                continue
            self.documents += 1
            self.bytes += len(document.data)
            yield document.data.decode("utf-8")


class ShardCache:
    """The tokenized shards of a stream.

    Args:
        folder: theirs; made where it is missing.
        read: the documents of a shard.
        cutting: what makes contexts of them.
        named: how messages call a shard.
        most_open: arrays that are mapped at a time. One whose file somebody removes takes room as long as it is.
    """

    def __init__(
        self,
        folder: Path,
        read: Callable[[int], Iterable[Document]],
        cutting: Cutting,
        named: Callable[[int], str],
        most_open: int,
    ) -> None:
        self.folder, self._read, self._cutting, self._named = folder, read, cutting, named
        self._most_open = most_open
        self._records: dict[int, ShardRecord] = {}
        self._read_up_to = 0
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()

    def contexts(self, number: int) -> int:
        """How many contexts a shard has; it is tokenized where nobody has done that yet.

        Raises:
            DataError: the shard can't be read, or has changed.
        """
        if (record := self.known(number)) is None:
            record = self.ensure(number)
        return record.contexts

    def known(self, number: int) -> ShardRecord | None:
        """What came of a shard, as far as it was ever tokenized."""
        if number not in self._records:
            self._read_index()
        return self._records.get(number)

    def records(self) -> Collection[ShardRecord]:
        """Of all shards that were ever tokenized."""
        self._read_index()
        return self._records.values()

    def ensure(self, number: int) -> ShardRecord:
        """Make sure that a shard's contexts are on the disk, and whole.

        Raises:
            DataError: as `contexts`.
        """
        record = self.known(number)
        if record is not None and (not record.contexts or self._whole(record) is not None):
            return record
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with in_turn(self.folder / f".lock-{number % _LOCKS}"):
                record = self.known(number)
                if record is not None and (not record.contexts or self._whole(record) is not None):
                    return record
                return self._make(number, record)
        except OSError as error:
            raise DataError(
                f"The tokens of {self._named(number)} could not be written to {self.folder}: {reason(error)}. Free "
                "space on the disk, then go on."
            ) from error

    def array(self, number: int) -> np.ndarray:
        """Token ids of a shard, (contexts, context_length), read-only, mapped from the disk.

        Raises:
            DataError: as `contexts`.
        """
        while number not in self._open:  # another process may remove it at once, for its own shards
            found = self._whole(self.ensure(number))
            if found is not None:
                self._open[number] = found
                with contextlib.suppress(OSError):
                    os.utime(self._path(number))
        self._open.move_to_end(number)
        while len(self._open) > self._most_open:
            self._open.popitem(last=False)
        return self._open[number]

    def keep(self, needed: Collection[int], limit: int) -> None:
        """Remove the shards that were not used for longest until the others take `limit` bytes at most.

        Args:
            needed: shards that stay in any case.
            limit: bytes.
        """
        for number in [number for number in self._open if number not in needed]:
            del self._open[number]
        found = []
        with contextlib.suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.name.endswith(".npy") and not entry.name.startswith("."):
                        found.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.name))
        total = sum(size for _, size, _ in found)
        stay = {self._path(number).name for number in needed}
        for _, size, name in sorted(found):
            if total <= limit:
                return
            if name not in stay:
                (self.folder / name).unlink(missing_ok=True)
                total -= size

    def refuse_other_documents(self, numbers: Iterable[int]) -> None:
        """Refuse shards that were tokenized before, and whose documents are other ones now.

        Raises:
            DataError: one is.
        """
        for number in numbers:
            record = self.known(number)
            if record is not None and record.documents_sha256 != self._cutting.documents_digest(self._read(number)):
                raise self._changed(number)

    # The arrays.

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08}.npy"

    def _whole(self, record: ShardRecord) -> np.ndarray | None:
        """The array of a shard as it was written; None where it is not there, or damaged."""
        path = self._path(record.shard)
        shape = (record.contexts, self._cutting.context_length)
        try:
            array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
            if (
                array.shape == shape
                and array.dtype == self._cutting.dtype
                and array_digest(array) == record.tokens_sha256
            ):
                return array
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError):
            pass
        warnings.warn(f"{path} is damaged, and its shard is tokenized again.", stacklevel=1)
        path.unlink(missing_ok=True)
        return None

    def _make(self, number: int, before: ShardRecord | None) -> ShardRecord:
        path = self._path(number)
        # One name for all, so that what a dead process has left is written over.
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            record = self._cutting.cut(number, self._read(number), temporary)
            if before is not None and before != record:
                raise self._changed(number)
            if record.contexts:
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        if before is None:
            self._write_index(record)
        return record

    def _changed(self, number: int) -> DataError:
        return DataError(
            f"{self._named(number)} has changed since it was first tokenized for {self.folder}. Put it back as it was, "
            "or prepare the data anew in another folder."
        )

    # The index.

    def _read_index(self) -> None:
        """Take over the lines that others have written."""
        path = self.folder / INDEX
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self._read_up_to:
                self._read_up_to = 0  # somebody has removed the folder meanwhile
            file.seek(self._read_up_to)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read_up_to += len(line)
                if (record := _parsed(line)) is not None:
                    self._records[record.shard] = record

    def _write_index(self, record: ShardRecord) -> None:
        path = self.folder / INDEX
        with in_turn(self.folder / ".lock-index"), path.open("a+b") as file:
            end = file.seek(0, os.SEEK_END)
            if end:  # a process that was killed may have left half a line
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(_written(record))
            file.flush()
            os.fsync(file.fileno())
        self._records[record.shard] = record


def _written(record: ShardRecord) -> bytes:
    text = record.model_dump_json()
    return json.dumps([json.loads(text), hashlib.sha256(text.encode()).hexdigest()]).encode() + b"\n"


def _parsed(line: bytes) -> ShardRecord | None:
    """What a line of the index says; None where it is damaged."""
    with contextlib.suppress(ValueError, TypeError, ConfigError):
        values, digest = json.loads(line)
        record = ShardRecord.parse(values)
        if hashlib.sha256(record.model_dump_json().encode()).hexdigest() == digest:
            return record
    return None
