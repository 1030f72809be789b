"""`import auxin`: few words that serve a model and a folder alike, and an import that brings no more than it must."""

import ast
import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.optim import AdamW
from transformers import PreTrainedTokenizerFast

import auxin
from auxin.accounting import Ledger
from auxin.edits.structure import structural_edits
from auxin.errors import CheckpointError, ConfigError, DataError, PlanError
from auxin.methods import method, methods
from auxin.methods.grow.stacking import METHOD as STACKING
from auxin.models.tokenformer import TokenFormerForCausalLM
from auxin.objectives.calibration import Calibration
from auxin.planning.method import Method
from auxin.settings import Settings
from tiny_models import change, inputs, labels, logits, tiny
from tiny_tokenizers import tiny_tokenizer

WORDS = ["Plan", "Receipt", "apply", "grow", "load", "methods", "plan", "save"]
EXACT = 1e-12


@pytest.fixture
def folder(tmp_path):
    tiny("llama", dtype=torch.float32).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


# The words.


def test_the_face_is_few_words():
    assert dir(auxin) == sorted(auxin.__all__) == WORDS
    for word in WORDS:
        assert callable(getattr(auxin, word))
        assert getattr(auxin, word).__doc__
    with pytest.raises(AttributeError, match=r"module 'auxin' has no attribute 'plna'"):
        _ = auxin.plna


def test_methods_is_the_list_and_the_package():
    assert auxin.methods() == methods()
    assert "hypercloning" in auxin.methods()
    assert auxin.methods is auxin.methods is sys.modules["auxin.methods"]
    assert auxin.methods.method("graft") is auxin.methods()["graft"]


@pytest.mark.parametrize("name", sorted(methods()))
def test_a_plan_is_the_same_for_a_model_and_for_its_folder(name, tmp_path, monkeypatch):
    family = {"tokenformer": "tokenformer", "expert-dropping": "mixtral"}.get(name, "llama")
    model, found = tiny(family, dtype=torch.float32), method(name)
    model.save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer("byte_level")
    if name == "vocabulary":
        model = tiny(family, dtype=torch.float32, vocab_size=len(tokenizer))
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        model = auxin.load(tmp_path / "model")
    settings, data = found.examples(model), {}
    if found.calibration is not None and found.calibration(found.settings.parse(settings)) is not None:
        learns = {"steps": 2} if "steps" in found.settings.model_fields else {}
        settings, data = {**settings, **learns}, {"data": [inputs(model)["input_ids"]]}
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setenv("AUXIN_CACHE", str(tmp_path / "first"))
    plans = [auxin.plan(model, name, folder=tmp_path / "a", **data, **settings)]
    monkeypatch.setenv("AUXIN_CACHE", str(tmp_path / "second"))  # what is measured costs as much again
    plans += [auxin.plan(tmp_path / "model", name, folder=tmp_path / "b", **data, **settings)]
    assert type(plans[0]) is auxin.Plan
    dumps = [plan.model_dump(exclude={"cost": {"seconds"}, "made_for": {"dtype"}}) for plan in plans]
    assert dumps[0] == dumps[1]
    assert plans[0].method == name
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_config_is_enough_where_shapes_are(folder):
    (folder / "model.safetensors").unlink()
    assert auxin.plan(folder / "config.json", "stacking", factor=2) == auxin.plan(str(folder), "stacking", factor=2)
    with pytest.raises(ConfigError, match=r"holds no \*\.safetensors file"):
        auxin.plan(folder, "ligo", layers=3)


def test_settings_reach_the_method_and_seeds_are_settings():
    model = tiny("llama")
    plans = [auxin.plan(model, "net2net", intermediate_size=17, seed=seed) for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    assert plans[2].settings == {"intermediate_size": 17, "seed": 1}


def test_apply_changes_a_model_and_its_optimizer():
    model = tiny("llama", dtype=torch.float32)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    model(**inputs(model), labels=labels(model)).loss.backward()
    optimizer.step()
    before = model(**inputs(model)).logits.detach()
    receipt = auxin.apply(auxin.plan(model, "hypercloning", factor=2), model, optimizer=optimizer, probe=inputs(model))
    assert type(receipt) is auxin.Receipt
    assert (receipt.plan.promise, receipt.overshoot) == ("exact", 2)
    assert model.config.hidden_size == 32
    assert change(before, model(**inputs(model)).logits.detach()) < receipt.tolerance
    weight = model.model.layers[0].mlp.up_proj.weight
    assert optimizer.state[weight]["exp_avg"].shape == weight.shape == (24, 32)


def test_apply_serves_a_folder_too_and_keeps_its_books(folder, tmp_path):
    plan = auxin.plan(folder, "graft", tokens=3)
    receipt = auxin.apply(plan, folder, output=tmp_path / "grown")
    assert receipt.max_relative_change == 0
    assert [stage.plan["method"] for stage in Ledger.load(tmp_path / "grown").stages] == ["graft"]
    model = auxin.load(folder)
    auxin.apply(plan, model)
    loaded = auxin.load(tmp_path / "grown")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert (receipt.parameters_before, receipt.parameters_after) == (
        auxin.load(folder).num_parameters(),
        loaded.num_parameters(),
    )


def test_load_does_the_edits_again_and_chooses_the_class(folder, tmp_path):
    for family in ("bert", "t5", "vit", "tokenformer"):
        model = tiny(family, dtype=torch.float32)
        model.save_pretrained(tmp_path / family)
        assert type(auxin.load(tmp_path / family)) is type(model)
    model = auxin.load(folder)
    auxin.apply(auxin.plan(model, "graft", tokens=3), model)
    model.save_pretrained(tmp_path / "grafted")
    loaded = auxin.load(str(tmp_path / "grafted"), dtype=torch.float64)
    assert loaded.dtype == torch.float64
    assert len(structural_edits(loaded.config)) == len(structural_edits(model.config)) > 0
    assert type(loaded.model.layers[0].mlp.up_proj) is type(model.model.layers[0].mlp.up_proj) is not nn.Linear


def test_grow_appends_parameter_tokens():
    model = tiny("tokenformer")
    before = logits(model)
    assert auxin.grow(model, ffn_tokens=40).plan.promise == "exact"
    assert change(before, logits(model)) < EXACT


def test_a_compiled_model_is_the_model_inside():
    model = tiny("llama")
    compiled = torch.compile(model)
    plan = auxin.plan(compiled, "stacking", factor=2)
    assert plan == auxin.plan(model, "stacking", factor=2)
    auxin.apply(plan, compiled)
    assert len(model.model.layers) == 4


# Data for methods that look at it.


@pytest.mark.parametrize("given", ["batches", "mappings", "calibration"])
def test_data_is_batches_or_a_calibration(given, tmp_path):
    model = tiny("llama", dtype=torch.float32)
    batches = [inputs(model, seed)["input_ids"] for seed in range(2)]
    data = {
        "batches": batches,
        "mappings": [{"input_ids": ids, "labels": ids} for ids in batches],
        "calibration": Calibration.of_batches(model, batches),
    }[given]
    plan = auxin.plan(model, "ligo", data=data, folder=tmp_path, layers=3, steps=2)
    assert (plan.cost.samples, plan.cost.units) == (4, 4 * 7)
    assert plan.cost.data == Calibration.of_batches(model, batches).fingerprint
    auxin.apply(plan, model)
    assert model.config.num_hidden_layers == 3


def test_data_is_a_corpus_whose_tokenizer_a_model_in_memory_does_not_know(tmp_path):
    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer("byte_level")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(f"def walk{number}(tree): return {number * 17} " * 20)
    corpus = {"source": "files", "paths": [str(path) for path in tmp_path.glob("*.txt")], "context_length": 8}
    model = tiny("llama", dtype=torch.float32, vocab_size=len(tokenizer))
    data = {"samples": 3, "length": 8, "batch_size": 2, "corpus": corpus}
    for missing in ({}, {"data": data}):
        with pytest.raises(ConfigError, match=r"ligo looks at data.*nothing about its tokenizer\. Give data"):
            auxin.plan(model, "ligo", layers=3, steps=2, **missing)
    corpus["tokenizer"] = str(tmp_path / "tokenizer")
    plan = auxin.plan(model, "ligo", data=data, folder=tmp_path, layers=3, steps=2)
    assert (plan.cost.samples, plan.cost.units) == (2 + 1, 3 * 8)


def test_data_that_nothing_looks_at_is_refused():
    model = tiny("llama")
    ids = inputs(model)["input_ids"]
    for data in ([ids], {"samples": 3}, Calibration.of_batches(model, [ids])):
        with pytest.raises(ConfigError, match=r"stacking looks at no data with these settings"):
            auxin.plan(model, "stacking", factor=2, data=data)
    with pytest.raises(DataError, match=r"one tensor of shape \[2, 7\]\. Give a list of batches"):
        auxin.plan(model, "ligo", data=ids, layers=3)
    with pytest.raises(ConfigError, match=r"data: sampels: unknown field\. Did you mean 'samples'\?"):
        auxin.plan(model, "ligo", data={"sampels": 3}, layers=3)


@pytest.mark.parametrize("word", ["data", "folder"])
def test_no_setting_can_be_called_what_plan_says_itself(word):
    named = type("Named", (Settings,), {"__annotations__": {word: int}, word: 0})
    with pytest.raises(TypeError, match=f"has a setting '{word}'.*rename it"):
        Method("named", "", "", "grow", named, STACKING.plan, STACKING.examples)
    assert not any(word in found.settings.model_fields for found in methods().values())


# What is wrong is said.


def test_the_nearest_name_is_told():
    model = tiny("llama")
    with pytest.raises(ConfigError, match=r"Unknown method 'hypercloing'\. Did you mean 'hypercloning'\?"):
        auxin.plan(model, "hypercloing", factor=2)
    with pytest.raises(ConfigError, match=r"hypercloning: facter: unknown field\. Did you mean 'factor'\?"):
        auxin.plan(model, "hypercloning", facter=2)
    with pytest.raises(ConfigError, match=r"llama-pro: seed: unknown field"):
        auxin.plan(model, "llama-pro", seed=1)


def test_what_is_no_model_is_refused(tmp_path):
    wrapped = nn.Sequential(tiny("llama"))
    plan = auxin.plan(tiny("llama"), "stacking", factor=2)
    with pytest.raises(ConfigError, match=r"auxin\.plan takes .* received a Sequential\. .* give the model inside"):
        auxin.plan(wrapped, "stacking", factor=2)
    with pytest.raises(ConfigError, match=r"auxin\.apply takes .* received a Sequential"):
        auxin.apply(plan, wrapped)
    adapted = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"received a PeftModel, which holds an adapter\. .*merge_and_unload"):
        auxin.plan(adapted, "stacking", factor=2)
    adapted.save_pretrained(tmp_path / "adapter")
    quantized = tiny("llama")
    quantized.config.quantization_config = {"quant_method": "gguf"}
    with pytest.raises(PlanError, match=r"quantized \(gguf\).*Dequantize it first"):
        auxin.plan(quantized, "stacking", factor=2)
    for use in (lambda folder: auxin.plan(folder, "stacking", factor=2), auxin.load):
        with pytest.raises(CheckpointError, match="holds an adapter and no model"):
            use(tmp_path / "adapter")
    for use in (lambda folder: auxin.plan(folder, "stacking", factor=2), auxin.load):
        with pytest.raises(CheckpointError, match="nothing does not exist"):
            use(tmp_path / "nothing")
    with torch.device("meta"):
        skeleton = type(tiny("llama"))(tiny("llama").config)
    with pytest.raises(ConfigError, match=r"ligo looks at the model's weights, .* on the meta device"):
        auxin.plan(skeleton, "ligo", data=[inputs(tiny("llama"))["input_ids"]], layers=3)


def test_what_is_for_the_other_kind_of_model_is_refused(folder, tmp_path):
    model = tiny("llama")
    plan = auxin.plan(model, "stacking", factor=2)
    with pytest.raises(ConfigError, match=r"output = 'there': a model in memory is changed in place"):
        auxin.apply(plan, model, output="there")
    with pytest.raises(ConfigError, match=r"optimizer is for a model in memory"):
        auxin.apply(plan, folder, output=tmp_path / "out", optimizer=AdamW(model.parameters()))
    with pytest.raises(PlanError, match=r"does not run on the probe .*Give auxin\.apply a probe on which it runs"):
        auxin.apply(plan, folder, output=tmp_path / "out", probe=torch.tensor([[-1]]))
    with pytest.raises(ConfigError, match=r"Give output, the folder of the new checkpoint"):
        auxin.apply(plan, folder)
    assert len(model.model.layers) == 2
    assert not (tmp_path / "out").exists()
    estimate = plan.model_copy(update={"estimate": True})
    for target in ({"model": model}, {"model": folder, "output": tmp_path / "out"}):
        with pytest.raises(PlanError, match="is an estimate"):
            auxin.apply(estimate, **target)


# What a fresh process imports, and what works in it after `import auxin` alone.

NEEDED_LATER = {
    "auxin.face",
    "auxin.models.tokenformer.layers",
    "auxin.models.tokenformer.modeling",
    "auxin.models.tokenformer.vision",
    "auxin.models.loading",
    "auxin.nn.bricks",
    "auxin.nn.pattention",
    "auxin.edits.plan",
    "auxin.edits.resolution",
    "auxin.edits.structure",
    "auxin.edits.kinds.edit",
    "auxin.methods",
    "auxin.planning",
    "auxin.settings",
    "auxin.cli",
    "datasets",
    "jinja2",
    "pandas",
    "plotly",
    "pyarrow",
    "pydantic",
    "scipy",
    "tensorboard",
    "torchdata",
    "torch._dynamo",
    "transformers.generation.utils",
    "transformers.masking_utils",
    "transformers.modeling_utils",
    "transformers.pipelines",
    "transformers.trainer",
}


def fresh(program: str, *arguments: object) -> str:
    """What a new process prints that runs `program`."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


IMPORT = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import auto
before = set(sys.modules)
import auxin
print(sorted(set(sys.modules) - before))
"""


def test_importing_it_imports_nothing_that_is_needed_later():
    loaded = set(ast.literal_eval(fresh(IMPORT)))
    assert {"auxin.models", "auxin.edits.replay", "auxin.models.tokenformer.configuration"} <= loaded
    assert loaded & NEEDED_LATER == set()
    assert {name.partition(".")[0] for name in loaded} == {"auxin"}
    # Names that are no longer there would never be loaded.
    ours = Path(auxin.__file__).parent
    for name in (name for name in NEEDED_LATER if name.startswith("auxin.")):
        path = ours.joinpath(*name.split(".")[1:])
        assert path.is_dir() or path.with_suffix(".py").is_file()


ANYWHERE = """
import itertools
import torch
import auxin
torch.manual_seed(0)
for samples, wide, dtype in itertools.product((1, 7, 64), (8, 24, 257), (torch.float32, torch.float64)):
    inputs, weight = torch.randn(samples, 24, dtype=dtype), torch.randn(wide, 24, dtype=dtype)
    expected = inputs @ weight.T
    for offset in range(8):
        elsewhere = torch.empty(weight.numel() + 8, dtype=dtype)[offset:][:weight.numel()].view_as(weight).copy_(weight)
        assert torch.equal(inputs @ elsewhere.T, expected), (samples, wide, dtype, offset)
"""


def test_products_do_not_depend_on_where_weights_lie(monkeypatch):
    """Else a model that was loaded would compute other bits than the one that was saved."""
    monkeypatch.delenv("MKL_CBWR", raising=False)
    fresh(ANYWHERE)


BY_AND_BY = """
import sys
import auxin
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer
tokenformer, grafted = sys.argv[1:]

config = AutoConfig.from_pretrained(tokenformer)
assert type(config) is CONFIG_MAPPING["tokenformer"]
assert type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
made = AutoHfQuantizer.from_config({"quant_method": "auxin", "edits": []}, pre_quantized=True)
assert isinstance(made, HfQuantizer) and made.is_trainable and made.is_serializable()
assert AUTO_QUANTIZATION_CONFIG_MAPPING["auxin"] is type(made.quantization_config)
assert "auxin.edits.structure" not in sys.modules

model = AutoModelForCausalLM.from_pretrained(grafted).eval()
ids = load_file(grafted + "/probe.safetensors")
assert torch.equal(model(ids["input_ids"]).logits, ids["expected"])
assert "auxin.models.tokenformer.modeling" not in sys.modules
print(type(model).__name__, type(model.model.layers[0].mlp.up_proj).__name__)
print(type(AutoModel.from_pretrained(tokenformer)).__name__)
"""

MODELS = """
import sys
import torch
import auxin
from safetensors.torch import load_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import PreTrainedModel
folder = sys.argv[1]
looked_up = MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(folder))]
assert looked_up.__name__ == "TokenFormerForCausalLM"
built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
loaded = AutoModelForCausalLM.from_pretrained(folder)
from auxin.models.tokenformer.modeling import TokenFormerForCausalLM, TokenFormerModel
assert type(built) is type(loaded) is TokenFormerForCausalLM
assert isinstance(loaded, (PreTrainedModel, looked_up)) and isinstance(loaded, looked_up)
assert MODEL_FOR_CAUSAL_LM_MAPPING[type(loaded.config)] is TokenFormerForCausalLM
assert MODEL_MAPPING[type(loaded.config)] is TokenFormerModel
assert type(AutoModel.from_pretrained(folder)) is TokenFormerModel
loaded.save_pretrained(sys.argv[2])
print(AutoConfig.from_pretrained(sys.argv[2]).architectures)
ids = load_file(folder + "/probe.safetensors")
assert torch.equal(loaded.eval()(ids["input_ids"]).logits, ids["expected"])
"""

PIPELINE = """
import sys
import auxin
from transformers import pipeline
made = pipeline("text-generation", model=sys.argv[1])
print(type(made.model).__name__, len(made("def walk", max_new_tokens=3, do_sample=False)))
"""


def keep_probe(model, path):
    """Save the model with what its logits have to be."""
    model.save_pretrained(path)
    ids = inputs(model)["input_ids"]
    with torch.no_grad():
        save_file({"input_ids": ids, "expected": model.eval()(ids).logits.contiguous()}, path / "probe.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A TokenFormer with a tokenizer, and a grafted Llama."""
    folder, tokenizer = tmp_path_factory.mktemp("saved"), tiny_tokenizer("byte_level")
    model = tiny("tokenformer", dtype=torch.float32, vocab_size=len(tokenizer))
    keep_probe(model, folder / "tokenformer")
    tokenizer.save_pretrained(folder / "tokenformer")
    grafted = tiny("llama", dtype=torch.float32)
    auxin.apply(auxin.plan(grafted, "graft", tokens=3), grafted)
    keep_probe(grafted, folder / "grafted")
    return folder


def test_each_thing_is_imported_when_it_is_used(saved):
    """A config, the hook of edited models, an edited model, and the base of a model of ours, one after the other."""
    printed = fresh(BY_AND_BY, saved / "tokenformer", saved / "grafted")
    assert printed.split() == ["LlamaForCausalLM", "GraftedLinear", "TokenFormerModel"]


def test_auto_classes_build_and_load_the_classes_themselves(saved, tmp_path):
    assert ast.literal_eval(fresh(MODELS, saved / "tokenformer", tmp_path / "again")) == ["TokenFormerForCausalLM"]
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == ([TokenFormerForCausalLM.__name__], "tokenformer")


def test_pipelines_find_it(saved):
    command = [sys.executable, "-c", PIPELINE, str(saved / "tokenformer")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == ["TokenFormerForCausalLM", "1"], done.stderr
    assert "is not supported" not in done.stderr
