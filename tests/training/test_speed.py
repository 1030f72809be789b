"""Speed is of learning alone."""

import pytest

from auxin.training import speed
from auxin.training.speed import Speed


def test_what_is_paused_does_not_count(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    measured = Speed(units_per_step=100, position=5)
    now[0] += 2
    with measured.paused():
        now[0] += 50
    now[0] += 2
    assert measured.units_per_second(9) == pytest.approx(4 * 100 / 4)
    measured.start(9)
    now[0] += 1
    assert measured.units_per_second(11) == pytest.approx(200)
    with measured.drawing():
        now[0] += 3
    with measured.paused():
        now[0] += 9
    assert measured.data_share() == pytest.approx(3 / 4)
    measured.start(11)
    now[0] += 1
    assert measured.data_share() == 0
