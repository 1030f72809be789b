"""Recipes with teachers: known before the run by their shapes, after it by their weights, and relied on."""

import copy
import json

import pytest
import torch

from auxin.accounting import Ledger
from auxin.accounting.memory import FLOAT32_BYTES
from auxin.errors import CheckpointError, ConfigError
from auxin.models.loading import load_model
from auxin.objectives.objective import Reference
from auxin.recipes import Recipe, price_recipe, run_recipe
from auxin.recipes.folder import claim_directory, stage_directory
from auxin.recipes.references import reference_model, reference_shapes
from auxin.recipes.runner import opened_run, run_branch
from auxin.recipes.stage_models import stage_configs
from auxin.sums import write_sums
from auxin.training.checkpoint import write_checkpoint_folder
from corpora import small_corpus, write_documents
from plugins import EXAMPLE, install
from tiny_models import fresh_llama
from tiny_tokenizers import tiny_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
DROP = {"kind": "change", "name": "cut", "method": "drop-layers", "settings": {"drop": [1, 2]}}


@pytest.fixture(scope="module", autouse=True)
def _drop_layers(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        install(tmp_path_factory.mktemp("plugin"), patch, "auxin-drop-layers", EXAMPLE)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("corpus"), phrase="what was cut is learnt from what was there ")


def train(name: str, objective=None, **settings) -> dict:
    values = {"steps": 4, **settings, **({} if objective is None else {"objective": objective})}
    return {"kind": "train", "name": name, "settings": values}


def teach(teacher: str = "base/train", **values) -> dict:
    return {"kind": "distillation", "teacher": teacher, **values}


def recipe_of(corpus, *branches, **training) -> Recipe:
    common = {"batch_size": 4, "tensorboard": False, "device": "cpu", "log_interval": 1}
    first = {"kind": "build", "model_type": "llama", "config": SIZES}
    base = {"name": "base", "title": "base", "stages": [first, train("train"), train("longer")]}
    others = [{"name": f"b{n}", "title": f"b{n}", **branch} for n, branch in enumerate(branches, 1)]
    return Recipe.parse(
        {
            "name": "teachers",
            "title": "Teachers",
            "data": small_corpus(corpus),
            "training": {**common, **training},
            "branches": [base, *others],
        }
    )


def repaired(objective, *stages) -> dict:
    return {"fork": "base/train", "stages": [DROP, train("repair", objective), *stages]}


LAYERS = {"hidden_states": 1.0, "attentions": 1.0}


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    small = {"kind": "build", "model_type": "llama", "config": {**SIZES, "hidden_size": 16, "num_hidden_layers": 1}}
    recipe = recipe_of(
        corpus,
        repaired(teach(**LAYERS), {"kind": "evaluate"}),
        {"stages": [small, train("learn", teach("base/longer", weight=0.9))]},
        {"stages": [small, train("plain")]},
    )
    with opened_run(recipe, tmp_path_factory.mktemp("run") / "out", lambda line: None) as opened:
        for branch in recipe.branches:
            run_branch(opened, branch)
    return opened


def test_the_price_is_what_was_paid(run):
    price = price_recipe(run.recipe, memory=False, form=run.data.form)
    paid = {branch.name: Ledger.load(run.final_checkpoint(branch.name)).total_flops for branch in run.recipe.branches}
    assert paid == pytest.approx(price.branch_flops)
    flops = {f"{stage.branch}/{stage.stage}": stage.flops for stage in price.stages}
    # Half the layers for the student, and one pass of three of the whole for the teacher.
    assert flops["base/train"] / 3 < flops["b1/repair"] < flops["base/train"]
    assert flops["b2/learn"] > flops["base/train"] / 3
    assert flops["b3/plain"] < flops["b2/learn"] / 2


def test_layers_are_known_before_and_after_the_run(run):
    branch = run.recipe.branches[1]
    objective = run.recipe.training_settings(branch.stages[1]).objective
    shapes = reference_shapes(run.recipe, run.structures, branch, branch.stages[1], objective)
    assert shapes["base/train"].layers == {0: 0, 1: 3}
    books = Ledger.load(run.checkpoint("b1", "cut"))
    assert run.references(objective, books)["base/train"].layers == {0: 0, 1: 3}
    # What the teacher learnt after the two parted leaves its layers what they are.
    assert reference_model(run.checkpoint("base", "longer"), books).layers == {0: 0, 1: 3}
    # A model that was built anew has nothing of it.
    alien = Ledger.load(run.checkpoint("b2", "build"))
    assert reference_model(run.checkpoint("base", "longer"), alien).layers is None


def test_the_teacher_is_the_checkpoint_that_its_stage_left(run):
    state = json.loads((run.checkpoint("b1", "repair") / "training" / "state.json").read_text())
    teacher = Reference.read(run.checkpoint("base", "train"))
    assert state["identity"]["objective"] == {"teacher": teacher.fingerprint}
    # Held-out losses are those of the text, before, on the way and after.
    cut, repair, evaluate = Ledger.load(run.final_checkpoint("b1")).stages[-3:]
    assert repair.value_before == pytest.approx(cut.value_after, abs=1e-6)
    assert evaluate.value_after == pytest.approx(repair.value_after, abs=1e-6)


def test_a_teacher_that_was_done_again_differently_is_refused(corpus, tmp_path):
    with opened_run(recipe_of(corpus, repaired(teach())), tmp_path / "out", lambda line: None) as run:
        base, student = run.recipe.branches
        run_branch(run, base)
        run_branch(run, student)
    (run.stage_directory(student, student.stages[1]) / "stage.json").unlink()
    checkpoint = run.checkpoint("base", "train")
    teacher = load_model(checkpoint)
    with torch.no_grad():
        teacher.lm_head.weight += 1
    teacher.save_pretrained(checkpoint)
    write_sums(checkpoint)
    with pytest.raises(CheckpointError, match=r"was started with objective\.teacher"):
        run_branch(run, student)


def test_what_a_begun_stage_learns_from_stays_and_what_follows_may_change(corpus, tmp_path):
    recipe = recipe_of(corpus, repaired(teach("base/train")))
    claim_directory(recipe, tmp_path, lambda line: None)

    def changed(stage: int, **settings) -> Recipe:
        values = copy.deepcopy(recipe.model_dump(mode="json", exclude_defaults=True))
        values["branches"][0]["stages"][stage]["settings"] |= settings
        return Recipe.parse(values)

    folder = stage_directory(tmp_path, recipe.branches[1], recipe.branches[1].stages[1])
    folder.mkdir(parents=True)
    (folder / "stage.json").write_text("{}")
    # As if the base had to be done again: nothing of it is there.
    begun = stage_directory(tmp_path, recipe.branches[0], recipe.branches[0].stages[0])
    begun.mkdir(parents=True)
    (begun / "stage.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"branches\.0\.stages\.1\.settings\.steps: 4 there, 5 asked"):
        claim_directory(changed(1, steps=5), tmp_path, lambda line: None)
    claim_directory(changed(2, steps=5), tmp_path, lambda line: None)


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        (
            repaired(teach("base/lnger")),
            r"b1/repair: settings.objective: 'base/lnger': Unknown earlier .*'longer'",
        ),
        (
            repaired(teach("b1/repair")),
            r"b1/repair: settings.objective: 'b1/repair': Unknown earlier .*'repair'.*cut",
        ),
        (
            repaired(teach("base")),
            "b1/repair: settings.objective: 'base' names a branch and no stage. Give BR",
        ),
        (repaired(teach("b1/last"), train("last")), "Unknown earlier stage 'last'"),
    ],
)
def test_teachers_that_are_not_done_before_are_refused(corpus, branch, message):
    with pytest.raises(ConfigError, match=message):
        recipe_of(corpus, branch)


def test_a_stage_may_learn_from_an_earlier_one_of_its_own_branch(corpus):
    # The model before the cut, and the one right after it.
    for teacher in ("base/train", "b1/cut"):
        price_recipe(recipe_of(corpus, repaired(teach(teacher, **LAYERS))), memory=False)


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        (
            repaired(teach("elsewhere/x")),
            "b1/repair: settings.objective: 'elsewhere/x' is no stage of the recipe, and",
        ),
        (
            {
                "stages": [
                    {"kind": "build", "model_type": "llama", "config": {**SIZES, "num_hidden_layers": 2}},
                    train("learn", teach(hidden_states=1.0)),
                ]
            },
            "b1/learn: layers: the student has 2 layers and the teacher 4, and no changes are known.*Say which",
        ),
        (repaired(teach(objective="span_corruption")), "b1/repair: objective: 'span_corruption' is for encoder-dec"),
        (repaired(teach(hidden_states=1.0, layers={0: 4})), "b1/repair: layers: the teacher has no layer 4"),
    ],
)
def test_what_does_not_fit_is_said_before_work_starts(corpus, tmp_path, branch, message):
    with pytest.raises(ConfigError, match=message):
        run_recipe(recipe_of(corpus, branch), tmp_path / "out", "", announce=lambda line: None)
    assert not (tmp_path / "out").exists()


def test_branches_are_compared_by_what_needs_no_teacher(corpus):
    with pytest.raises(ConfigError, match=r"training.objective: 'distillation' goes by another model.*train stage"):
        recipe_of(corpus, objective=teach())


def test_memory_counts_the_teachers_weights(corpus):
    plain, taught = (recipe_of(corpus, repaired(objective)) for objective in (None, teach()))
    memory = [{stage.stage: stage for stage in price_recipe(recipe).stages} for recipe in (plain, taught)]
    teacher = memory[1]["train"].parameters
    assert memory[1]["repair"].memory_bytes == memory[0]["repair"].memory_bytes + FLOAT32_BYTES * teacher


def test_a_teacher_in_a_folder_has_to_have_the_datas_tokenizer(corpus, tmp_path):
    vocabulary = stage_configs(recipe_of(corpus), recipe_of(corpus).data.form())["base"]["build"].vocab_size
    model = fresh_llama(vocab_size=vocabulary)
    folder = write_checkpoint_folder(tmp_path / "teacher", model, processor=tiny_tokenizer("byte_level"))
    with pytest.raises(ConfigError, match=r"b1/repair: settings.objective: .*teacher has another tokenizer than"):
        run_recipe(recipe_of(corpus, repaired(teach(str(folder)))), tmp_path / "out", "", announce=lambda line: None)
