"""Streams small enough to be read many times: files of documents, and the settings that read them."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from auxin.data.tokenizer import train_tokenizer

TEXT = "the cat sat on the mat, the cat sat on the hat: naïve café"
LENGTH = 8
"""Tokens of a context."""


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([TEXT] * 3, 290, LENGTH)


@cache
def _plain() -> Tokenizer:
    plain = Tokenizer.from_str(tokenizer().backend_tokenizer.to_str())
    plain.encode_special_tokens = True
    return plain


def encode(text: str) -> list[int]:
    """The ids of a text in which the separator is text like all else."""
    return _plain().encode(text, add_special_tokens=False).ids


def separator() -> int:
    return int(tokenizer().eos_token_id)


def write_parquet(path: Path, texts: Sequence[str], rows: int = 4) -> Path:
    """A file whose row groups have so many rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"text": pyarrow.array(texts, pyarrow.string()), "number": list(range(len(texts)))}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=rows)
    return path


def write_lines(path: Path, texts: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def documents(count: int, first: int = 0) -> list[str]:
    """Texts that differ, of 2 to 29 words."""
    words = TEXT.split()
    return [
        f"{number} " + " ".join(words[(number * 7 + word) % len(words)] for word in range(2 + number * 11 % 28))
        for number in range(first, first + count)
    ]


def stream_of(folder: Path, *paths: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a stream that is read in many small shards."""
    place = folder / "tokenizer"
    if not place.exists():
        tokenizer().save_pretrained(place)
    values = {"paths": [str(path) for path in paths], "tokenizer": str(place), "context_length": LENGTH}
    return {**values, "validation_fraction": 0.3, "shard_bytes": 1, "shuffle_shards": 2, **changes}
