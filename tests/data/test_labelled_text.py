"""Labelled texts: special tokens, cutting and padding, classes, the split, and that nothing is lost in silence."""

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import auxin.data.labelled_text as labelled
from auxin.data.collecting import CONFLICT, document_key, is_validation
from auxin.data.dataset import DATASETS
from auxin.data.labelled_source import LabelledTextSettings
from auxin.data.labelled_text import LabelledData, prepare
from auxin.data.padding import PaddingEncoder
from auxin.errors import ConfigError, DataError
from tiny_tokenizers import tiny_tokenizer

WORDS = ["season", "light", "tree", "leaf", "worst", "best", "hope", "found"]
TEXTS = [" ".join(WORDS[(n * k + k) % 8] for k in range(1, 2 + n % 7)) + f" {n}" for n in range(40)]
ROWS = [{"text": text, "label": ("neg", "pos")[n % 2]} for n, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a BERT's tokenizer, a GPT-2's and a Llama's."""
    root = tmp_path_factory.mktemp("tokenizers")
    for kind in ("wordpiece", "byte_level", "sentencepiece"):
        tiny_tokenizer(kind).save_pretrained(root / kind)
    return {path.name: path for path in root.iterdir()}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def asked(path: Path, rows: list[Any] = ROWS, **changes: Any) -> LabelledTextSettings:
    values = {"paths": [str(write(path, rows))], "vocab_size": 300, "context_length": 12, "validation_fraction": 0.3}
    return LabelledTextSettings.parse({**values, **changes})


def rows_of(data: LabelledData) -> list[tuple[str, str, str]]:
    """(split, text, label) of every sample, decoded."""
    tokenizer, found = data.tokenizer(), []
    for name in ("train", "validation"):
        split = data.split(name)
        batch = split.rows(range(len(split)))
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            text = tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
            found.append((name, text, data.form.labels[label]))
    return found


def test_every_text_is_there_with_its_label_on_the_side_that_its_content_decides(tmp_path: Path) -> None:
    settings_ = asked(tmp_path / "a.jsonl", context_length=64)
    data = prepare(settings_, tmp_path / "data")
    expected = {
        ("validation" if is_validation(document_key(row["text"].encode(), 0), settings_) else "train", *row.values())
        for row in ROWS
    }
    assert set(rows_of(data)) == expected
    assert len(rows_of(data)) == len(ROWS)
    form = data.form
    assert (form.unit, form.units, form.length, form.labels) == ("example", 1, 64, ("neg", "pos"))
    assert form.tensors == ("input_ids", "attention_mask", "labels")
    assert form.config_values.keys() == {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"}
    assert data.bytes_per_unit is None
    assert DATASETS.find("labelled_text").settings is LabelledTextSettings
    data.verify()


@settings(deadline=None, max_examples=10)
@given(st.lists(st.tuples(st.sampled_from(TEXTS), st.integers(0, 2)), min_size=8, max_size=60), st.integers(0, 99))
def test_of_a_text_one_label_is_kept_and_every_row_is_accounted_for(rows: list[tuple[str, int]], seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        # Three texts of each class that are surely there, so that there are classes to learn in most draws.
        rows = [(f"{word} {label}", label) for word in WORDS for label in range(3)] + rows
        settings_ = asked(path, [{"text": text, "label": n} for text, n in rows], seed=seed, context_length=64)
        data = prepare(settings_, Path(folder) / "data")
        first = {}
        for text, label in rows:
            first.setdefault(text, label)
        conflicts = sum(first[text] != label for text, label in rows)
        assert {text: int(label) for _, text, label in rows_of(data)} == first
        assert data.report.documents == len(first)
        skipped = data.report.skipped.get(CONFLICT)
        assert (skipped.count if skipped else 0) == conflicts
        assert data.report.documents + data.report.duplicates + conflicts == len(rows)
        for name, split in (("train", data.report.train), ("validation", data.report.validation)):
            counts = Counter(int(label) for side, _, label in rows_of(data) if side == name)
            assert split.labels == tuple(counts[n] for n in range(3))
            assert split.examples == sum(split.labels)


def encoded_by_hand(kind: str, text: str, length: int) -> list[int]:
    """Of one text what the tokenizer's papers say: [CLS] text [SEP]; text <|endoftext|>; <s> text."""
    tokenizer = tiny_tokenizer(kind)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if kind == "wordpiece":
        return [tokenizer.cls_token_id, *ids[: length - 2], tokenizer.sep_token_id]
    if kind == "byte_level":
        return [*ids[: length - 1], tokenizer.eos_token_id]
    return [tokenizer.bos_token_id, *ids[: length - 1]]


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level", "sentencepiece"])
@pytest.mark.parametrize("length", [4, 12])
def test_special_tokens_cutting_and_padding(tmp_path: Path, tokenizers: dict[str, Path], kind: str, length: int):
    settings_ = asked(tmp_path / "a.jsonl", tokenizer=str(tokenizers[kind]), context_length=length)
    data, cut, tokens = prepare(settings_, tmp_path / "data"), 0, 0
    tokenizer = tiny_tokenizer(kind)
    padding = tokenizer.pad_token_id if kind == "wordpiece" else tokenizer.eos_token_id
    expected = Counter()
    for row in ROWS:
        ids = encoded_by_hand(kind, row["text"], length)
        cut += len(encoded_by_hand(kind, row["text"], 999)) > length
        tokens += len(ids)
        expected[(*ids, *[padding] * (length - len(ids)), len(ids), row["label"] == "pos")] += 1
    found = Counter()
    for name in ("train", "validation"):
        batch = data.split(name).rows(range(len(data.split(name))))
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            assert mask.tolist() == sorted(mask.tolist(), reverse=True), "padding is on the right"
            found[(*ids.tolist(), int(mask.sum()), bool(label))] += 1
    assert found == expected
    assert data.report.train.cut + data.report.validation.cut == cut > 0
    assert data.report.train.tokens + data.report.validation.tokens == tokens
    assert f"{cut} texts cut to it" in data.describe()["context length"]
    # What is not known before the data is prepared is the classes alone.
    early, late = settings_.form(), data.form
    assert early.config_values == late.config_values
    assert (early.tensors, early.vocab_size, early.labels) == (late.tensors, late.vocab_size, None)
    assert late.config_values["pad_token_id"] == padding


def test_special_tokens_spelled_out_are_text(tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    rows = [*ROWS, {"text": "leaf <|endoftext|> tree", "label": "pos"}]
    data = prepare(asked(tmp_path / "a.jsonl", rows, tokenizer=str(tokenizers["byte_level"])), tmp_path / "data")
    end = data.tokenizer().eos_token_id
    for name in ("train", "validation"):
        batch = data.split(name).rows(range(len(data.split(name))))
        real = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -1)
        assert (real == end).sum(1).max() <= 1


PAIRS = [{"text": f"best tree {n}", "other": f"worst leaf {n % 5}", "label": n % 2} for n in range(30)]


def test_pairs(tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    options = {"text_pair_field": "other", "context_length": 16}
    data = prepare(
        asked(tmp_path / "a.jsonl", PAIRS, tokenizer=str(tokenizers["wordpiece"]), **options), tmp_path / "b"
    )
    assert data.form.tensors == ("input_ids", "attention_mask", "token_type_ids", "labels")
    tokenizer, found = tiny_tokenizer("wordpiece"), Counter()
    for name in ("train", "validation"):
        batch = data.split(name).rows(range(len(data.split(name))))
        rows = zip(*(batch[key].tolist() for key in data.form.tensors), strict=True)
        found.update((*ids, *mask, *types, label) for ids, mask, types, label in rows)
    expected = Counter()
    for row in PAIRS:
        one = tokenizer(row["text"], row["other"], padding="max_length", max_length=16)
        assert len(one["input_ids"]) == 16
        expected[(*one["input_ids"], *one["attention_mask"], *one["token_type_ids"], row["label"])] += 1
    assert found == expected
    # A decoder's texts are each ended by the same token; of a pair that is cut, both keep something.
    gpt2 = prepare(
        asked(tmp_path / "a.jsonl", PAIRS, tokenizer=str(tokenizers["byte_level"]), **options), tmp_path / "g"
    )
    end = gpt2.tokenizer().eos_token_id
    batch = gpt2.split("train").rows([0])
    ids = batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist()
    assert (ids.count(end), ids[-1]) == (2, end)
    assert 2 <= ids.index(end) <= len(ids) - 3
    # The second text makes another example of the first.
    twice = [*PAIRS, {**PAIRS[0], "other": "hope"}]
    more = prepare(asked(tmp_path / "a.jsonl", twice, **options), tmp_path / "more")
    assert more.report.documents == len(twice)


@pytest.mark.parametrize(
    ("found", "labels", "names"),
    [
        ([10, 9, 2], None, ("2", "9", "10")),
        (["b", "a", "10"], None, ("10", "a", "b")),
        ([True, False], None, ("false", "true")),
        ([1, 0], ["neg", "pos"], ("neg", "pos")),
        (["pos", "neg"], ["pos", "neg"], ("pos", "neg")),
        ([1, 2], [2, 1], ("2", "1")),
        ([True, False], [True, False], ("true", "false")),
        ([1.0, 0.0], None, ("0", "1")),
    ],
)
def test_classes_and_their_order(tmp_path: Path, found: list[Any], labels: Any, names: tuple[str, ...]) -> None:
    rows = [{"text": text, "label": found[n % len(found)]} for n, text in enumerate(TEXTS)]
    data = prepare(asked(tmp_path / "a.jsonl", rows, labels=labels), tmp_path / "data")
    assert data.form.labels == names

    def name(value: Any) -> str:
        if labels == ["neg", "pos"] and isinstance(value, int):
            return labels[value]
        return str(value).lower() if isinstance(value, bool) else str(value).removesuffix(".0")

    by_text = {text: name(row["label"]) for text, row in zip(TEXTS, rows, strict=True)}
    whole = [(text, label) for _, text, label in rows_of(data) if text in by_text]
    assert len(whole) > 5
    assert all(by_text[text] == label for text, label in whole)


def test_parquet_and_hugging_face_datasets_are_read_alike(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub" / "train.jsonl", ROWS)
    common = {"vocab_size": 300, "context_length": 12, "validation_fraction": 0.3}
    parquet = LabelledTextSettings(paths=(tmp_path / "a.parquet",), **common)
    hub = LabelledTextSettings(source="huggingface", name=str(tmp_path / "hub"), **common)
    prints = {
        prepare(each, tmp_path / str(n)).fingerprint
        for n, each in enumerate([asked(tmp_path / "a.jsonl"), parquet, hub])
    }
    assert len(prints) == 1


def test_what_is_skipped_is_counted_and_named(tmp_path: Path) -> None:
    bad = [
        {"text": "no class", "label": None},
        {"text": "  ", "label": "pos"},
        {"text": 3, "label": "pos"},
        {"text": "only text"},
        "not an object",
        {**ROWS[0], "label": "pos"},
        ROWS[0],
    ]
    write(tmp_path / "a.jsonl", [*ROWS, *bad])
    (tmp_path / "README.md").write_text("what this is")
    settings_ = LabelledTextSettings(paths=(tmp_path,), vocab_size=300, validation_fraction=0.3)
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(settings_, Path(folder) / "data")
    assert {reason: skipped.count for reason, skipped in data.report.skipped.items()} == {
        "holds no rows": 1,
        "no label": 1,
        "empty": 1,
        "text field is not a string": 1,
        "no field 'label'": 1,
        "not a JSON object": 1,
        CONFLICT: 1,
    }
    assert data.report.duplicates == 1
    assert data.report.skipped[CONFLICT].examples[0].endswith("a.jsonl:46")
    told = data.describe()
    assert "1 skipped: no label" in told["left out"]
    neg, pos = np.add(data.report.train.labels, data.report.validation.labels)
    assert (neg, pos) == (20, 20)
    assert told["training examples"] == "{} (neg {}, pos {})".format(
        data.report.train.examples, *data.report.train.labels
    )


def one_class_held_out(seed: int = 0) -> list[dict[str, str]]:
    """Rows whose class "rare" falls into the validation split alone."""
    settings_ = LabelledTextSettings(paths=(Path("a"),), validation_fraction=0.3, seed=seed)
    rare = next(f"rare {n}" for n in range(99) if is_validation(document_key(f"rare {n}".encode(), seed), settings_))
    return [*ROWS, {"text": rare, "label": "rare"}]


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (
            ROWS,
            {"labels": ["neg", "neutral"]},
            r"a.jsonl:2: label is 'pos', which is none of `labels` \(neg, neutral\)",
        ),
        ([*ROWS, {"text": "x", "label": 2}], {"labels": ["neg", "pos"]}, r"a.jsonl:41: label is 2, which is none of"),
        (
            ROWS,
            {"labels": ["neg", "pos", "none"]},
            r"'none' has no training example \(0 held out\).*leave the class out",
        ),
        (one_class_held_out(), {}, r"'rare' has no training example \(1 held out\)"),
        ([{**row, "label": "a"} for row in ROWS], {}, "All texts have the label 'a': there is nothing to tell apart"),
        ([{"text": "x", "label": [1]}], {}, r"a.jsonl:1: label is \[1\], and a class is text.*Set `label_field`"),
        ([{"text": "x", "label": 0.5}], {}, r"a.jsonl:1: label is 0.5, and a class is text"),
        # What is long would bury what is said about it.
        (
            [{"text": "x", "label": [0] * 10**5}],
            {},
            r"label is \[0, .{60,90} \.\.\. \(300,000 characters\), and a class",
        ),
        (ROWS, {"labels": [f"c{n}" for n in range(100)]}, r"`labels` \(c0, c1, [^)]*, c23 and 76 more\)\. Add"),
        ([{f"f{n:03}": 0 for n in range(300)}], {}, "no field 'text'.*one of: f000, .*, f023 and 276 more"),
        (ROWS, {"label_field": "class"}, "a.jsonl:1 has no field 'class'. Set `label_field` to one of: label, text"),
        (ROWS, {"text_field": "body"}, "no field 'body'. Set `text_field`"),
        (ROWS, {"text_pair_field": "b"}, "no field 'b'. Set `text_pair_field`"),
        ([{"text": "x", "label": None}], {}, r"no usable document: 0 distinct documents .*1 no label"),
        (
            PAIRS,
            {"text_pair_field": "other", "context_length": 3},
            "context_length: 3 has no room for 2 special tokens",
        ),
    ],
)
def test_sources_that_can_not_be_learnt_from(tmp_path: Path, rows: list[Any], changes: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        prepare(asked(tmp_path / "a.jsonl", rows, **changes), tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "stdlib"}, r"source: the standard library's files have no labels\. Set source: files"),
        ({"source": "files"}, "needs `paths`"),
        ({"paths": ["a"], "labels": ["x"]}, "labels"),
        ({"paths": ["a"], "labels": ["1", 1]}, "labels must differ; given: 1, 1"),
        ({"paths": ["a"], "label_field": "text"}, "must differ; given: text, text"),
    ],
)
def test_settings_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LabelledTextSettings.parse(values)


def test_a_finished_folder_is_reused_and_what_changed_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings_ = asked(tmp_path / "a.jsonl")
    first = prepare(settings_, tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr(labelled, "_build", lambda *arguments: pytest.fail("built again"))
        assert prepare(settings_, tmp_path / "data").fingerprint == first.fingerprint
        assert (
            first.fingerprint
            == prepare(LabelledTextSettings.parse(settings_.model_dump()), first.directory).fingerprint
        )
    with pytest.raises(DataError, match=r"of other settings \(label_field: 'label' there, 'other' asked\)"):
        prepare(settings_.model_copy(update={"label_field": "other"}), tmp_path / "data")
    # The texts are the same, a label is not.
    write(tmp_path / "a.jsonl", [{**ROWS[0], "label": "pos"}, *ROWS[1:]])
    with pytest.raises(DataError, match="source has changed"):
        prepare(settings_, tmp_path / "data")
    content = bytearray((first.directory / "train-labels.npy").read_bytes())
    content[-12] ^= 1
    (first.directory / "train-labels.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"train-labels.npy is damaged"):
        LabelledData.load(first.directory).verify()


def test_the_fingerprint_follows_content_and_settings(tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    base = prepare(asked(tmp_path / "a.jsonl"), tmp_path / "base").fingerprint
    same = asked(tmp_path / "b.jsonl", [*reversed(ROWS), ROWS[3]])
    assert prepare(same, tmp_path / "same").fingerprint == base
    changed = {
        "label": asked(tmp_path / "c.jsonl", [{**ROWS[0], "label": "pos"}, *ROWS[1:]]),
        "order": asked(tmp_path / "a.jsonl", labels=["pos", "neg"]),
        "length": asked(tmp_path / "a.jsonl", context_length=11),
        "seed": asked(tmp_path / "a.jsonl", seed=1),
        "tokenizer": asked(tmp_path / "a.jsonl", tokenizer=str(tokenizers["wordpiece"])),
    }
    prints = {name: prepare(value, tmp_path / f"x-{name}").fingerprint for name, value in changed.items()}
    assert len({base, *prints.values()}) == len(prints) + 1


def test_a_number_is_no_place_among_classes_that_are_numbers() -> None:
    numbers = LabelledTextSettings.parse({"paths": ["a.jsonl"], "labels": [1, 2, 3]})
    assert numbers.label_name(1, "row 1") == "1"
    with pytest.raises(DataError, match="none of `labels`"):
        numbers.label_name(0, "row 1")
    words = LabelledTextSettings.parse({"paths": ["a.jsonl"], "labels": ["no", "yes"]})
    assert words.label_name(0, "row 1") == "no"


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level"])
def test_a_long_text_is_cut_before_it_is_encoded_and_loses_no_token(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blanks are nothing to WordPiece, so that what is kept may begin far behind."""
    tokenizer = tiny_tokenizer(kind)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = [["the tree and the leaf " * 30], [" " * 500 + "the tree"], ["short"]]
    pairs = [[*text, "of the leaf " * 40] for text in texts[1:]]
    for is_pair, rows in ((False, texts), (True, pairs)):
        whole = list(PaddingEncoder(tokenizer, 12, is_pair).encode(rows))
        with monkeypatch.context() as less:
            less.setattr("auxin.data.padding._ENOUGH", 20)
            assert list(PaddingEncoder(tokenizer, 12, is_pair).encode(rows)) == whole
