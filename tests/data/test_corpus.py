"""Preparing a corpus: split, fingerprint, reuse, and that nothing is lost in silence."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import auxin.data.corpus as corpus
from auxin.data import CorpusSettings, PackedData, prepare
from auxin.data.collecting import document_key, is_validation
from auxin.data.dataset import save_processor
from auxin.data.tokenizer import SEPARATOR, tokenizer_digest, train_tokenizer
from auxin.errors import ConfigError, DataError
from auxin.sums import SUMS_FILE
from tiny_tokenizers import tiny_tokenizer

TEXTS = [f"document {n}: " + " ".join(f"word{n * k % 13}" for k in range(20)) for n in range(40)]
SMALL: dict[str, Any] = {"source": "files", "vocab_size": 300, "context_length": 16, "validation_fraction": 0.3}


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def corpus_of(path: Path, texts: list[str] = TEXTS, **changes: Any) -> CorpusSettings:
    return CorpusSettings(paths=(write_jsonl(path, texts),), **(SMALL | changes))


def documents(array: np.ndarray, data: PackedData) -> set[str]:
    """The complete documents of a packed array; a separator spelled out in a document is no separator."""
    tokenizer = data.tokenizer()
    tokens = array.reshape(-1)
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id)
    return {tokenizer.decode(tokens[start:end]) for start, end in zip([0, *(ends[:-1] + 1)], ends, strict=False)}


@settings(deadline=None, max_examples=15)
@given(st.lists(st.text(min_size=1, max_size=20), min_size=8, max_size=30), st.integers(0, 1000))
@example([SEPARATOR, f"a{SEPARATOR}", *"abcdefgh"], 0)
def test_every_document_is_on_one_side(texts: list[str], seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings_ = corpus_of(Path(folder) / "a.jsonl", texts, context_length=2, seed=seed)
        distinct = {text for text in texts if text.strip()}
        held_out = {text for text in distinct if is_validation(document_key(text.encode(), seed), settings_)}
        assume(0 < len(held_out) < len(distinct))
        data = prepare(settings_, Path(folder) / "data")
        assert data.report.documents == len(distinct)
        assert data.report.duplicates == len([text for text in texts if text.strip()]) - len(distinct)
        # One token at most is cut off each split: the last separator, or the last document's end.
        train, validation = documents(data.train, data), documents(data.validation, data)
        assert len(train) >= len(distinct - held_out) - 1
        assert len(validation) >= len(held_out) - 1
        assert train <= distinct - held_out
        assert validation <= held_out


def test_a_document_keeps_its_side_when_others_come(tmp_path: Path) -> None:
    settings_ = corpus_of(tmp_path / "a.jsonl")
    few = prepare(corpus_of(tmp_path / "few.jsonl", TEXTS[:20]), tmp_path / "few")
    all_ = prepare(settings_, tmp_path / "all")
    assert not documents(few.train, few) & documents(all_.validation, all_)
    assert not documents(few.validation, few) & documents(all_.train, all_)
    other_seed = prepare(corpus_of(tmp_path / "a.jsonl", seed=1), tmp_path / "other seed")
    assert documents(other_seed.validation, other_seed) != documents(all_.validation, all_)
    share = sum(is_validation(document_key(b"%d" % n, 0), settings_) for n in range(20_000)) / 20_000
    assert share == pytest.approx(0.3, abs=0.02)  # six standard deviations


def test_the_tokenizer_sees_the_training_split_only(tmp_path: Path) -> None:
    settings_ = corpus_of(tmp_path / "a.jsonl")
    data = prepare(settings_, tmp_path / "data")
    keys = {text: document_key(text.encode(), 0) for text in TEXTS}
    train = [text for text in TEXTS if not is_validation(keys[text], settings_)]
    assert tokenizer_digest(data.tokenizer()) == tokenizer_digest(train_tokenizer(train, 300, 16))
    assert tokenizer_digest(data.tokenizer()) != tokenizer_digest(train_tokenizer(TEXTS, 300, 16))


def test_fingerprint_follows_content_and_settings(tmp_path: Path) -> None:
    tokenizer = tmp_path / "other"
    train_tokenizer(TEXTS[:3], 280, 16).save_pretrained(tokenizer)
    base = prepare(corpus_of(tmp_path / "a.jsonl"), tmp_path / "base").fingerprint
    # Other place, other order, a duplicate and an empty document: the same corpus.
    same = corpus_of(tmp_path / "b.jsonl", [*reversed(TEXTS), TEXTS[0], ""], max_documents=1000)
    assert prepare(same, tmp_path / "same").fingerprint == base
    changed = {
        "document": corpus_of(tmp_path / "c.jsonl", [TEXTS[0] + "!", *TEXTS[1:]]),
        "seed": corpus_of(tmp_path / "a.jsonl", seed=1),
        "context_length": corpus_of(tmp_path / "a.jsonl", context_length=8),
        "vocab_size": corpus_of(tmp_path / "a.jsonl", vocab_size=290),
        "validation_fraction": corpus_of(tmp_path / "a.jsonl", validation_fraction=0.31),
        "tokenizer": corpus_of(tmp_path / "a.jsonl", tokenizer=tokenizer),
        "max_documents": corpus_of(tmp_path / "a.jsonl", max_documents=39),
    }
    prints = {name: prepare(value, tmp_path / f"x-{name}").fingerprint for name, value in changed.items()}
    assert len({base, *prints.values()}) == len(prints) + 1
    # The same tokens in other rows are other data, also where no tail gives it away.
    report = PackedData.load(tmp_path / "base").report
    rows = [corpus._fingerprint(CorpusSettings(context_length=n), "d", "t", report) for n in (16, 8)]
    assert rows[0] != rows[1]
    assert all(len(value) == 64 and int(value, 16) >= 0 for value in prints.values())


def test_bytes_per_token_counts_the_packed_text(tmp_path: Path) -> None:
    data = prepare(corpus_of(tmp_path / "a.jsonl"), tmp_path / "data")
    text = data.tokenizer().decode(data.validation.reshape(-1)).replace(SEPARATOR, "")
    assert data.bytes_per_unit == len(text.encode()) / data.validation.size


def test_arrays_are_mapped_and_read_only(tmp_path: Path) -> None:
    data = prepare(corpus_of(tmp_path / "a.jsonl"), tmp_path / "data")
    assert isinstance(data.train, np.memmap)
    assert data.train.dtype == np.uint16
    assert data.train.shape[1] == data.context_length == 16
    assert int(data.train.max()) < data.vocab_size
    with pytest.raises(ValueError, match="read-only"):
        data.train[0, 0] = 1


def test_a_finished_folder_is_reused_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings_ = corpus_of(tmp_path / "a.jsonl")
    first = prepare(settings_, tmp_path / "my data")
    monkeypatch.setattr(corpus, "_build", lambda *arguments: pytest.fail("built again"))
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "read_documents", lambda *arguments: pytest.fail("read again"))
        assert prepare(settings_, tmp_path / "my data").fingerprint == first.fingerprint
    # A source that was only touched is compared by content.
    os.utime(tmp_path / "a.jsonl", (1, 1))
    assert prepare(settings_, tmp_path / "my data").fingerprint == first.fingerprint
    (tmp_path / "a.jsonl").unlink()
    with pytest.warns(UserWarning, match="can't be compared"):
        assert prepare(settings_, tmp_path / "my data").fingerprint == first.fingerprint
    first.verify()


def test_a_changed_source_is_noticed(tmp_path: Path) -> None:
    settings_ = corpus_of(tmp_path / "a.jsonl")
    prepare(settings_, tmp_path / "data")
    write_jsonl(tmp_path / "a.jsonl", [*TEXTS, "one more"])
    with pytest.raises(DataError, match="source has changed"):
        prepare(settings_, tmp_path / "data")


def test_a_changed_tokenizer_is_noticed(tmp_path: Path) -> None:
    train_tokenizer(TEXTS[:3], 280, 16).save_pretrained(tmp_path / "tokenizer")
    settings_ = corpus_of(tmp_path / "a.jsonl", tokenizer=tmp_path / "tokenizer")
    prepare(settings_, tmp_path / "data")
    assert prepare(settings_, tmp_path / "data").vocab_size <= 280
    train_tokenizer(TEXTS[3:], 280, 16).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(DataError, match="is not the one"):
        prepare(settings_, tmp_path / "data")


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    settings_ = corpus_of(tmp_path / "a.jsonl")
    prepare(settings_, tmp_path / "data")
    with pytest.raises(DataError, match=r"other settings \(seed: 0 there, 5 asked\)"):
        prepare(corpus_of(tmp_path / "a.jsonl", seed=5), tmp_path / "data")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="is not empty"):
        prepare(settings_, tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    with pytest.raises(DataError, match="is a file"):
        prepare(settings_, tmp_path / "a.jsonl")


def test_a_folder_inside_the_source_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(DataError, match="lies inside"):
        prepare(CorpusSettings(paths=(tmp_path,), **SMALL), tmp_path / "data")


def test_a_failure_leaves_nothing_and_a_killed_run_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_ = corpus_of(tmp_path / "a.jsonl")
    (tmp_path / ".data.partial").mkdir()  # what a killed process leaves
    (tmp_path / ".data.partial" / "train.spool").write_bytes(b"half")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_fingerprint", full)
        with pytest.raises(DataError, match="No space left"):
            prepare(settings_, tmp_path / "data")
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / ".data.partial").exists()
    (tmp_path / "data").mkdir()
    data = prepare(settings_, tmp_path / "data")
    assert sorted(path.name for path in data.directory.iterdir()) == [
        "SHA256SUMS",
        "corpus.json",
        "tokenizer",
        "train.npy",
        "validation.npy",
    ]


@pytest.mark.parametrize("name", ["train.npy", "corpus.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_damage_is_noticed(tmp_path: Path, name: str, damage: str) -> None:
    data = prepare(corpus_of(tmp_path / "a.jsonl"), tmp_path / "data")
    path = data.directory / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError):
        PackedData.load(data.directory).tokenizer()


def test_verify_finds_a_changed_token(tmp_path: Path) -> None:
    data = prepare(corpus_of(tmp_path / "a.jsonl"), tmp_path / "data")
    content = bytearray((data.directory / "validation.npy").read_bytes())
    content[-1] ^= 1
    (data.directory / "validation.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"validation.npy is damaged"):
        PackedData.load(data.directory).verify()


@pytest.mark.parametrize("sums", [True, False])
def test_a_changed_token_is_refused_where_the_data_would_be_used_again(tmp_path: Path, sums: bool) -> None:
    """Also in data that were prepared before there were sums."""
    asked = corpus_of(tmp_path / "a.jsonl")
    path = prepare(asked, tmp_path / "data").directory / "train.npy"
    if not sums:
        (path.parent / SUMS_FILE).unlink()
    prepare(asked, tmp_path / "data")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train\.npy .*Delete"):
        prepare(asked, tmp_path / "data")


def test_the_tokenizer_answers_like_any_other(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    data = prepare(corpus_of(tmp_path / "a.jsonl"), tmp_path / "data")
    tokenizer = AutoTokenizer.from_pretrained(data.directory / "tokenizer")
    assert tokenizer.decode(tokenizer("word1 word2")["input_ids"]) == "word1 word2"
    assert tokenizer.eos_token == tokenizer.bos_token == SEPARATOR
    assert tokenizer.model_max_length == 16


def test_progress_reaches_its_end(tmp_path: Path) -> None:
    seen: dict[str, tuple[int, int | None]] = {}
    data = prepare(
        corpus_of(tmp_path / "a.jsonl"),
        tmp_path / "data",
        lambda stage, done, total: seen.update({stage: (done, total)}),
    )
    assert list(seen) == ["read", "tokenizer", "train", "validation"]
    assert seen["train"] == (data.report.train.bytes, data.report.train.bytes)


def test_progress_bars_leave_standard_output_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(corpus_of(tmp_path / "a.jsonl"), tmp_path / "quiet", progress=True)
    assert capfd.readouterr() == ("", ""), "there is no terminal"
    monkeypatch.setenv("FORCE_COLOR", "1")
    prepare(corpus_of(tmp_path / "b.jsonl"), tmp_path / "colored", progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "corpus: train" in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_fraction": 0.0001}, "No document fell into the validation split"),
        ({"validation_fraction": 0.9999}, "No document fell into the train split"),
        ({"context_length": 100_000}, "less than one context of 100000"),
        ({"max_bytes": 1}, "no usable document: 0 distinct documents .*stopped at max_bytes"),
        ({"tokenizer": Path("nowhere")}, "nowhere does not exist"),
    ],
)
def test_corpora_that_can_not_be_used(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare(corpus_of(tmp_path / "a.jsonl", **changes), tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"validation_fraction": 0.0}, "validation_fraction"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"context_length": 1}, "context_length"),
        ({"vocab_size": 256}, "vocab_size"),
        ({"source": "files"}, "paths"),
        ({"source": "huggingface"}, "name"),
        ({"source": "stdlib", "paths": ["a.txt"]}, "paths"),
        ({"source": "stdlib", "name": "x"}, "name"),
    ],
)
def test_settings_out_of_range(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        CorpusSettings(**values)
    with pytest.raises(ConfigError, match=field):
        CorpusSettings.parse(values)


def test_a_slice_of_the_standard_library(tmp_path: Path) -> None:
    data = prepare(
        CorpusSettings(max_documents=60, vocab_size=512, context_length=64, validation_fraction=0.2), tmp_path / "data"
    )
    assert data.report.documents == 60
    assert data.report.limit == "max_documents"
    assert data.vocab_size == 512
    assert 1.5 < data.bytes_per_unit < 6
    assert "import" in data.tokenizer().decode(data.train[:50].reshape(-1))


def test_a_disk_that_is_full_when_a_tokenizer_is_written_is_an_error_of_the_disk(tmp_path):
    """The tokenizers package reports it by an exception of no class."""
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        save_processor(tiny_tokenizer("byte_level"), tmp_path)
