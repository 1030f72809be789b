"""What is wrong with a recipe is said before anything is made: file, branch, stage, field, and what to do."""

import copy
import re
from pathlib import Path

import pytest
import torch
import yaml

from auxin.errors import AuxinError, ConfigError, DataError
from auxin.recipes import Recipe, load_recipe, price_recipe, run_recipe
from auxin.recipes.beforehand import check_devices, check_sources
from auxin.recipes.folder import allowed_changes, claim_directory, held
from auxin.recipes.schema import MOST_BRANCHES

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SMALL = {
    "name": "small",
    "title": "Small",
    "data": {"source": "files", "paths": ["texts"], "context_length": 16, "vocab_size": 300},
    "training": {"batch_size": 2},
    "branches": [
        {
            "name": "one",
            "title": "One",
            "stages": [
                {"kind": "build", "model_type": "llama", "config": SIZES},
                {"kind": "train", "name": "base", "settings": {"steps": 3}},
            ],
        },
        {
            "name": "two",
            "title": "Two",
            "fork": "one/base",
            "stages": [{"kind": "train", "name": "on", "flops_of": "one"}],
        },
    ],
}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The path of the recipe, in the current folder, beside its texts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("roots and shoots")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    return "./small.yaml"


STAGE = "branches.0.stages.1"
BUILD = "branches.0.stages.0.config"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rat=1", "training.learning_rat: unknown field. Did you mean 'learning_rate'?"),
        ("training.adam_betas=[1, 2, 3]", "training.adam_betas: must be a list of 2 or less (received 3)"),
        ("training.adam_betas=3", "training.adam_betas: must be a list, [a, b] (received 3)"),
        ("warmup_steps=3", "warmup_steps: unknown field. Did you mean 'training.warmup_steps'?"),
        ("learning_rat=3", "learning_rat: unknown field. Did you mean 'training.learning_rate'?"),
        ("vocab_size=300", "vocab_size: unknown field. Did you mean 'data.vocab_size'?"),
        (f"{STAGE}.steps=3", f"one/base: {STAGE}.steps: unknown field. Did you mean 'settings.steps'?"),
        (f"{STAGE}.badge=3", f"one/base: {STAGE}.badge: unknown field. Known: kind, name, flops_of, settings, fresh"),
        (f"{STAGE}.settings.learning_rat=3", "one/base: settings.learning_rat: unknown field. Did you mean"),
        (
            f"{STAGE}.settings.steps=null",
            "one/base: settings: give exactly one of steps, tokens, samples, flops, or flops_of beside settings; "
            "given: none",
        ),
        (f"{STAGE}.settings={{step: 40}}", "one/base: settings.step: unknown field. Did you mean 'steps'?"),
        (
            "training.tokens=64",
            "one/base: settings: give exactly one of steps, tokens, samples, flops, or flops_of beside settings; "
            "given: settings.steps, training.tokens",
        ),
        (
            f"{STAGE}.kind=trian",
            f"one/base: {STAGE}.kind: 'trian' is none of build, train, change, evaluate. Did you mean",
        ),
        (
            f"{STAGE}.name=A b",
            f"one/A b: {STAGE}.name: a name begins with a lower case letter or a digit and has lower",
        ),
        (f"name={'y' * 101}", "name: a name begins with a lower case letter or a digit and has lower case letters, "),
        ("title=12", "title: must be text (received 12). Put text that looks like something else in quotes"),
        ("seed=x", "seed: must be a whole number (received 'x')"),
        ("seed=-1", "seed: must be 0 or more (received -1)"),
        ("data=5", "data: 5 is neither a mapping with `kind`"),
        ("branches=5", "branches: must be a list, [a, b] (received 5)"),
        ("branches.0=5", "branches.0: must be a mapping, {field: value} (received 5)"),
        (f"{STAGE}.flops_of=two", "one/base: flops_of: no branch stands above this one, so that none can be 'two'"),
        (
            "branches.1.fork=onne/base",
            "two: fork: Unknown branch 'onne'. Did you mean 'one'? Known: one. Name a branch",
        ),
        (
            "branches.1.fork=one",
            "two: fork: 'one' names a branch and no stage. Give BRANCH/STAGE, one of one/build, one/base.",
        ),
        (f"{STAGE}.lora=4", f"one/base: {STAGE}.lora: a rank alone is no LoRA. Write {{rank: 4}}"),
        (
            f"{STAGE}.settings.lora={{rank: 4}}",
            f"one/base: {STAGE}: settings.lora: lora is a field of the stage. Write it beside settings",
        ),
        ("data.paths=null", "data.paths: must be a list, [a, b] (received null)"),
        (
            "data.paths=[null, {a: [true]}]",
            "data.paths.0: must be a path (received null); data.paths.1: must be a path ",
        ),
        ("main_branch=thre", "main_branch: Unknown branch 'thre'. Known: one, two."),
    ],
)
def test_a_wrong_field_is_told_with_its_branch_and_stage(small, override, message):
    with pytest.raises(ConfigError) as raised:
        load_recipe(small, [override])
    assert str(raised.value).startswith(f"{small}: {message}")


def test_required_and_unknown_fields_make_one_sentence():
    wrong = {**SMALL, "Name": "small"}
    del wrong["name"]
    with pytest.raises(ConfigError) as raised:
        Recipe.parse(wrong)
    assert str(raised.value) == "name: required, but not given; Name: unknown field. Did you mean 'name'?"


CHANGE = "branches.1.stages.0={kind: change, "
TOKENFORMER = (
    "branches.0.stages.0={kind: build, model_type: tokenformer, config: {hidden_size: 16, num_hidden_layers: 1, "
    "num_attention_heads: 2, qkv_tokens: 6, proj_tokens: 6, ffn_tokens: 12, max_position_embeddings: 16}}"
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"{BUILD}.hiden_size=3"], "one/build: config: Unknown llama config field 'hiden_size'. Did you mean"),
        ([f"{BUILD}.num_hidden_layers=1000000000000"], "one/build: config: llama refuses it: num_hidden_layers"),
        ([f"{BUILD}.num_labels=1000000000000"], "one/build: config: llama refuses it: num_labels = 10000000"),
        (["branches.0.stages.0.model_type=lama"], "one/build: model_type: Unknown architecture 'lama'. Did you mean"),
        (["branches.0.stages.0={kind: build, preset: 125m}"], "one/build: preset: Unknown TokenFormer preset '125m'"),
        (
            ["branches.0.stages.0={kind: build, checkpoint: nowhere}"],
            "one/build: checkpoint: nowhere does not exist. Give the folder of a checkpoint.",
        ),
        (
            ["branches.0.stages.0={kind: build, checkpoint: small.yaml}"],
            "one/build: checkpoint: small.yaml is a file and no folder. Give the folder of a checkpoint.",
        ),
        ([CHANGE + "method: llama-por}"], "two/change: method: Unknown method 'llama-por'. Did you mean 'llama-pro'?"),
        (
            [CHANGE + "method: stacking, settings: {layer: 2}}"],
            "two/change: settings.layer: unknown field. Did you mean 'layers'?",
        ),
        (
            [CHANGE + "method: llama-pro}"],
            "two/change: settings: give exactly one of group_size (null) and layers (null)",
        ),
        (
            [CHANGE + "method: stacking, settings: {layers: 1}}"],
            "two/change: settings: The model has 1 layers already.",
        ),
        (
            [CHANGE + "method: stacking, settings: {layers: 2}, calibration: {samples: 2}}"],
            "two/change: calibration: stacking looks at no data",
        ),
        (
            [CHANGE + "method: ligo, settings: {layers: 2}, calibration: {sample: 2}}"],
            "two/change: calibration.sample: unknown field. Did you mean 'samples'?",
        ),
        ([CHANGE + "to: 757m}"], "two/change: to: only a TokenFormer grows by tokens, this is a llama."),
        ([TOKENFORMER, CHANGE + "to: 125m}"], "two/change: to: Unknown TokenFormer preset '125m'. Did you mean"),
        ([TOKENFORMER, CHANGE + "tokens: {qkv_tokens: 4}}"], "two/change: tokens: qkv_tokens = 4 is fewer than the 6"),
        ([TOKENFORMER, "data.context_length=17"], "one/base: data.context_length is 17, but the model's max_position"),
        (["training.warmup_steps=9"], "one/base: training.warmup_steps: 9 of warmup and 1 of decay do not fit"),
        ([f"{STAGE}.settings.warmup_steps=9"], "one/base: settings.warmup_steps: 9 of warmup"),
        ([], "two/on: flops_of: 'one' used no more FLOPs than were used before"),
        (["data.tokenizer=texts"], "data.tokenizer: There is no tokenizer.json in texts."),
    ],
)
def test_what_cant_be_built_or_done_is_told_with_file_branch_stage_and_field(small, overrides, message):
    with pytest.raises(AuxinError) as raised:
        price_recipe(load_recipe(small, overrides), memory=False)
    assert str(raised.value).startswith(f"{small}: {message}")
    assert len(str(raised.value)) < 500


def test_a_folder_or_another_file_in_the_place_of_a_recipe_is_told_what_was_meant(small, tmp_path):
    run = tmp_path / "run"
    claim_directory(load_recipe(small), run, print)
    Path("config.json").write_text("{}")
    for given, message in (
        ("./run", "run is a folder. Give the recipe in it, run/recipe.yaml, or the name of a built-in recipe."),
        ("run", "run is a folder. Give the recipe in it, run/recipe.yaml,"),
        ("texts", "texts is a folder. Give the path of a YAML file or the name of a built-in recipe."),
        (
            "config.json",
            "config.json is no recipe by its name. Give a file whose suffix is .yaml, or the name of a built",
        ),
    ):
        with pytest.raises(ConfigError) as raised:
            load_recipe(given)
        assert str(raised.value).startswith(message)
    assert "auxin train --model config.json" in str(raised.value)
    with pytest.raises(ConfigError, match="Unknown recipe"):
        load_recipe("y" * 5000)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("branches.7.name=x", "--set 'branches.7.name=x': '7' is no index of a list of 2. Its last is 1."),
        ("branches.-1.name=x", "--set 'branches.-1.name=x': '-1' is no index of a list of 2."),
        ("training.steps=[1", "--set 'training.steps=[1': the value '[1' is not valid YAML: line "),
        (
            "seed={a: 1, a: 2}",
            "--set 'seed={a: 1, a: 2}': the value '{a: 1, a: 2}' is not valid YAML: line 1, column 8: ",
        ),
        ("seed.x=1", "--set 'seed.x=1': 'seed' holds the value 4, not a group of values."),
        ("a..b=1", "--set 'a..b=1' is no key=value. Write --set KEY=VALUE"),
        (".".join("a" * 100) + "=1", "--set 'a.a.a"),
        ("y" * 5000, "--set 'yyy"),
    ],
)
def test_a_wrong_override_is_told_with_its_option(small, override, message):
    with pytest.raises(ConfigError) as raised:
        load_recipe(small, ["seed=4", override])
    assert str(raised.value).startswith(message)
    assert len(str(raised.value)) < 400


def test_too_many_branches_are_refused_at_once():
    branch = SMALL["branches"][0]
    many = {**SMALL, "branches": [{**branch, "name": f"b{number}"} for number in range(2000)]}
    with pytest.raises(ConfigError, match=rf"branches: must be a list of {MOST_BRANCHES} or less"):
        Recipe.parse(many)


def test_of_many_wrong_fields_the_first_are_told():
    wrong = copy.deepcopy(SMALL)
    wrong["data"] |= {f"field{number}": 0 for number in range(3000)}
    with pytest.raises(ConfigError, match=r"and 2,994 more wrong fields$") as raised:
        Recipe.parse(wrong)
    assert len(str(raised.value)) < 2500


def test_sources_and_devices_are_looked_for_before_anything_is_made(small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for override, error, message in (
        ("data.paths=[nowhere]", DataError, "data.paths: nowhere does not exist"),
        ("data.tokenizer=nowhere", DataError, "data.tokenizer: Tokenizer nowhere does not exist"),
        ("training.device=cuda", ConfigError, "training.device: 'cuda' is asked for"),
        (f"{STAGE}.settings.device=cuda", ConfigError, "one/base: settings.device: 'cuda' is asked for"),
    ):
        with pytest.raises(error, match=f"^{re.escape(f'{small}: {message}')}"):
            run_recipe(load_recipe(small, [override]), tmp_path / "out", "auxin run")
    assert not (tmp_path / "out").exists()
    check_sources(load_recipe(small))
    check_devices(load_recipe(small))


@pytest.mark.parametrize("output", ["small.yaml", "small.yaml/out", "/proc/nope"])
def test_a_folder_that_cant_be_made_is_named(small, output):
    with pytest.raises(ConfigError, match=rf"{re.escape(output)}.*Give another") as raised:
        claim_directory(load_recipe(small), Path(output), print)
    assert "Errno" not in str(raised.value)
    with pytest.raises(ConfigError, match=rf"{re.escape(output)}.*Give another one"), held(Path(output)):
        pass


def test_a_longer_budget_for_a_finished_run_is_pointed_to_the_way_there_is(small, tmp_path):
    recipe, folder = load_recipe(small), tmp_path / "run"
    claim_directory(recipe, folder, print)
    for number, name in ((1, "build"), (2, "base")):
        stage = folder / "branches" / "one" / f"{number:02d}-{name}"
        (stage / "checkpoint").mkdir(parents=True)
        checkpoint = stage.relative_to(folder) / "checkpoint"
        (stage / "stage.json").write_text(f'{{"name": "{name}", "kind": "train", "checkpoint": "{checkpoint}"}}')
    with pytest.raises(
        ConfigError, match=r"steps: 3 there, 9 asked.*auxin train --model .*02-base/checkpoint -o ANOTHER"
    ):
        allowed_changes(load_recipe(small, [f"{STAGE}.settings.steps=9"]), folder)
    with pytest.raises(ConfigError, match=r"or the recipe as it was\.$"):
        allowed_changes(load_recipe(small, [f"{STAGE}.settings.learning_rate=1e-4"]), folder)
