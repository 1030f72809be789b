"""Train a byte-level BPE tokenizer, load one, and encode documents so that no text turns into a special token."""

import copy
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from auxin.errors import DataError
from auxin.foreign import offline, refuse_active_file, refuse_links_out

SEPARATOR = "<|endoftext|>"
"""The special token of a trained tokenizer: ends each document, and begins and pads generated text."""

TOKENIZER_FILES = (
    "tokenizer.json",
    # What slow tokenizers are made of and fast ones can be made from.
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "tekken.json",
    "tiktoken.model",
)
"""Files of which any one makes a tokenizer."""


PIECE = 2**20
"""Characters of a document that are encoded at a time: tokens and their offsets take many times the text's memory."""
_BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")


def train_tokenizer(texts: Iterable[str], vocab_size: int, context_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE (no text is unknown to it, and decoding gives the text back byte by byte).

    Args:
        texts: the documents of the training split.
        vocab_size: entries wanted, the separator included; fewer when the text has no more pairs to merge.
        context_length: tokens, stored as the tokenizer's `model_max_length`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        # All 256 bytes, so that a byte that the training split lacks can still be encoded.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """As `read_tokenizer`, for encoding documents: it has an end-of-text token to separate them with. One that names
    none (BERT's) ends them with its separator, which ends a text in its own template, too.

    Raises:
        DataError: as `read_tokenizer`, or there is no such token.
    """
    tokenizer = read_tokenizer(path)
    if tokenizer.eos_token_id is None:
        end = SEPARATOR if SEPARATOR in tokenizer.get_vocab() else tokenizer.sep_token
        if end is None:
            # No new one: its id would lie beyond the model's table.
            special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special][:5]
            raise DataError(
                f"The tokenizer {path} has no end-of-text token, with which texts end. Set its eos_token to a token "
                f"that it has{', such as ' if special else ''}{' or '.join(special)}."
            )
        tokenizer.eos_token = end
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether the files of a tokenizer lie in `folder`."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a folder or a `tokenizer.json`; nothing is fetched and no code of the folder is run.

    Raises:
        DataError: nothing there, not a fast tokenizer, one that is code of the folder's own, or a folder with links
            that lead out of it (`auxin.foreign`).
    """
    if not path.exists():
        raise DataError(f"Tokenizer {path} does not exist. Give a folder or a tokenizer.json, or leave it out.")
    if path.is_dir() and not has_tokenizer(path):
        # For some architectures transformers would make up an empty one, which turns every text into nothing.
        raise DataError(
            f"There is no tokenizer.json in {path}. Save the tokenizer there, or give another folder or file."
        )
    if path.is_dir():
        refuse_links_out(path, DataError, below=("additional_chat_templates",))
        for name in ("config.json", "tokenizer_config.json"):
            refuse_active_file(path / name, DataError)
    try:
        tokenizer: Any
        if path.is_file():
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
        else:
            with offline():
                tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    # The Rust library raises bare Exception for a file that it can't read.
    except Exception as error:
        raise DataError(f"{path} holds no tokenizer that can be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(f"{path} holds a {type(tokenizer).__name__}; a fast tokenizer (tokenizer.json) is needed.")
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise DataError(f"The tokenizer {path} turns the text 'a' into no token: it is empty or damaged. Give another.")
    return tokenizer


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """Hex SHA-256 of everything that decides how documents are encoded and separated."""
    backend = plain_backend(tokenizer)
    return hashlib.sha256(f"{tokenizer.eos_token_id}\n{backend.to_str()}".encode()).hexdigest()


def same_tokens(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> bool:
    """Whether both turn every text into the same ids, special tokens of their rules included."""
    return plain_backend(one).to_str() == plain_backend(other).to_str()


def plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the Rust tokenizer without truncation and padding, for which special tokens in a text are text."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def pieces(text: str) -> Iterator[str]:
    """A long text in pieces of about `PIECE` characters, cut before a space between two words, where
    tokenizers cut it themselves; one that puts a space before any text (Llama 2's) has a token more at each cut. A word
    that is longer is cut, too; a text that is no longer is one piece."""
    start = 0
    while len(text) - start > PIECE:
        found = _BETWEEN_WORDS.search(text, start + PIECE // 2, start + PIECE)
        end = found.start() if found else start + PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def encode_documents(
    backend: Tokenizer, texts: Iterable[str], batch_characters: int
) -> Iterator[tuple[str, Sequence[int], bool]]:
    """Yield the pieces of each text with their token ids, and whether a piece is the text's last, encoding about
    `batch_characters` at a time on all threads."""
    batch: list[tuple[str, bool]] = []
    waiting = 0
    for text in texts:
        done = 0
        for piece in pieces(text):
            done += len(piece)
            batch.append((piece, done == len(text)))
            waiting += len(piece)
            if waiting >= batch_characters:
                yield from _encode_batch(backend, batch)
                batch, waiting = [], 0
    yield from _encode_batch(backend, batch)


def _encode_batch(backend: Tokenizer, batch: Sequence[tuple[str, bool]]) -> Iterator[tuple[str, Sequence[int], bool]]:
    encodings = backend.encode_batch_fast([piece for piece, _ in batch], add_special_tokens=False)
    for (piece, is_last), encoding in zip(batch, encodings, strict=True):
        yield piece, encoding.ids, is_last


def vocabulary_fields(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The config fields of a new model that its tokenizer decides."""
    fields = {"vocab_size": max(tokenizer.get_vocab().values()) + 1}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if (value := getattr(tokenizer, name)) is not None:
            fields[name] = value
    return fields
