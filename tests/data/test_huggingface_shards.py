"""Datasets that `datasets` streams: from a local folder, as from the Hub but for the place of the files."""

import gzip
import json
from itertools import islice
from pathlib import Path

import datasets
import pytest

from auxin.data import make_loader
from auxin.data.huggingface_shards import plan_dataset
from auxin.data.streamed_settings import StreamedTextSettings
from auxin.data.streamed_text import prepare
from auxin.errors import DataError
from streams import documents, stream_of, write_lines, write_parquet

pytestmark = pytest.mark.usefixtures("nobody_ahead")


def settings(folder: Path, **changes: object) -> StreamedTextSettings:
    values = {**stream_of(folder), "name": str(folder / "corpus"), **changes}
    del values["paths"]
    return StreamedTextSettings.parse(values)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three files of four row groups each."""
    for number in range(3):
        write_parquet(tmp_path / f"corpus/train-{number}.parquet", documents(20, 20 * number), rows=5)
    return tmp_path


def batches(folder: Path, own: StreamedTextSettings, name: str, count: int, position: int = 0) -> list:
    data = prepare(own, folder / name)
    loader = make_loader(data.split("train"), 3, 5, position)
    return [batch["input_ids"].tolist() for batch in islice(loader, count)]


def test_row_groups_are_shards_and_the_batches_those_of_the_files_themselves(corpus):
    """The same texts in the same shards, read by `datasets` and by this package's own reader."""
    plan, _ = plan_dataset(settings(corpus))
    assert len(plan.shards) == 12
    assert [Path(file.name).name for file in plan.files] == [f"train-{number}.parquet" for number in range(3)]
    streamed = batches(corpus, settings(corpus), "streamed", 40)
    files = StreamedTextSettings.parse(stream_of(corpus, corpus / "corpus/*.parquet"))
    assert streamed == batches(corpus, files, "files", 40)
    # It goes on in the middle of a shard.
    assert batches(corpus, settings(corpus), "streamed", 10, 23) == streamed[23:33]


def test_files_of_lines_are_a_shard_each(corpus):
    for number in range(3):
        (corpus / f"corpus/train-{number}.parquet").unlink()
        lines = write_lines(corpus / f"corpus/train-{number}.jsonl", documents(20, 20 * number))
        (corpus / f"{number}.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))  # which is not cut
    assert len(plan_dataset(settings(corpus))[0].shards) == 3
    files = StreamedTextSettings.parse(stream_of(corpus, corpus / "*.jsonl.gz"))
    assert len(prepare(files, corpus / "files").plan.shards) == 3
    assert batches(corpus, settings(corpus), "streamed", 30) == batches(corpus, files, "files", 30)


def test_what_is_wrong_is_told(corpus):
    with pytest.raises(DataError, match=r"has no field 'words'. Set `text_field` to one of: text, number"):
        plan_dataset(settings(corpus, text_field="words"))
    with pytest.raises(DataError, match=r"split 'test', could not be streamed"):
        plan_dataset(settings(corpus, split="test"))
    with pytest.raises(DataError, match=r"could not be streamed: .* Check the name"):
        plan_dataset(settings(corpus, name=str(corpus / "nothing")))
    batches(corpus, settings(corpus), "streamed", 2)
    file = corpus / "corpus/train-1.parquet"
    content = file.read_bytes()
    file.write_bytes(content[:-20] + b"x" * 20)
    with pytest.raises(DataError, match=r"could not be streamed"):
        batches(corpus, settings(corpus), "streamed", 2)
    write_parquet(file, documents(20, 100), rows=5)
    with pytest.raises(DataError, match=r"changed: .*train-1.parquet"):
        batches(corpus, settings(corpus), "streamed", 2)
    file.write_bytes(content)
    assert batches(corpus, settings(corpus), "streamed", 2)


def test_a_dataset_of_the_hub_stays_at_the_commit_that_it_was_prepared_from(corpus, monkeypatch):
    """The Hub can't be reached here, so what it would say of a file's origin is put in its place: later looks ask for
    that commit, and the branch may move on."""
    asked, real = [], datasets.load_dataset_builder

    class Names(list):
        origin_metadata = [("some/set", "abc123")] * 3

    def builder(name, config, revision=None):
        asked.append(revision)
        found = real(name, config)

        class Pretending:
            as_streaming_dataset = staticmethod(found.as_streaming_dataset)

            class config:
                data_files = {"train": Names(f"hf://{file}" for file in found.config.data_files["train"])}

        return Pretending

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    data = prepare(settings(corpus), corpus / "data")
    assert data.plan.revision == "abc123"
    assert {file.digest for file in data.plan.files} == {"some/set abc123"}
    assert set(asked) == {None, "abc123"}  # the first look finds the commit
    asked.clear()
    assert prepare(settings(corpus), corpus / "data").fingerprint == data.fingerprint
    assert set(asked) == {"abc123"}
    assert json.loads((corpus / "data/plan.json").read_text())["revision"] == "abc123"
