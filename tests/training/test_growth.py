"""Models that lie in pieces in several processes, changed there: bit by bit what one process makes of them whole."""

import json
from typing import Any

import pytest

import auxin
from auxin.errors import PlanError
from auxin.methods import methods
from auxin.training import apply_in_pieces
from capabilities import Refusal, probe
from covering import DISTINCT, whole
from tiny_models import tiny
from training.servers import served

FAMILIES = [
    pytest.param(family, marks=() if family in ("llama", "tokenformer") else whole, id=family)
    for family in (*DISTINCT, "bert", "vit")
]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """What processes find out together."""
    folder = tmp_path_factory.mktemp("grown")
    with served("growth_server.py") as ask:

        def of(scenario: str, size: int, **request: object) -> Any:
            answer = ask({**request, "size": size, "folder": str(folder / "found"), "scenario": scenario})
            assert answer["codes"] == [0] * size, answer["messages"]
            return json.loads((folder / "found.json").read_text())

        yield of


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_makes_of_pieces_what_it_makes_of_the_whole(asked, request, tmp_path, family):
    """Weights, buffers, moments, groups, config and receipt, by three processes, which most sizes don't divide."""
    plans = []
    for name in methods():
        result = probe(name, family)
        # Beside a Llama, which has most of them, the shorter run of the tests has what a Llama refuses.
        wanted = family == "llama" or request.config.getoption("--all") or isinstance(probe(name, "llama"), Refusal)
        if wanted and not isinstance(result, Refusal):
            plans.append(str(tmp_path / f"{name}.yaml"))
            result.plan.to_yaml(plans[-1])
    assert plans
    assert asked("grow", 3, family=family, plans=plans) == {}


def test_what_is_frozen_and_what_is_set_beside_the_config_stay(asked, tmp_path):
    """New parameters are trained, whatever is around them; the kind of attention and a layer in evaluation mode."""
    plans = []
    for name in ("graft", "altup", "hypercloning", "stacking"):
        plans.append(str(tmp_path / f"{name}.yaml"))
        probe(name, "llama").plan.to_yaml(plans[-1])
    assert asked("grow", 2, family="llama", plans=plans, frozen=True) == {}


@pytest.mark.parametrize(
    ("size", "method", "settings"),
    [(2, "hypercloning", {"factor": 2}), (4, "hypercloning", {"factor": 2}), (3, "stacking", {"layers": 8})],
)
def test_a_process_holds_its_pieces_and_one_tensor(asked, size, method, settings):
    """Weights and moments, old and new, and what one tensor is made of and becomes, each up to twice: while it is
    gathered, and between two steps of widening it."""
    peak, before, after, old, new = asked("bounded", size, method=method, settings=settings)
    assert before + after <= peak <= before + after + 2 * (old + new)


def test_a_whole_model_is_not_grown_in_pieces():
    """The message names what does it."""
    model = tiny("llama")
    with pytest.raises(PlanError, match=r"does not lie in pieces .* Use auxin.apply"):
        apply_in_pieces(auxin.plan(model, "stacking", layers=4), model)
