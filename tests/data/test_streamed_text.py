"""A stream's batches are what its page says, wherever one begins, whoever reads, and whatever became of the cache."""

import gc
import json
import shutil
import tempfile
import time
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from auxin.data import make_loader, shards_ahead
from auxin.data.shard_cache import INDEX
from auxin.data.shard_plan import plan_files, read_files
from auxin.data.stream_order import place_of
from auxin.data.streamed_settings import StreamedTextSettings
from auxin.data.streamed_text import SHARDS, StreamedText, prepare
from auxin.errors import DataError
from oracles import stream as oracle
from streams import LENGTH, TEXT, documents, encode, separator, stream_of, write_lines, write_parquet

SUPPRESSED = [HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much, HealthCheck.too_slow]
FIRST_WORDS = st.sampled_from([*TEXT.split(), "", " ", "ü", "\N{GRINNING FACE}", "<|endoftext|>"])
HELD_OUT = next(text for text in documents(99) if len(text) > 99 and oracle.is_held_out(text, 0, 0.3))
"""What any corpus needs to have a validation split."""
TEXTS = st.builds(lambda words, times: " ".join(words) * times, st.lists(FIRST_WORDS, max_size=8), st.integers(1, 5))


def opened(folder: Path, **values: object) -> StreamedText:
    return prepare(StreamedTextSettings.parse(values), folder / "data")


def batches(data: StreamedText, count: int, position: int = 0, size: int = 3, seed: int = 5, workers: int = 0) -> list:
    loader = make_loader(data.split("train"), size, seed, position, workers)
    return [batch["input_ids"].tolist() for batch in islice(loader, count)]


def derived(shards: list[list[str]], count: int, width: int, size: int = 3, seed: int = 5) -> list:
    """The first batches of shards of texts, by the oracle."""
    contexts = [oracle.contexts_of(texts, encode, separator(), LENGTH, 0, 0.3) for texts in shards]
    walk = oracle.in_order(contexts, width, seed)
    return [list(islice(walk, size)) for _ in range(count)]


@settings(max_examples=15, suppress_health_check=SUPPRESSED)
@given(
    files=st.lists(st.lists(TEXTS, min_size=1, max_size=9), min_size=1, max_size=4),
    rows=st.integers(1, 4),
    width=st.integers(1, 4),
    size=st.integers(1, 6),
    seed=st.integers(0, 2**40),
    position=st.integers(0, 40),
)
def test_the_order_is_that_of_the_page_from_any_position_on(nobody_ahead, files, rows, width, size, seed, position):
    """Parquet, each row group a shard; with a cache, without one, and with the index alone."""
    files = [*files, [HELD_OUT]]
    shards = [texts[start : start + rows] for texts in files for start in range(0, len(texts), rows)]
    assume(any(oracle.contexts_of(texts, encode, separator(), LENGTH, 0, 0.3) for texts in shards))
    wanted = derived(shards, position + 6, width, size, seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for number, texts in enumerate(files):
            write_parquet(folder / f"corpus/{number}.parquet", texts, rows)
        values = stream_of(folder, folder / "corpus", shuffle_shards=width)
        data = opened(folder, **values)
        assert batches(data, 6, position, size, seed) == wanted[position:]  # nothing of before was read
        assert batches(data, position + 6, 0, size, seed) == wanted
        for path in (folder / "data" / SHARDS).glob("*.npy"):
            path.unlink()
        assert batches(opened(folder, **values), 6, position, size, seed) == wanted[position:]


@settings(max_examples=15, suppress_health_check=SUPPRESSED)
@given(
    texts=st.lists(TEXTS, min_size=2, max_size=12),
    small=st.lists(TEXTS, max_size=2),
    wanted=st.integers(40, 400),
    ends=st.sampled_from(["", "\n", "\n\n"]),
)
def test_lines_of_json_are_cut_by_bytes_and_none_is_lost(nobody_ahead, texts, small, wanted, ends):
    """Each line in the shard that it begins in; what is smaller than a shard shares one with its neighbours."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        content = write_lines(folder / "corpus/a.jsonl", texts).read_bytes().rstrip(b"\n") + ends.encode()
        (folder / "corpus/a.jsonl").write_bytes(content)
        for number, text in enumerate(small):
            (folder / f"corpus/b{number}.txt").write_text(text or "x")
        values = stream_of(folder, folder / "corpus", shard_bytes=wanted, validation_fraction=0.01)
        data = StreamedTextSettings.parse(values)
        plan, _ = plan_files(data)
        read = [list(read_files(plan, n, data)) for n in range(len(plan.shards))]
        found = [[one.data.decode() for one in shard if one.data] for shard in read]
        parts = oracle.lines_by_bytes(content, wanted)
        own = [[json.loads(line)["text"] for line in part if line.strip()] for part in parts]
        others = [text or "x" for text in small]
        assert sum(map(len, read)) == len(texts) + len(small), "a part in which no line begins has no document"
        if len(content) <= wanted:  # the file is no larger than a shard
            assert [text for shard in found for text in shard] == [t for t in [*own[0], *others] if t.strip()]
        else:
            assert found[: len(own)] == [[text for text in part if text.strip()] for part in own]
            assert [text for shard in found[len(own) :] for text in shard] == [t for t in others if t.strip()]


@pytest.fixture
def corpus(tmp_path: Path) -> dict:
    for number in range(4):
        write_parquet(tmp_path / f"corpus/{number}.parquet", documents(20, 20 * number), rows=5)
    return stream_of(tmp_path, tmp_path / "corpus/*.parquet")


def test_readers_do_not_change_it_and_a_process_works_ahead(corpus, tmp_path, monkeypatch):
    """No reading process, two, a loader that is restored in the middle of a shard; the process ends with the data."""
    monkeypatch.setattr(shards_ahead, "_FAREWELL", 60.0)  # a busy machine may take long to start what is to end
    data = opened(tmp_path, **corpus)
    alone = batches(data, 60)
    process = data.ahead._process
    assert process is not None
    assert process.poll() is None
    assert batches(data, 60, workers=2) == alone
    loader = make_loader(data.split("train"), 3, 5, 0, 2)
    walk = iter(loader)
    assert [next(walk)["input_ids"].tolist() for _ in range(17)] == alone[:17]
    state = loader.state_dict()
    del walk
    restored = make_loader(data.split("train"), 3, 5, 0, 2)
    restored.load_state_dict(state)
    assert [batch["input_ids"].tolist() for batch in islice(restored, 20)] == alone[17:37]
    del data, loader, restored
    gc.collect()
    assert process.wait(60) == 0
    assert not list((tmp_path / "data" / SHARDS).glob("*.tmp"))


def test_the_process_ahead_makes_what_it_is_asked_for(corpus, tmp_path):
    data = opened(tmp_path, **corpus)
    data.ahead.ask([3, 7])
    process = data.ahead._process
    process.stdin.close()
    # It ends in an order that leaves nothing half-written, whatever it has come to.
    assert process.wait(60) == 0
    assert not list((tmp_path / "data" / SHARDS).glob("*.tmp"))
    data = opened(tmp_path, **corpus)
    data.ahead.ask([3, 7])
    while any(data.cache.known(number) is None for number in (3, 7)):
        assert data.ahead._process.poll() is None
        time.sleep(0.05)
    assert {record.shard for record in data.cache.records()} == {3, 7}


def test_a_process_ahead_that_has_died_is_told_and_started_again(corpus, tmp_path):
    data = opened(tmp_path, **corpus)
    alone = batches(data, 3)
    data.ahead._process.kill()
    data.ahead._process.wait()
    with pytest.warns(UserWarning, match=r"tokenizes ahead .* has ended with -9, and is started again"):
        assert batches(data, 3) == alone
    assert data.ahead._process.poll() is None


def test_the_cache_is_bounded_and_what_was_removed_is_made_again(corpus, tmp_path, nobody_ahead):
    data = opened(tmp_path, **corpus)
    whole = batches(data, 200)
    sizes = [path.stat().st_size for path in (tmp_path / "data" / SHARDS).glob("*.npy")]
    assert len(sizes) == 16
    bound = sum(sizes) // 2
    small = opened(tmp_path, **corpus, cache_bytes=bound)
    stream, found, most = small.split("train"), [], 0
    order = stream.order(3, 5)
    for position in range(200):
        found.append(stream.rows(order.batch(position))["input_ids"].tolist())
        most = max(most, sum(path.stat().st_size for path in (tmp_path / "data" / SHARDS).glob("*.npy")))
    assert found == whole
    assert most <= bound + 2 * max(sizes)  # a window is made before room is made
    # A reader that lags behind finds what was removed.
    early = order.batch(0)
    shutil.rmtree(tmp_path / "data" / SHARDS)
    assert small.split("train").rows(early)["input_ids"].tolist() == whole[0]


def test_the_window_before_stays_for_readers_that_are_behind(corpus, tmp_path, nobody_ahead):
    """In the first epoch too, in which windows are made ready to be counted, and then once more to be learnt."""
    data = opened(tmp_path, **corpus, cache_bytes=0)
    stream, width = data.split("train"), data.settings.shuffle_shards
    order, windows = stream.order(1, 5), []
    for position in range(200):
        shard = place_of(order.batch(position)[0])[0]
        if not windows or shard not in windows[-1]:
            windows.append(order._in_window(order._epoch, order._window))
        kept = {int(path.stem) for path in (tmp_path / "data" / SHARDS).glob("*.npy")}
        assert {shard for window in windows[-2:] for shard in window} <= kept
        assert len(kept) <= 2 * width  # nobody works ahead here
    assert len(windows) > 16 / width  # more than an epoch


def test_a_reader_maps_no_more_than_it_may_need(corpus, tmp_path, nobody_ahead):
    """The room of a file that was removed is free only when nobody maps it any more."""
    order, reader = opened(tmp_path, **corpus).split("train").order(3, 5), opened(tmp_path, **corpus)
    for position in range(100):
        reader.split("train").rows(order.batch(position))
    assert len(reader.cache._open) == 2 * reader.settings.shuffle_shards < 16


def test_the_process_ahead_ends_with_the_training_and_another_one_begins(corpus, tmp_path):
    data = opened(tmp_path, **corpus)
    alone, process = batches(data, 3), data.ahead._process
    data.split("train").close()
    assert process.poll() is not None
    assert batches(data, 3) == alone
    assert data.ahead._process.poll() is None


@pytest.mark.parametrize("damage", ["cut", "changed", "other shape", "empty"])
def test_damage_of_the_cache_is_mended(corpus, tmp_path, nobody_ahead, damage):
    whole = batches(opened(tmp_path, **corpus), 30)
    for path in (tmp_path / "data" / SHARDS).glob("*.npy"):
        content = bytearray(path.read_bytes())
        if damage == "changed":
            content[-3] ^= 1
        cut = {"cut": content[:-5], "changed": content, "other shape": content + b"1234", "empty": b""}[damage]
        path.write_bytes(cut if damage != "other shape" else content.replace(b", 8)", b", 4)"))
    with pytest.warns(UserWarning, match=r"is damaged, and its shard is tokenized again"):
        assert batches(opened(tmp_path, **corpus), 30) == whole


def test_a_damaged_index_is_mended(corpus, tmp_path, nobody_ahead):
    whole = batches(opened(tmp_path, **corpus), 30)
    index = tmp_path / "data" / SHARDS / INDEX
    lines = index.read_bytes().splitlines(keepends=True)
    assert len(lines) > 4
    wrong = lines[1].replace(b'"contexts": ', b'"contexts": 1')
    assert wrong != lines[1]
    (index.parent / ".00000003.npy.tmp").write_bytes(b"half")  # of a process that was killed
    index.write_bytes(b"".join([lines[0], wrong, b"\xff\x00\n", b"[]\n", *lines[3:-1], lines[-1][:40]]))
    assert batches(opened(tmp_path, **corpus), 30) == whole
    assert batches(opened(tmp_path, **corpus), 30) == whole  # a line was written behind the half one
    assert batches(opened(tmp_path, **corpus), 200)
    assert not list(index.parent.glob(".*.tmp"))


def test_held_out_documents_are_those_of_the_sample_and_no_training_sees_them(corpus, tmp_path, nobody_ahead):
    data = opened(tmp_path, **{**corpus, "shard_bytes": 10**6})  # all in one shard, and with it one tail
    texts = documents(80)
    held_out = [text for text in texts if oracle.is_held_out(text, 0, 0.3)]
    spelled = data.tokenizer().decode(data.validation.reshape(-1))
    seen = {text for text in held_out if f"{text}<|endoftext|>" in spelled}
    assert len(held_out) - len(seen) <= 2  # the tail is dropped, and the first has no end before it
    batches(data, 200)  # more than an epoch
    arrays = [data.cache.array(record.shard) for record in data.cache.records() if record.contexts]
    learnt = {text for array in arrays for text in data.tokenizer().decode(array.reshape(-1)).split("<|endoftext|>")}
    assert not learnt & set(held_out)
    assert 80 - len(held_out) - len(learnt & set(texts)) <= 3  # what fits into the tail


def test_a_sample_is_a_part_of_the_corpus(tmp_path, nobody_ahead):
    for number in range(16):
        write_parquet(tmp_path / f"corpus/{number:02}.parquet", documents(40, 40 * number), rows=40)
    whole = sum(len(text.encode()) for text in documents(16 * 40))
    values = stream_of(tmp_path, tmp_path / "corpus", sample_bytes=whole // 10)
    report = opened(tmp_path, **values).report
    assert report.shards == 16
    assert 16 * 40 / 20 < report.documents < 16 * 40 / 6


def test_fingerprints_know_what_decides_a_batch(corpus, tmp_path, nobody_ahead):
    data = opened(tmp_path, **corpus)
    assert opened(tmp_path, **corpus, cache_bytes=1).fingerprint == data.fingerprint
    moved = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "corpus", moved / "corpus")
    same = stream_of(tmp_path, moved / "corpus/*.parquet")
    assert prepare(StreamedTextSettings.parse(same), moved / "data").fingerprint == data.fingerprint
    found = {data.fingerprint}
    for number, changes in enumerate([{"seed": 1}, {"shuffle_shards": 3}, {"shard_bytes": 500}, {"context_length": 9}]):
        found.add(prepare(StreamedTextSettings.parse({**same, **changes}), moved / str(number)).fingerprint)
    write_parquet(moved / "corpus/3.parquet", documents(20, 61), rows=5)
    found.add(prepare(StreamedTextSettings.parse(same), moved / "changed").fingerprint)
    assert len(found) == 6


def test_shards_that_give_nothing_are_passed_over_and_none_at_all_is_an_error(tmp_path, nobody_ahead):
    texts = [text for text in documents(300) if not oracle.is_held_out(text, 0, 0.3)]
    held_out = [text for text in documents(300) if oracle.is_held_out(text, 0, 0.3)]
    write_parquet(tmp_path / "corpus/a.parquet", held_out[:20], rows=20)
    write_parquet(tmp_path / "corpus/b.parquet", texts[:9], rows=9)
    values = stream_of(tmp_path, tmp_path / "corpus")
    # Each is a shard of its own; the first has nothing to learn.
    wanted = derived([held_out[:20], texts[:9]], 30, 2)
    assert batches(opened(tmp_path, **values), 30) == wanted
    write_parquet(tmp_path / "corpus/b.parquet", ["a"], rows=1)
    nothing = prepare(StreamedTextSettings.parse(values), tmp_path / "nothing")
    with pytest.raises(DataError, match=r"No shard of the stream has a context .* shorter context_length"):
        batches(nothing, 1)
