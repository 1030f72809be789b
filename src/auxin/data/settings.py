"""What a corpus is made of and how it is tokenized, split and packed."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from auxin.settings import Settings


class CorpusSettings(Settings):
    """Settings of `prepare`: where the documents come from and how they become packed tokens.

    Raises:
        pydantic.ValidationError (ConfigError through `CorpusSettings.parse`): a value is out of range, or a field
            that the source needs is missing.
    """

    source: Literal["stdlib", "files", "huggingface"] = "stdlib"
    """`stdlib`: the running Python's own standard library (tests left out). `files`: local files named by `paths`.
    `huggingface`: the dataset `name`."""
    paths: tuple[Path, ...] = ()
    """For `files`: files, folders (read recursively) and globs. `.jsonl` and `.parquet` hold one document per row,
    every other file is one document."""
    name: str | None = None
    """For `huggingface`: the dataset's name on the Hub, or a local folder that `datasets.load_dataset` reads."""
    config: str | None = None
    """For `huggingface`: the dataset's configuration."""
    split: str = "train"
    """For `huggingface`: the split (or slice, such as `train[:1%]`) whose documents are read. Validation documents
    are always taken from it by content hash."""
    text_field: str = "text"
    """The field that holds a document's text, in JSON lines, Parquet and Hugging Face datasets."""
    tokenizer: Path | None = None
    """A tokenizer to load (a folder or a `tokenizer.json`); None trains a byte-level BPE on the training split."""
    vocab_size: int = Field(default=4096, ge=257)
    """Entries of the trained tokenizer, special token included (256 bytes and one separator at least). A small
    corpus may not fill it. Not used when `tokenizer` is given."""
    context_length: int = Field(default=512, ge=2)
    """Tokens per packed context."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Expected share of the documents in the validation split. A document's side depends on its content and `seed`
    alone, so it never changes when other documents are added."""
    seed: int = Field(default=0, ge=0)
    """Seed of the split and of the order of documents."""
    max_documents: int | None = Field(default=None, ge=1)
    """Stop after this many distinct documents, in the source's order; None reads all."""
    max_bytes: int | None = Field(default=None, ge=1)
    """Stop before the distinct documents exceed this many UTF-8 bytes; None reads all."""

    @model_validator(mode="after")
    def _source_has_what_it_needs(self) -> Self:
        if self.source == "files" and not self.paths:
            raise ValueError("source 'files' needs `paths`: give at least one file, folder or glob")
        if self.source == "huggingface" and not self.name:
            raise ValueError("source 'huggingface' needs `name`: give the dataset's name or a local folder")
        if self.source != "files" and self.paths:
            raise ValueError(f"`paths` belongs to source 'files', but source is {self.source!r}")
        if self.source != "huggingface" and self.name:
            raise ValueError(f"`name` belongs to source 'huggingface', but source is {self.source!r}")
        return self
