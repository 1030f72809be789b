"""A recipe says what it means or is refused with the field, the value and the mend, before any work starts."""

import copy

import pytest
import yaml

from auxin.accounting import count_parameters
from auxin.errors import ConfigError, PlanError
from auxin.methods import methods
from auxin.models.loading import skeleton
from auxin.models.tokenformer import TokenFormerConfig
from auxin.recipes import Recipe, builtin_recipes, load_recipe, price_recipe, training_recipe
from auxin.recipes.seeds import part_of
from auxin.recipes.stage_models import final_config, match_parameters, stage_configs

DEMO = yaml.safe_load(load_recipe.__globals__["BUILTIN"].joinpath("demo.yaml").read_text())


def changed(**changes):
    """The demo's values with dotted keys (dots written as two underscores) set, or removed by None."""
    values = copy.deepcopy(DEMO)
    for key, value in changes.items():
        *path, last = [int(part) if part.isdigit() else part for part in key.split("__")]
        target = values
        for part in path:
            target = target[part]
        target[last] = value
    return values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainning": {}}, "trainning: unknown field. Did you mean 'training'"),
        ({"data__vocabsize": 512}, "Did you mean 'vocab_size'"),
        ({"data__source": "web"}, "data.source"),
        ({"branches__0__stages__2__tokens__ffn_token": 9}, "Did you mean 'ffn_tokens'"),
        ({"branches__0__stages__1__settings": {"step": 5}}, "settings.step: unknown field. Did you mean 'steps'"),
        ({"branches__0__stages__1__settings": {}}, "exactly one of steps, tokens, samples, flops, or flops_of"),
        ({"branches__0__stages__1__settings": {"steps": 5, "learning_rat": 1}}, "Did you mean 'learning_rate'"),
        ({"branches__1__fork": "grwn/base"}, "Did you mean 'grown'"),
        ({"branches__1__fork": "grown/bse"}, "Did you mean 'base'"),
        ({"branches__1__stages__0__flops_of": "dense"}, "no branch stands above|Unknown branch 'dense'"),
        ({"branches__2__name": "grown"}, "stands twice"),
        ({"branches__1__fork": None}, "begins with one build stage"),
        ({"branches__0__stages__0__preset": "124m"}, "exactly one of preset, model_type, checkpoint and like"),
        ({"branches__0__stages__1__name": "../../base"}, "branches.0.stages.1"),
        ({"main_branch": "growm"}, "Did you mean 'grown'"),
        ({"seeds": [2**63]}, "seeds.0"),
        ({"seeds": [True]}, "seeds.0"),
        ({"measures": ["loss", "loss"]}, "measures must differ"),
        ({"branches__0__stages__1__hooks": ["exact_rates", "exact_rates"]}, "exact_rates stands twice"),
        ({"branches__0__stages__1__hooks": [{"kind": "train_only", "paths": [""]}]}, "hooks.0.paths.0"),
    ],
)
def test_a_wrong_recipe_names_the_field_and_the_mend(changes, message):
    with pytest.raises(ConfigError, match=message):
        Recipe.parse(changed(**changes))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        ({"model_type": "lama"}, "model_type: Unknown architecture 'lama'. Did you mean"),
        ({"model_type": "llama", "config": {"hidden_size": 30, "num_attention_heads": 4}}, "multiple of the number"),
        ({"model_type": "gpt2", "config": {"hiden_size": 32}}, "Did you mean 'hidden_size'"),
        ({"model_type": "llama", "config": {"intermediate_size": -1}}, "no llama can be built with these sizes"),
        ({"model_type": "tokenformer", "config": {"qkv_token": 8}}, "Did you mean 'qkv_tokens'"),
    ],
)
def test_a_model_that_cant_be_built_is_refused_in_one_short_message(build, message):
    recipe = Recipe.parse(changed(branches__0__stages__0={"kind": "build", **build}))
    with pytest.raises(ConfigError, match=message) as caught:
        stage_configs(recipe, recipe.data.form())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_fields_under_former_names_are_known():
    config = {"rotary_emb_base": 500.0, "rotary_pct": 0.5, "num_hidden_layers": 1, "hidden_size": 32}
    build = {"kind": "build", "model_type": "gpt_neox", "config": {**config, "num_attention_heads": 4}}
    values = {**changed(), "branches": [{"name": "a", "title": "a", "stages": [build]}]}
    values["main_branch"] = "a"
    recipe = Recipe.parse(values)
    rope = final_config(stage_configs(recipe, recipe.data.form()), "a").rope_parameters
    assert (rope["rope_theta"], rope["partial_rotary_factor"]) == (500.0, 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branches__0__stages__1__settings": {"steps": 50, "warmup_steps": 100}}, "warmup_steps"),
        ({"data__context_length": 256}, "context_length is 256"),
        (
            {"branches__1__fork": "grown/final", "branches__1__stages__0__flops_of": "grown"},
            "flops_of: 'grown' used no more FLOPs than were used before",
        ),
    ],
)
def test_what_does_not_fit_together_has_no_price(changes, message):
    with pytest.raises(ConfigError, match=message):
        price_recipe(Recipe.parse(changed(**changes)), memory=False)


def test_builtin_recipes_are_valid():
    assert set(builtin_recipes()) == {
        "altup",
        "altup-t5",
        "demo",
        "shoot-out",
        "structured-ffn-110m-to-1.3b",
        "tokenformer-124m-to-1.4b",
    }


def test_the_demo_is_priced_at_equal_flops():
    price = price_recipe(load_recipe("demo"))
    for flops in price.branch_flops.values():
        assert flops == pytest.approx(price.branch_flops["grown"], rel=2e-3)
    # A line of electricity comes last.
    assert str(price).count("\n") == 1 + len(price.stages) + 1 + len(price.branch_flops) + 1


def test_the_shoot_outs_branches_cost_the_same_and_end_as_large():
    recipe = load_recipe("shoot-out")
    price = price_recipe(recipe, memory=False)
    for flops in price.branch_flops.values():
        assert flops == pytest.approx(price.branch_flops["dense"], rel=5e-3)
    finals = {stage.branch: stage.parameters for stage in price.stages}
    small = {finals.pop(name) for name in ("dense", "dense-lower", "tokenformer")}
    assert max(small) < 1.01 * min(small)
    assert max(finals.values()) < 1.07 * min(finals.values())
    grown = {stage.method or "tokenformer" for b in recipe.branches for stage in b.stages if stage.kind == "change"}
    assert grown >= {name for name, method in methods().items() if method.intent == "grow"} - {"vocabulary", "altup"}


def test_unknown_recipes_and_overrides_are_named():
    with pytest.raises(ConfigError, match="Did you mean 'demo'"):
        load_recipe("dmo")
    with pytest.raises(ConfigError, match="does not exist"):
        load_recipe("nowhere/demo.yaml")
    with pytest.raises(ConfigError, match="no key=value"):
        load_recipe("demo", ["seed"])
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_recipe("demo", ["training.steps=[1"])
    with pytest.raises(ConfigError, match="no index"):
        load_recipe("demo", ["branches.9.name=x"])
    recipe = load_recipe("demo", ["seed=3", "training.learning_rate=1e-3", "branches.0.title=A"])
    assert (recipe.seed, recipe.training["learning_rate"], recipe.branches[0].title) == (3, 1e-3, "A")


def test_files_that_are_no_text_are_refused(tmp_path):
    for name in ("recipe.yaml", "config.json"):
        (tmp_path / name).write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match="can't be read"):
        load_recipe(str(tmp_path / "recipe.yaml"))
    with pytest.raises(ConfigError, match="can't be read"):
        training_recipe(str(tmp_path / "config.json"), {}, {"steps": 1})


def test_structures_are_known_before_training():
    recipe = load_recipe("demo")
    structures = stage_configs(recipe, recipe.data.form())
    grown, scratch = final_config(structures, "grown"), final_config(structures, "scratch")
    assert isinstance(grown, TokenFormerConfig)
    assert list(grown.ffn_tokens) == [64, 64, 128]
    assert list(scratch.ffn_tokens) == [256]
    counts = {name: count_parameters(skeleton(final_config(structures, name))).total for name in structures}
    assert counts["grown"] == counts["scratch"]
    assert counts["dense"] == pytest.approx(counts["grown"], rel=1e-3)


def test_the_papers_recipe_has_its_sizes_and_budgets():
    price = price_recipe(load_recipe("tokenformer-124m-to-1.4b"), memory=False)
    grown = [stage for stage in price.stages if stage.branch == "grown" and stage.kind == "train"]
    assert [stage.parameters for stage in grown] == [123_569_664, 354_190_848, 753_796_608, 1_309_705_728]
    assert [round(stage.units / 1e9) for stage in grown] == [300, 30, 30, 30]
    # Forward and backward: 6 N per token for the products, and three times the paper's 4 L d T for attention.
    base = grown[0]
    per_token = 3 * (2 * (84_934_656 + 50304 * 768) + 4 * 12 * 768 * 1024)
    assert base.flops == pytest.approx(base.units * per_token, rel=1e-9)
    assert price.branch_flops["grown"] < price.branch_flops["scratch"]


def test_the_recipe_of_structured_parts_has_the_papers_sizes_and_flops():
    millions = {"dense-110m": 110, "dense-335m": 335, "dense-729m": 729, "dense-1274m": 1274}
    millions |= {"low-rank-63-1274m": 985, "block-dense-63-1274m": 955, "low-rank-32-1274m": 744}
    flops = {"dense-1274m": 2.10, "low-rank-63-1274m": 1.66, "block-dense-63-1274m": 1.61, "low-rank-32-1274m": 1.29}
    price = price_recipe(part_of(load_recipe("structured-ffn-110m-to-1.3b"), list(millions)), memory=False)
    trained = {stage.branch: stage for stage in price.stages if stage.kind == "train"}
    assert {name: round(stage.parameters / 1e6) for name, stage in trained.items()} == millions
    assert {name: round(trained[name].flops / 1e20, 2) for name in flops} == flops


def test_an_impossible_growth_is_refused_before_anything_runs():
    values = changed(branches__0__stages__2__tokens={"qkv_tokens": 4})
    recipe = Recipe.parse(values)
    with pytest.raises(PlanError, match="qkv_tokens"):
        stage_configs(recipe, recipe.data.form())


def test_a_dense_model_too_large_to_match_is_refused():
    recipe = load_recipe("demo")
    config = final_config(stage_configs(recipe, recipe.data.form()), "dense")
    with pytest.raises(ConfigError, match="parameters_of"):
        match_parameters(config, 100)
