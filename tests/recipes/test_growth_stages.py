"""Grow stages of any method: priced before they run, and what the training after them holds back or goes on with."""

import dataclasses

import pytest
import torch

from auxin.accounting import Ledger, StageRecord, count_parameters
from auxin.edits import Plan, SetConfig
from auxin.edits.structure import config_values, edited_skeleton
from auxin.errors import ConfigError, PlanError
from auxin.methods import methods
from auxin.methods.grow.tokenformer import OldTokenRates, TokenGrowth, plan_token_growth
from auxin.models.loading import load_model
from auxin.models.tokenformer import TokenFormerConfig
from auxin.planning.hooks import ExactRates, OldRates
from auxin.recipes import Recipe, price_recipe, run_recipe
from auxin.recipes.schema import TrainStage
from auxin.recipes.stage_hooks import old_shapes, stage_hooks
from auxin.recipes.stage_models import final_config, growth_plan, resolve_structures
from corpora import small_corpus, write_documents

LLAMA = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
}


def recipe(corpus, *stages, training=None):
    values = {
        "name": "r",
        "title": "R",
        "seed": 3,
        "corpus": small_corpus(corpus),
        "training": {"batch_size": 4, "tensorboard": False, "decay_fraction": 0.0, **(training or {})},
        "branches": [
            {
                "name": "main",
                "title": "main",
                "stages": [
                    {"kind": "build", "model_type": "llama", "config": LLAMA},
                    {"kind": "train", "name": "base", "settings": {"steps": 2}},
                    *stages,
                ],
            }
        ],
    }
    return Recipe.parse(values)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("corpus"))


def grow(method, **settings):
    return {"kind": "grow", "name": f"grow-{method}", "method": method, "settings": settings}


AFTER = {"kind": "train", "name": "after", "settings": {"steps": 2}}


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (grow("stackng", factor=2), "Did you mean 'stacking'"),
        (grow("stacking", faktor=2), "Did you mean 'factor'"),
        ({"kind": "grow", "method": "stacking", "to": "354m"}, r"exactly one of method, to \(a preset\) and tokens"),
        ({"kind": "grow", "to": "354m", "settings": {"factor": 2}}, "settings go with method"),
        ({"kind": "grow", "to": "354m"}, "only a TokenFormer grows by tokens, this is a llama"),
        (grow("stacking", layers=1), "stacking can't shrink"),
    ],
)
def test_an_impossible_growth_is_refused_before_any_work(corpus, tmp_path, stage, message):
    with pytest.raises((ConfigError, PlanError), match=message):
        run_recipe(recipe(corpus, stage), tmp_path / "out", "")
    assert not (tmp_path / "out").exists()


def test_what_a_growth_makes_is_known_before_it_is_done(corpus):
    made = recipe(corpus, grow("stacking", factor=2), AFTER, grow("hypercloning", factor=2), AFTER | {"name": "last"})
    config = final_config(resolve_structures(made, {"vocab_size": 300}), "main")
    assert (config.num_hidden_layers, config.hidden_size) == (4, 32)
    prices = {stage.stage: stage for stage in price_recipe(made, memory=False).stages}
    assert prices["last"].parameters == count_parameters(edited_skeleton(config)).total
    assert prices["last"].flops > prices["after"].flops > prices["base"].flops


def test_a_growths_seed_is_the_recipes_unless_it_has_its_own(corpus):
    made = recipe(corpus, grow("hypercloning", factor=2), {**grow("hypercloning", factor=2, seed=7), "name": "b"})
    model = edited_skeleton(resolve_structures(made, {"vocab_size": 300})["main"]["base"])
    plans = [growth_plan(stage, model, 3) for stage in made.branches[0].stages[2:]]
    assert [plan.seed for plan in plans] == [3, 7]


@pytest.fixture(scope="module")
def expanded(corpus, tmp_path_factory):
    """Grown twice in a row by identity shapes, then trained with all that was there before frozen."""
    folder = tmp_path_factory.mktemp("expanded") / "out"
    stages = [grow("llama-pro", group_size=1), grow("llama-pro", group_size=2) | {"name": "again"}]
    made = recipe(corpus, *stages, AFTER | {"old_rate": 0.0})
    return folder, run_recipe(made, folder, "", announce=lambda line: None)


def test_two_growths_in_a_row_freeze_what_was_there_before_both(expanded):
    folder, results = expanded
    branch = folder / "branches/main"
    before = dict(load_model(branch / "04-again/checkpoint").named_parameters())
    stage = branch / "05-after"
    after = dict(load_model(stage / (stage / "latest").read_text().strip()).named_parameters())
    moved = {name.split(".")[2] for name in before if not torch.equal(before[name], after[name])}
    # 0 1 -> 0 0' 1 1' -> 0 0' 0'' 1 1' 1'', where groups of two get a copy of their upper layer
    assert moved == {"1", "2", "4", "5"}
    assert [growth.promise for growth in results.branches[0].growths] == ["exact", "exact"]
    assert all(abs(growth.change) < 1e-5 for growth in results.branches[0].growths)


def test_old_entries_that_are_mixed_with_new_ones_are_refused(corpus, tmp_path):
    made = recipe(corpus, grow("hypercloning", factor=2), AFTER | {"old_rate": 0.5})
    with pytest.raises(PlanError, match=r"hypercloning makes .* out of old entries and new ones alike"):
        run_recipe(made, tmp_path / "out", "", announce=lambda line: None)


def tokenformer_plans():
    config = TokenFormerConfig(vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, qkv_tokens=4,
                               proj_tokens=4, ffn_tokens=8)  # fmt: skip
    return config, plan_token_growth(config, TokenGrowth(qkv_tokens=6, ffn_tokens=12))


def ledger_of(*plans):
    grown = [StageRecord(name="grow", kind="grow", parameters=1, plan=plan.model_dump(mode="json")) for plan in plans]
    return Ledger(stages=[StageRecord(name="base", kind="train", parameters=1, tokens=1), *grown])


def test_the_hooks_of_a_stage_know_what_was_there_before():
    config, plan = tokenformer_plans()
    shapes = old_shapes([plan])
    assert shapes["model.layers.0.mlp.key_tokens"] == (8, 8)
    assert shapes["model.layers.0.attention.query.value_tokens"] == (4, 8)
    assert shapes["model.layers.0.attention.proj.key_tokens"] == (4, 8)
    assert shapes.keys() == {name for name, _ in edited_skeleton(config).named_parameters()}
    stage = TrainStage(kind="train", name="t", old_tokens_rate=0.0, old_rate=0.5, old_rate_steps=4)
    tokens, everything = stage_hooks(stage, ledger_of(plan))
    assert isinstance(tokens, OldTokenRates)
    assert tokens.old_counts == {"qkv": 4, "proj": 4, "ffn": 8}
    assert isinstance(everything, OldRates)
    assert (tokens.steps, everything.steps, everything.ratio) == (4, 4, 0.5)


@pytest.mark.parametrize("field", ["old_tokens_rate", "old_rate", "exact_rates"])
def test_what_is_about_a_growth_needs_one(field):
    stage = TrainStage.parse({"kind": "train", "name": "t", field: 0.5 if field != "exact_rates" else True})
    with pytest.raises(ConfigError, match=field):
        stage_hooks(stage, ledger_of())


def test_exact_rates_go_on_with_the_small_model(corpus, tmp_path):
    """The optimizer of the grown model takes the small model's steps: the held-out losses agree."""
    made = {
        "small": [AFTER],
        "grown": [grow("hypercloning", factor=2), AFTER | {"exact_rates": True}],
        "plain": [grow("hypercloning", factor=2), AFTER],
    }
    losses = {}
    for name, stages in made.items():
        results = run_recipe(
            recipe(corpus, *stages, training={"gradient_clip": None}), tmp_path / name, "", announce=lambda line: None
        )
        losses[name] = results.branches[0].validation_loss
    assert losses["grown"] == pytest.approx(losses["small"], abs=2e-5)
    assert abs(losses["plain"] - losses["small"]) > 10 * abs(losses["grown"] - losses["small"])


def test_a_method_that_looks_at_weights_is_priced_by_its_outline_and_pays_for_its_text(corpus, tmp_path, monkeypatch):
    stacking = methods()["stacking"]
    seen = []

    def learned(model, settings):
        seen.append(next(model.parameters()).is_meta)
        return stacking.plan(model, settings)

    method = dataclasses.replace(
        stacking, name="learned", plan=learned, needs_weights=True, outline=stacking.plan, tokens=lambda settings: 640
    )
    monkeypatch.setattr("auxin.recipes.stage_models.find_method", lambda name: method)
    made = recipe(corpus, grow("learned", factor=2), AFTER)
    price = price_recipe(made, memory=False)
    assert not seen
    results = run_recipe(made, tmp_path / "out", "", announce=lambda line: None)
    assert seen == [False]
    assert results.branches[0].flops == pytest.approx(price.branch_flops["main"], rel=1e-9)
    assert results.branches[0].tokens == 640 + 4 * 4 * 16
    assert "640" in str(price)
    monkeypatch.setattr(
        "auxin.recipes.stage_models.find_method", lambda name: dataclasses.replace(method, outline=None)
    )
    with pytest.raises(PlanError, match="has no outline"):
        price_recipe(made, memory=False)


def test_a_plan_that_sets_config_alone_keeps_all_old():
    config, _ = tokenformer_plans()
    plan = Plan(
        method="x", promise="exact", edits=[SetConfig(values={"use_cache": False})], made_for=config_values(config)
    )
    assert set(old_shapes([plan])) == {name for name, _ in edited_skeleton(config).named_parameters()}


def test_exact_rates_are_a_hook_of_their_own(expanded):
    folder, _ = expanded
    ledger = Ledger.load(folder / "branches/main/03-grow-llama-pro/checkpoint")
    stage = TrainStage(kind="train", name="t", exact_rates=True)
    (hook,) = stage_hooks(stage, ledger)
    assert isinstance(hook, ExactRates)
    with pytest.raises(ConfigError, match="right after one growth"):
        stage_hooks(stage, Ledger.load(folder / "branches/main/04-again/checkpoint"))
