"""Learning rates against their closed forms, budgets against arithmetic."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auxin.data import SampleForm
from auxin.errors import ConfigError
from auxin.training import TrainingSettings, learning_rate
from training.tiny import tiny_settings

FORM = SampleForm("token", 16, ("input_ids",), length=16)


def rates(settings: TrainingSettings, steps: int) -> list[float]:
    return [learning_rate(settings, step, steps) for step in range(steps)]


def test_wsd_rises_stays_and_falls_in_straight_lines():
    settings = tiny_settings(steps=20, learning_rate=2.0, warmup_steps=4, decay_fraction=0.25)
    expected = [0.5, 1.0, 1.5, 2.0, *[2.0] * 11, 2.0, 1.6, 1.2, 0.8, 0.4]
    assert rates(settings, 20) == pytest.approx(expected)


def test_wsd_falls_to_its_minimum():
    settings = tiny_settings(
        steps=10, learning_rate=1.0, warmup_steps=0, decay_fraction=1, minimum_learning_rate_ratio=0.5
    )
    assert rates(settings, 10) == pytest.approx([1 - 0.05 * step for step in range(10)])


def test_wsd_without_decay_ends_in_the_stable_phase():
    settings = tiny_settings(steps=10, learning_rate=1.0, warmup_steps=2, decay_fraction=0)
    assert rates(settings, 10) == [0.5] + [1.0] * 9


def test_cosine_passes_through_the_middle_halfway():
    settings = tiny_settings(
        steps=12, learning_rate=1.0, warmup_steps=2, schedule="cosine", minimum_learning_rate_ratio=0.1
    )
    got = rates(settings, 12)
    assert got[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert got[7] == pytest.approx(0.55)
    assert got[4] == pytest.approx(0.1 + 0.9 * math.cos(math.pi / 10) ** 2)  # 1 + cos 2a = 2 cos^2 a
    assert learning_rate(settings, 12, 12) == pytest.approx(0.1)


def test_constant_after_warmup():
    assert rates(tiny_settings(steps=5, learning_rate=1.0, warmup_steps=2, schedule="constant"), 5) == [0.5, 1, 1, 1, 1]


@given(
    steps=st.integers(1, 200),
    warmup=st.floats(0, 1),
    decay=st.floats(0, 1),
    minimum=st.floats(0, 1),
    schedule=st.sampled_from(["wsd", "cosine", "constant"]),
)
def test_no_step_is_wasted_and_none_exceeds_the_peak(steps, warmup, decay, minimum, schedule):
    settings = tiny_settings(
        steps=steps,
        schedule=schedule,
        decay_fraction=decay,
        minimum_learning_rate_ratio=minimum,
        warmup_steps=int(warmup * (steps - (round(decay * steps) if schedule == "wsd" else 0))),
    )
    assert settings.total_steps(FORM, 1.0) == steps
    got = rates(settings, steps)
    assert all(0 < rate <= settings.learning_rate for rate in got)
    after = got[settings.warmup_steps :]
    assert after == sorted(after, reverse=True)


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ({"steps": 7}, 7),
        ({"tokens": 4 * 16 * 7 + 31}, 7),
        ({"tokens": 4 * 16 * 7 + 33}, 8),
        ({"tokens": 1}, 1),
        ({"flops": 4 * 16 * 100.0 * 7.4}, 7),
        ({"flops": 1.0}, 1),
        ({"samples": 4 * 7 + 1}, 7),
        ({"samples": 4 * 7 + 3}, 8),
    ],
)
def test_budgets_buy_the_nearest_number_of_steps(budget, steps):
    assert tiny_settings(**budget, warmup_steps=0, decay_fraction=0).total_steps(FORM, 1600.0) == steps


def test_tokens_are_no_budget_for_what_is_not_made_of_them():
    images = SampleForm("image", 1, ("pixel_values", "labels"))
    assert tiny_settings(samples=40, warmup_steps=0).total_steps(images, 1.0) == 10
    with pytest.raises(ConfigError, match=r"tokens: 640 is no budget for data that is counted in images.*samples"):
        tiny_settings(tokens=640).total_steps(images, 1.0)


def test_phases_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="8 of warmup and 5 of decay do not fit into the 10 steps"):
        tiny_settings(steps=10, warmup_steps=8, decay_fraction=0.5).total_steps(FORM, 1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "exactly one of steps, tokens, samples, flops, not none"),
        ({"steps": 1, "tokens": 5}, "exactly one"),
        ({"steps": 1, "batch_size": 2, "micro_batch_size": 4}, r"micro_batch_size \(4\) is larger"),
        ({"steps": 1, "adam_betas": (0.9, 1.0)}, "adam_betas"),
        ({"steps": 1, "processes_per_copy": 2}, "has a meaning for strategy: hybrid alone, not for auto"),
        ({"steps": 1, "gather_once": True, "strategy": "tensor"}, "gather_once has no meaning for strategy: tensor"),
        ({"steps": 1, "learning_rte": 1.0}, "learning_rate"),
        ({"steps": 1, "guard": {"window": 8, "minimum_history": 9}}, "minimum_history"),
    ],
)
def test_wrong_settings_name_themselves(values, message):
    with pytest.raises(ConfigError, match=message):
        TrainingSettings.parse(values)
