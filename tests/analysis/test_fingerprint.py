"""A model that computes something else is another one, or is known to be none that can be told."""

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from analysis.samples import Samples
from analysis.test_run import Loudness
from auxin.analysis import measure, model_fingerprint
from auxin.analysis.fingerprint import _of_constant, is_known
from auxin.edits import apply
from auxin.methods import methods
from auxin.models.loading import load_model
from auxin.planning.bench import Bench
from tiny_models import FAMILIES, FURTHER, inputs, tiny


def layer(model: Any) -> Any:
    return model.model.layers[0]


def scaled(factor: float) -> Any:
    return lambda hidden: factor * hidden


CHANGES = {
    "another activation": lambda model: setattr(layer(model).mlp, "act_fn", nn.ReLU()),
    "a function": lambda model: setattr(layer(model).mlp, "act_fn_", torch.tanh),
    "a part of a function": lambda model: setattr(layer(model), "act", functools.partial(torch.clamp, min=2)),
    "epsilon of a norm": lambda model: setattr(layer(model).input_layernorm, "variance_epsilon", 1.0),
    "scale of attention": lambda model: setattr(layer(model).self_attn, "scaling", 1.0),
    "a flag": lambda model: setattr(layer(model).self_attn, "is_causal", False),
    "a tuple": lambda model: setattr(layer(model), "window", (3, 4)),
    "a tensor": lambda model: setattr(layer(model), "shift", torch.ones(2)),
    "a buffer": lambda model: model.model.rotary_emb.inv_freq.mul_(0.5),
    "attention's implementation": lambda model: model.set_attn_implementation("eager"),
    "a config of its own": lambda model: setattr(
        layer(model).self_attn, "config", type(model.config)(**{**model.config.to_dict(), "rms_norm_eps": 0.5})
    ),
    "another class": lambda model: setattr(layer(model).mlp, "__class__", type("Other", (type(layer(model).mlp),), {})),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_module_goes_by_makes_another_model(change):
    model = tiny("llama", dtype=torch.float32)
    before = model_fingerprint(model)
    CHANGES[change](model)
    assert model_fingerprint(model) != before
    assert is_known(model)


def test_functions_are_told_apart_by_what_they_do_and_hold():
    model = tiny("llama")
    found = set()
    for function in (scaled(1.0), scaled(2.0), lambda hidden: 2.0 * hidden, lambda hidden: 2.0 + hidden):
        layer(model).mlp.act_fn_ = function
        assert is_known(model)
        found.add(model_fingerprint(model))
    assert len(found) == 4
    layer(model).mlp.act_fn_ = scaled(2.0)
    assert model_fingerprint(model) in found


def test_code_is_told_in_one_order():
    """The order of a set of words goes by the process."""
    words = frozenset(map(str, range(20)))
    assert _of_constant(words) == str(sorted(map(repr, words)))


def patched(model: Any) -> None:
    layer(model).mlp.forward = lambda hidden: hidden


UNKNOWN = {
    "forward hook": lambda model: layer(model).mlp.register_forward_hook(lambda *parts: parts[2] * 0),
    "forward pre-hook": lambda model: layer(model).mlp.register_forward_pre_hook(lambda *parts: None),
    "forward in place of the class's": patched,
    "an object": lambda model: setattr(layer(model), "helper", object()),
    "a list that holds itself": lambda model: setattr(layer(model), "items", ring()),
}


def ring() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


@pytest.mark.parametrize("change", UNKNOWN)
def test_what_no_fingerprint_knows_is_neither_kept_nor_taken_from_what_is_kept(change, tmp_path):
    model = tiny("llama")
    data = Samples.of(model)
    measure(Loudness(), model, data, cache=tmp_path)
    before = sorted(tmp_path.iterdir())
    UNKNOWN[change](model)
    assert not is_known(model)
    assert measure(Loudness(), model, data, cache=tmp_path) == measure(Loudness(), model, data, cache=False)
    assert data.passes == 3
    assert sorted(tmp_path.iterdir()) == before


def test_hooks_of_every_module_keep_off_the_cache_too():
    handle = nn.modules.module.register_module_forward_hook(lambda *parts: None)
    try:
        assert not is_known(tiny("llama"))
    finally:
        handle.remove()
    assert is_known(tiny("llama"))


def test_hooks_by_which_transformers_captures_outputs_change_nothing():
    model = tiny("llama")
    before = model_fingerprint(model)
    model(**inputs(model), output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    assert is_known(model)
    assert model_fingerprint(model) == before


def test_a_class_that_was_patched_is_another(monkeypatch):
    model = tiny("llama")
    before = model_fingerprint(model)
    monkeypatch.setattr(type(layer(model).mlp), "forward", lambda self, hidden: hidden)
    assert model_fingerprint(model) != before


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.whole) for name in FURTHER)])
def test_every_architecture_is_known_and_a_copy_is_the_same(family):
    model = tiny(family, dtype=torch.float32)
    assert is_known(model)
    assert model_fingerprint(copy.deepcopy(model)) == model_fingerprint(model)


@pytest.mark.parametrize(("name", "family"), [("graft", "t5"), ("altup", "llama")])
def test_an_edited_model_is_that_which_was_saved(name, family, tmp_path):
    model, method = tiny(family, dtype=torch.float32), methods()[name]
    apply(method.plan(Bench(model), method.settings.parse(method.examples(model))), model)
    model.save_pretrained(tmp_path / "model")
    assert is_known(model)
    assert model_fingerprint(load_model(tmp_path / "model")) == model_fingerprint(model)


@pytest.mark.whole
def test_it_is_the_same_in_another_process():
    code = "from tiny_models import tiny\nfrom auxin.analysis import model_fingerprint\n"
    code += "print(model_fingerprint(tiny('gemma2')))"
    places = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": places, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == model_fingerprint(tiny("gemma2"))
