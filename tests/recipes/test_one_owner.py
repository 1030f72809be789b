"""A run's folder has one owner at a time, and one that is stopped, or killed, leaves nothing in the way."""

import os
import re
import shutil
import signal

import pytest
import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from auxin.errors import CheckpointError, ConfigError, TrainingError
from auxin.interruption import REQUEST, SIGNALS, Interrupted, Interruption, _Stop, ended_by_signals
from auxin.models.loading import load_model
from auxin.recipes import Recipe, run_recipe, run_seeds
from auxin.recipes.folder import held
from auxin.sums import damage
from auxin.training.checkpoint import read_training
from corpora import small_corpus, write_documents

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
BUILD = {
    "kind": "build",
    "model_type": "tokenformer",
    "config": {**SIZES, "qkv_tokens": 2, "proj_tokens": 2, "ffn_tokens": 8},
}
GROW = {"kind": "change", "name": "grow", "tokens": {"qkv_tokens": 4, "proj_tokens": 4, "ffn_tokens": 16}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("corpus"), documents=30)


def recipe(corpus, *stages, **changes):
    values = {"name": "tiny", "title": "Tiny", "data": small_corpus(corpus), "training": {"tensorboard": False}}
    branch = {"name": "main", "title": "main", "stages": [*(stages or (BUILD, GROW)), {"kind": "evaluate"}]}
    return Recipe.parse({**values, "branches": [branch], **changes})


def go(asked, output, announce=lambda line: None):
    return run_recipe(asked, output, "", announce=announce)


def temporaries(folder):
    return [path for path in folder.rglob(".*") if path.is_dir() and path.suffix in (".tmp", ".partial")]


def test_a_second_process_is_told_who_is_at_it_and_touches_nothing(corpus, tmp_path):
    """Also in the moment between a stage's checkpoint and its record, when the stage looks unfinished."""
    finished = tmp_path / "run/branches/main/02-grow/checkpoint"
    told = []

    def announce(line):
        if line.startswith("  grow"):
            record = finished.parent / "stage.json"
            content = record.read_text()
            record.unlink()
            with pytest.raises(TrainingError, match=rf"is in use: process {os.getpid()} on .* works in it") as raised:
                go(recipe(corpus), tmp_path / "run")
            told.append(str(raised.value))
            assert damage(finished) is None
            assert (finished / "config.json").exists()
            record.write_text(content)

    go(recipe(corpus), tmp_path / "run", announce)
    assert len(told) == 1


def test_a_folder_that_is_held_is_not_even_claimed(corpus, tmp_path):
    with held(tmp_path / "run"):
        for start in (lambda: go(recipe(corpus), tmp_path / "run"), lambda: several(corpus, tmp_path / "run")):
            with pytest.raises(TrainingError, match="in use"):
                start()
    assert os.listdir(tmp_path / "run") == [".lock"]
    go(recipe(corpus), tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious.txt").touch()
    with pytest.raises(ConfigError, match="not empty"), held(tmp_path / "mine"):
        pass
    assert os.listdir(tmp_path / "mine") == ["precious.txt"]


def several(corpus, output):
    return run_seeds(recipe(corpus, seeds=[0, 1]), output, "", lambda line: None)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_says_what_was_being_done_and_the_next_one_is_the_systems_again(number):
    before = signal.SIG_IGN if number in (signal.SIGINT, signal.SIGTERM) else signal.SIG_DFL
    former = signal.signal(number, before)
    while_cleaning = []

    def work():
        try:
            signal.raise_signal(number)
            signal.raise_signal(number)
        except Exception:
            pytest.fail("no `except Exception` may hold it up")
        finally:
            while_cleaning.append(signal.getsignal(number))

    try:
        with pytest.raises(Interrupted, match=f"Interrupted by {number.name} while boiling eggs") as raised:
            boil(work)
        assert raised.value.exit_code == 130
        # That of shells or schedulers comes twice, and must not end it the second time.
        assert while_cleaning == [signal.SIG_IGN]
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, former)


def test_a_scheduler_may_signal_often_and_only_a_second_insistence_ends_at_once(monkeypatch):
    """As a job's steps get SIGUSR1 from the scheduler and from the process that started them, and SIGTERM after it."""
    monkeypatch.setattr("auxin.interruption.os.write", lambda descriptor, text: None)
    ended = []
    former = {number: signal.signal(number, lambda *_: ended.append("SIGTERM")) for number in (signal.SIGTERM,)}
    former[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, lambda *_: ended.append("theirs"))
    try:
        with Interruption() as interruption:
            for number in (REQUEST, REQUEST, signal.SIGTERM, REQUEST):
                signal.raise_signal(number)
            assert (interruption.signal_name, ended) == ("SIGUSR1", [])
            signal.raise_signal(signal.SIGUSR2)
            assert ended == ["theirs"], "a program has a meaning of its own for it"
            signal.raise_signal(signal.SIGTERM)
        assert ended == ["theirs", "SIGTERM"]
        assert signal.getsignal(REQUEST) is signal.SIG_DFL
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def test_a_process_of_torchrun_hears_sigterm_twice_and_lives(monkeypatch):
    """From the scheduler, and from torchrun, which kills it if it takes too long; Ctrl-C behind it ends it at once."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    told, ended = [], []
    monkeypatch.setattr("auxin.interruption.os.write", lambda descriptor, text: told.append(text))
    numbers = (signal.SIGTERM, signal.SIGINT)
    former = {number: signal.signal(number, lambda number, _: ended.append(number)) for number in numbers}
    try:
        with Interruption(says=False) as interruption:
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
            assert (interruption.signal_name, ended, told) == ("SIGTERM", [], [])
            signal.raise_signal(signal.SIGINT)
            assert ended == [signal.SIGINT]
        with Interruption():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
        assert ended == [signal.SIGINT, signal.SIGTERM], "who insists by Ctrl-C is asked no further"
        assert len(told) == 1
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@ended_by_signals("boiling eggs")
def boil(work):
    work()


STAGES = [
    ("auxin.data.corpus.read_documents", "preparing the data"),
    ("auxin.edits.folder_executor.carry", "doing the stage main/grow"),
    ("auxin.recipes.stages.HeldOut", "doing the stage main/grow"),
    ("auxin.recipes.stages.copy_checkpoint", "doing the stage main/evaluate"),
]


@pytest.mark.parametrize(("inner", "doing"), STAGES)
def test_a_signal_in_any_stage_leaves_nothing_half_written(corpus, tmp_path, monkeypatch, inner, doing):
    def signalled(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(inner, signalled)
        with pytest.raises(Interrupted, match=f"Interrupted by SIGTERM while {doing}.*same command to go on"):
            go(recipe(corpus), tmp_path / "run")
    assert temporaries(tmp_path) == []
    go(recipe(corpus), tmp_path / "run")


def test_what_a_killed_stage_left_is_swept_at_the_start(corpus, tmp_path):
    stage = tmp_path / "run/branches/main/02-grow"
    go(recipe(corpus), tmp_path / "run")
    for folder in (stage, stage.with_name("03-evaluate")):
        (folder / f".checkpoint.{'0' * 32}.tmp").mkdir()
        (folder / f".checkpoint.{'0' * 32}.tmp/model.safetensors").write_bytes(b"half")
        (folder / "stage.json").unlink()
        (folder / "notes.txt").write_text("mine")
    go(recipe(corpus), tmp_path / "run")
    assert temporaries(tmp_path) == []
    assert (stage / "notes.txt").exists()


def test_a_model_that_is_not_finite_is_not_taken_over(corpus, tmp_path):
    go(recipe(corpus), tmp_path / "run")
    source, broken = tmp_path / "run/branches/main/02-grow/checkpoint", tmp_path / "broken"
    model = load_model(source)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    model.save_pretrained(broken)
    data = small_corpus(corpus) | {"tokenizer": str(source)}
    asked = recipe(corpus, {"kind": "build", "checkpoint": str(broken)}, data=data)
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(broken))}: 1 of .* are NaN or infinite"):
        go(asked, tmp_path / "out")


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


LEARN = {"kind": "train", "name": "learn", "settings": {"steps": 4, "batch_size": 2, "checkpoint_interval": 2}}


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A run that ends with a training, and one that ends with a change, in a folder."""
    folder = tmp_path_factory.mktemp("finished")
    values = recipe(corpus).model_dump(mode="json", exclude_defaults=True)
    for name, stages in (("trained", [BUILD, LEARN]), ("changed", [BUILD, GROW])):
        values["branches"] = [{"name": "main", "title": "main", "stages": stages}]
        go(Recipe.parse(values), folder / name)
    return folder


def copy_of(run, tmp_path):
    """The recipe of a copy of `run` in the folder `run`."""
    shutil.copytree(run, tmp_path / "run")
    return Recipe.from_yaml(tmp_path / "run/recipe.yaml")


@pytest.mark.parametrize(
    ("name", "last"), [("trained", "02-learn/checkpoints/step-00000004"), ("changed", "02-grow/checkpoint")]
)
def test_the_end_of_a_finished_run_is_done_again_where_it_is_damaged(finished, tmp_path, name, last):
    asked = copy_of(finished / name, tmp_path)
    checkpoint = tmp_path / "run/branches/main" / last
    before, told = (checkpoint / "model.safetensors").read_bytes(), []
    flip(checkpoint / "model.safetensors")
    go(asked, tmp_path / "run", told.append)
    assert (checkpoint / "model.safetensors").read_bytes() == before
    assert damage(checkpoint) is None
    assert checkpoint.with_name(f"damaged-{checkpoint.name}").is_dir()
    assert any("is damaged: model.safetensors differs" in line for line in told)


def test_only_the_end_of_what_is_finished_is_read(finished, tmp_path, monkeypatch):
    asked, looked = copy_of(finished / "trained", tmp_path), []
    for module in ("auxin.recipes.runner", "auxin.training.run_folder"):
        monkeypatch.setattr(f"{module}.damage", lambda folder: looked.append(folder.name) or damage(folder))
    go(asked, tmp_path / "run")
    assert set(looked) == {"step-00000004"}


def test_a_record_that_names_a_checkpoint_on_the_way_is_refused(finished, tmp_path):
    asked = copy_of(finished / "trained", tmp_path)
    record = tmp_path / "run/branches/main/02-learn/stage.json"
    record.write_text(record.read_text().replace("step-00000004", "step-00000002"))
    with pytest.raises(CheckpointError, match=r"names step-00000002, with which the stage was not finished\. Remove"):
        go(asked, tmp_path / "run")
    record.unlink()
    go(asked, tmp_path / "run")


def test_a_signal_that_the_inner_context_misses_is_taken_by_the_next_one():
    """One may come between the last instruction within a context and the first of its end."""

    def missed():
        raise _Stop("SIGTERM")

    with (
        pytest.raises(Interrupted, match=r"Ended by SIGTERM; nothing half-written is left") as raised,
        ended_by_signals(),
    ):
        missed()
    assert raised.value.exit_code == 128 + signal.SIGTERM


def test_a_signal_while_moments_are_read_is_no_damage(finished, monkeypatch):
    """torch.distributed.checkpoint takes whatever is raised for a failure of one of the processes."""
    checkpoint = finished / "trained/branches/main/02-learn/checkpoints/step-00000004"

    def signalled(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(HuggingFaceStorageReader, "read_data", signalled)
    with pytest.raises(Interrupted, match="Interrupted by SIGTERM while reading"), ended_by_signals("reading"):
        read_training(checkpoint)


@pytest.mark.parametrize("line", ["{}", "null", '{"step": 1, "seconds": "x"}', "cut", "\\xff"])
def test_a_damaged_line_of_metrics_is_left_out(finished, tmp_path, line):
    asked = copy_of(finished / "trained", tmp_path)
    metrics = tmp_path / "run/branches/main/02-learn/metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([line, *lines[:-1], line, lines[-1], ""]))
    points = len(go(asked, tmp_path / "run").branches[0].curve)
    assert points == len(lines)
    (tmp_path / "run/branches/main/02-learn/stage.json").unlink()
    (tmp_path / "run/branches/main/02-learn/latest").write_text("checkpoints/step-00000002\n")
    go(asked, tmp_path / "run")
    metrics.unlink()
    assert go(asked, tmp_path / "run").branches[0].curve == []


def test_a_metric_that_is_none_is_named(finished, tmp_path):
    asked = copy_of(finished / "trained", tmp_path)
    metrics = tmp_path / "run/branches/main/02-learn/metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"validation_loss": ', '"validation_loss": "?", "other": '))
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, step \d+: value: must be a finite number"):
        go(asked, tmp_path / "run")


def test_a_run_whose_recipe_is_gone_or_cut_asks_for_it(finished, tmp_path):
    asked, saved = copy_of(finished / "changed", tmp_path), tmp_path / "run/recipe.yaml"
    text = saved.read_text()
    saved.write_text(text[: len(text) // 2])
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        go(asked, tmp_path / "run")
    saved.unlink()
    with pytest.raises(ConfigError, match=r"holds a run without its recipe\.yaml\. Put the recipe back"):
        go(asked, tmp_path / "run")
    saved.write_text(text)
    go(asked, tmp_path / "run")
