"""Timing in turns by a clock that only the timed things move; what was timed once is not timed again."""

import statistics

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from auxin.accounting import ExecutedFlops, latency
from auxin.accounting.latency import FEWEST, MOST, Conditions, Run, Stopwatch, medians
from auxin.errors import ConfigError

CONDITIONS = Conditions.here("forward", 1, 8, torch.float32, "cpu")


class Clock:
    """Time that passes when something is done."""

    def __init__(self):
        self.now, self.done = 0.0, []

    def __call__(self):
        return self.now

    def run(self, name, seconds, times=1):
        """A run that takes these seconds, the first to warm up; making it ready takes long, and counts for nothing."""
        left = iter(seconds)

        def prepare():
            self.now += 1000.0

            def call():
                self.done.append(name)
                self.now += next(left)

            return call

        return Run(prepare, times)


def watch(clock, folder, conditions=CONDITIONS):
    return Stopwatch(conditions, folder, clock)


def test_the_median_counts_and_all_take_turns():
    clock = Clock()
    first = [100.0, *([1.0, 3.0, 2.0] * MOST)]
    second = [50.0, *([8.0] * 3 * MOST)]
    found = medians([clock.run("a", first), clock.run("b", second, times=4)], clock)
    rounds = clock.done.count("a") - 1
    assert found == [statistics.median(first[1 : 1 + rounds]), 2.0]
    assert FEWEST <= rounds <= MOST
    assert clock.done == ["a", "b"] * (1 + rounds)


def test_what_takes_long_is_timed_the_fewest_times(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(latency.time, "perf_counter", clock)
    medians([clock.run("a", [10.0] * 200)], clock)
    assert len(clock.done) == 1 + FEWEST


def test_what_was_timed_is_not_timed_again(tmp_path):
    clock = Clock()

    def runs(*seconds):
        return lambda: [clock.run(str(number), [float(number)] * 200) for number in seconds]

    assert watch(clock, tmp_path).seconds(["one", "two"], runs(1, 2)) == [1.0, 2.0]
    done = len(clock.done)
    assert watch(clock, tmp_path).seconds(["one", "two"], runs(3, 4)) == [1.0, 2.0]
    assert len(clock.done) == done
    # Other parts, other company, other conditions.
    assert watch(clock, tmp_path).seconds(["two", "one"], runs(3, 4)) == [3.0, 4.0]
    assert watch(clock, tmp_path).seconds(["one"], runs(5)) == [5.0]
    for change in ({"threads": 77}, {"processor": "another"}, {"batch_size": 2}, {"torch_version": "0"}):
        other = CONDITIONS.model_copy(update=change)
        assert watch(clock, tmp_path, other).seconds(["one"], runs(6)) == [6.0]


def test_what_counts_operations_is_not_timed_and_counts_nothing(tmp_path):
    seen = []

    def prepare():
        return lambda: seen.append(len(_get_current_dispatch_mode_stack())) or torch.ones(2, 2) @ torch.ones(2, 2)

    with ExecutedFlops() as counter:
        Stopwatch(CONDITIONS, tmp_path).seconds(["product"], lambda: [Run(prepare)])
    assert set(seen) == {0}
    assert counter.total == 0


def test_a_damaged_file_is_no_measurement(tmp_path):
    clock = Clock()
    stopwatch = watch(clock, tmp_path)
    stopwatch.seconds(["one"], lambda: [clock.run("a", [1.0] * 200)])
    (file,) = tmp_path.glob("*.json")
    changes = [("1.0", "-1.0"), ("1.0", "1.5"), ('"one"', '"other"')]
    for content in ("", "{}", *(file.read_text().replace(*change) for change in changes)):
        file.write_text(content)
        assert stopwatch.seconds(["one"], lambda: [clock.run("a", [2.0] * 200)]) == [2.0]


def test_a_folder_that_cant_be_written_to_costs_the_record_alone(tmp_path):
    clock = Clock()
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="AUXIN_CACHE"):
        assert watch(clock, tmp_path / "file" / "cache").seconds(["x"], lambda: [clock.run("a", [1.0] * 200)]) == [1.0]


def test_conditions_say_what_they_are():
    told = str(Conditions.here("decoding", 2, 8, torch.bfloat16, "cpu"))
    assert told.startswith("decoding a token after 2 x 8 tokens on ")
    assert f"{torch.get_num_threads()} thread" in told
    assert f"bfloat16, torch {torch.__version__}" in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="cuda"):
        Conditions.here("forward", 1, 8, torch.float32, "cuda")
