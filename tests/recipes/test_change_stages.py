"""Grow stages of any method: priced before they run, and what the training after them holds back or goes on with."""

import dataclasses
import json
import re

import pytest
import torch

from auxin.accounting import Ledger, StageRecord, count_parameters, flops_per_token
from auxin.cli.running import _print_results
from auxin.data import PackedData
from auxin.data.tokenizer import load_tokenizer
from auxin.edits import ArrangeLayers, Plan, SetConfig
from auxin.edits.structure import config_values, edited_skeleton
from auxin.errors import ConfigError, PlanError
from auxin.methods import methods
from auxin.methods.grow.ligo import GrowthOperator
from auxin.methods.grow.tokenformer import OldTokenRates, TokenGrowth, plan_token_growth
from auxin.models.loading import load_model
from auxin.models.tokenformer import TokenFormerConfig
from auxin.objectives.calibration import CalibrationSettings
from auxin.planning.bench import Bench, from_model
from auxin.planning.hooks import ExactRates, OldRates
from auxin.planning.lineage import old_shapes
from auxin.recipes import Recipe, price_recipe, run_recipe
from auxin.recipes.schema import TrainStage
from auxin.recipes.stage_hooks import stage_hooks
from auxin.recipes.stage_models import change_plan, estimated_stages, final_config, stage_configs
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
        "data": small_corpus(corpus),
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
    return {"kind": "change", "name": f"grow-{method}", "method": method, "settings": settings}


AFTER = {"kind": "train", "name": "after", "settings": {"steps": 2}}


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (grow("stackng", factor=2), "Did you mean 'stacking'"),
        (grow("stacking", faktor=2), "Did you mean 'factor'"),
        ({"kind": "change", "method": "stacking", "to": "354m"}, r"exactly one of method, to \(a preset\) and tokens"),
        ({"kind": "change", "to": "354m", "settings": {"factor": 2}}, "settings go with method"),
        ({"kind": "change", "to": "354m", "calibration": {"samples": 2}}, "calibration goes with method"),
        (grow("stacking", factor=2) | {"calibration": {"samples": 2}}, "stacking looks at no data.*samples"),
        (grow("ligo", layers=3, steps=0) | {"calibration": {"samples": 2}}, "ligo looks at no data with these"),
        (grow("ligo", layers=3) | {"calibration": {"length": 17}}, "length is 17, but data.context_length is 16"),
        (grow("ligo", layers=3) | {"calibration": {"lenght": 8}}, "calibration.lenght: unknown.*mean 'length'"),
        (grow("ligo", layers=3, batch_size=2), "batch_size: unknown field"),
        ({"kind": "change", "to": "354m"}, "only a TokenFormer grows by tokens, this is a llama"),
        (grow("stacking", layers=1), "stacking can't shrink"),
    ],
)
def test_an_impossible_growth_is_refused_before_any_work(corpus, tmp_path, stage, message):
    with pytest.raises((ConfigError, PlanError), match=message):
        run_recipe(recipe(corpus, stage), tmp_path / "out", "")
    assert not (tmp_path / "out").exists()


def test_what_a_growth_makes_is_known_before_it_is_done(corpus):
    made = recipe(corpus, grow("stacking", factor=2), AFTER, grow("hypercloning", factor=2), AFTER | {"name": "last"})
    config = final_config(stage_configs(made, made.data.form()), "main")
    assert (config.num_hidden_layers, config.hidden_size) == (4, 32)
    prices = {stage.stage: stage for stage in price_recipe(made, memory=False).stages}
    assert prices["last"].parameters == count_parameters(edited_skeleton(config)).total
    assert prices["last"].flops > prices["after"].flops > prices["base"].flops


def test_a_growths_seed_is_the_recipes_unless_it_has_its_own(corpus):
    made = recipe(corpus, grow("hypercloning", factor=2), {**grow("hypercloning", factor=2, seed=7), "name": "b"})
    model = edited_skeleton(stage_configs(made, made.data.form())["main"]["base"])
    plans = [change_plan(stage, Bench(model, seed=3)) for stage in made.branches[0].stages[2:]]
    assert [plan.seed for plan in plans] == [3, 7]


@pytest.fixture(scope="module")
def expanded(corpus, tmp_path_factory):
    """Grown twice in a row by identity shapes, then trained with all that was there before frozen."""
    folder = tmp_path_factory.mktemp("expanded") / "out"
    stages = [grow("llama-pro", group_size=1), grow("llama-pro", group_size=2) | {"name": "again"}]
    made = recipe(corpus, *stages, AFTER | {"hooks": [{"kind": "old_rates", "ratio": 0.0}]})
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
    made = recipe(corpus, grow("hypercloning", factor=2), AFTER | {"hooks": [{"kind": "old_rates", "ratio": 0.5}]})
    with pytest.raises(PlanError, match=r"hypercloning makes .* out of old entries and new ones alike"):
        run_recipe(made, tmp_path / "out", "", announce=lambda line: None)


def tokenformer_plans():
    config = TokenFormerConfig(vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, qkv_tokens=4,
                               proj_tokens=4, ffn_tokens=8)  # fmt: skip
    return config, plan_token_growth(config, TokenGrowth(qkv_tokens=6, ffn_tokens=12))


def ledger_of(*plans):
    grown = [StageRecord(name="grow", kind="change", parameters=1, plan=plan.model_dump(mode="json")) for plan in plans]
    return Ledger(stages=[StageRecord(name="base", kind="train", parameters=1, units=1), *grown])


def test_the_hooks_of_a_stage_know_what_was_there_before():
    config, plan = tokenformer_plans()
    shapes = old_shapes([plan])
    assert shapes["model.layers.0.mlp.key_tokens"] == (8, 8)
    assert shapes["model.layers.0.attention.query.value_tokens"] == (4, 8)
    assert shapes["model.layers.0.attention.proj.key_tokens"] == (4, 8)
    assert shapes.keys() == {name for name, _ in edited_skeleton(config).named_parameters()}
    hooks = [{"kind": "old_token_rates", "ratio": 0.0, "steps": 4}, {"kind": "old_rates", "ratio": 0.5, "steps": 4}]
    stage = TrainStage(kind="train", name="t", hooks=hooks)
    tokens, everything = stage_hooks(stage, ledger_of(plan))
    assert isinstance(tokens, OldTokenRates)
    assert tokens.old_counts == {"qkv": 4, "proj": 4, "ffn": 8}
    assert isinstance(everything, OldRates)
    assert (tokens.steps, everything.steps, everything.ratio) == (4, 4, 0.5)


@pytest.mark.parametrize("kind", ["old_token_rates", "old_rates", "exact_rates"])
def test_what_is_about_a_growth_needs_one(kind):
    hook = {"kind": kind} if kind == "exact_rates" else {"kind": kind, "ratio": 0.5}
    stage = TrainStage.parse({"kind": "train", "name": "t", "hooks": [hook]})
    with pytest.raises(ConfigError, match=f"t: hooks: {kind} is for"):
        stage_hooks(stage, ledger_of())


def test_exact_rates_go_on_with_the_small_model(corpus, tmp_path):
    """The optimizer of the grown model takes the small model's steps: the held-out losses agree."""
    made = {
        "small": [AFTER],
        "grown": [grow("hypercloning", factor=2), AFTER | {"hooks": ["exact_rates"]}],
        "plain": [grow("hypercloning", factor=2), AFTER],
    }
    losses = {}
    for name, stages in made.items():
        results = run_recipe(
            recipe(corpus, *stages, training={"gradient_clip": None}), tmp_path / name, "", announce=lambda line: None
        )
        losses[name] = results.branches[0].value
    assert losses["grown"] == pytest.approx(losses["small"], abs=2e-5)
    assert abs(losses["plain"] - losses["small"]) > 10 * abs(losses["grown"] - losses["small"])


def looking(found, factor):
    """A method that looks at weights and at 20 samples: its outline doubles the layers, its plan makes them `factor`
    times as many; what it saw and on what kind of model goes into `found`."""
    stacking = methods()["stacking"]

    def plan(bench, settings):
        found.append(next(bench.model.parameters()).is_meta)
        for batch in bench.data.batches():
            bench.model(**batch)
        return stacking.plan(bench, settings.model_copy(update={"factor": factor}))

    return dataclasses.replace(
        stacking,
        name="looking",
        plan=plan,
        needs_weights=True,
        outline=stacking.plan,
        calibration=lambda settings: CalibrationSettings(samples=20, batch_size=8),
    )


@pytest.fixture
def install(monkeypatch):
    """Makes a method the one that every change stage finds."""

    def installed(method):
        monkeypatch.setattr("auxin.recipes.stage_models.find_method", lambda name: method)

    return installed


def quiet(line):
    """Tells nobody."""


def test_a_method_that_looks_at_weights_is_priced_as_an_estimate_and_books_what_it_did(corpus, tmp_path, install):
    found = []
    install(looking(found, factor=2))
    made = recipe(corpus, grow("looking", factor=2), AFTER)
    price = price_recipe(made, memory=False)
    assert not found
    assert [stage.estimate for stage in price.stages] == [False, False, True, True]
    assert "grow-looking (change, an estimate)" in str(price)
    assert "An estimate: a method looks at weights" in str(price)
    assert price.stages[2].units == 20 * 16
    results = run_recipe(made, tmp_path / "out", "", announce=quiet)
    assert found == [False]
    record = results.branches[0].ledger.stages[2]
    assert (record.samples, record.units) == (20, 20 * 16)
    assert results.branches[0].units == 2 * 4 * 16 + 20 * 16 + 2 * 4 * 16
    base = tmp_path / "out/branches/main/02-base"
    small = load_model(base / (base / "latest").read_text().strip())
    # It looks forwards, once, at the small model; the price took it for learning with the grown one.
    assert record.flops == pytest.approx(20 * 16 * flops_per_token(small, 16).forward, rel=1e-9)
    assert 0 < record.flops < price.stages[2].flops
    assert record.seconds > 0
    plan = Plan.model_validate(record.plan)
    assert not plan.estimate
    assert plan.cost.samples == 20
    install(dataclasses.replace(looking(found, factor=2), outline=None))
    with pytest.raises(PlanError, match="main/grow-looking: settings: looking looks at the weights and has no outline"):
        price_recipe(made, memory=False)


def without_the_last_layer(model, settings):
    """A plan that leaves out the upper of two layers."""
    return Plan(
        method="shorter",
        promise="none",
        edits=[ArrangeLayers(layers="model.layers", order=[0])],
        made_for=config_values(model.config),
    )


def test_a_change_that_makes_the_model_smaller_is_priced_measured_and_called_a_change(
    corpus, tmp_path, install, capsys
):
    plan = from_model(without_the_last_layer)
    install(dataclasses.replace(methods()["stacking"], name="shorter", intent="prune", plan=plan))
    made = recipe(corpus, grow("shorter", factor=2) | {"name": "change"}, AFTER)
    prices = [stage.parameters for stage in price_recipe(made, memory=False).stages]
    assert prices[0] == prices[1] > prices[2] == prices[3]
    results = run_recipe(made, tmp_path / "out", "", announce=quiet)
    (point,) = results.branches[0].growths
    assert point.parameters_after < point.parameters_before
    small = load_model(tmp_path / "out/branches/main/03-change/checkpoint")
    assert (small.config.num_hidden_layers, count_parameters(small).total) == (1, point.parameters_after)
    assert point.value_before is not None
    assert point.value_after is not None
    assert point.value_after != point.value_before
    _print_results(results, tmp_path / "out", as_json=False)
    printed = capsys.readouterr().out
    assert re.search(r"^change +difference +loss before +loss after +parameters$", printed, flags=re.MULTILINE)
    assert "growth" not in printed


def test_what_is_pruned_by_data_is_priced_as_what_is_looked_at(corpus):
    cut = {"kind": "change", "method": "taylor", "settings": {"ffn": 0.25}, "calibration": {"samples": 6}}
    build, base, change, after = price_recipe(recipe(corpus, cut, AFTER), memory=False).stages
    assert change.parameters == after.parameters < build.parameters
    assert change.flops / 6 == pytest.approx(base.flops / (base.units / 16)), "a sample of the model before"
    assert change.flops / 6 > after.flops / (after.units / 16)


def test_a_pruned_model_has_the_size_that_its_price_told(corpus, tmp_path):
    """The price has no weights; which units go changes nothing about how many."""
    made = recipe(corpus, grow("magnitude", target={"parameters": 0.8}), AFTER)
    prices = [stage.parameters for stage in price_recipe(made, memory=False).stages]
    (point,) = run_recipe(made, tmp_path / "out", "", announce=quiet).branches[0].growths
    assert (point.parameters_before, point.parameters_after) == (prices[1], prices[2])
    assert prices[3] == prices[2] <= 0.8 * prices[1]


def test_data_that_a_growth_looked_at_does_not_move_the_training_on(corpus, tmp_path, install):
    """With the same documents in the same order, a growth that looks at data is compared with one that doesn't."""
    install(looking([], factor=2))
    positions = {}
    for name, stage in (("looking", grow("looking", factor=2)), ("not", grow("stacking", factor=2))):
        if name == "not":
            install(methods()["stacking"])
        run_recipe(recipe(corpus, stage, AFTER), tmp_path / name, "", announce=quiet)
        lines = (tmp_path / name / "branches/main/04-after/metrics.jsonl").read_text().splitlines()
        positions[name] = [json.loads(line)["data_position"] for line in lines if "data_position" in line]
    assert positions["looking"] == positions["not"]


def test_what_goes_by_an_estimated_branch_reads_what_that_branch_left(corpus, tmp_path, install):
    """The outline says four layers, the plan makes six: what is built like it, or as large, is of the real size."""
    install(looking([], factor=3))
    values = recipe(corpus, grow("looking", factor=2)).model_dump(mode="json", exclude_defaults=True)
    build = {"kind": "build", "model_type": "llama", "config": {**LLAMA, "num_hidden_layers": 1}}
    evaluate = {"kind": "evaluate"}
    values["branches"] += [
        {"name": "like", "title": "l", "stages": [{"kind": "build", "like": "main"}, evaluate]},
        {"name": "size", "title": "s", "stages": [build | {"parameters_of": "main"}, evaluate]},
        {"name": "again", "title": "a", "stages": [{"kind": "build", "like": "like"}, evaluate]},
        {"name": "fork", "title": "f", "fork": "main/grow-looking", "stages": [AFTER, grow("looking", factor=2)]},
        {"name": "own", "title": "o", "stages": [build, AFTER]},
    ]
    made = Recipe.parse(values)
    assert estimated_stages(made) == {
        ("main", "grow-looking"),
        *((name, stage) for name in ("like", "size", "again") for stage in ("build", "evaluate")),
        ("fork", "after"),
        ("fork", "grow-looking"),
    }
    assert final_config(stage_configs(made, made.data.form()), "like").num_hidden_layers == 4
    run_recipe(made, tmp_path / "out", "", announce=quiet)
    models = {
        name: load_model(tmp_path / "out/branches" / name / "02-evaluate/checkpoint")
        for name in ("like", "again", "size")
    }
    main = load_model(tmp_path / "out/branches/main/03-grow-looking/checkpoint")
    target = count_parameters(main).total
    assert main.config.num_hidden_layers == 6
    assert models["like"].config.num_hidden_layers == models["again"].config.num_hidden_layers == 6
    assert count_parameters(models["like"]).total == target
    assert abs(count_parameters(models["size"]).total / target - 1) < 0.02
    fork = load_model(tmp_path / "out/branches/fork/02-grow-looking/checkpoint")
    assert fork.config.num_hidden_layers == 18, "a later growth starts from the real model"


def documents_of(tokenizer, contexts):
    """The numbers of the documents of whose beginning something is in the contexts."""
    return {
        int(number) for text in tokenizer.batch_decode(contexts) for number in re.findall(r"document (\d+) says", text)
    }


def test_ligo_learns_from_the_training_split_alone_and_pays_for_every_token(corpus, tmp_path, monkeypatch):
    seen = []
    loss = GrowthOperator.loss

    def recorded(operator, batch):
        seen.append(batch["input_ids"])
        return loss(operator, batch)

    monkeypatch.setattr(GrowthOperator, "loss", recorded)
    made = recipe(corpus, grow("ligo", layers=3, intermediate_size=40, steps=60), AFTER)
    assert made.data.validation_fraction == 0.2
    results = run_recipe(made, tmp_path / "out", "", announce=quiet)
    contexts = torch.cat(seen).tolist()
    data = PackedData.load(tmp_path / "out/data")
    train, held_out = ({tuple(row) for row in split.tolist()} for split in (data.train, data.validation))
    assert {tuple(row) for row in contexts} <= train
    assert not {tuple(row) for row in contexts} & (held_out - train)
    tokenizer = data.tokenizer()
    looked_at, held = documents_of(tokenizer, contexts), documents_of(tokenizer, data.validation.tolist())
    assert len(looked_at) > 10
    assert len(held) >= 2
    assert not looked_at & held
    record = results.branches[0].ledger.stages[2]
    assert record.samples == len(contexts) == 60 * 8
    assert record.units == sum(batch.numel() for batch in seen)
    assert record.flops > 0
    assert list((tmp_path / "out/branches/main/03-grow-ligo").glob("ligo-*.safetensors"))


def test_a_stage_says_how_much_a_method_looks_at(corpus, tmp_path):
    stage = grow("ligo", layers=3, steps=3) | {"calibration": {"length": 8, "batch_size": 2}}
    results = run_recipe(recipe(corpus, stage), tmp_path / "out", "", announce=quiet)
    record = results.branches[0].ledger.stages[2]
    assert (record.samples, record.units) == (6, 48)


def test_a_plan_that_sets_config_alone_keeps_all_old():
    config, _ = tokenformer_plans()
    plan = Plan(
        method="x", promise="exact", edits=[SetConfig(values={"use_cache": False})], made_for=config_values(config)
    )
    assert set(old_shapes([plan])) == {name for name, _ in edited_skeleton(config).named_parameters()}


def test_exact_rates_are_a_hook_of_their_own(expanded):
    folder, _ = expanded
    ledger = Ledger.load(folder / "branches/main/03-grow-llama-pro/checkpoint")
    stage = TrainStage(kind="train", name="t", hooks=["exact_rates"])
    (hook,) = stage_hooks(stage, ledger)
    assert isinstance(hook, ExactRates)
    with pytest.raises(ConfigError, match="right after one change"):
        stage_hooks(stage, Ledger.load(folder / "branches/main/04-again/checkpoint"))


def test_a_changed_tokenizer_goes_with_the_model_through_the_stages(corpus, tmp_path):
    """The corpus stays in the run's tokens; the grown model keeps its own tokenizer, also after training."""
    words = [" chloroplast", " photosynthesis"]
    made = recipe(corpus, grow("vocabulary", tokens=words), AFTER)
    price = price_recipe(made, memory=False)
    assert [stage.estimate for stage in price.stages] == [False, False, True, True]
    run_recipe(made, tmp_path / "out", "", announce=quiet)
    main = tmp_path / "out" / "branches" / "main"
    folders = {}
    for stage in ("02-base", "03-grow-vocabulary", "04-after"):
        latest = main / stage / "latest"
        folders[stage] = main / stage / (latest.read_text().strip() if latest.exists() else "checkpoint")
    old = load_tokenizer(folders["02-base"])
    for stage in ("03-grow-vocabulary", "04-after"):
        tokenizer, model = load_tokenizer(folders[stage]), load_model(folders[stage])
        assert len(tokenizer) == len(old) + 2
        assert model.config.vocab_size >= len(tokenizer)
        assert [tokenizer.decode(tokenizer(word)["input_ids"]) for word in words] == words
    plan = Plan.model_validate(Ledger.load(folders["04-after"]).stages[2].plan)
    assert "tokenizer.json" in {file.into for file in plan.files}


def test_the_books_and_what_goes_by_them_do_not_depend_on_what_was_measured_before(corpus, tmp_path, monkeypatch):
    """A branch that trains for the FLOPs of one that searches takes as many steps with any cache. Two branches whose
    searches begin alike are each charged all of theirs."""
    search = grow("finercut", removed=2) | {"calibration": {"samples": 8, "batch_size": 4}}
    values = recipe(corpus, search).model_dump(mode="json", exclude_unset=True)
    values["branches"] += [
        {"name": "again", "title": "again", "fork": "main/base", "stages": [search]},
        {
            "name": "same",
            "title": "same",
            "fork": "main/base",
            "stages": [{"kind": "train", "name": "more", "flops_of": "main"}],
        },
    ]
    made = Recipe.parse(values)

    def books(out, cache):
        monkeypatch.setenv("AUXIN_CACHE", str(tmp_path / cache))
        results = run_recipe(made, tmp_path / out, "", announce=quiet)
        return [[(s.samples, s.units, s.flops) for s in branch.ledger.stages] for branch in results.branches]

    cold = books("cold", "kept")
    main, again, same = cold
    assert main == again
    assert main[2][:2] == (2 * 8, 2 * 8 * 16)
    assert same[2][2] > 0
    steps = sorted((tmp_path / "kept" / "analysis").glob("removal-*.json"))
    assert len(steps) == 2
    steps[0].unlink()  # as after a search that was broken off, or after another one
    assert books("half warm", "kept") == cold
