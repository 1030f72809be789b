"""What a stream of packed text is made of."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from auxin.data.dataset import SampleForm
from auxin.data.settings import TextSettings, asked_form


class StreamedTextSettings(TextSettings):
    """Documents of a corpus that is too large to be prepared as a whole: shards of it become packed tokens while a
    model learns those before.

    Raises:
        pydantic.ValidationError (ConfigError through `StreamedTextSettings.parse`): a value is out of range, or a field
            that the source needs is missing.
    """

    decide_no_sample: ClassVar[frozenset[str]] = frozenset({"cache_bytes"})

    kind: Literal["streamed_text"] = "streamed_text"
    """Says that this is a stream of packed text."""
    split: str = "train"
    """For `huggingface`: the split whose documents are read, as a whole. Validation documents are always taken from it
    by content hash."""
    validation_fraction: float = Field(default=0.01, gt=0, lt=1)
    """Expected share of the documents that no training sees. A document's side depends on its content and `seed` alone.
    Those of the sample are the validation split."""
    seed: int = Field(default=0, ge=0)
    """Seed of the split, and of which shards the sample is taken from."""
    max_documents: int | None = None
    """Refused: the budget of a training says how much is read."""
    max_bytes: int | None = None
    """Refused, too."""
    tokenizer: Path | None = None
    """A tokenizer to load (a folder or a `tokenizer.json`); None trains a byte-level BPE on the sample."""
    context_length: int = Field(default=512, ge=2)
    """Tokens per packed context."""
    sample_bytes: int = Field(default=64_000_000, ge=1)
    """Bytes of text that are read before a training begins, from the beginnings of a few shards: the tokenizer is
    trained on them, and those of their documents that are held out are the validation split."""
    shard_bytes: int = Field(default=8 * 2**20, ge=1)
    """About how many bytes of a file make a shard, where it can be cut (Parquet between row groups, JSON lines that are
    not compressed between lines), and up to which smaller files share one. Shards are tokenized and packed one by
    one."""
    shuffle_shards: int = Field(default=8, ge=1)
    """Shards whose contexts are shuffled together. So many are tokenized before the first step."""
    cache_bytes: int = Field(default=8 * 2**30, ge=0)
    """Bytes that tokenized shards may take on the disk. Those that were not used for longest go first, and are
    tokenized anew when they are needed again; what is learnt now, was before and comes next stays in any case."""

    @model_validator(mode="after")
    def _no_part(self) -> Self:
        for field in ("max_documents", "max_bytes"):
            if getattr(self, field) is not None:
                raise ValueError(
                    f"{field} belongs to the kind 'text'. Leave it out: a training's budget (steps, tokens) says how "
                    "much of a stream is read, and sample_bytes how much before it begins"
                )
        if "[" in self.split:
            raise ValueError(
                f"split: {self.split!r} is a part of a split, and a stream reads whole ones. Give its name alone"
            )
        return self

    def form(self) -> SampleForm:
        """See `asked_form`."""
        return asked_form(self)
