"""The texts of benchmarks that adapt a model from one kind of text to another, and pieces of prepared corpora as data
to train on."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics

import numpy as np

from auxin.data import Contexts, CorpusSettings, SampleForm
from auxin.data.dataset import SplitName
from auxin.data.sources import read_documents


@dataclass(frozen=True)
class Excerpt:
    """Contexts of tokens in memory, as training wants its data; see `auxin.data.Dataset`."""

    train: np.ndarray
    """Token ids (contexts, length) to learn."""
    validation: np.ndarray
    """Token ids (contexts, length) that `train` itself measures at its start and its end."""
    vocab_size: int

    @property
    def form(self) -> SampleForm:
        """Contexts of tokens."""
        length = self.train.shape[1]
        return SampleForm("token", length, ("input_ids",), length=length, vocab_size=self.vocab_size)

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the tokens."""
        digest = hashlib.sha256(f"{self.vocab_size} {self.train.shape}".encode())
        for part in (self.train, self.validation):
            digest.update(part.astype("<u4").tobytes())
        return digest.hexdigest()

    @property
    def bytes_per_unit(self) -> None:
        """Not known: pieces begin and end anywhere."""

    def split(self, name: SplitName) -> Contexts:
        """One side."""
        return Contexts(getattr(self, name))

    def processor(self) -> None:
        """None: the tokenizer stays with the model that the benchmark starts from."""

    def describe(self) -> dict[str, str]:
        """Nothing that a report would want."""
        return {}


def spread_rows(rows: np.ndarray, count: int) -> np.ndarray:
    """`count` of the rows (contexts, length), evenly spread."""
    return rows[np.linspace(0, len(rows) - 1, count).astype(int)]


def source_code() -> Iterator[tuple[str, bytes]]:
    """The standard library's files by name, without the reference manual, which is a module of it."""
    for document in read_documents(CorpusSettings()):
        if document.data is not None and not document.name.startswith("pydoc_data/"):
            yield document.name, document.data


def manual() -> Iterator[tuple[str, bytes]]:
    """Python's reference manual by topic, English in reStructuredText, as `pydoc` carries it. Topics share sections, so
    that each paragraph is kept where it comes first only."""
    seen: set[str] = set()
    for name in sorted(topics):
        kept = []
        for paragraph in topics[name].split("\n\n"):
            key = re.sub(r"\s+", " ", paragraph).strip()
            if key and key not in seen:
                seen.add(key)
                kept.append(paragraph)
        if kept:
            yield name, "\n\n".join(kept).encode()
