"""Scoring texts that lie in files."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from auxin.accounting.inputs import text_length
from auxin.errors import DataError, reason
from auxin.evaluation.perplexity import Perplexity, perplexity

LONGEST_WINDOW = 1024
"""Window where none is asked for and the model's context is not shorter."""


def score_files(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    paths: Sequence[str | Path],
    context_length: int | None = None,
    stride: int | None = None,
) -> dict[str, Perplexity]:
    """Perplexity and bits per byte of each file, by its path as given.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        paths: UTF-8 text files.
        context_length: window in tokens; None is the model's context, at most 1024.
        stride: tokens between windows; None is half the window.

    Raises:
        DataError: a file is missing, empty or not UTF-8, or window and stride don't fit; nothing is scored then.
    """
    texts = {str(path): _read(Path(path)) for path in paths}
    if context_length is None:
        context_length = text_length(model, LONGEST_WINDOW)
    return {path: perplexity(model, tokenizer, text, context_length, stride) for path, text in texts.items()}


def _read(path: Path) -> str:
    if path.is_dir():
        raise DataError(f"{path} is a folder. Give the text files in it, each by itself.")
    try:
        # As it is, but for a byte order mark: reading as text would turn the line ends of Windows into others.
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist. Give an existing text file.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no readable UTF-8 text ({reason(error)}). Convert it, or leave it out.") from error
    if not text:
        raise DataError(f"{path} is empty: there is nothing to score.")
    return text
