"""The distinct documents of a source, each in its split, and what became of the others."""

import hashlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from auxin.data.dataset import SPLITS, ProgressCallback, SplitName
from auxin.data.packing import DocumentSpool
from auxin.data.settings import SourceSettings
from auxin.data.sources import Document
from auxin.errors import DataError
from auxin.settings import Settings

_MAX_EXAMPLES = 10
CONFLICT = "another label or answer than an earlier one of the same content"


class Skipped(Settings):
    """Documents that were left out for one reason."""

    count: int
    examples: tuple[str, ...]
    """The names of the first of them."""


class ReadReport(Settings):
    """What became of every document of the source."""

    documents: int
    """Documents kept, both splits."""
    duplicates: int
    """Documents removed because an earlier one has the same bytes."""
    skipped: dict[str, Skipped]
    """Documents left out, by reason."""
    limit: str | None
    """The limit (`max_documents` or `max_bytes`) at which reading stopped; None when all was read."""

    def describe_left_out(self) -> str:
        """What of the source is not in the data, in one line: duplicates, skipped documents with examples, the
        limit."""
        parts = [f"{self.duplicates:,} duplicates"]
        for reason, skipped in self.skipped.items():
            examples = ", ".join(skipped.examples) + (", ..." if skipped.count > len(skipped.examples) else "")
            parts.append(f"{skipped.count:,} skipped: {reason} ({examples})")
        if self.limit is not None:
            parts.append(f"everything after {self.limit} was reached")
        return "; ".join(parts)


class Collected:
    """The distinct documents of a source, split and spooled, and a record of the others."""

    def __init__(self, directory: Path) -> None:
        self.train = DocumentSpool(directory / "train.spool")
        self.validation = DocumentSpool(directory / "validation.spool")
        self.duplicates = 0
        self.skipped: dict[str, tuple[int, list[str]]] = {}
        self.limit: str | None = None

    def skip(self, name: str, reason: str) -> None:
        """Count a document that is left out."""
        count, examples = self.skipped.get(reason, (0, []))
        if count < _MAX_EXAMPLES:
            # File systems have names that are no text.
            examples.append(name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))
        self.skipped[reason] = (count + 1, examples)

    def digest(self) -> str:
        """Hex SHA-256 of the documents of both splits, in order."""
        return hashlib.sha256(f"{self.train.digest()} {self.validation.digest()}".encode()).hexdigest()

    def report(self) -> dict[str, Any]:
        """The fields of `ReadReport`."""
        return {
            "documents": len(self.train) + len(self.validation),
            "duplicates": self.duplicates,
            "skipped": {reason: Skipped(count=n, examples=tuple(names)) for reason, (n, names) in self.skipped.items()},
            "limit": self.limit,
        }

    def unlink(self) -> None:
        """Remove the spooled documents."""
        for spool in (self.train, self.validation):
            spool.path.unlink()


def collect(
    settings: SourceSettings,
    documents: Iterable[Document],
    directory: Path,
    advance: ProgressCallback,
    noun: str = "document",
    needed: Collection[SplitName] = SPLITS,
) -> Collected:
    """Read the source once; drop exact duplicates; send each document to its split.

    Of documents with the same content and other data, the first is kept.

    Args:
        settings: the split and the limits.
        documents: of the source.
        directory: where they are spooled.
        advance: is told the bytes read so far.
        noun: what messages call a document.
        needed: the splits of which something is to be read.

    Raises:
        DataError: a split that is needed has no document.
    """
    collected = Collected(directory)
    seen: dict[bytes, bytes] = {}
    size = 0
    for document in documents:
        if document.data is None:
            collected.skip(document.name, str(document.skipped))
            continue
        content = document.data if document.content is None else document.content
        key = document_key(content, settings.seed)
        rest = b"" if document.content is None else hashlib.sha256(document.data).digest()
        if key in seen:
            if seen[key] == rest:
                collected.duplicates += 1
            else:
                collected.skip(document.name, CONFLICT)
            continue
        if settings.max_documents is not None and len(seen) >= settings.max_documents:
            collected.limit = "max_documents"
            break
        if settings.max_bytes is not None and size + len(content) > settings.max_bytes:
            collected.limit = "max_bytes"
            break
        seen[key] = rest
        size += len(content)
        side = key if document.side is None else document_key(document.side, settings.seed)
        spool = collected.validation if is_validation(side, settings) else collected.train
        spool.add(key + rest, document.data)
        advance("read", size, None)
    collected.train.finish()
    collected.validation.finish()
    splits: dict[SplitName, DocumentSpool] = {"train": collected.train, "validation": collected.validation}
    for name, spool in splits.items():
        if name in needed and not len(spool):
            raise DataError(_empty_split(name, len(seen), settings, collected, noun))
    return collected


def document_key(data: bytes, seed: int) -> bytes:
    """A document's digest under `seed`: decides its split and its place in it."""
    return hashlib.sha256(b"%d:" % seed + hashlib.sha256(data).digest()).digest()


def is_validation(key: bytes, settings: SourceSettings) -> bool:
    """Whether the document with this key is held out."""
    return int.from_bytes(key[:8], "big") < settings.validation_fraction * 2**64


def _empty_split(name: str, documents: int, settings: SourceSettings, collected: Collected, noun: str) -> str:
    skipped = ", ".join(f"{count} {reason}" for reason, (count, _) in collected.skipped.items()) or "none"
    found = f"{documents} distinct {noun}s ({collected.duplicates} duplicates; skipped: {skipped})"
    if collected.limit:
        found += f", stopped at {collected.limit}"
    if not documents:
        # The other reasons say what to do, or what is wrong in a file of rows.
        plain = noun == "document" and collected.skipped.keys() <= {"empty", "not UTF-8"}
        mend = "Give text that is not empty and encoded in UTF-8" if plain else "Mend that, or give another source"
        return f"The source has no usable {noun}: {found}. {mend}."
    return (
        f"No {noun} fell into the {name} split at validation_fraction {settings.validation_fraction}: {found}. "
        f"Use more {noun}s (the split never cuts one), another validation_fraction, or another seed."
    )
