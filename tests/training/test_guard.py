"""The guard's judgement against numpy, and what a run does about a bad batch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auxin.data import make_loader
from auxin.errors import TrainingError
from auxin.training import GuardSettings, latest_checkpoint, load_model, train
from auxin.training.guard import Guard, GuardEvent
from training.tiny import (
    CONTEXT,
    VOCABULARY,
    TinyData,
    bits,
    checkpoint_bits,
    poisoned_llama,
    read_metrics,
    tiny_llama,
    tiny_settings,
    weights,
)

losses = st.lists(st.floats(0.1, 10), min_size=8, max_size=40)


@given(losses, st.floats(1, 20))
def test_limit_is_median_plus_a_multiple_of_the_robust_deviation(values, multiple):
    guard = Guard(GuardSettings(spike_multiple=multiple, window=16, minimum_history=8, minimum_spread=0.0))
    for value in values:
        guard.accept(value)
    recent = np.array(values[-16:])
    deviation = np.median(np.abs(recent - np.median(recent))) * 1.4826
    limit = np.median(recent) + multiple * deviation
    assert guard.limit() == pytest.approx(limit, rel=1e-9)
    assert guard.problem(limit * 1.001 + 1e-6, 1.0) is not None
    assert guard.problem(limit * 0.999 - 1e-6, 1.0) is None


@given(losses, losses)
def test_judgement_goes_on_from_its_saved_state(first, second):
    settings = GuardSettings(window=16, minimum_history=8)
    guard, other = Guard(settings), Guard(settings)
    for value in first:
        guard.accept(value)
    other.load_state_dict(guard.state_dict())
    for value in second:
        assert guard.problem(value, 1.0) == other.problem(value, 1.0)
        guard.accept(value)
        other.accept(value)
        assert guard.limit() == other.limit()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_is_bad_from_the_first_step(value):
    guard = Guard(GuardSettings(spike_multiple=None))
    assert "loss" in (guard.problem(value, 1.0) or "")
    assert "gradient" in (guard.problem(1.0, value) or "")
    assert guard.problem(1e9, 1.0) is None


def test_short_history_and_a_ripple_on_a_flat_run_are_no_spikes():
    guard = Guard(GuardSettings(spike_multiple=5, minimum_history=4, minimum_spread=0.02))
    for _ in range(3):
        guard.accept(1.0)
    assert guard.problem(100.0, 1.0) is None
    guard.accept(1.0)
    assert guard.problem(1.09, 1.0) is None
    assert guard.problem(1.11, 1.0) is not None


def test_too_many_means_within_the_window():
    guard = Guard(GuardSettings(window=10, minimum_history=2, maximum_events=1))

    def event(position: int) -> GuardEvent:
        return GuardEvent(step=position, data_position=position, reason="r", action="skip")

    assert [guard.record(event(position)) for position in (0, 10, 25, 34)] == [False, False, False, True]


# A batch is poisoned: its loss is nan. Which batches are, follows from the data's order.


def bad_batches(data: TinyData, batch_size: int, batches: int) -> list[int]:
    loader = iter(make_loader(data.split("train"), batch_size, seed=0))
    return [p for p in range(batches) if bool((next(loader)["input_ids"] == VOCABULARY - 1).any())]


def poisoned(rows: tuple[int, ...] = (5,)) -> TinyData:
    return TinyData(poisoned_rows=rows)


@pytest.fixture(scope="module")
def bad() -> int:
    """The one bad batch of the first epoch (16 batches of 4)."""
    (position,) = bad_batches(poisoned(), 4, 16)
    assert 2 <= position <= 13
    return position


def test_a_poisoned_batch_is_skipped_as_if_its_step_had_no_update(tmp_path, bad):
    model = poisoned_llama()
    settings = tiny_settings(steps=16, checkpoint_interval=4)
    result = train(model, poisoned(), settings, tmp_path / "run", progress=False)
    # The same by hand: the same batches, rates and clipping, the bad step left out.
    hand = poisoned_llama()
    clean = train(hand, poisoned(), settings, tmp_path / "hand", stop_after=bad, progress=False)
    assert bits(weights(load_model(clean.checkpoint))) == bits(weights(hand))
    assert not torch.equal(weights(hand), weights(poisoned_llama()))
    one_on = poisoned_llama()
    train(one_on, poisoned(), settings, tmp_path / "hand", stop_after=bad + 1, progress=False)
    assert bits(weights(one_on)) == bits(weights(hand))
    assert torch.isfinite(weights(model)).all()
    (event,) = [line for line in read_metrics(tmp_path / "run") if "event" in line]
    assert (event["event"], event["bad_step"], event["data_position"]) == ("skip", bad, bad + 1)
    assert event["reason"] == "the loss is nan"
    assert result.ledger.stages[-1].notes == [f"guard: step {bad}, batch {bad}: the loss is nan; skipped"]
    assert (result.steps, result.units) == (16, 16 * 4 * CONTEXT)


def test_rewind_goes_back_to_the_checkpoint_and_on_past_the_bad_batch(tmp_path, bad):
    settings = tiny_settings(steps=16, schedule="constant", checkpoint_interval=2, guard=GuardSettings(action="rewind"))
    model = poisoned_llama()
    result = train(model, poisoned(), settings, tmp_path / "run", progress=False)
    kept = bad // 2 * 2
    # The same by hand: train to the checkpoint, then start a stage there with the batch after the bad one.
    hand = poisoned_llama()
    first = train(hand, poisoned(), settings, tmp_path / "one", stop_after=kept, progress=False)
    train(
        hand,
        poisoned(),
        tiny_settings(steps=16 - kept, schedule="constant", warmup_steps=0),
        tmp_path / "two",
        optimizer_from=first.checkpoint,
        data_position=bad + 1,
        progress=False,
    )
    assert bits(weights(model)) == bits(weights(hand))
    assert result.steps == 16
    assert result.data_position == bad + 1 + 16 - kept
    assert result.units == result.data_position * 4 * CONTEXT, "work that was thrown away was paid for all the same"
    lines = read_metrics(tmp_path / "run")
    (event,) = [line for line in lines if "event" in line]
    assert (event["event"], event["bad_step"], event["rewound_to"]) == ("rewind", bad, kept)
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == sorted(set(steps))
    positions = [line["data_position"] for line in lines]
    assert positions == sorted(positions)


def test_stops_with_a_usable_checkpoint_when_it_keeps_happening(tmp_path):
    data = poisoned(tuple(range(8, 64)))
    settings = tiny_settings(steps=16, checkpoint_interval=1, guard=GuardSettings(maximum_events=2))
    with pytest.raises(TrainingError, match=r"more than 2 bad steps.*the loss is nan.*Lower learning_rate"):
        train(poisoned_llama(), data, settings, tmp_path, progress=False)
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    model = load_model(checkpoint)
    ids = torch.arange(CONTEXT)[None]
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)
    assert sum("event" in line for line in read_metrics(tmp_path)) == 3
    # What it stopped at, it stops at again: deterministic, and nothing got lost.
    with pytest.raises(TrainingError, match="more than 2 bad steps"):
        train(poisoned_llama(), data, settings, tmp_path, progress=False)
    assert sum("event" in line for line in read_metrics(tmp_path)) == 3


class StepHook:
    """The least a hook must have."""

    def attach(self, model, optimizer) -> None: ...

    def before_step(self, step: int) -> None: ...

    def after_step(self, step: int) -> None: ...

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None: ...


def test_a_spike_of_finite_loss_is_found(tmp_path):
    """Once counting upwards is learnt, contexts that count downwards cost far more."""
    data = TinyData()
    bad_step = 48

    class TurnAround(StepHook):
        def before_step(self, step: int) -> None:
            if step == bad_step:  # whose batch is drawn by now
                self.turn()

        def after_step(self, step: int) -> None:
            assert step != bad_step
            if step == bad_step - 1:
                self.turn()

        def turn(self) -> None:
            data.train[:] = data.train[:, ::-1].copy()

    settings = tiny_settings(steps=64, learning_rate=1e-2, guard=GuardSettings(minimum_history=16, window=16))
    result = train(tiny_llama(), data, settings, tmp_path, hooks=[TurnAround()], progress=False)
    (event,) = [line for line in read_metrics(tmp_path) if "event" in line]
    assert event["bad_step"] == bad_step
    assert "is a spike above" in event["reason"]
    assert result.value is not None
    assert result.value < 1.0


def test_a_gradient_that_is_not_finite_is_not_applied(tmp_path):
    class Poison(StepHook):
        armed = False

        def attach(self, model, optimizer) -> None:
            model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf if self.armed else gradient)

        def before_step(self, step: int) -> None:
            self.armed = step == 3

        def after_step(self, step: int) -> None:
            assert step != 3

    model = tiny_llama()
    train(model, TinyData(), tiny_settings(steps=6), tmp_path, hooks=[Poison()], progress=False)
    (event,) = [line for line in read_metrics(tmp_path) if "event" in line]
    assert event["bad_step"] == 3
    assert "gradient norm" in event["reason"]
    assert torch.isfinite(weights(model)).all()


def test_a_ramp_ends_where_the_last_update_is_left_out(tmp_path):
    class Ramp(StepHook):
        def attach(self, model, optimizer) -> None:
            model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf if self.at == 5 else gradient)

        def before_step(self, step: int) -> None:
            self.at = step

        def after_step(self, step: int) -> None:
            self.at = step + 1

    ramp = Ramp()
    train(tiny_llama(), TinyData(), tiny_settings(steps=6), tmp_path, hooks=[ramp], progress=False)
    assert ramp.at == 6


def test_a_bad_first_step_rewinds_to_the_start(tmp_path):
    (first, *_) = bad_batches(poisoned((5,)), 4, 16)
    settings = tiny_settings(steps=4, guard=GuardSettings(action="rewind"))
    result = train(poisoned_llama(), poisoned(), settings, tmp_path, data_position=first, progress=False)
    assert result.steps == 4
    assert result.data_position == first + 5


def test_rewind_and_interruption_together_give_the_same_bits(tmp_path, bad):
    settings = tiny_settings(steps=16, checkpoint_interval=4, keep_checkpoints=1, guard=GuardSettings(action="rewind"))
    alone = train(poisoned_llama(), poisoned(), settings, tmp_path / "alone", progress=False)
    for stop in range(1, 17):
        pieces = train(poisoned_llama(), poisoned(), settings, tmp_path / "pieces", stop_after=stop, progress=False)
    assert checkpoint_bits(alone.checkpoint) == checkpoint_bits(pieces.checkpoint)
    assert read_metrics(tmp_path / "alone") == read_metrics(tmp_path / "pieces")
    assert alone.ledger.stages[-1].notes == pieces.ledger.stages[-1].notes
