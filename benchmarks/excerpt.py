"""The texts of benchmarks that adapt a model from one kind of text to another, and pieces of prepared corpora as data
to train on."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from auxin.data import Contexts, CorpusSettings, SampleForm
from auxin.data.collecting import document_key, is_validation
from auxin.data.dataset import SplitName
from auxin.data.sources import read_documents
from auxin.objectives.causal import Causal
from auxin.objectives.measures import Loss


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


def modules(held_out: bool) -> Iterator[tuple[str, str]]:
    """The standard library's files by name, each text once: those that a corpus holds out, or the others."""
    settings, seen = CorpusSettings(), set[bytes]()
    for name, content in source_code():
        if content not in seen and is_validation(document_key(content, settings.seed), settings) == held_out:
            yield name, content.decode()
        seen.add(content)


def pieces(ids: Tensor, windows: int, length: int) -> Tensor:
    """`windows` pieces of `length` tokens, evenly spread over `ids`: (windows, length)."""
    starts = torch.linspace(0, len(ids) - length, windows).long()
    return torch.stack([ids[start : start + length] for start in starts])


def loss_of(model: PreTrainedModel, windows: np.ndarray) -> float:
    """Nats per token of windows of text, (windows, tokens)."""
    form = Excerpt(windows, windows, 1 + int(windows.max())).form
    return Loss()(model, Contexts(windows), Causal().bind(model.config, form), batch_size=1)


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
