"""Reading documents: every format, and a reason for everything that is left out."""

import bz2
import codecs
import gzip
import json
import lzma
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models
from transformers import GPTNeoXConfig

from auxin.data import CorpusSettings, prepare, row_files
from auxin.data.collecting import collect
from auxin.data.sources import read_documents, source_files
from auxin.data.tokenizer import load_tokenizer, train_tokenizer
from auxin.errors import DataError
from tiny_tokenizers import tiny_tokenizer


def read(*paths: Path, **changes: Any) -> tuple[list[str], dict[str, str]]:
    """The texts, and the reasons by the last part of the names."""
    found = list(read_documents(CorpusSettings(source="files", paths=paths, **changes)))
    texts = [document.data.decode() for document in found if document.data is not None]
    return texts, {Path(document.name).name: document.skipped for document in found if document.skipped}


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_text_files_keep_every_byte_and_bad_ones_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\n\N{SNOWMAN}".encode())
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.md").write_text("two")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.txt").write_text(" \n\t")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / ".hidden").write_text("no")
    texts, skipped = read(tmp_path)
    assert texts == ["one\r\n\N{SNOWMAN}", "two"]
    assert skipped == {
        "empty.txt": "empty",
        "blank.txt": "empty",
        "latin.txt": "not UTF-8",
        ".hidden": "hidden file",
    }


def test_a_folder_below_a_hidden_one_is_read(tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "corpus"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("one")
    assert read(folder) == (["one"], {})


def test_globs_folders_and_files_name_a_file_once(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("a.txt", "deep/b.txt", "deep/er/c.txt", "deep/er/d.md"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "**" / "*.txt")[0] == ["a.txt", "deep/b.txt", "deep/er/c.txt"]
    assert len(read(tmp_path, tmp_path / "*.txt", tmp_path / "deep" / ".." / "a.txt")[0]) == 4


def test_jsonl_rows(tmp_path: Path) -> None:
    rows = ['{"body": "one"}', "", "{oops", "[1]", '{"other": 1}', '{"body": null}', '{"body": "\\ud800"}']
    rows += ['{"body": ""}', '{"body": "two"}', '{"body": ' + "9" * 5000 + "}"]
    (tmp_path / "a.jsonl").write_bytes("\n".join(rows).encode() + b'\n{"body": "caf\xe9"}\n')
    texts, skipped = read(tmp_path / "a.jsonl", text_field="body")
    assert texts == ["one", "two"]
    assert skipped == {
        "a.jsonl:3": "not valid JSON",
        "a.jsonl:4": "not a JSON object",
        "a.jsonl:5": "no field 'body'",
        "a.jsonl:6": "text field is not a string",
        "a.jsonl:7": "not valid Unicode",
        "a.jsonl:8": "empty",
        "a.jsonl:10": "not valid JSON",
        "a.jsonl:11": "not UTF-8",
    }
    (tmp_path / "b.jsonl").write_text("\n\n")
    assert read(tmp_path / "b.jsonl") == ([], {"b.jsonl": "empty"})


def test_parquet_rows(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"text": ["one", None, "", "two"], "n": [1, 2, 3, 4]})
    texts, skipped = read(tmp_path / "a.parquet")
    assert texts == ["one", "two"]
    assert skipped == {"a.parquet:2": "text field is not a string", "a.parquet:3": "empty"}
    write_parquet(tmp_path / "b.parquet", {"text": pyarrow.array([], pyarrow.string())})
    assert read(tmp_path / "b.parquet") == ([], {"b.parquet": "empty"})


def test_a_missing_text_field_names_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one", "id": 3}\n')
    write_parquet(tmp_path / "a.parquet", {"body": ["one"], "id": [3]})
    for name in ("a.jsonl", "a.parquet"):
        with pytest.raises(DataError, match=r"no field 'text'.*one of: body, id"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere.txt", "nowhere.txt does not exist"),
        (lambda folder: folder / "*.txt", "matches no file"),
        (lambda folder: folder, "matches no file"),
    ],
)
def test_paths_without_files(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(make(tmp_path))


def test_a_broken_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read(tmp_path / "a.parquet")


def test_the_standard_library_without_its_tests() -> None:
    files = source_files(CorpusSettings())
    names = [file.name for file in files]
    assert "statistics.py" in names
    assert "json/decoder.py" in names
    assert names == sorted(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
def test_a_hugging_face_dataset(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set" / "train.parquet", {"body": ["one", None, "two"], "n": [1, 2, 3]})
    settings = CorpusSettings(source="huggingface", name=str(tmp_path / "set"), text_field="body")
    found = list(read_documents(settings))
    assert [document.data for document in found] == [b"one", None, b"two"]
    assert found[1].skipped == "text field is not a string"
    with pytest.raises(DataError, match=r"no field 'text'.*one of: body, n"):
        list(read_documents(settings.model_copy(update={"text_field": "text"})))
    with pytest.raises(DataError, match="split 'nope', could not be loaded"):
        list(read_documents(settings.model_copy(update={"split": "nope"})))


@pytest.mark.usefixtures("offline")
def test_a_dataset_that_can_not_be_reached() -> None:
    with pytest.raises(DataError, match=r"'nobody/nothing'.*could not be loaded.*Check the name"):
        list(read_documents(CorpusSettings(source="huggingface", name="nobody/nothing")))


def test_tokenizers_load_from_a_folder_and_a_file(tmp_path: Path) -> None:
    trained = train_tokenizer(["some text"], 260, 16)
    trained.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.eos_token_id == trained.eos_token_id
        assert loaded("some text")["input_ids"] == trained("some text")["input_ids"]


def test_tokenizers_that_can_not_be_used(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match="holds no tokenizer"):
        load_tokenizer(tmp_path / "bad.json")
    (tmp_path / "empty").mkdir()
    # transformers makes an empty tokenizer up for the folder of such a model.
    GPTNeoXConfig().save_pretrained(tmp_path / "empty")
    with pytest.raises(DataError, match=r"no tokenizer.json in .*empty. Save the tokenizer there"):
        load_tokenizer(tmp_path / "empty")
    hollow = Tokenizer(models.BPE())
    hollow.add_special_tokens(["<|endoftext|>"])
    hollow.save(str(tmp_path / "hollow.json"))
    with pytest.raises(DataError, match="turns the text 'a' into no token"):
        load_tokenizer(tmp_path / "hollow.json")
    content = train_tokenizer(["some text"], 260, 16).backend_tokenizer.to_str()
    (tmp_path / "plain.json").write_text(content.replace("<|endoftext|>", "<other>"))
    with pytest.raises(DataError, match=r"no end-of-text token.* Set its eos_token to a token that .* as <other>\.$"):
        load_tokenizer(tmp_path / "plain.json")
    assert json.loads(content)["model"]["type"] == "BPE"


def test_a_tokenizer_without_an_end_of_text_ends_documents_with_its_separator(tmp_path: Path) -> None:
    own = tiny_tokenizer("wordpiece")
    own.save_pretrained(tmp_path)
    found = load_tokenizer(tmp_path)
    assert own.eos_token_id is None
    assert found.eos_token_id == own.sep_token_id is not None
    assert len(found) == len(own), "no token is new: its id would lie beyond a model's table"


def test_rows_are_told_by_the_ending_in_letters_of_any_case(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}).encode() for text in ("one", "two")]
    (tmp_path / "a.JSONL").write_bytes(b"\n".join(lines))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    (tmp_path / "c.Jsonl.GZ").write_bytes(gzip.compress(lines[0]) + gzip.compress(b"\nno json"))
    write_parquet(tmp_path / "d.PARQUET", {"text": ["three"]})
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b"no rows"))
    texts, skipped = read(tmp_path)
    assert texts == ["one", "two"] * 2 + ["one", "three", "no rows"]
    assert skipped == {"c.Jsonl.GZ:2": "not valid JSON"}


TWO = [{"text": "one, \N{SNOWMAN}"}, {"text": 'two "2"\nlines'}]
JSON_LINES = "".join(json.dumps(row) + "\n" for row in TWO).encode()
ARRAY = json.dumps(TWO, ensure_ascii=False, indent=1).encode()
CSV = 'n,text\r\n1,"one, \N{SNOWMAN}"\r\n2,"two ""2""\nlines"\r\n'.encode()
ROWS = {
    "a.jsonl": JSON_LINES,
    "a.ndjson": JSON_LINES,
    "lines.json": JSON_LINES,
    "array.json": ARRAY,
    "a.csv": CSV,
    "a.tsv": 'text\tn\n"one, \N{SNOWMAN}"\t1\n"two ""2""\nlines"\t2\n'.encode(),
}
COMPRESSED = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8], ids=["plain", "BOM"])
@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("name", ROWS)
def test_rows_of_every_format_compressed_or_not(tmp_path: Path, name: str, compression: str, mark: bytes) -> None:
    path = tmp_path / f"{name}{compression}"
    path.write_bytes(COMPRESSED[compression](mark + ROWS[name]))
    for named in (path, tmp_path):
        assert read(named) == ([row["text"] for row in TWO], {})


@pytest.mark.parametrize("compression", COMPRESSED)
def test_a_byte_order_mark_is_no_text(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(COMPRESSED[compression](codecs.BOM_UTF8 + "one \N{ZERO WIDTH NO-BREAK SPACE}two".encode()))
    assert read(path) == (["one \N{ZERO WIDTH NO-BREAK SPACE}two"], {})


def test_what_is_packed_is_not_read_and_it_is_said_what_to_do(tmp_path: Path) -> None:
    for name in ("a.jsonl.zst", "b.txt.ZST", "c.tar.gz", "d.zip", "e.parquet.gz"):
        (tmp_path / name).write_bytes(b"plain")
    assert read(tmp_path) == (
        [],
        {
            "a.jsonl.zst": ".zst: decompress it first",
            "b.txt.ZST": ".zst: decompress it first",
            "c.tar.gz": ".tar.gz: decompress it first",
            "d.zip": ".zip: decompress it first",
            "e.parquet.gz": ".parquet.gz: decompress it first",
        },
    )
    settings = CorpusSettings(source="files", paths=(tmp_path / "a.jsonl.zst",))
    with pytest.raises(DataError, match=r"1 \.zst: decompress it first\)\. Mend that, or give another source"):
        collect(settings, read_documents(settings), tmp_path, lambda *_: None)


NO_ROWS = {
    "package.json": '{\n  "name": "x",\n  "text": "y"\n}\n',
    "short.json": '{"name": "x"}',
    "numbers.json": "[1, 2, 3]",
    "text.json": '["text"]',
    "broken.json": '[{"text": ',
    "none.json": "no JSON",
    "a.csv": "name,n\nx,1\n",
}


def test_a_folder_of_sources_keeps_its_json_and_csv_as_text_and_says_which_hold_rows(tmp_path: Path) -> None:
    for name, text in NO_ROWS.items():
        (tmp_path / name).write_text(text)
    with pytest.warns(UserWarning, match=r"^2 files hold rows without a field 'text'.*: .*a\.csv, .*short\.json\. Set"):
        texts, skipped = read(tmp_path)
    assert sorted(texts) == sorted(NO_ROWS.values())
    assert skipped == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path, text_field="name")[0].count("x") == 2


@pytest.mark.parametrize("name", ["a.csv", "short.json"])
def test_a_file_of_rows_that_is_named_itself_is_not_taken_for_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(NO_ROWS[name])
    with pytest.raises(DataError, match=r"no field 'text'\. Set `text_field` to one of: n"):
        read(tmp_path / name)


def test_csv_rows(tmp_path: Path) -> None:
    long = "x" * 200_000
    (tmp_path / "a.csv").write_bytes(f"n,text\n1,{long}\n\n2\n3,\n4,".encode() + b"caf\xe9\n5,two\n")
    texts, skipped = read(tmp_path)
    assert texts == [long, "two"]
    assert skipped == {"a.csv:2": "fewer columns than the header", "a.csv:3": "empty", "a.csv:4": "not UTF-8"}
    (tmp_path / "a.csv").write_text("text\n")
    assert read(tmp_path) == ([], {"a.csv": "empty"})
    (tmp_path / "a.csv").write_text("text\none\ntw\ro\n")
    with pytest.raises(DataError, match=r"a\.csv is no CSV behind its row 1.*Mend it"):
        read(tmp_path)


def test_elements_of_a_json_array(tmp_path: Path) -> None:
    elements = [{"text": "one"}, 3, {"other": 1}, {"text": None}, {"text": "two"}]
    (tmp_path / "a.json").write_text(f" \n{json.dumps(elements)} \n")
    assert read(tmp_path) == (
        ["one", "two"],
        {
            "a.json:2": "not a JSON object",
            "a.json:3": "no field 'text'",
            "a.json:4": "text field is not a string",
        },
    )
    for broken in ('[{"text": "one"}', '[{"text": "one"}, {"text": "tw', '[{"text": "one"} {"text": "two"}]'):
        (tmp_path / "a.json").write_text(broken)
        with pytest.raises(DataError, match=r"a\.json is no JSON array of UTF-8 behind its element 1: .*Mend it"):
            read(tmp_path)


@pytest.mark.parametrize("seed", range(3))
def test_a_json_array_is_read_in_pieces_of_any_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Cut at any place, it gives what `json` gives of the whole."""
    draw = random.Random(seed)
    texts = ["".join(draw.choices('ab"\\\n\t{}[],:\u00e9\u2603\U0001f600 ', k=draw.randrange(60))) for _ in range(30)]
    values = [*texts, *(draw.choice([1, -2.5e-3, 12345678901234567890, True, None, [], {}]) for _ in range(30))]
    draw.shuffle(values)
    elements = [value if draw.random() < 0.3 else {"text": value} for value in values]
    content = json.dumps(elements, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 1]))
    (tmp_path / "a.json").write_text(content)
    for characters in (1, 2, 3, 7, 64, 10_000):
        monkeypatch.setattr(row_files, "_CHARACTERS", characters)
        assert list(row_files._json_array(tmp_path / "a.json")) == elements


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: b"{}" + data, lambda data: data[:20] + b"x" * 40]
)
def test_a_damaged_compressed_file_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    rows = "\n".join(json.dumps({"text": f"a text, number {number}"}) for number in range(900))
    for name, content in {"a.jsonl.gz": rows, "a.json.gz": f"[{rows.replace(chr(10), ',')}]"}.items():
        path = tmp_path / name
        path.write_bytes(damage(gzip.compress(content.encode())))
        with pytest.raises(DataError, match=rf"^\S*{name} can't be read: .*restore it or leave it out\.$"):
            read(path)


def test_what_a_folder_holds_beside_files_is_left_out_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("read")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/more.txt").write_text("read too")
    (tmp_path / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    found = {
        Path(document.name).name: document.skipped
        for document in read_documents(CorpusSettings(source="files", paths=[tmp_path]))
    }
    assert found == {
        "text.txt": None,
        "more.txt": None,
        "linked": "link to a folder",
        "dangling": "link to nothing that is a file",
        "pipe": "no file",
    }
    with pytest.raises(DataError, match="pipe is no file and no folder"):
        read(tmp_path / "pipe")


def test_a_name_that_is_no_text_can_be_told(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(20):
        (tmp_path / f"texts/{number}.txt").write_text(f"text {number} to learn from\n" * 20)
    (Path(os.fsdecode(bytes(tmp_path / "texts") + b"/\xff\xfe.txt"))).write_bytes(b"\xff\xfe\x00")
    settings = CorpusSettings(
        source="files", paths=[tmp_path / "texts"], vocab_size=260, context_length=16, validation_fraction=0.5
    )
    data = prepare(settings, tmp_path / "data")
    (example,) = data.report.skipped["not UTF-8"].examples
    assert example.endswith("\\xff\\xfe.txt")
