"""Kinds of data, objectives and measures of other packages: found by their entry points, and used like our own."""

import pytest

from auxin.data.dataset import DATASETS
from auxin.errors import ConfigError
from auxin.models.loading import load_model
from auxin.objectives.measures import REGISTRY as MEASURES
from auxin.objectives.objective import OBJECTIVES
from auxin.recipes import Recipe, price_recipe, run_recipe
from plugins import install

DATA = """
from typing import Literal
import torch
from auxin.data import DatasetSettings, SampleForm
from auxin.data.dataset import DatasetKind

class Counting(DatasetSettings):
    kind: Literal["counting"] = "counting"
    length: int = 8

    def form(self):
        sizes = {"length": self.length, "vocab_size": 12, "config_values": {"vocab_size": 12}}
        return SampleForm("number", self.length, ("numbers",), **sizes)

class Numbers:
    def __init__(self, settings):
        self.settings, self.form, self.fingerprint, self.bytes_per_unit = settings, settings.form(), "c" * 64, None

    def split(self, name):
        return Rows(self.settings.length, 40 if name == "train" else 6)

    def processor(self):
        return None

    def describe(self):
        return {"source": "counting"}

class Rows:
    def __init__(self, length, samples):
        self.length, self.samples = length, samples

    def __len__(self):
        return self.samples

    def rows(self, rows):
        return {"numbers": (torch.tensor(list(rows))[:, None] + torch.arange(self.length)) % 12}

KIND = DatasetKind("counting", Counting, lambda settings, directory, progress: Numbers(settings))
"""
OBJECTIVE = """
from typing import Literal
from transformers import AutoModelForCausalLM
from auxin.objectives.objective import Objective, ObjectiveSettings, zeros

class NextNumber(ObjectiveSettings):
    kind: Literal["next_number"] = "next_number"
    every: int = 1

    def auto_class(self, form):
        return AutoModelForCausalLM

    def _bound(self, config, form, references):
        return Bound(config, form, self.every)

class Bound(Objective):
    target = "number"
    shifted = True

    def __init__(self, config, form, every):
        super().__init__(config, form)
        self.every = every

    def inputs(self, batch, noise):
        numbers = batch["numbers"]
        return {"input_ids": numbers, "labels": numbers.masked_fill(numbers % self.every != 0, -100)}

    def example(self, samples):
        return {"input_ids": zeros(samples, self.form.length), "labels": zeros(samples, self.form.length)}
"""
MEASURE = """
from typing import Literal
from auxin.objectives.measures import Accuracy

class Percent(Accuracy):
    kind: Literal["percent"] = "percent"

    def unit(self, objective):
        return "% of " + objective.target + "s"

    def value(self, found):
        return 100 * super().value(found)
"""
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "counting", DATA, group="datasets", thing="KIND")
    install(tmp_path, monkeypatch, "next-number", OBJECTIVE, group="objectives", thing="NextNumber")
    install(tmp_path, monkeypatch, "percent", MEASURE, group="measures", thing="Percent")


def test_they_are_found_by_name(installed):
    assert {"text", "counting"} <= set(DATASETS.all())
    assert {"causal", "span_corruption", "next_number"} <= set(OBJECTIVES.all())
    assert {"loss", "accuracy", "macro_f1", "percent"} <= set(MEASURES.all())
    assert DATASETS.find("counting").settings(length=3).form().units == 3


def recipe(**objective):
    return Recipe.parse(
        {
            "name": "count",
            "title": "Count",
            "data": {"kind": "counting", "length": 6},
            "training": {
                "objective": {"kind": "next_number", "every": 2, **objective},
                "batch_size": 4,
                "tensorboard": False,
            },
            "measures": ["percent", "loss"],
            "branches": [
                {
                    "name": "main",
                    "title": "main",
                    "stages": [
                        {"kind": "build", "model_type": "llama", "config": LLAMA},
                        {"kind": "train", "name": "train", "settings": {"samples": 200, "learning_rate": 0.02}},
                    ],
                }
            ],
        }
    )


def test_a_recipe_of_nothing_but_them_is_priced_run_and_compared(installed, tmp_path):
    price = price_recipe(recipe())
    assert (price.unit, price.stages[1].units) == ("number", 200 * 6)
    assert "numbers" in str(price)
    results = run_recipe(recipe(), tmp_path / "out", "", announce=lambda line: None)
    (branch,) = results.branches
    assert (results.unit, results.measure.name, results.measure.unit) == ("number", "percent", "% of numbers")
    assert results.measure.better == "higher"
    assert (branch.units, branch.ledger.stages[1].unit) == (200 * 6, "number")
    assert branch.value > 90, "the next number is easy to know"
    assert branch.measures.keys() == {"percent", "loss"}
    assert branch.measures["loss"] < 1
    assert (branch.perplexity, branch.bits_per_byte) == (None, None)
    assert branch.flops == price.stages[1].flops
    model = load_model(tmp_path / "out/branches/main/02-train/checkpoints/step-00000050")
    assert model.config.vocab_size == 12


def test_their_settings_are_checked_like_our_own(installed):
    with pytest.raises(ConfigError, match=r"objective\.evry: unknown field\. Did you mean 'every'"):
        recipe(evry=2)


@pytest.mark.parametrize(
    ("group", "source", "registry", "reason"),
    [
        ("datasets", "THING = 3", DATASETS, "not an auxin.data.dataset.DatasetKind"),
        ("objectives", "class THING: pass", OBJECTIVES, "no settings class of an objective"),
        ("measures", "THING = len", MEASURES, "is no measure"),
    ],
)
def test_what_is_none_is_left_out_with_a_warning(tmp_path, monkeypatch, group, source, registry, reason):
    before = set(registry.all())
    install(tmp_path, monkeypatch, "broken", source, group=group, thing="THING")
    with pytest.warns(UserWarning, match=f"'broken' of the package broken was left out.*{reason}.*uninstall broken"):
        assert set(registry.all()) == before
