"""Pack documents into contexts of equal length, streamed into an .npy file that is memory-mapped afterwards."""

import hashlib
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from tokenizers import Tokenizer

from auxin.data.tokenizer import encode_documents
from auxin.errors import DataError
from auxin.settings import Settings

_BATCH_CHARACTERS = 2**21


class SplitReport(Settings):
    """What one split holds."""

    documents: int
    """Documents packed (the last ones may lie in the dropped tail)."""
    bytes: int
    """UTF-8 bytes of all its documents."""
    contexts: int
    """Rows of the packed array."""
    tokens: int
    """Tokens packed, separators included: contexts times context_length."""
    packed_bytes: int
    """UTF-8 bytes of the text that the packed tokens stand for. A separator counts as zero bytes; the text of the
    dropped tail is not counted, and a character that the cut goes through counts as dropped."""
    dropped_tokens: int
    """Tokens of the tail, fewer than one context, that did not fill a row and were left out."""
    sha256: str
    """Digest of the packed tokens."""


class DocumentSpool:
    """Documents of one split in a file, read back in the order of their keys; only offsets and keys are in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("wb")
        self._entries: list[tuple[bytes, int, int]] = []
        self._end = 0

    def add(self, key: bytes, data: bytes) -> None:
        """Append a document; `key` decides its place."""
        self._file.write(data)
        self._entries.append((key, self._end, len(data)))
        self._end += len(data)

    def finish(self) -> Self:
        """End writing and sort the documents by key."""
        self._file.close()
        self._entries.sort()
        return self

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """UTF-8 bytes of all documents."""
        return self._end

    def contents(self) -> Iterator[bytes]:
        """Yield the documents in order."""
        if not self._entries:
            return
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for _, start, length in self._entries:
                yield content[start : start + length]

    def texts(self) -> Iterator[str]:
        """Yield the documents in order, each as text."""
        return (content.decode("utf-8") for content in self.contents())

    def digest(self) -> str:
        """Hex SHA-256 of the documents' keys in order."""
        digest = hashlib.sha256()
        for key, _, _ in self._entries:
            digest.update(key)
        return digest.hexdigest()


class ContextWriter:
    """Writes a token stream as an (num_contexts, context_length) .npy file of unknown length, in small memory."""

    def __init__(self, path: Path, context_length: int, dtype: np.dtype[Any]) -> None:
        self._file = path.open("wb")
        self._context_length = context_length
        self._dtype = dtype
        self._tail = np.empty(0, dtype)
        self._digest = hashlib.sha256()
        self.contexts = 0
        self._write_header()

    def write(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append tokens; whole contexts go to the file, the rest waits."""
        waiting = np.concatenate([self._tail, np.asarray(ids, self._dtype)])
        whole = len(waiting) - len(waiting) % self._context_length
        if whole:
            content = waiting[:whole].tobytes()
            self._file.write(content)
            self._digest.update(content)
            self.contexts += whole // self._context_length
        self._tail = waiting[whole:]

    def finish(self) -> tuple[int, str]:
        """Close the file; return the number of dropped tokens and the digest of the kept ones."""
        self._file.seek(0)
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return len(self._tail), self._digest.hexdigest()

    def _write_header(self) -> None:
        # NumPy pads the header so that the first axis can grow in place.
        np.lib.format.write_array_header_1_0(
            self._file,
            {"descr": self._dtype.str, "fortran_order": False, "shape": (self.contexts, self._context_length)},
        )


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest little-endian unsigned type of two or four bytes that holds every token id."""
    return np.dtype("<u2") if vocab_size < 65536 else np.dtype("<u4")


def pack(
    spool: DocumentSpool,
    backend: Tokenizer,
    separator: int,
    path: Path,
    context_length: int,
    dtype: np.dtype[Any],
    advance: Callable[[int], None],
    needed: bool = True,
) -> SplitReport:
    """Encode the documents of `spool`, each followed by the separator, into contexts of `context_length` tokens.

    The last tokens that fill no context are dropped and counted. `advance` is told the UTF-8 bytes done so far.

    Raises:
        DataError: the tokens do not fill one context, and one is `needed`.
    """
    writer = ContextWriter(path, context_length, dtype)
    done = total = 0
    recent: deque[tuple[str, int, int]] = deque()  # pieces that may reach into the tail: text, first token, tokens
    for text, ids, is_last in encode_documents(backend, spool.texts(), _BATCH_CHARACTERS):
        writer.write([*ids, separator] if is_last else ids)
        recent.append((text, total, len(ids)))
        total += len(ids) + is_last
        while recent[0][1] + recent[0][2] < total - context_length:
            recent.popleft()
        done += len(text.encode())
        advance(done)
    dropped, digest = writer.finish()
    if writer.contexts == 0 and needed:
        raise DataError(
            f"The {path.stem} split has {total} tokens in {len(spool)} documents, less than one context of "
            f"{context_length}. Use more text, a shorter context_length, or another validation_fraction."
        )
    return SplitReport(
        documents=len(spool),
        bytes=spool.size,
        contexts=writer.contexts,
        tokens=writer.contexts * context_length,
        packed_bytes=spool.size - sum(_dropped_bytes(backend, *entry, total - dropped) for entry in recent),
        dropped_tokens=dropped,
        sha256=digest,
    )


def _dropped_bytes(backend: Tokenizer, text: str, start: int, tokens: int, cut: int) -> int:
    """UTF-8 bytes of `text`, whose `tokens` tokens begin at `start` of the stream, that lie behind the cut."""
    kept = max(0, cut - start)
    if kept >= tokens:
        return 0
    first_dropped_character = backend.encode(text, add_special_tokens=False).offsets[kept][0]
    return len(text[first_dropped_character:].encode())
