"""The sample package of examples/plugin shows up everywhere, with no change to the core."""

import importlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from auxin import cli
from auxin.edits import MergeModule, Plan, apply
from auxin.edits.runtimes import about_runtimes
from auxin.edits.structure import config_values, structural_edits
from auxin.errors import ConfigError, PlanError
from auxin.methods import method, methods
from auxin.models.anatomy import anatomy
from auxin.nn.bricks import find_brick
from auxin.planning.bench import Bench
from auxin.planning.width import widen
from auxin.planning.width_maps import StreamMap, Widening, circular, padded
from capabilities import Result, matrix, probe
from plugins import EXAMPLE, ROOT, install
from tiny_models import FAMILIES, InDouble, change, inputs, labels, logits, tiny

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


def test_a_method_is_about_80_lines_and_a_brick_with_its_method_120():
    for name, lines in (("auxin_drop_layers", 90), ("auxin_channel_scale", 130)):
        assert len((EXAMPLE / f"{name}.py").read_text().splitlines()) <= lines


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
    header, _, *rows = matrix({"drop-layers": methods()["drop-layers"]}, FAMILIES, {}).splitlines()
    assert header == "| | `drop-layers` |"
    assert [row.endswith("| other |") for row in rows] == [True] * len(FAMILIES)
    assert isinstance(probe("drop-layers", "t5"), Result)


def test_the_tests_of_all_methods_take_it_in(plugin):
    paths = [str(plugin), str(EXAMPLE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--all", "tests/test_every_method.py"]
    which = "(drop-layers and (llama or t5)) or (channel-scale and (llama or gpt2))"
    done = subprocess.run([*command, "-k", which], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed[1]) >= 16


# The brick.

EXACT = 1e-12
SCALED = [family for family in FAMILIES if family != "tokenformer"]
STREAMS = ["residual", "query", "key_value", "ffn"]


def grown(name, model, **values):
    """Apply a method, by default with its example settings."""
    found = method(name)
    with InDouble():
        plan = found.plan(Bench(model), found.settings.parse(values or found.examples(model)))
        return apply(plan, model, probe=inputs(model)).plan


def scaled(family, streams=STREAMS, **config):
    """A tiny model whose linear layers have random factors on their outputs."""
    model = tiny(family, seed=3, **config)
    before = logits(model)
    assert grown("channel-scale", model, streams=streams).promise == "exact"
    assert torch.equal(before, logits(model)) or change(before, logits(model)) < EXACT
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for scale in scales(model).values():
            scale.add_(torch.randn(scale.shape, generator=generator, dtype=torch.float64))
    assert change(before, logits(model)) > 1e-2
    return model


def scales(model):
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith(".scale")}


def test_factors_multiply_what_a_layer_gives(plugin):
    for family, inside in (("llama", "model.layers.1.mlp.up_proj"), ("gpt2", "transformer.h.1.attn.c_attn")):
        model = tiny(family)
        layer = model.get_submodule(inside)
        grown("channel-scale", model)
        brick = model.get_submodule(inside)
        assert type(brick) is find_brick("channel_scale")
        assert brick.weight is layer.weight
        with torch.no_grad():
            brick.scale.copy_(torch.randn_like(brick.scale))
            x = torch.randn(2, 3, 16, dtype=torch.float64)
            torch.testing.assert_close(brick(x), layer(x) * brick.scale)


def test_the_brick_says_what_its_parameter_is(plugin):
    found = anatomy(scaled("gpt2"))
    told = {role.pattern: role for role in found.roles if role.added}
    assert told.keys() == {
        f"transformer.h.*.{x}.scale" for x in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    for pattern, role in told.items():
        weight = found.role(pattern.replace("*", "0").replace("scale", "weight"))
        assert (role.axes, role.access, role.kind) == ((weight.axes[1],), ("writes",), "scale")


WIDER = [
    ("hypercloning", {"factor": 2}),
    ("hypercloning", {"factor": 2, "variant": "diagonal"}),
    ("net2net", {"intermediate_size": 17}),
    ("lemon", {"hidden_size": 32}),
    ("masked", {"intermediate_size": 17}),
]


@pytest.mark.parametrize(("name", "values"), WIDER, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_scaled_model_gets_wider_exactly(plugin, family, name, values):
    model = scaled(family)
    before, sizes = logits(model), [scale.numel() for scale in scales(model).values()]
    assert grown(name, model, **values).promise == "exact"
    assert change(before, logits(model)) < EXACT
    assert [scale.numel() for scale in scales(model).values()] > sizes


def test_factors_of_new_heads_and_units_are_as_those_before(plugin):
    """A factor of zero on a row of zeros would never learn."""
    model = scaled("qwen3", head_dim=8)
    grown("net2net", model, num_attention_heads=8)
    assert all(scale.abs().min() > 1e-6 for scale in scales(model).values())
    model = scaled("llama")
    old = scales(model)["model.layers.0.mlp.up_proj.scale"].detach().clone()
    grown("masked", model, intermediate_size=17)
    (new,) = (scale for name, scale in scales(model).items() if "layers.0.mlp.up_proj" in name)
    torch.testing.assert_close(new.detach(), torch.cat([old, old.mean().expand(5)]))
    model, keep = scaled("llama"), circular(16, 16)
    heads = (StreamMap(4, (0, 1, 2, 3)), StreamMap(2, (0, 1)))
    edits = widen(anatomy(model), Widening(keep, *heads, feed_forward={"ffn": padded(12, 17)}, head_dim=4)).edits
    apply(Plan(method="maps", promise="exact", edits=edits, made_for=config_values(model.config)), model)
    torch.testing.assert_close(scales(model)["model.layers.0.mlp.up_proj.scale"].detach(), new.detach())
    for family, hidden in (("gpt2", 32), ("gpt_neox", 64)):
        model = scaled(family)
        before, size = logits(model), anatomy(model).sizes.head_dim
        # Larger heads: queries make up for what scores are divided by, once and not in their factors too.
        grown("lemon", model, hidden_size=hidden, num_attention_heads=4)
        assert anatomy(model).sizes.head_dim == 2 * size
        assert change(before, logits(model)) < EXACT
        assert all(scale.abs().min() > 1e-6 for scale in scales(model).values())


@pytest.mark.parametrize("family", ["llama", "olmo2", "gpt2", "t5"])
def test_a_scaled_model_gets_deeper(plugin, family):
    model = scaled(family)
    before, count = logits(model), len(scales(model))
    assert grown("llama-pro", model, group_size=1).promise == "exact"
    assert change(before, logits(model)) < EXACT
    assert len(scales(model)) == 2 * count
    model(**inputs(model), labels=labels(model)).loss.backward()
    # Every identity block can learn.
    stacks = anatomy(model).stacks
    for layer in (layer for stack in stacks for layer in model.get_submodule(stack.path)):
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())
    model = scaled(family)
    assert grown("stacking", model, factor=2).promise == "none"
    assert change(before, logits(model)) > 1e-3
    assert len(scales(model)) == 2 * count


NINE = ("bert2bert", "hypercloning", "lemon", "ligo", "llama-pro", "masked", "net2net", "solar", "stacking")


@pytest.mark.parametrize("family", SCALED)
def test_methods_that_take_the_architecture_take_it_with_the_brick(plugin, family, monkeypatch):
    """All nine that ask what every parameter is; what one refuses, it refuses of the plain model too."""
    monkeypatch.chdir(plugin)
    taken = set()
    for name in NINE:
        values = method(name).examples(tiny(family))
        if name == "masked":
            values["new_layers"] = "copies"
        if name == "lemon":  # factors change the mean that padding before a LayerNorm takes
            values["hidden_size"] = 2 * anatomy(tiny(family)).sizes.residual
        try:
            grown(name, tiny(family), **values)
        except PlanError:
            assert (name, family) == ("llama-pro", "bert")
            continue
        model = scaled(family)
        before = logits(model)
        plan = grown(name, model, **values)
        assert plan.promise == "none" or change(before, logits(model)) < EXACT, name
        assert len(scales(model)) > 0
        assert torch.isfinite(logits(model)).all()
        taken.add(name)
    assert len(taken) == 9 - (family == "bert")


def test_what_can_not_follow_is_refused_with_the_mend(plugin):
    with pytest.raises(PlanError, match=r"factors of its units .* change behind it\. Merge them first.* are 16 and 32"):
        grown("lemon", scaled("gpt2"), hidden_size=20)
    grown("lemon", scaled("gpt2", ["key_value", "ffn"]), hidden_size=20)
    with pytest.raises(PlanError, match=r"all layers of model\.layers were edited .*channel_scale.*Ask for copies"):
        grown("masked", scaled("llama"), layers=3)
    with pytest.raises(PlanError, match=r"writes key_value or ffn\. Name other streams"):
        grown("channel-scale", scaled("llama"))
    with pytest.raises(ConfigError, match="channel_scale: a Embedding has no outputs on axis 0"):
        find_brick("channel_scale").replacing(nn.Embedding(2, 2))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_merges_back_into_the_layer(plugin, family):
    model, plain = scaled(family), tiny(family, seed=3)
    making = importlib.import_module("auxin_channel_scale").ScaleMaking()
    for path, brick in model.named_modules():
        if type(brick) is not find_brick("channel_scale"):
            continue
        settings, layer = {"axis": brick.axis}, plain.get_submodule(path)
        old = {name: parameter.detach() for name, parameter in layer.named_parameters()}
        new = {name: parameter.detach() for name, parameter in brick.named_parameters()}
        shapes = making.shapes({name: tuple(tensor.shape) for name, tensor in old.items()}, **settings)
        made = making.values(old, torch.Generator(), **settings)
        assert {name: tuple(tensor.shape) for name, tensor in made.items()} == shapes == {"scale": brick.scale.shape}
        assert making.back({**old, **made}, **settings).keys() == old.keys()
        assert all(torch.equal(old[name], tensor) for name, tensor in making.back({**old, **made}, **settings).items())
        with torch.no_grad():
            for name, tensor in making.back(new, **settings).items():
                layer.get_parameter(name).copy_(tensor)
    assert change(logits(model), logits(plain)) < EXACT


def test_saved_and_loaded_it_is_the_same_here_and_in_a_new_process(plugin):
    cases, classes = [], {"llama": "AutoModelForCausalLM", "gpt2": "AutoModelForCausalLM"}
    for family, model_class in classes.items():
        for name in ("channel-scale", "hypercloning", "llama-pro"):
            model = scaled(family)
            if name != "channel-scale":
                grown(name, model)
            model = model.float()
            folder = plugin / f"{family}-{name}"
            model.save_pretrained(folder)
            with torch.no_grad():
                expected = model(**inputs(model)).logits
                assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(**inputs(model)).logits, expected)
            save_file({**inputs(model), "expected": expected.contiguous()}, folder / "probe.safetensors")
            cases.append({"folder": str(folder), "model_class": model_class})
    assert "channel_scale" in about_runtimes(model.config)
    assert "merge it back" in about_runtimes(model.config)
    (plugin / "cases.json").write_text(json.dumps({"plain": [], "replayed": cases}))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(plugin), str(EXAMPLE)])}
    command = [sys.executable, str(ROOT / "tests" / "reload.py"), str(plugin / "cases.json")]
    done = subprocess.run(command, capture_output=True, text=True, env={**environment, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [None] * len(cases)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_after_growing_wider_and_deeper_it_is_merged_back_by_an_edit(plugin, family):
    model = scaled(family)
    grown("hypercloning", model, factor=2)
    grown("llama-pro", model, group_size=1)
    before = logits(model)
    replaced = [edit.module for edit in structural_edits(model.config)]
    merges = [MergeModule(module=module) for module in replaced]
    with InDouble():
        apply(Plan(method="by hand", promise="exact", edits=merges), model, probe=inputs(model))
    assert change(before, logits(model)) < EXACT
    assert structural_edits(model.config) == []
    assert not scales(model)
    model.save_pretrained(plugin / "plain")
    assert "quantization_config" not in json.loads((plugin / "plain" / "config.json").read_text())
