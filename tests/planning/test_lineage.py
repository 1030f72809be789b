"""Which layers and units were made from which: by arrangements, cuts and bricks of any kind, over several changes and
the books."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import auxin
from auxin.accounting import Ledger, StageRecord
from auxin.edits import ArrangeLayers, JoinAbove, Plan, ReplaceModule, SliceParameter
from auxin.methods import method
from auxin.planning.bench import Bench
from auxin.planning.lineage import changes_between, layers_made_from, resolved_in_turn, units_made_from
from cut_models import FFN, narrow_plan
from tiny_models import fresh_llama, tiny

STACKS = {family: path for family, (path, *_) in FFN.items() if family != "t5"}
DEEP = fresh_llama(num_hidden_layers=4)


def plan(*edits) -> Plan:
    return Plan(method="by hand", promise="none", edits=list(edits))


def arranged(order, layers="model.layers", **values) -> Plan:
    return plan(ArrangeLayers(layers=layers, order=order, **values))


def layers_of(plans, model) -> dict[int, int]:
    return layers_made_from(resolved_in_turn(plans, model), model)


def units_of(plans, model) -> tuple[int, ...] | None:
    return units_made_from(resolved_in_turn(plans, model), model)


orders = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@given(order=orders)
def test_layers_are_those_that_the_order_names(order):
    assert layers_of([arranged(order)], DEEP) == dict(enumerate(order))


@given(first=orders, data=st.data())
def test_changes_follow_one_another(first, data):
    second = data.draw(st.lists(st.integers(0, len(first) - 1), min_size=1, max_size=6))
    found = layers_of([arranged(first), arranged(second)], DEEP)
    assert found == {new: first[old] for new, old in enumerate(second)}


def test_new_and_blended_layers_were_made_from_none():
    assert layers_of([arranged([0, None, 1, 2, 3, None])], DEEP) == {0: 0, 2: 1, 3: 2, 4: 3}
    weights = [[1.0, 0, 0, 0], [0, 0.5, 0.5, 0]]
    blend = {name: weights for name, _ in DEEP.model.layers[0].named_parameters()}
    assert layers_of([arranged([0, 1], blend=blend)], DEEP) == {0: 0}


@pytest.mark.parametrize("family", STACKS)
def test_every_family_with_one_stack(family):
    model = tiny(family)
    assert layers_of([arranged([1], STACKS[family])], model) == {0: 1}
    assert layers_of([narrow_plan(family)], model) == {0: 0, 1: 1}


def test_the_layers_of_a_decoder_follow_those_of_its_encoder():
    model = tiny("t5")
    edits = [ArrangeLayers(layers="encoder.block", order=[0]), ArrangeLayers(layers="decoder.block", order=[0, 1, 1])]
    assert layers_of([plan(*edits)], model) == {0: 0, 1: 2, 2: 3, 3: 3}


def test_a_choice_from_the_layer_above_leaves_a_layer_what_it_was():
    half = SliceParameter(parameter="model.layers.*.mlp.up_proj.weight", axis=0, index=list(range(1, 13)))
    joined = JoinAbove(layers="model.layers", parameter="mlp.up_proj.weight")
    assert layers_of([plan(joined, half)], fresh_llama()) == {0: 0, 1: 1}


def test_layers_with_bricks_were_made_from_the_layers_that_they_stand_in():
    low_rank = ReplaceModule(module="model.layers.*.mlp.up_proj", brick="low_rank_linear", settings={"rank": 3})
    assert layers_of([plan(low_rank), arranged([3, 1])], DEEP) == {0: 3, 1: 1}


def made_by(name: str, model, **settings) -> Plan:
    found = method(name)
    return found.plan(Bench(model), found.settings.parse(settings))


CHANGES = [
    [("magnitude", {"hidden": 0.5})],
    [("magnitude", {"hidden": 0.75}), ("magnitude", {"heads": 0.5}), ("random", {"hidden": 0.5})],
    [("hypercloning", {"factor": 2})],
    [("hypercloning", {"factor": 2}), ("random", {"hidden": 0.5}), ("llama-pro", {"group_size": 1})],
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(name for name, _ in changes))
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_units_were_made_from_those_whose_embeddings_they_have(family, changes):
    model = tiny(family)
    old = model.get_input_embeddings().weight.detach().clone()
    before, plans = copy.deepcopy(model), []
    for name, settings in changes:
        plans.append(made_by(name, model, **settings))
        auxin.apply(plans[-1], model)
    new = model.get_input_embeddings().weight.detach()
    units = units_of(plans, before)
    # Gemma multiplies by the root of the width, which the embeddings make up for.
    growth = (new.shape[1] / old.shape[1]) ** 0.5 if family == "gemma" else 1
    assert units is not None
    assert torch.allclose(new * growth, old[:, list(units)])


def test_units_that_are_the_same_or_new_or_blended_are_none():
    model = tiny("llama")
    for found in ([], [arranged([1])], [made_by("magnitude", model, heads=0.5)]):
        assert units_of(found, model) is None
    padded = made_by("lemon", model, hidden_size=20)
    assert units_of([padded], model) is None


@pytest.mark.parametrize("name", ["hypercloning", "bert2bert", "llama-pro", "stacking"])
def test_methods_keep_layers_or_copy_them(name):
    found = method(name)
    model = tiny("llama")
    made = found.plan(Bench(model), found.settings.parse(found.examples(model)))
    orders = [edit.order for edit in made.edits if isinstance(edit, ArrangeLayers)]
    assert layers_of([made], model) == dict(enumerate(orders[0] if orders else range(2)))


def books(*names: str, plans: dict[str, Plan] | None = None) -> Ledger:
    """Records that differ by their names; those that are changes have plans."""
    plans = plans or {}

    def record(name: str) -> StageRecord:
        kind = "change" if name in plans else "evaluate" if name.startswith("evaluate") else "train"
        made = plans[name].model_dump(mode="json") if name in plans else None
        return StageRecord(name=name, kind=kind, parameters=1, plan=made, versions={}, started_at="")

    return Ledger(stages=[record(name) for name in names])


def test_the_changes_between_two_models_are_those_since_they_parted():
    cut, again = arranged([0, 1]), arranged([1])
    plans = {"cut": cut, "again": again}
    student = books("build", "base", "cut", "repair", "again", plans=plans)
    assert changes_between(books("build", "base"), student) == [cut, again]
    assert changes_between(books("build", "base", "cut", plans=plans), student) == [again]
    assert changes_between(student, student) == []
    # Neither what is measured nor what the teacher learnt later changes its layers.
    assert changes_between(books("build", "base", "evaluate", "longer"), student) == [cut, again]
    assert changes_between(books("other"), student) is None
    assert changes_between(Ledger(), student) is None
    assert changes_between(books("build", "grown", plans={"grown": cut}), student) is None
