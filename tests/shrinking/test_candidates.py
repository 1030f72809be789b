"""Ways of making a model smaller: what each step asks for, and how a search calls them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auxin.errors import ConfigError
from auxin.methods import methods
from auxin.planning.target import Target
from auxin.shrinking.candidates import NONE, ORDER, SHARES, STANDARD, Candidate, Space, Step, kind_of
from auxin.shrinking.search import candidates
from auxin.shrinking.settings import ShrinkSettings
from auxin.shrinking.trials import Trial


def trial_of(number: int, candidate: Candidate, loss: float | None) -> Trial:
    return Trial(number=number, steps=candidate.dump(), loss=loss, refused=None if loss else "it can't be done")


def made_up_loss(candidate: Candidate) -> float | None:
    """Pairs are better, the more the later step does; two methods refuse."""
    if any(step.method in ("slicegpt", "magnitude") for step in candidate.steps):
        return None
    return 3 - 0.3 * len(candidate.steps) + 0.1 * candidate.steps[0].until


def searched(space: Space, wanted: int, seed: int = 0, trials: list[Trial] | None = None) -> list[Trial]:
    trials = [] if trials is None else trials
    for candidate in candidates(space, trials, seed, wanted):
        trials.append(trial_of(len(trials), candidate, made_up_loss(candidate)))
    return trials


LEFT_OUT = {
    "random": "is what the others have to beat",
    "expert-dropping": "is for mixtures of experts",
    "optin": "makes a pass over the samples for each unit",
    "vtrans": "learns its gates in many steps",
}
"""Methods with a target that are not tried unless they are named, and why."""
REFUSED = {"vocabulary-pruning"}
"""Methods with a target that can't be named: a text is other tokens behind them."""


def test_every_method_that_has_a_target_is_tried_or_left_out_for_a_reason():
    with_target = {name for name, method in methods().items() if "target" in method.settings.model_fields}
    assert with_target == set(STANDARD) | set(LEFT_OUT) | REFUSED
    assert not set(STANDARD) & set(LEFT_OUT)


@given(
    shares=st.lists(st.floats(*SHARES), min_size=2, max_size=3),
    have=st.integers(10**4, 10**10),
    asked=st.one_of(st.floats(0.05, 0.95).map(lambda share: round(share, 3)), st.integers(10**2, 9_000)),
)
def test_steps_go_down_to_just_what_is_asked(shares, have, asked):
    space = Space(["shortgpt", "taylor", "greenformers"])
    parameters = dict.fromkeys(ORDER, NONE)
    for kind, share in zip(ORDER, shares, strict=False):
        parameters |= {kind: next(iter(space.choices[kind])), f"{kind}_share": share}
    candidate = space.candidate(parameters)
    target = Target(parameters=asked)
    numbers = [values["parameters"] for values in candidate.targets(target, have)]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] < have
    assert numbers[-1] == math.floor(target.limit(have))  # what meets the last step's meets the whole
    # Every step's share of the logarithm is the share that was given.
    limit = float(target.limit(have))
    for step, number in zip(candidate.steps[:-1], numbers, strict=False):
        assert math.log(have / number) / math.log(have / limit) == pytest.approx(step.until, abs=0.01)


def test_one_method_alone_is_asked_as_the_user_asks():
    target = Target(flops=0.7, sequence_length=64)
    assert Candidate((Step("taylor"),)).targets(target, 1000.0) == [{"flops": 0.7, "sequence_length": 64}]
    two = Candidate((Step("shortgpt", until=0.5), Step("taylor"))).targets(target, 1000.0)
    assert two == [{"flops": 837, "sequence_length": 64}, {"flops": 700, "sequence_length": 64}]
    times = Candidate((Step("shortgpt", until=0.5), Step("taylor"))).targets(Target(latency=0.25), 8.0)
    assert times == [{"latency_ms": 4.0}, {"latency_ms": 2.0}]


def test_a_way_is_written_and_read_and_called_by_one_name():
    space = Space(None)
    for candidate in [trial.candidate for trial in searched(space, 30)]:
        assert Candidate.load(candidate.dump()) == candidate
        again = space.candidate(space.parameters(candidate))
        assert [(step.method, step.settings) for step in again.steps] == [
            (step.method, step.settings) for step in candidate.steps
        ]
        kinds = [kind_of(step.method) for step in candidate.steps]
        assert kinds == sorted(set(kinds), key=ORDER.index)  # one of a kind, depth before width before products


def test_a_search_tries_every_method_alone_first_and_nothing_twice():
    space = Space(None)
    trials = searched(space, 40)
    assert [trial.candidate for trial in trials[: len(STANDARD)]] == [Candidate((Step(name),)) for name in STANDARD]
    seen = [str(trial.steps) for trial in trials]
    assert len(set(seen)) == len(seen) == 40


def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been():
    space = Space(None)
    whole = searched(space, 24)
    for stop in (3, 14, 23):
        assert searched(space, 24, trials=searched(space, stop)) == whole
    assert searched(space, 24, seed=1) != whole


def test_a_search_learns_from_what_was_tried():
    """Of what chance alone draws a quarter has the best form; the estimator comes back to it."""
    space = Space(["shortgpt", "taylor", "wanda-structured", "greenformers", "slicegpt", "magnitude"])
    trials = searched(space, 60)
    of_three = [len(trial.candidate.steps) == 3 and trial.loss is not None for trial in trials]
    assert sum(of_three[30:]) > sum(of_three[:30])


def test_a_search_ends_where_there_is_nothing_else():
    trials = searched(Space(["shortgpt"]), 5)
    assert [trial.candidate.title for trial in trials] == ["shortgpt"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"methods": ["axformer"]}, "axformer has no target"),
        ({"methods": ["taylor", "taylor"]}, "methods must differ"),
        ({"methods": ["vocabulary-pruning"]}, "changes the tokenizer"),
        ({"methods": ["tailor"]}, "taylor"),
        ({"trials": 0}, "trials"),
        ({"target": {}}, "exactly one of"),
        ({"target": 0.7}, "a size of what"),
        ({"budget": 0}, "budget"),
        ({"teacher_weight": 2}, "teacher_weight"),
        ({"bugdet": 5}, "budget"),
    ],
)
def test_what_is_asked_wrongly_is_said(values, message):
    with pytest.raises(ConfigError, match=message):
        ShrinkSettings.parse({"model": "somewhere", "target": {"parameters": 0.7}, **values})
