"""What is wrong with a stream's source is told in one message that names the file, before or while it is learnt."""

import json
import os
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from auxin.data import make_loader
from auxin.data.shard_cache import Cutting
from auxin.data.streamed_settings import StreamedTextSettings
from auxin.data.streamed_text import StreamedText, prepare
from auxin.errors import ConfigError, DataError
from auxin.training import TrainingSettings, latest_checkpoint, train
from oracles.stream import shuffled
from streams import documents, stream_of, write_lines, write_parquet
from training.tiny import checkpoint_bits, tiny_llama

pytestmark = pytest.mark.usefixtures("nobody_ahead")


@pytest.fixture
def values(tmp_path: Path) -> dict:
    for number in range(4):
        write_parquet(tmp_path / f"corpus/{number}.parquet", documents(20, 20 * number), rows=5)
    return stream_of(tmp_path, tmp_path / "corpus")


def opened(values: dict, folder: Path) -> StreamedText:
    return prepare(StreamedTextSettings.parse(values), folder)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"words": ["a"]}, r"bad.parquet has no field 'text'. Set `text_field` to one of: words"),
        ({"text": [1]}, r"bad.parquet has a field 'text' of the type int64, not of texts. Set `text_field`"),
        ({"text": pyarrow.array([], pyarrow.string())}, r"No row is in .*bad.parquet. Restore what is empty, or leave"),
    ],
)
def test_a_parquet_file_without_texts_is_refused_before_anything(values, tmp_path, columns, message):
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "corpus/bad.parquet")
    with pytest.raises(DataError, match=message):
        opened(values, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_files_that_are_damaged_or_empty_are_refused_before_anything(values, tmp_path):
    (tmp_path / "corpus/empty.jsonl").touch()
    with pytest.raises(DataError, match=r"No row is in .*empty.jsonl"):
        opened(values, tmp_path / "data")
    path = tmp_path / "corpus/2.parquet"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"2.parquet is not a readable Parquet file: .* Restore it or leave it out"):
        opened(values, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_documents": 5}, "max_documents belongs to the kind 'text'.*a training's budget"),
        ({"max_bytes": 5}, "max_bytes belongs to the kind 'text'"),
        ({"shard_bytes": 0}, "shard_bytes"),
        ({"paths": [], "name": "some/set", "split": "train[:1%]"}, "a part of a split, and a stream reads whole ones"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, changes, message):
    with pytest.raises(ConfigError, match=message):
        StreamedTextSettings.parse({**values, **changes})


def changed(path: Path) -> None:
    """Another text of the same length."""
    texts = pyarrow.parquet.read_table(path)["text"].to_pylist()
    texts[7] = texts[7].replace("the", "teh", 1)
    write_parquet(path, texts, rows=5)


def test_a_source_that_has_changed_is_refused_by_the_names_of_its_files(values, tmp_path):
    opened(values, tmp_path / "data")
    changed(tmp_path / "corpus/1.parquet")
    (tmp_path / "corpus/2.parquet").unlink()
    write_parquet(tmp_path / "corpus/new.parquet", ["a"])
    with pytest.raises(DataError) as told:
        opened(values, tmp_path / "data")
    for what in ("missing: ", "changed: ", "new: "):
        assert what in str(told.value)
    for name, what in (("2.parquet", "missing"), ("1.parquet", "changed"), ("new.parquet", "new")):
        assert name in str(told.value).split(f"{what}: ")[1].split(";")[0]
    with pytest.raises(DataError, match="other settings"):
        opened({**values, "context_length": 16}, tmp_path / "data")


def test_a_file_that_was_touched_alone_is_taken_and_one_that_was_read_is_compared(values, tmp_path):
    texts = [f"{number} " + "the cat sat on the mat " * 200 for number in range(60)]
    file = write_lines(tmp_path / "lines.jsonl", texts)
    values = {**values, "paths": [str(file)], "shard_bytes": 30_000}
    first = batches(values, tmp_path, 500)
    os.utime(file, ns=(1, 1))
    assert batches(values, tmp_path, 5) == first[:5]
    # In a place that is not looked at for the file's digest: only reading it again tells.
    content = bytearray(file.read_bytes())
    place = content.index(b"mat", 20_000)
    content[place : place + 3] = b"bat"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"lines.jsonl, bytes \d+ to \d+ has changed since it was first tokenized"):
        opened(values, tmp_path / "data")


def batches(values: dict, folder: Path, count: int) -> list:
    loader = make_loader(opened(values, folder / "data").split("train"), 4, 1)
    return [batch["input_ids"].tolist() for batch in islice(loader, count)]


MENDS = {
    "missing": r"2.parquet, a file of the stream, can't be read: there is no such file or folder. Put it back",
    "cut": r"2.parquet, a file of the stream, has changed since the stream was prepared. Put it back as it was",
    "changed": r"2.parquet, a file of the stream, has changed since the stream was prepared",
    "no disk": r"The tokens of .*2.parquet.* could not be written to .*shards: .* Free space on the disk",
}


@pytest.mark.parametrize("fault", MENDS)
def test_what_fails_in_the_middle_of_training_loses_nothing(values, tmp_path, fault, monkeypatch):
    """The steps that were done are saved, the message says where and what to mend; the run ends in the same bits."""
    # One with which the file comes late, but in the first epoch.
    seed = next(seed for seed in range(999) if not set(shuffled(range(16), f"{seed}:0")[:6]) & set(range(8, 12)))
    settings = TrainingSettings(steps=40, batch_size=3, tensorboard=False, checkpoint_interval=None, seed=seed)
    whole = train(model(), opened(values, tmp_path / "data"), settings, tmp_path / "whole", progress=False)
    other = opened(values, tmp_path / "other")
    file = tmp_path / "corpus/2.parquet"
    content, times = file.read_bytes(), file.stat()
    if fault == "no disk":

        def cut(self, number, documents, path):
            if "2.parquet" in other.plan.named(number):
                raise OSError(28, "No space left on device")
            return kept(self, number, documents, path)

        kept = Cutting.cut
        monkeypatch.setattr(Cutting, "cut", cut)
    elif fault == "missing":
        file.unlink()
    elif fault == "cut":
        file.write_bytes(content[:100])
    else:
        changed(file)
    with pytest.raises(DataError, match=rf"{MENDS[fault]}.* Training stopped after step (\d+) of 40") as told:
        train(model(), other, settings, tmp_path / "run", progress=False)
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert f"saved in {checkpoint}" in str(told.value)
    steps = int(checkpoint.name.removeprefix("step-"))
    assert 0 < steps < 40
    assert f"after step {steps} of" in str(told.value)
    monkeypatch.undo()
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    train(model(), opened(values, tmp_path / "other"), settings, tmp_path / "run", progress=False)
    assert checkpoint_bits(latest_checkpoint(tmp_path / "run")) == checkpoint_bits(whole.checkpoint)


def model():
    return tiny_llama(vocab_size=300)


def test_lines_without_the_field_are_told_by_the_file_they_are_in(values, tmp_path):
    lines = [json.dumps({"words": "the cat"})] * 50
    (tmp_path / "corpus/lines.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"lines.jsonl, byte 0 has no field 'text'. Set `text_field` to one of: words"):
        opened({**values, "shard_bytes": 100, "sample_bytes": 10**9}, tmp_path / "data")


def test_a_plan_that_is_damaged_is_told(values, tmp_path):
    opened(values, tmp_path / "data")
    (tmp_path / "data/plan.json").write_text("{")
    with pytest.raises(DataError, match=r"plan.json .*Delete"):
        opened(values, tmp_path / "data")
