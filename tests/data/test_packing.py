"""Packing loses nothing but the documented tail."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from auxin.data import tokenizer as tokenizers
from auxin.data.packing import ContextWriter, DocumentSpool, SplitReport, pack, token_dtype
from auxin.data.tokenizer import SEPARATOR, plain_backend, train_tokenizer
from auxin.errors import DataError
from oracles.byte_level import token_bytes
from tiny_tokenizers import KINDS, TEXT, tiny_tokenizer

TOKENIZER = train_tokenizer(["the cat sat on the mat, the cat sat on the hat: naïve café"] * 3, 300, 64)
BACKEND = plain_backend(TOKENIZER)
SEPARATOR_ID = TOKENIZER.eos_token_id


def packed(documents: list[str], context_length: int) -> tuple[np.ndarray, SplitReport]:
    with tempfile.TemporaryDirectory() as folder:
        spool = DocumentSpool(Path(folder) / "spool")
        for index, document in enumerate(documents):
            spool.add(index.to_bytes(4, "big"), document.encode())
        path = Path(folder) / "train.npy"
        report = pack(spool.finish(), BACKEND, SEPARATOR_ID, path, context_length, token_dtype(300), lambda done: None)
        return np.load(path, allow_pickle=False), report


def documents_of(tokens: list[int]) -> list[bytes]:
    """Split at separators and spell the tokens out."""
    documents = [b""]
    for token in tokens:
        if token == SEPARATOR_ID:
            documents.append(b"")
        else:
            documents[-1] += token_bytes(BACKEND.id_to_token(token))
    return documents


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=12), st.integers(2, 9))
@example([f"a {SEPARATOR} b", SEPARATOR], 2)
@example(["\N{GRINNING FACE}"], 3)  # the cut goes through a character
@example(["the cat", "sat"], 2)
def test_packing_loses_only_the_tail(documents: list[str], context_length: int) -> None:
    stream = [token for text in documents for token in [*BACKEND.encode(text).ids, SEPARATOR_ID]]
    assume(len(stream) >= context_length)
    array, report = packed(documents, context_length)
    tokens = array.reshape(-1).tolist()
    assert array.shape[1] == context_length
    assert len(stream) - len(tokens) == report.dropped_tokens < context_length
    assert report.tokens == len(tokens)
    # The text comes back, document by document; the last one is cut where the tail begins.
    found = documents_of(tokens)
    last = len(found) - 1
    assert found[:last] == [text.encode() for text in documents[:last]]
    if last < len(documents):
        assert documents[last].encode().startswith(found[last])
    else:
        assert found[last] == b""
    assert report.packed_bytes == sum(len(document.decode("utf-8", "ignore").encode()) for document in found)
    assert report.bytes == sum(len(text.encode()) for text in documents)


def test_decoding_gives_documents_joined_by_separators() -> None:
    documents = ["the cat\r\n", " sat  on\tthe", "mat \N{SNOWMAN}"]
    joined = "".join(text + SEPARATOR for text in documents)
    length = len(TOKENIZER(joined)["input_ids"])
    array, report = packed(documents, length)
    assert report.dropped_tokens == 0
    assert TOKENIZER.decode(array[0]) == joined


def test_a_separator_written_in_a_document_stays_text() -> None:
    array, _ = packed([f"one{SEPARATOR}two"], 2)
    assert SEPARATOR_ID not in array.reshape(-1)[:-1]


def test_documents_follow_their_keys(tmp_path: Path) -> None:
    spool = DocumentSpool(tmp_path / "spool")
    for text in ("b", "c", "a"):
        spool.add(text.encode(), text.encode())
    assert list(spool.finish().texts()) == ["a", "b", "c"]


def test_too_little_for_one_context() -> None:
    with pytest.raises(DataError, match=r"train split has 2 tokens in 1 documents, less than one context of 5"):
        packed(["a"], 5)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.integers(0, 99_999), max_size=20), max_size=20), st.integers(1, 7))
def test_writer_equals_one_concatenation(pieces: list[list[int]], context_length: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.npy"
        writer = ContextWriter(path, context_length, token_dtype(100_000))
        for piece in pieces:
            writer.write(piece)
        dropped, _ = writer.finish()
        array = np.load(path, mmap_mode="r" if writer.contexts else None, allow_pickle=False)
        tokens = [token for piece in pieces for token in piece]
        assert array.dtype == np.uint32
        assert array.reshape(-1).tolist() == tokens[: len(tokens) - dropped]
        assert dropped == len(tokens) % context_length


@pytest.mark.parametrize(("vocab_size", "bits"), [(65535, 16), (65536, 32), (257, 16)])
def test_dtype_follows_the_vocabulary(vocab_size: int, bits: int) -> None:
    assert token_dtype(vocab_size).itemsize * 8 == bits


def test_training_twice_gives_the_same_tokenizer_and_every_byte_can_be_encoded() -> None:
    texts = [f"word{n % 7} other{n % 5} \N{SNOWMAN}" for n in range(50)]
    first, second = (train_tokenizer(texts, 320, 64) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert isinstance(first.backend_tokenizer, Tokenizer)
    unseen = "".join(map(chr, range(0x20, 0x500))) + "\N{GRINNING FACE}"
    assert first.decode(first(unseen)["input_ids"]) == unseen


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_in_pieces_has_the_tokens_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(TEXT)
    backend = plain_backend(tiny_tokenizer(kind))
    whole = backend.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr(tokenizers, "PIECE", 60)
    assert len(list(tokenizers.pieces(text))) > len(text) // 60
    found = list(tokenizers.encode_documents(backend, [text, "", text], 100))
    assert "".join(piece for piece, _, _ in found) == text * 2
    ids = [token for _, ids, _ in found for token in ids]
    # Llama 2's tokenizer puts a space before any text, and so before any piece.
    assert ids == whole * 2 or (kind == "sentencepiece" and 0 < len(ids) - 2 * len(whole) < len(found))
    assert [is_last for _, _, is_last in found].count(True) == 3
    assert found[-1][2]


def test_pieces_change_no_row_and_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = ["the cat sat on the mat " * 9, "the hat", "a" * 200, "naïve café " * 20]
    array, report = packed(documents[:2] + documents[3:], 7)
    monkeypatch.setattr(tokenizers, "PIECE", 40)
    again, told = packed(documents[:2] + documents[3:], 7)
    assert np.array_equal(array, again)
    assert report == told
    words, _ = packed(documents, 7)
    assert documents_of(words.reshape(-1).tolist())[2] == b"a" * 200, "a word longer than a piece is cut, not lost"
