"""Where documents come from, and what a corpus of packed text is made of them."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from transformers import PreTrainedTokenizerFast

from auxin.data.dataset import DatasetSettings, SampleForm
from auxin.data.tokenizer import load_tokenizer, vocabulary_fields
from auxin.errors import placed


class SourceSettings(DatasetSettings):
    """Where documents come from, and which of them are held out."""

    source: Literal["stdlib", "files", "huggingface"] = "stdlib"
    """`stdlib`: the running Python's own standard library (tests left out). `files`: local files named by `paths`.
    `huggingface`: the dataset `name`. Where it is left out, `paths` or `name` say it."""
    paths: tuple[Path, ...] = ()
    """For `files`: files, folders (read recursively) and globs, a list or a single one. `.jsonl`, `.ndjson` and
    `.parquet` hold one document per row, and so do `.json` (JSON lines, or an array), `.csv` and `.tsv` whose rows have
    the text field; every other file is one document. All but `.parquet` may be compressed (`.gz`, `.bz2`, `.xz`)."""
    name: str | None = None
    """For `huggingface`: the dataset's name on the Hub, or a local folder that `datasets.load_dataset` reads."""
    config: str | None = None
    """For `huggingface`: the dataset's configuration."""
    split: str = "train"
    """For `huggingface`: the split (or slice, such as `train[:1%]`) whose documents are read. Validation documents
    are always taken from it by content hash."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Expected share of the documents in the validation split. A document's side depends on its content and `seed`
    alone, so it never changes when other documents are added."""
    seed: int = Field(default=0, ge=0)
    """Seed of the split and of the order of documents."""
    max_documents: int | None = Field(default=None, ge=1)
    """Stop after this many distinct documents, in the source's order; None reads all."""
    max_bytes: int | None = Field(default=None, ge=1)
    """Stop before the distinct documents exceed this many bytes, of UTF-8 or of pixels; None reads all."""

    @field_validator("paths", mode="before")
    @classmethod
    def _single_path(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | Path) else value

    @model_validator(mode="before")
    @classmethod
    def _source_follows(cls, values: Any) -> Any:
        """The source that is meant where only what belongs to it is given."""
        if isinstance(values, dict) and "source" not in values:
            for field, source in _BELONGS.items():
                if values.get(field):
                    return {**values, "source": source}
        return values

    @model_validator(mode="after")
    def _source_has_what_it_needs(self) -> Self:
        if self.source == "files" and not self.paths:
            raise ValueError("source 'files' needs `paths`: give at least one file, folder or glob")
        if self.source == "huggingface" and not self.name:
            raise ValueError("source 'huggingface' needs `name`: give the dataset's name or a local folder")
        for field, source in _BELONGS.items():
            if self.source != source and getattr(self, field):
                raise ValueError(
                    f"`{field}` belongs to source {source!r}, but source is {self.source!r}. Set source: {source}, or "
                    f"leave `{field}` out"
                )
        return self

    @property
    def text(self) -> str:
        """Whose text it is, in words."""
        if self.source == "stdlib":
            return "the standard library's source"
        return f"the dataset {self.name}" if self.source == "huggingface" else ", ".join(map(str, self.paths))


_BELONGS = {"paths": "files", "name": "huggingface"}
"""What a source goes by, and which one."""


def without_stdlib(value: Any, lacking: str) -> Any:
    """A `source` as it is given; ValueError where it is the standard library, whose files have none of what is
    `lacking`, in the plural."""
    if value == "stdlib":
        raise ValueError(f"the standard library's files have no {lacking}. Set source: files, or huggingface")
    return value


class TokenizedSettings(SourceSettings):
    """Texts, and what turns them into samples of equally many tokens."""

    tokenizer: Path | None = None
    """A tokenizer to load (a folder or a `tokenizer.json`); None trains a byte-level BPE on the training split."""
    vocab_size: int = Field(default=4096, ge=257)
    """Entries of the trained tokenizer, special token included (256 bytes and one separator at least). A small
    corpus may not fill it. Not used when `tokenizer` is given."""
    context_length: int = Field(default=512, ge=2)
    """Tokens per sample."""


class TextSettings(TokenizedSettings):
    """Texts that each are in a field of their own."""

    text_field: str = "text"
    """The field that holds a document's text, in files of rows and Hugging Face datasets."""


class CorpusSettings(TextSettings):
    """Documents that become packed tokens: one text after the other, cut into contexts of equal length.

    Raises:
        pydantic.ValidationError (ConfigError through `CorpusSettings.parse`): a value is out of range, or a field
            that the source needs is missing.
    """

    kind: Literal["text"] = "text"
    """Says that this is packed text."""
    context_length: int = Field(default=512, ge=2)
    """Tokens per packed context."""

    def form(self) -> SampleForm:
        """See `asked_form`."""
        return asked_form(self)


def asked_form(settings: TokenizedSettings) -> SampleForm:
    """Contexts of tokens; the vocabulary is the one asked for, or that of the tokenizer named if it is there."""
    if settings.tokenizer is None or not settings.tokenizer.exists():
        return packed_form(settings, settings.vocab_size if settings.tokenizer is None else None)
    with placed("tokenizer: "):
        tokenizer = load_tokenizer(settings.tokenizer)
    return packed_form(settings, vocabulary_fields(tokenizer)["vocab_size"], tokenizer)


def packed_form(
    settings: TokenizedSettings, vocab_size: int | None, tokenizer: PreTrainedTokenizerFast | None = None
) -> SampleForm:
    """The form of packed text of `settings`, with `vocab_size` tokens of a `tokenizer` that may be there already."""
    fields = {} if vocab_size is None else {"vocab_size": vocab_size}
    return SampleForm(
        unit="token",
        units=settings.context_length,
        tensors=("input_ids",),
        length=settings.context_length,
        vocab_size=vocab_size,
        mask_token_id=None if tokenizer is None else tokenizer.mask_token_id,
        config_values=fields if tokenizer is None else vocabulary_fields(tokenizer),
    )
