"""What a person sees of a run: how long it takes on, where it stands, and that it moves."""

import re

import pytest

from auxin.objectives.measures import Accuracy, Loss
from auxin.training import progress as progress_module
from auxin.training import train
from auxin.training.progress import Place, TimeLeft, hours
from training.tiny import TinyData, tiny_llama, tiny_settings


class Clock:
    """Stands still until it is told to move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def step(self, left: TimeLeft, seconds: float) -> None:
        self.now += seconds
        left.stepped()


def test_the_first_step_does_not_tell_how_long_the_others_take():
    clock = Clock()
    left = TimeLeft(1000, 1e9, 0, 0.0, clock)
    clock.step(left, 24.0)
    assert left.of_stage(1) is None, "of the warm-up alone nothing is known"
    clock.step(left, 2.0)
    assert left.of_stage(2) == pytest.approx(998 * 2.0)
    clock.step(left, 4.0)
    assert left.of_stage(3) == pytest.approx(997 * 3.0)
    clock.now += 1000.0
    assert left.of_stage(3) == pytest.approx(997 * 3.0), "nothing was done meanwhile"


def test_what_comes_after_the_last_step_is_counted_and_counted_down():
    clock = Clock()
    left = TimeLeft(10, 1e9, final_samples=300, flops_after=5e9, clock=clock)
    left.evaluating(0)
    clock.now += 10.0
    left.evaluating(50)
    for _ in range(2):
        clock.step(left, 1.0)
    # 8 steps of 1 s, 300 samples at 5 a second, and 5e9 FLOPs at 1e9 a second.
    assert left.of_stage(2) == pytest.approx(8 + 60)
    assert left.of_run(2) == pytest.approx(8 + 60 + 5)
    for _ in range(8):
        clock.step(left, 1.0)
    assert left.of_stage(10) == pytest.approx(60)
    for done, expected in ((0, 60), (100, 40), (200, 20)):
        clock.now += 20.0 if done else 0.0
        left.evaluating(done)
        assert left.of_stage(10) == pytest.approx(expected)
    left.evaluating(0)  # the second measure
    assert left.of_stage(10) == pytest.approx(20)
    clock.now += 20.0
    left.evaluating(100)
    assert left.of_stage(10) == pytest.approx(0)
    assert left.of_run(10) == pytest.approx(5)


def test_lines_tell_the_stage_of_the_run_and_how_far_an_evaluation_has_come(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "LINE_INTERVAL", 0.0)
    measures, place = [Loss(), Accuracy()], Place(2, 12, 1e9)
    train(tiny_llama(), TinyData(), tiny_settings(steps=4), tmp_path, measures=measures, stage_name="base", place=place)
    lines = capsys.readouterr().err.splitlines()
    evaluations = [line for line in lines if "held-out samples" in line]
    # At the start the loss, at the end both, on 8 samples in batches of 4.
    assert [re.search(r"on (\d) of 8 held-out", line)[1] for line in evaluations] == ["0", "4", "8"] * 3
    steps = [line for line in lines if line.startswith("base: step ")]
    assert "left" not in steps[0]
    for line in [*steps[1:], *evaluations[3:]]:
        assert re.search(r"  \d+:\d\d:\d\d left; stage 2 of 12, \d+:\d\d:\d\d left of the run$", line)


def test_a_stage_alone_speaks_of_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "LINE_INTERVAL", 0.0)
    train(tiny_llama(), TinyData(), tiny_settings(steps=3), tmp_path)
    told = capsys.readouterr().err
    assert "left" in told
    assert not re.search(r"of the run|stage \d", told)


@pytest.mark.parametrize(("seconds", "told"), [(None, ""), (3723.4, "1:02:03"), (9e18, "over 100 years")])
def test_any_time_can_be_told(seconds, told):
    assert hours(seconds) == told
