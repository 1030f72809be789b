"""Models that were made narrower, mended by what they were: in a recipe in which one was grown before, and by an
adapter."""

import copy

import peft
import pytest
import torch

import auxin
from auxin.accounting import Ledger
from auxin.models.loading import load_model
from auxin.objectives.objective import Reference
from auxin.recipes import Recipe, price_recipe
from auxin.recipes.runner import opened_run, run_branch
from auxin.training import train
from auxin.training.checkpoint import write_checkpoint_folder
from corpora import small_corpus, write_documents
from covering import whole
from objectives.test_distillation import bound
from training.tiny import TinyData, tiny_llama, tiny_settings

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
HALF = {"heads": 0.5, "ffn": 0.5, "hidden": 0.5}
WAYS = {
    "net2net-taylor": (
        {"method": "net2net", "settings": {"intermediate_size": 64}},
        {"method": "taylor", "settings": {"heads": 0.5, "ffn": 0.5}},
    ),
    "hypercloning-magnitude": (
        {"method": "hypercloning", "settings": {"factor": 2}},
        {"method": "magnitude", "settings": HALF},
    ),
}


def stage(kind: str, name: str, **values) -> dict:
    return {"kind": kind, "name": name, **values}


def recipe_of(corpus, grow: dict, cut: dict) -> Recipe:
    def mended(name: str, **objective) -> dict:
        settings = {"steps": 20}
        if objective:
            settings["objective"] = {"kind": "distillation", "teacher": "grown/train", "weight": 0.5, **objective}
        stages = [stage("change", "cut", **cut), stage("train", "mend", settings=settings)]
        return {"name": name, "title": name, "fork": "grown/train", "stages": stages}

    build = {"kind": "build", "model_type": "llama", "config": SIZES}
    growing = [stage("change", "grow", **grow), stage("train", "train", settings={"steps": 30})]
    return Recipe.parse(
        {
            "name": "mending",
            "title": "Mending",
            "data": small_corpus(corpus),
            "training": {"batch_size": 4, "learning_rate": 5e-3, "tensorboard": False, "device": "cpu"},
            "branches": [
                {"name": "base", "title": "b", "stages": [build, stage("train", "train", settings={"steps": 20})]},
                {"name": "grown", "title": "g", "fork": "base/train", "stages": growing},
                mended("alone"),
                mended("taught", relations=2.0, relation_heads=4, hidden_states=0.5),
            ],
        }
    )


def distance(student, teacher, inputs) -> float:
    """Of the relations alone."""
    objective, plain = (bound(student, teacher, weight=0.0, **more) for more in ({"relations": 1.0}, {}))
    with torch.no_grad():
        return float(objective.loss(student, inputs) - plain.loss(student, inputs))


@pytest.mark.parametrize("way", ["hypercloning-magnitude", pytest.param("net2net-taylor", marks=whole)])
def test_a_grown_model_is_cut_back_and_mended_by_what_it_was(tmp_path, way):
    corpus = write_documents(tmp_path / "corpus", phrase="what was cut is learnt from what was there ")
    recipe = recipe_of(corpus, *WAYS[way])
    with opened_run(recipe, tmp_path / "out", lambda line: None) as run:
        for branch in recipe.branches:
            run_branch(run, branch)
    price = price_recipe(recipe, memory=False, form=run.data.form)
    teacher = load_model(run.checkpoint("grown", "train"))
    students = {name: load_model(run.final_checkpoint(name)) for name in ("alone", "taught")}
    books = {name: Ledger.load(run.final_checkpoint(name)) for name in students}
    widths = [model.config.hidden_size for model in (students["taught"], teacher)]
    assert widths == ([16, 16] if way.startswith("net2net") else [16, 32])
    # Of the hidden states, those are compared that are left.
    objective = recipe.training_settings(recipe.branches[3].stages[1]).objective
    units = run.references(objective, Ledger.load(run.checkpoint("taught", "cut")))["grown/train"].units
    cut, before = (
        load_model(folder).get_input_embeddings().weight
        for folder in (run.checkpoint("taught", "cut"), run.checkpoint("grown", "train"))
    )
    assert torch.equal(cut, before if units is None else before[:, list(units)])
    for name in students:
        record = books[name].stages[-1]
        assert record.value_after < record.value_before
    paid = books["taught"].stages[-1].flops
    (asked,) = (found.flops for found in price.stages if (found.branch, found.stage) == ("taught", "mend"))
    assert paid == pytest.approx(asked)
    rows = run.data.split("validation").rows(range(4))
    inputs = {"input_ids": rows["input_ids"], "labels": rows["input_ids"]}
    assert distance(students["taught"], teacher, inputs) < 0.7 * distance(students["alone"], teacher, inputs)


def test_an_adapter_mends_a_model_that_was_cut(tmp_path):
    """The cut model's own weights stay; the adapter alone is kept, resumed and loaded again."""
    teacher = tiny_llama(5, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
    train(teacher, TinyData(), tiny_settings(steps=60, learning_rate=1e-2), tmp_path / "teacher", progress=False)
    cut = copy.deepcopy(teacher)
    auxin.apply(auxin.plan(cut, "magnitude", **HALF), cut)
    folder = write_checkpoint_folder(tmp_path / "cut", cut)
    told = {"kind": "distillation", "teacher": "t", "weight": 0.9, "relations": 1.0}
    settings = tiny_settings(steps=30, learning_rate=1e-2, objective=told)

    def mended(output: str, stop_after: int | None = None):
        student = load_model(folder)
        torch.manual_seed(0)
        student.add_adapter(peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
        references = {"t": Reference(copy.deepcopy(teacher), "t")}
        place = tmp_path / output
        result = train(
            student, TinyData(), settings, place, references=references, stop_after=stop_after, progress=False
        )
        return student, result

    student, result = mended("whole")
    mended("pieces", stop_after=12)
    again, _ = mended("pieces")
    record = result.ledger.stages[-1]
    assert record.value_after < 0.8 * record.value_before
    adapters = [model.get_adapter_state_dict() for model in (student, again)]
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())
    kept = {name.replace(".base_layer", ""): value for name, value in student.state_dict().items()}
    assert all(torch.equal(value, kept[name]) for name, value in cut.state_dict().items())
    loaded = load_model(folder)
    loaded.load_adapter(result.checkpoint)
    ids = torch.arange(16)[None]
    assert torch.equal(loaded.eval()(input_ids=ids).logits, student.eval()(input_ids=ids).logits)
