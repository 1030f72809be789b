"""What text needs of memory does not grow with a document's length or with the number of files."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from auxin.data.tokenizer import train_tokenizer

# Prints the megabytes that preparing adds to the peak of a process which has imported everything and read a little.
CHILD = """
import json, resource, sys
from pathlib import Path
from auxin.data import CorpusSettings, prepare
from auxin.data.labelled_source import LabelledTextSettings
from auxin.data.labelled_text import prepare as prepare_labelled
from auxin.data.question_answering import prepare as prepare_questions
from auxin.data.question_source import QuestionAnsweringSettings

def prepared(path, output, kind):
    values = {"paths": [path], "tokenizer": sys.argv[1], "context_length": 64, "validation_fraction": 0.4}
    if kind == "labelled_text":
        return prepare_labelled(LabelledTextSettings(**values), output)
    if kind == "question_answering":
        fields = {"question_field": "name", "context_field": "text", "answer_field": "answer"}
        return prepare_questions(QuestionAnsweringSettings(**values, **fields), output)
    return prepare(CorpusSettings(source="files", **values), output)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

source, small, folder, kind = map(str, sys.argv[2:6])
prepared(small, Path(folder) / "small", kind)
before = peak()
report = prepared(source, Path(folder) / "data", kind).report
print(json.dumps([peak() - before, report.documents]))
"""
WORDS = "the cat sat on the mat and the hat lay under a tree by the river "


def added(source: Path, folder: Path, kind: str = "text") -> tuple[float, int]:
    """Megabytes, and the documents that were kept."""
    train_tokenizer([WORDS * 3], 300, 64).save_pretrained(folder / "tokenizer")
    rows(folder / "small.jsonl", 30, 300)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD]
        + [str(path) for path in (folder / "tokenizer", source, folder / "small.jsonl", folder, kind)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    megabytes, documents = json.loads(done.stdout)
    return megabytes, documents


def rows(path: Path, count: int, length: int, *longer: int) -> None:
    """Labelled rows of `count` texts of about `length` characters, and one of each of the `longer` lengths."""
    with path.open("w") as file:
        for number, size in enumerate([*([length] * count), *longer]):
            text = f"{number} {WORDS * (size // len(WORDS) + 1)}"
            row = {"text": text, "label": number % 2, "name": f"which {number}", "answer": "cat"}
            file.write(json.dumps(row) + "\n")


@pytest.mark.parametrize("kind", ["text", "labelled_text", "question_answering"])
@pytest.mark.parametrize("megabytes", [6, pytest.param(60, marks=pytest.mark.whole)])
def test_a_long_line(megabytes, kind, tmp_path):
    """A few copies of the text, and the tokens of a part of it."""
    rows(tmp_path / "a.jsonl", 30, 300, megabytes * 1_000_000, megabytes * 1_000_000)
    found, documents = added(tmp_path / "a.jsonl", tmp_path, kind)
    assert documents == 32
    assert found < 400 + 8 * megabytes, found


def test_a_json_array_and_a_csv_of_many_rows(tmp_path):
    """One row at a time: 20 MB of a column that is not asked for are not there at once."""
    texts = [f"{number} {WORDS}" for number in range(20_000)]
    rest = "x" * 1000
    (tmp_path / "rows").mkdir()
    with (tmp_path / "rows/a.json").open("w") as file:
        json.dump([{"rest": rest, "text": text} for text in texts], file)
    with (tmp_path / "rows/b.csv").open("w") as file:
        file.writelines(["rest,text\n", *(f"{rest},b{text}\n" for text in texts)])
    found, documents = added(tmp_path / "rows", tmp_path)
    assert documents == 2 * len(texts)
    assert found < 100, found


@pytest.mark.parametrize("files", [5_000, pytest.param(100_000, marks=pytest.mark.whole)])
def test_many_files(files, tmp_path):
    """Names, sizes and digests."""
    for number in range(files):
        if number % 1000 == 0:
            folder = tmp_path / "texts" / f"{number // 1000:03}"
            folder.mkdir(parents=True)
        (folder / f"{number}.txt").write_text(f"{number} {WORDS}")
    found, documents = added(tmp_path / "texts", tmp_path)
    assert documents == files
    assert found < 100 + files * 0.003, found


STREAM = """
import itertools, json, sys
from pathlib import Path
from auxin.data import make_loader
from auxin.data.shards_ahead import ShardsAhead
from auxin.data.streamed_settings import StreamedTextSettings
from auxin.data.streamed_text import prepare

ShardsAhead.ask = lambda self, shards: None  # all of the work is done here

def read(paths, output, count):
    values = {"paths": paths, "tokenizer": sys.argv[1], "context_length": 64, "validation_fraction": 0.4}
    data = prepare(StreamedTextSettings.parse({**values, "sample_bytes": 100_000, "shuffle_shards": 1}), output)
    for _ in itertools.islice(make_loader(data.split("train"), 32, 0), count):
        pass
    return sum(record.bytes for record in data.cache.records())

def peak():  # of this program alone: getrusage's begins with that of whoever has started it
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

source, small, folder = map(str, sys.argv[2:5])
read([small], Path(folder) / "small", 5)
before = peak()
size = read([source], Path(folder) / "data", 5)
print(json.dumps([peak() - before, size]))
"""


@pytest.mark.parametrize("ending", [".jsonl.gz", ".parquet"])
def test_a_shard_that_can_not_be_cut(ending, tmp_path):
    """Rows of one large shard, a compressed file or a single row group, become tokens without all of them being there
    at once."""
    train_tokenizer([WORDS * 3], 300, 64).save_pretrained(tmp_path / "tokenizer")
    large, small = tmp_path / f"large{ending}", tmp_path / f"small{ending}"
    for path, count in ((large, 12_000), (small, 100)):
        texts = [f"{number} {WORDS * 40}" for number in range(count)]
        if ending == ".parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=count)
        else:
            path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode(), 1))
    words = [str(place) for place in (tmp_path / "tokenizer", large, small, tmp_path)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STREAM, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    megabytes, size = json.loads(done.stdout)
    assert size > 0.5 * 12_000 * 40 * len(WORDS)
    # Held as a whole, the texts alone would take 31, their tokens a multiple of that.
    assert megabytes < 70, megabytes
