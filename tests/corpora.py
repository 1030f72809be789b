"""Small corpora for whole runs: folders of short documents, and the settings that read them."""

from pathlib import Path
from typing import Any


def write_documents(folder: Path, documents: int = 30, phrase: str = "growing is cheaper than starting over ") -> Path:
    """`folder` with so many text files, which differ in a number and repeat `phrase` to about 700 characters.

    Documents that repeat themselves make small vocabularies and losses that fall within a few steps.
    """
    folder.mkdir(exist_ok=True)
    for number in range(documents):
        (folder / f"{number}.txt").write_text(f"document {number} says " + phrase * (700 // len(phrase)))
    return folder


def small_corpus(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe's `data` that reads `folder`: few tokens, short contexts, enough held out to measure on."""
    values = {"vocab_size": 300, "context_length": 16, "validation_fraction": 0.2}
    return {"source": "files", "paths": [str(folder)], **values, **changes}
