"""The sample package of examples/plugin shows up everywhere, with no change to the core."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from auxin import cli
from auxin.errors import ConfigError, PlanError
from auxin.methods import method, methods
from auxin.planning.bench import Bench
from capabilities import Result, matrix, probe
from plugins import EXAMPLE, ROOT, install
from tiny_models import FAMILIES, inputs, tiny

PACKAGE = "auxin-drop-layers"


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, PACKAGE, EXAMPLE)
    yield tmp_path
    probe.cache_clear()


def call(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_it_is_about_80_lines():
    assert len((EXAMPLE / "auxin_drop_layers.py").read_text().splitlines()) <= 90


def test_it_works_on_the_command_line(plugin):
    assert "drop-layers" in call("methods")
    assert "Indices of the layers to leave out" in call("methods", "drop-layers")
    model = tiny("llama", dtype=torch.float32, num_hidden_layers=3)
    model.save_pretrained(plugin / "model")
    arguments = ("plan", plugin / "model", "drop-layers", "--set", "drop=[1]", "-o", plugin / "plan.yaml")
    assert "3 layers" not in call(*arguments)
    call("apply", plugin / "model", plugin / "plan.yaml", "-o", plugin / "smaller")
    found = json.loads(call("diff", plugin / "model", plugin / "smaller", "--json"))
    assert found["config"]["num_hidden_layers"] == [3, 2]
    smaller = AutoModelForCausalLM.from_pretrained(plugin / "smaller")
    del model.model.layers[1]
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    with torch.no_grad():
        assert torch.equal(smaller(**inputs(smaller)).logits, model(**inputs(model), use_cache=False).logits)


def test_its_refusals_are_messages(plugin):
    found, model = method("drop-layers"), tiny("t5")
    for settings, words in (
        ({"drop": [5]}, "has no layer 5. Its last one is 1"),
        ({"drop": [0]}, "the first layer can't be left out"),
        ({"drop": [1], "stack": "model.layers"}, "Use one of encoder.block, decoder.block"),
    ):
        with pytest.raises(PlanError, match=words):
            found.plan(Bench(model), found.settings.parse(settings))
    with pytest.raises(ConfigError, match="drop"):
        found.settings.parse({"drop": []})


def test_it_is_in_the_capability_matrix(plugin):
    table = matrix({"drop-layers": methods()["drop-layers"]}, FAMILIES)
    row = next(line for line in table.splitlines() if line.startswith("| `drop-layers` |"))
    assert row.count("changes the function") == len(FAMILIES)
    assert isinstance(probe("drop-layers", "t5"), Result)


def test_the_tests_of_all_methods_take_it_in(plugin):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(plugin), str(EXAMPLE)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_every_method.py"]
    done = subprocess.run(
        [*command, "-k", "drop-layers and (llama or t5)"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed[1]) >= 8
