"""What kinds of padded texts share: rows of equal length with a few whole numbers beside each, on the disk and as
batches."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from auxin.data.collecting import Collected
from auxin.data.dataset import ProgressCallback
from auxin.data.packing import ContextWriter, DocumentSpool, token_dtype
from auxin.data.padding import SEGMENTS, Padded, PaddingEncoder
from auxin.data.prepared_text import PreparedText, TextManifest, TextReport
from auxin.data.preparing import open_array, write_array
from auxin.data.settings import TokenizedSettings
from auxin.data.tokenizer import tokenizer_digest
from auxin.settings import Settings

_BATCH, _BATCH_CHARACTERS = 1024, 2**21
"""Texts encoded at a time, and about how many characters of them."""
TOKENS, SECOND = -2, -1
"""Columns of what is kept beside a text's ids: its tokens without padding, and where the second text begins."""


class PaddedSplitReport(Settings):
    """What one split holds."""

    examples: int
    """Texts, or pairs of texts."""
    cut: int
    """Those that were longer than the context and lost their end."""
    tokens: int
    """Tokens without padding, special ones included."""
    sha256: str
    """Digest of the tokens."""
    rows_sha256: str
    """Digest of what is kept beside them."""


class PaddedReport(TextReport):
    """What became of every row of the source, and what the splits hold."""

    train: PaddedSplitReport
    validation: PaddedSplitReport


class PaddedManifest(TextManifest):
    """What a folder of padded texts says about itself."""

    report: PaddedReport


ManifestT = TypeVar("ManifestT", bound=PaddedManifest)


class PaddedRows:
    """Padded texts as a split of samples; see `dataset.Split`.

    Args:
        tokens: ids, (texts, context_length).
        facts: what is kept beside them, (texts, columns), of which the last two are the length and the start of the
            second text.
        tensors: names of what a batch holds.
    """

    def __init__(self, tokens: np.ndarray, facts: np.ndarray, tensors: tuple[str, ...]) -> None:
        self.tokens, self.facts, self.tensors = tokens, facts, tensors

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and, of pairs, `token_type_ids` (rows, context_length), and what is wanted of a
        model; all 64-bit integers."""
        chosen = list(rows)
        tokens = torch.from_numpy(self.tokens[chosen].astype(np.int64))
        facts = torch.from_numpy(self.facts[chosen].astype(np.int64))
        places = torch.arange(tokens.shape[1])
        mask = places < facts[:, TOKENS, None]
        found = {
            "input_ids": tokens,
            "attention_mask": mask.long(),
            SEGMENTS: (mask & (places >= facts[:, SECOND, None])).long(),
            **self._wanted(facts),
        }
        return {name: found[name] for name in self.tensors}

    def _wanted(self, facts: Tensor) -> dict[str, Tensor]:
        """What a batch holds beside the texts, of facts (rows, columns)."""
        raise NotImplementedError


class PaddedText(PreparedText[ManifestT]):
    """Prepared texts of one length: two memory-mapped arrays of tokens with the facts beside them."""

    facts: ClassVar[str]
    """What the files of facts are called, behind the split's name."""
    columns: ClassVar[int]
    """Of the facts of a text."""
    bytes_per_unit: ClassVar[None] = None
    """Losses are not those of a text."""

    def _open(self) -> None:
        self._arrays: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name in ("train", "validation"):
            examples = self._of(name).examples
            tokens = open_array(self.directory / f"{name}.npy", (examples, self.context_length), (np.uint16, np.uint32))
            facts = open_array(self.directory / f"{name}-{self.facts}.npy", (examples, self.columns), (np.int32,))
            self._arrays[name] = tokens, facts

    def _of(self, name: str) -> PaddedSplitReport:
        report = self.manifest.report
        return report.train if name == "train" else report.validation

    def _digests(self) -> Iterator[tuple[str, np.ndarray, str]]:
        for name, (tokens, facts) in self._arrays.items():
            yield f"{name}.npy", tokens, self._of(name).sha256
            yield f"{name}-{self.facts}.npy", facts, self._of(name).rows_sha256

    def describe_length(self, texts: str) -> str:
        """The length of the rows, how many of the `texts` lost their end, and how much is padding."""
        one, other = self._of("train"), self._of("validation")
        cut, examples = one.cut + other.cut, one.examples + other.examples
        padding = 1 - (one.tokens + other.tokens) / (examples * self.context_length)
        return f"{self.context_length:,}; {cut:,} {texts} cut to it, {padding:.0%} of it padding"


def padded_fingerprint(
    version: int,
    settings: TokenizedSettings,
    collected: Collected,
    tokenizer: PreTrainedTokenizerFast,
    encoder: PaddingEncoder,
    splits: Mapping[str, PaddedSplitReport],
    **also: Any,
) -> str:
    """Hex SHA-256 of what padded texts depend on, and of what they are.

    Args:
        version: of the kind's format.
        settings: the settings.
        collected: the documents.
        tokenizer, encoder: what made tokens of them.
        splits: what was written.
        also: what else tells two of them apart.
    """
    content = {
        "format": version,
        "documents": collected.digest(),
        "tokenizer": tokenizer_digest(tokenizer),
        "padding": encoder.padding,
        "validation_fraction": settings.validation_fraction,
        "seed": settings.seed,
        "splits": [[split.sha256, split.rows_sha256] for split in splits.values()],
        **also,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_padded(
    data: type[PaddedText[Any]],
    directory: Path,
    name: str,
    encoder: PaddingEncoder,
    rows: Iterable[tuple[Padded, tuple[int, ...]]],
) -> tuple[np.ndarray, dict[str, Any]]:
    """Write the arrays of one split.

    Args:
        data: the class that opens them.
        directory: the folder.
        name: of the split.
        encoder: what the rows were made with.
        rows: each text, and what is kept beside it but its length and its second text.

    Returns:
        The facts, (texts, columns), and the fields of `PaddedSplitReport`.
    """
    writer = ContextWriter(directory / f"{name}.npy", encoder.length, token_dtype(encoder.vocab_size))
    facts: list[tuple[int, ...]] = []
    cut = 0
    for padded, own in rows:
        writer.write(padded.ids)
        facts.append((*own, padded.tokens, padded.second))
        cut += padded.is_cut
    _, digest = writer.finish()
    array = np.array(facts, dtype=np.int32).reshape(len(facts), data.columns)
    write_array(directory / f"{name}-{data.facts}.npy", array)
    return array, {
        "examples": len(array),
        "cut": cut,
        "tokens": int(array[:, TOKENS].sum()),
        "sha256": digest,
        "rows_sha256": hashlib.sha256(array.tobytes()).hexdigest(),
    }


def json_batches(spool: DocumentSpool, name: str, advance: ProgressCallback) -> Iterator[list[list[Any]]]:
    """The documents, each an array of JSON, many at a time; `advance` is told of the split `name` how many are done."""
    batch: list[list[Any]] = []
    waiting = done = 0
    for written in spool.texts():
        batch.append(json.loads(written))
        waiting += len(written)
        if len(batch) == _BATCH or waiting >= _BATCH_CHARACTERS:
            done += len(batch)
            yield batch
            advance(name, done, len(spool))
            batch, waiting = [], 0
    if batch:
        yield batch
        advance(name, len(spool), len(spool))
