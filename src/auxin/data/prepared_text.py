"""What kinds of text share: the tokenizer that makes samples of them, and goes with every model that learns them."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

from transformers import PreTrainedTokenizerFast

from auxin.data.collecting import Collected, ReadReport
from auxin.data.dataset import ProgressCallback, save_processor
from auxin.data.packing import DocumentSpool
from auxin.data.preparing import Begun, Manifest, Prepared
from auxin.data.settings import TokenizedSettings
from auxin.data.tokenizer import read_tokenizer, tokenizer_digest, train_tokenizer
from auxin.errors import DataError

TOKENIZER = "tokenizer"
"""The folder of the tokenizer in that of the data."""


class TextReport(ReadReport):
    """What became of every document of the source, and the tokenizer's size."""

    vocab_size: int
    """The tokenizer's largest id plus one: a trained one can have fewer entries than asked for."""


class TextManifest(Manifest):
    """What a folder of prepared text says about itself, beside its settings and report."""

    tokenizer_digest: str
    loaded_tokenizer_digest: str | None
    settings: TokenizedSettings
    report: TextReport


TextManifestT = TypeVar("TextManifestT", bound=TextManifest)


class PreparedText(Prepared[TextManifestT]):
    """Prepared text: memory-mapped arrays of tokens, their tokenizer, and what they were made of."""

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """As `Prepared.load`, the tokenizer's file too."""
        data = super().load(directory)
        if not (data.directory / TOKENIZER / "tokenizer.json").is_file():
            raise DataError(
                f"{data.directory / TOKENIZER} is missing its tokenizer. Delete {data.directory} and prepare again."
            )
        return data

    @property
    def named_digest(self) -> str | None:
        """Of the tokenizer that the settings named."""
        return self.manifest.loaded_tokenizer_digest

    @property
    def context_length(self) -> int:
        """Tokens per row."""
        return self.manifest.settings.context_length

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer; every token id is below it."""
        return self.manifest.report.vocab_size

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Load the tokenizer."""
        return read_tokenizer(self.directory / TOKENIZER)

    def processor(self) -> PreTrainedTokenizerFast:
        """The tokenizer."""
        return self.tokenizer()

    def verify(self) -> None:
        """As `Prepared.verify`, the tokenizer too."""
        super().verify()
        if tokenizer_digest(self.tokenizer()) != self.manifest.tokenizer_digest:
            raise DataError(f"{self.directory / TOKENIZER} has changed. Delete {self.directory} and prepare again.")


SettingsT = TypeVar("SettingsT", bound=TokenizedSettings)


def with_tokenizer(
    load: Callable[[Path], PreTrainedTokenizerFast],
    texts: Callable[[DocumentSpool], Iterable[str]],
    build: Callable[[SettingsT, Collected, PreTrainedTokenizerFast, Path, ProgressCallback], dict[str, Any]],
) -> Callable[[SettingsT], Begun]:
    """How the preparation of a kind of text begins; see `Steps.begin`.

    Args:
        load: loads a tokenizer that is named.
        texts: what of the training split a tokenizer is trained on where none is named.
        build: writes the arrays into the folder; returns the manifest's `fingerprint`, `report` and what else it has.
    """

    def begin(settings: SettingsT) -> Begun:
        loaded = load(settings.tokenizer) if settings.tokenizer else None
        digest = tokenizer_digest(loaded) if loaded else None

        def written(collected: Collected, directory: Path, advance: ProgressCallback) -> dict[str, Any]:
            made = loaded
            if made is None:
                announced = _announced(texts(collected.train), len(collected.train), advance)
                made = train_tokenizer(announced, settings.vocab_size, settings.context_length)
            save_processor(made, directory / TOKENIZER)
            # What is read back later encodes the documents: saving may normalize a loaded tokenizer.
            tokenizer = read_tokenizer(directory / TOKENIZER)
            own = build(settings, collected, tokenizer, directory, advance)
            return {**own, "tokenizer_digest": tokenizer_digest(tokenizer), "loaded_tokenizer_digest": digest}

        return Begun(written, f"The tokenizer {settings.tokenizer}", digest)

    return begin


def _announced(texts: Iterable[str], total: int, advance: ProgressCallback) -> Iterator[str]:
    for done, text in enumerate(texts):
        advance("tokenizer", done, total)
        yield text
