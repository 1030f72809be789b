"""How long a recipe takes on this machine is told from steps that were timed, and is told at all only then."""

import json

import pytest
import torch

from auxin.accounting import Electricity, electricity
from auxin.edits.structure import edited_skeleton
from auxin.objectives.distillation import DistillationObjective
from auxin.recipes import price_recipe, timing
from auxin.recipes.timing import TIMED, Timer, seconds_per_step
from auxin.training.gradients import BatchGradients
from corpora import write_documents
from recipes.test_distillation import SIZES, recipe_of, teach, train
from recipes.test_runner import tiny_recipe
from training.tiny import TinyData, tiny_settings, tiny_tokenformer


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny_recipe(write_documents(tmp_path_factory.mktemp("corpus"), documents=2))


def trained(price):
    return [stage for stage in price.stages if stage.kind == "train"]


def test_every_train_stage_is_told_a_time_and_the_rest_of_the_price_stays(recipe):
    price = Timer().price(recipe)
    assert all(stage.seconds > 0 for stage in trained(price))
    assert price.seconds == pytest.approx(sum(stage.seconds for stage in trained(price)))
    without = [stage.model_copy(update={"seconds": None}) for stage in price.stages]
    assert price.model_copy(update={"stages": without}) == price_recipe(recipe)
    assert price_recipe(recipe).seconds is None


def test_what_is_emitted_goes_by_the_time_and_by_what_the_recipe_takes_on(recipe, monkeypatch):
    monkeypatch.setattr(timing, "seconds_per_step", lambda *_: 2.0)
    green = recipe.model_copy(update={"electricity": Electricity(watts=100.0, pue=1.5, grams_per_kwh=40.0)})
    price = Timer().price(green)
    assert price.kilowatt_hours == pytest.approx(price.seconds / 3600 * 0.15)
    assert price.kilograms_co2e == pytest.approx(price.kilowatt_hours * 0.04)
    assert f"x 40 g/kWh = {price.kilograms_co2e:.3g} kg CO2e, by what electricity.watts" in str(price)
    assert json.loads(price.model_dump_json())["kilograms_co2e"] == price.kilograms_co2e
    assert price_recipe(green).kilograms_co2e is None
    assert "kg of CO2e: not known, as the time is not" in str(price_recipe(green))
    monkeypatch.setattr(electricity, "choose_device", lambda name: torch.device("cpu"))
    assert Timer(threads=3).price(recipe).electricity.watts == 36


def test_the_time_is_that_of_the_steps(recipe, monkeypatch):
    monkeypatch.setattr(timing, "seconds_per_step", lambda *_: 2.0)
    price = Timer().price(recipe)
    assert [stage.seconds for stage in trained(price)] == pytest.approx([2.0 * stage.steps for stage in trained(price)])
    assert "take about" in str(price)


def test_a_model_that_was_not_timed_is_as_fast_as_the_largest_that_was(recipe, monkeypatch):
    sizes = sorted({stage.parameters for stage in trained(price_recipe(recipe))})
    monkeypatch.setattr(timing, "seconds_per_step", lambda *_: 2.0)
    monkeypatch.setattr(timing, "_fits", lambda stage, settings: stage.parameters == sizes[0])
    stages = trained(Timer().price(recipe))
    small = next(stage for stage in stages if stage.parameters == sizes[0])
    for stage in stages:
        assert stage.flops / stage.seconds == pytest.approx(small.flops / small.seconds)


def test_a_model_that_runs_out_of_memory_is_not_timed(recipe, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(timing, "seconds_per_step", full)
    assert Timer().price(recipe).seconds is None


def test_where_nothing_can_be_timed_no_time_is_told(recipe):
    price = Timer(patience=0.0).price(recipe)
    assert price.seconds is None
    assert "take about" not in str(price)


def test_a_stage_with_a_teacher_is_timed_with_it(tmp_path, monkeypatch):
    build = {"kind": "build", "model_type": "llama", "config": {**SIZES, "num_hidden_layers": 1}}
    layers = teach(hidden_states=1.0, layers={0: 3})
    recipe = recipe_of(
        write_documents(tmp_path, documents=2), {"stages": [build, train("learn", layers), train("alone")]}
    )
    asked = []
    learnt = DistillationObjective.loss

    def loss(self, model, inputs):
        asked.append(self.teacher.device.type)
        return learnt(self, model, inputs)

    monkeypatch.setattr(DistillationObjective, "loss", loss)
    price = Timer().price(recipe)
    assert asked == ["cpu"] * (1 + TIMED)
    assert all(stage.seconds > 0 for stage in trained(price))


def test_a_step_takes_as_long_as_its_micro_batches_and_the_optimizer(monkeypatch):
    """By a clock that only these move; the first of each warms up."""
    now, learnt, stepped = [0.0], BatchGradients.add, torch.optim.AdamW.step
    spent = {"learning": [], "stepping": []}

    def spend(kind, first, later):
        now[0] += later if spent[kind] else first
        spent[kind].append(now[0])

    def add(self, part, share):
        assert len(part["input_ids"]) == 2
        spend("learning", 100.0, 3.0)
        return learnt(self, part, share)

    def step(self, *arguments):
        spend("stepping", 50.0, 0.5)
        return stepped(self, *arguments)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(BatchGradients, "add", add)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    model = tiny_tokenformer().to("meta")
    settings = tiny_settings(steps=1, batch_size=6, micro_batch_size=2)
    assert seconds_per_step(model, settings, TinyData().form, room=200.0) == pytest.approx(3 * 3.0 + 0.5)
    assert len(spent["learning"]) == 1 + TIMED


def test_a_model_on_the_meta_device_is_stepped_with_its_ties_and_buffers():
    model = edited_skeleton(tiny_tokenformer().config)
    settings = tiny_settings(steps=1, batch_size=4, micro_batch_size=2)
    assert seconds_per_step(model, settings, TinyData().form, room=1.0) > 0
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # Zeros would be no work: products of them are as long, but nothing would be learnt.
    assert all(p.grad is not None and p.std() > 0 for p in model.parameters() if p.ndim > 1)
