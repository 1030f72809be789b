"""Real processes that are really killed, interrupted, or out of disk, and what is left of their runs."""

import json
import random
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from auxin.accounting import Ledger
from auxin.training import latest_checkpoint
from training.servers import served
from training.tiny import checkpoint_bits, read_metrics

SIGKILLED = -signal.SIGKILL
TIMED_OUT = -signal.SIGPROF

Run = Callable[..., dict]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Ask the fork server for a run."""
    with served("fork_server.py") as ask:
        yield lambda output_dir, **request: ask({"output_dir": str(output_dir), **request})


Alone = tuple[Path, int, float]


@pytest.fixture(scope="module")
def left_alone(run, tmp_path_factory) -> Callable[[str], Alone]:
    """The run of a task left alone: its folder, how many file operations it made, and the seconds that it computed."""

    @cache
    def once(task: str) -> Alone:
        folder = tmp_path_factory.mktemp(f"alone-{task}")
        answer = run(folder / "run", task=task, count=str(folder / "calls"))
        assert answer["code"] == 0, answer["message"]
        events = [line for line in read_metrics(folder / "run") if "event" in line]
        assert len(events) >= 2, "the run must rewind more than once to be worth killing"
        return folder / "run", int((folder / "calls").read_text()), answer["seconds"]

    return once


@pytest.fixture(scope="module")
def alone(left_alone) -> Alone:
    """That of a language model."""
    return left_alone("language")


def assert_same_end(one: Path, other: Path) -> None:
    """Weights, moments, random state and metrics are equal to the bit."""
    checkpoints = [latest_checkpoint(folder) for folder in (one, other)]
    assert checkpoints[0] is not None
    assert checkpoints[1] is not None
    assert checkpoint_bits(checkpoints[0]) == checkpoint_bits(checkpoints[1])
    assert read_metrics(one) == read_metrics(other)


def assert_same(one: Path, other: Path) -> None:
    """As assert_same_end, and the rest of the state and the folders' contents are equal too."""
    assert_same_end(one, other)
    names = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (one, other)]
    assert names[0] == names[1]
    states = [
        json.loads((folder / "checkpoints" / names[0][-1] / "training" / "state.json").read_text())
        for folder in (one, other)
    ]
    for state in states:
        del state["state"]["seconds"], state["state"]["started_at"]
        # What a kill cost is told in a note, with the seconds; all other notes must be the same.
        state["state"]["notes"] = [note for note in state["state"]["notes"] if not note.startswith("resumed at step")]
    assert states[0] == states[1]


@pytest.mark.parametrize("task", ["language", "classes"])
def test_killed_at_random_moments_again_and_again(run, left_alone, tmp_path, task):
    """A language model and a classifier end in the bits that they would have had."""
    reference, _, seconds = left_alone(task)
    moments = random.Random(1)
    longest, killed, folder = 0.6 * seconds, 0, tmp_path / "0"
    for attempt in range(1, 9):
        answer = run(folder, task=task, dies_after=moments.uniform(0.05, longest))
        if answer["code"] == 0:
            # It had gone on from a late checkpoint: start over and die sooner.
            assert_same(reference, folder)
            longest, folder = 0.6 * longest, tmp_path / str(attempt)
        else:
            assert answer["code"] == TIMED_OUT, answer["message"]
            killed += 1
    assert killed >= 3
    answer = run(folder, task=task)
    assert answer["code"] == 0, answer["message"]
    assert_same(reference, folder)


def test_killed_in_the_middle_of_saving(run, alone, tmp_path):
    """Just before a rename, a flush, a removal: moments that a random one would rarely meet."""
    reference, calls, _ = alone
    for kill_at in sorted(random.Random(2).sample(range(1, calls + 1), 6)):
        folder = tmp_path / str(kill_at)
        answer = run(folder, count=str(tmp_path / "calls"), kill_at=kill_at)
        assert answer["code"] == SIGKILLED, answer["message"]
        answer = run(folder)
        assert answer["code"] == 0, f"killed at file operation {kill_at}: {answer['message']}"
        assert_same(reference, folder)


@pytest.mark.parametrize("task", ["spans", "classes"])
def test_killed_in_given_steps_it_goes_on_with_the_same_noise(run, left_alone, tmp_path, task):
    """Noise that came from anything but seed and position would differ after a kill, also one behind a rewind; that of
    dropout goes on where the checkpoint was."""
    reference, _, _ = left_alone(task)
    for step in (3, 9, 12):
        answer = run(tmp_path / "killed", task=task, signal="SIGKILL", signal_at=step)
        assert answer["code"] == SIGKILLED, answer["message"]
    assert run(tmp_path / "killed", task=task)["code"] == 0
    assert_same(reference, tmp_path / "killed")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_a_signal_saves_and_says_how_to_go_on(run, alone, tmp_path, name):
    answer = run(tmp_path / "run", signal=name, signal_at=13)
    assert answer["code"] == 130
    assert f"Interrupted by {name} after step 14 of 17" in answer["message"]
    assert str(tmp_path / "run") in answer["message"]
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert checkpoint.name == "step-00000014"
    assert run(tmp_path / "run")["code"] == 0
    assert_same_end(alone[0], tmp_path / "run")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_in_the_last_step_ends_the_command_and_not_only_the_stage(run, alone, tmp_path, name):
    answer = run(tmp_path / "run", signal=name, signal_at=16)
    assert answer["code"] == 130
    assert f"Interrupted by {name} after step 17 of 17; the stage is finished and saved" in answer["message"]
    assert_same(alone[0], tmp_path / "run")
    assert run(tmp_path / "run")["code"] == 0
    assert_same(alone[0], tmp_path / "run")


def test_the_books_count_the_time_of_killed_processes(run, alone, tmp_path):
    spent = []
    for _ in range(2):
        assert run(tmp_path / "run", signal="SIGKILL", signal_at=9)["code"] == SIGKILLED
        spent.append(max(line["seconds"] for line in read_metrics(tmp_path / "run", timed=True)))
    assert spent[1] > spent[0], "the second piece goes on counting where the first was killed"
    assert run(tmp_path / "run")["code"] == 0
    assert_same(alone[0], tmp_path / "run")
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    record, reference = (Ledger.load(folder).stages[-1] for folder in (checkpoint, latest_checkpoint(alone[0])))
    assert record.seconds > spent[1]
    assert (record.units, record.flops) == (reference.units, reference.flops)
    notes = [note for note in record.notes if note not in reference.notes]
    assert len(notes) == 2
    assert all(note.startswith("resumed at step 5; at least ") and "lost and done again" in note for note in notes)


def test_the_second_ctrl_c_quits_at_once(run, tmp_path):
    answer = run(tmp_path / "run", signal="SIGINT", signal_at=13, times=2)
    assert answer["code"] == 99
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert checkpoint.name == "step-00000010"


def test_a_closed_terminal_saves_though_nothing_can_be_shown_any_more(run, alone, tmp_path):
    """The terminal and its shell send SIGHUP each, and writing to the terminal is an error from then on."""
    answer = run(tmp_path / "run", close_terminal_at=13)
    assert answer["code"] == 130, answer["message"]
    assert "Interrupted by SIGHUP after step 14 of 17" in answer["message"]
    assert latest_checkpoint(tmp_path / "run").name == "step-00000014"
    assert run(tmp_path / "run")["code"] == 0
    assert_same_end(alone[0], tmp_path / "run")


def test_who_asked_not_to_hear_of_hangups_does_not(run, alone, tmp_path):
    answer = run(tmp_path / "run", nohup=True, signal="SIGHUP", signal_at=13)
    assert answer["code"] == 0, answer["message"]
    assert_same(alone[0], tmp_path / "run")


def test_a_full_disk_loses_nothing_that_was_saved(run, alone, tmp_path):
    folder = tmp_path / "run"
    answer = run(folder, disk_full_at=12)
    assert answer["code"] == 1
    assert "step-00000015 could not be saved" in answer["message"]
    assert "File too large" in answer["message"]
    assert "Free space" in answer["message"]
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    assert checkpoint.name == "step-00000010"
    assert [path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")] == []
    assert run(folder)["code"] == 0
    assert_same(alone[0], folder)


def test_processes_that_read_ahead_change_no_bit_and_hold_no_lock(run, alone, tmp_path):
    """Left alone, killed between two checkpoints, and resumed at once: with them, with others and without."""
    whole, calls, _ = alone
    assert run(tmp_path / "read", workers=2)["code"] == 0
    assert_same_end(tmp_path / "read", whole)
    for number, (before, after) in enumerate([(2, 1), (1, 0), (0, 2)]):
        folder = tmp_path / str(number)
        killed = run(folder, workers=before, count=str(tmp_path / "calls"), kill_at=calls * (number + 3) // 8)
        assert killed["code"] == SIGKILLED, killed["message"]
        resumed = run(folder, workers=after)
        assert resumed["code"] == 0, resumed["message"]
        assert_same_end(folder, whole)
