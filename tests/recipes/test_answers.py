"""A recipe of a model that finds answers, by the command line: priced, built, trained, searched by AxFormer and pruned,
mended by what it was, measured, reported; killed and finished to the same bits; from a checkpoint with a new head."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, BertConfig, BertForSequenceClassification
from typer.testing import CliRunner

from auxin.accounting import Ledger
from auxin.cli import app
from auxin.errors import ConfigError, DataError, PlanError
from auxin.models.loading import load_config, load_model
from auxin.recipes import Recipe, price_recipe, run_recipe
from auxin.recipes.results import read_results
from labelled import question_rows, write_rows
from recipes.killed import check_killed_and_finished

BERT = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT |= {"max_position_embeddings": 40, "hidden_dropout_prob": 0.1}
TRAIN = {"kind": "train", "name": "train", "settings": {"samples": 6400}}
MEND = {"objective": {"kind": "distillation", "teacher": "main/train", "weight": 0.8, "hidden_states": 0.1}}
MEND["objective"]["objective"] = "question_answering"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every twentieth has the answer to another question, so that no model is always right."""
    return write_rows(tmp_path_factory.mktemp("rows") / "questions.jsonl", question_rows(640, wrong=20))


def answer_recipe(rows: Path, *stages: dict[str, Any], build: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    data = {"kind": "question_answering", "paths": [str(rows)], "answer_start_field": "start", "vocab_size": 400}
    common = {"batch_size": 16, "learning_rate": 2e-3, "log_interval": 5, "tensorboard": False, "device": "cpu"}
    common["guard"] = {"spike_multiple": None}
    first = {"kind": "build", **(build or {"model_type": "bert", "config": BERT})}
    return Recipe.parse(
        {
            "name": "answers",
            "title": "A tiny model that finds answers",
            "data": {**data, "context_length": 32, "validation_fraction": 0.25, **changes.pop("data", {})},
            "training": {"objective": "question_answering", **common},
            "measures": ["exact_match", "token_f1", "loss"],
            "branches": [{"name": "main", "title": "main", "stages": [first, *stages]}],
            **changes,
        }
    )


def whole_recipe(rows: Path) -> Recipe:
    """A model, and a branch for each method that makes it smaller, the first of which is mended."""
    base = answer_recipe(rows, TRAIN).model_dump(mode="json")
    looked = {"calibration": {"samples": 24, "batch_size": 7}}
    searched = {"kind": "change", "method": "axformer", "settings": {"benefit": 0.0, "tolerance": 2.0}, **looked}
    pruned = {"kind": "change", "method": "taylor", "settings": {"target": {"parameters": 0.9}}, **looked}
    mend = {"kind": "train", "name": "mend", "settings": {"samples": 320, **MEND}}
    for name, stages in (("axformer", [searched, mend, {"kind": "evaluate"}]), ("taylor", [pruned])):
        base["branches"].append({"name": name, "title": name, "fork": "main/train", "stages": stages})
    return Recipe.parse(base)


@pytest.fixture(scope="module")
def run(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    whole_recipe(rows).to_yaml(folder / "answers.yaml")
    done = CliRunner().invoke(app, ["run", str(folder / "answers.yaml"), "-o", str(folder / "out")])
    assert done.exit_code == 0, done.output
    return folder / "out", read_results(folder / "out"), done.stdout


def test_a_bert_learns_to_find_answers(run, rows):
    directory, results, _ = run
    main, searched, pruned = results.branches
    assert main.ledger.stages[1].value_before < 0.2 < 0.85 < main.value < 1
    assert main.measures.keys() == {"exact_match", "token_f1", "loss"}
    assert main.value == main.measures["exact_match"] <= main.measures["token_f1"] <= 1
    assert searched.value > 0.8
    assert pruned.parameters <= 0.9 * main.parameters
    # Who loads it with transformers alone gets answers.
    folder = directory / "branches/axformer/03-evaluate/checkpoint"
    import auxin.edits  # noqa: F401  a model of which parts have gone is loaded by its edits

    model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right = 0
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    for row in found:
        end = tokenizer.eos_token_id
        parts = [tokenizer(row[name])["input_ids"] for name in ("question", "context")]
        ids = torch.tensor([[*parts[0], end, *parts[1], end]])
        # As a trained tokenizer tells the texts of a pair apart, by its separator alone.
        output = model.eval()(ids)
        inside = slice(len(parts[0]) + 1, ids.shape[1] - 1)
        start, stop = (int(of[0, inside].argmax()) for of in (output.start_logits, output.end_logits))
        right += tokenizer.decode(parts[1][start : stop + 1]).strip() == row["answer"]
    assert right > 0.8 * len(found)


def test_the_search_looks_at_questions_and_what_is_left_is_mended(run):
    _, searched, pruned = run[1].branches
    for branch in (searched, pruned):
        change = next(stage for stage in branch.ledger.stages if stage.kind == "change")
        assert change.units >= 24, f"{branch.name} looked at no question"
        assert change.measure == "exact_match"
        assert 0 <= change.value_after <= 1


def test_the_price_is_what_was_paid_and_the_report_speaks_of_exact_answers(run, rows):
    directory, results, told = run
    price = price_recipe(whole_recipe(rows))
    main = results.branches[0]
    assert price.unit == results.unit == "example"
    assert main.flops == pytest.approx(price.branch_flops["main"], rel=1e-9)
    assert main.units == 6400
    assert all(stage.memory_bytes for stage in price.stages if stage.kind == "train")
    assert (results.measure.name, results.measure.better) == ("exact match", "higher")
    assert (main.perplexity, main.bits_per_byte) == (None, None)
    assert results.data["answers at several places"].startswith("0,")
    assert "exact match" in told
    assert "6,400 examples" in told
    report = (directory / "report.html").read_text()
    assert "exact match" in report


def test_a_killed_run_goes_on_to_the_same_bits(run, rows, tmp_path):
    whole = whole_recipe(rows).model_dump(mode="json")
    whole["branches"] = [branch for branch in whole["branches"] if branch["name"] in ("main", "axformer")]
    begun = "branches/axformer/02-mend/checkpoints"
    final = "branches/axformer/03-evaluate/checkpoint/edited_model.safetensors"
    check_killed_and_finished(Recipe.parse(whole), tmp_path, begun, final, run[0])


def test_a_checkpoint_of_another_task_gets_a_new_head(run, rows, tmp_path):
    directory, _, _ = run
    tokenizer = AutoTokenizer.from_pretrained(directory / "data/tokenizer")
    source = tmp_path / "source"
    config = BertConfig(**BERT, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_labels=3)
    BertForSequenceClassification(config).save_pretrained(source)
    tokenizer.save_pretrained(source)
    stage = {"kind": "train", "name": "train", "settings": {"steps": 2}}
    recipe = answer_recipe(rows, stage, build={"checkpoint": str(source)}, data={"tokenizer": str(source)})
    run_recipe(recipe, tmp_path / "out", "", lambda line: None)
    folder = tmp_path / "out/branches/main/01-build/checkpoint"
    assert load_config(folder).architectures == ["BertForQuestionAnswering"]
    assert load_config(folder).num_labels == 2
    told = "new random weights from seed 0: qa_outputs.bias, qa_outputs.weight"
    assert Ledger.load(folder).stages[-1].notes[-1].endswith(told)
    # And one of this task is taken over as it is.
    again = answer_recipe(rows, stage, build={"checkpoint": str(folder)}, data={"tokenizer": str(source)})
    run_recipe(again, tmp_path / "again", "", lambda line: None)
    adopted = tmp_path / "again/branches/main/01-build/checkpoint"
    assert Ledger.load(adopted).stages[-1].notes == [f"started from {folder}"]


@pytest.mark.parametrize(
    ("stages", "changes", "error", "message"),
    [
        ([TRAIN], {"measures": ["accuracy"]}, ConfigError, "measures: 'accuracy' is of classes.*Choose of loss, exact"),
        ([TRAIN], {"build": {"model_type": "t5"}}, ConfigError, "is for encoders and decoders, and t5"),
        ([TRAIN], {"build": {"model_type": "vit"}}, ConfigError, "vit has no class for the objective 'question_answer"),
        (
            [TRAIN],
            {"build": {"model_type": "bert", "config": {**BERT, "num_labels": 3}}},
            ConfigError,
            "num_labels: the model's config says 3",
        ),
        (
            [{"kind": "change", "method": "axformer", "calibration": {"samples": 8, "length": 16}}],
            {},
            ConfigError,
            r"calibration.length: of 16 tokens samples would lose their answers. Leave it out, or set data.context_le",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_work_starts(rows, tmp_path, stages, changes, error, message):
    recipe = answer_recipe(rows, *stages, **changes)
    with pytest.raises(error, match=message):
        run_recipe(recipe, tmp_path / "out", "", print)
    assert not (tmp_path / "out" / "data").exists()


def test_a_search_that_finds_nothing_and_a_method_without_logits_say_so(run, rows, tmp_path):
    source = run[0] / "branches/main/02-train/checkpoints"
    source = max(source.glob("step-*"))
    for method, settings, error, message in (
        (
            "finercut",
            {"target": {"parameters": 0.9}},
            PlanError,
            "gives start_logits and end_logits, and logits of one kind",
        ),
        ("axformer", {"candidates": "attention", "streams": [], "benefit": 0.99}, PlanError, "Nothing goes: of 2"),
    ):
        stage = {"kind": "change", "method": method, "settings": settings, "calibration": {"samples": 8}}
        recipe = answer_recipe(rows, stage, build={"checkpoint": str(source)}, data={"tokenizer": str(source)})
        with pytest.raises(error, match=message):
            run_recipe(recipe, tmp_path / method, "", lambda line: None)


def test_a_checkpoint_is_trained_on_by_one_command(run, rows, tmp_path):
    checkpoint = run[0] / "branches/main/02-train/checkpoints/step-00000400"
    values = ["data.kind=question_answering", "data.context_length=32"]
    values += ["training.objective=question_answering", "measures=[token_f1]", "training.tensorboard=false"]
    changes = [word for value in values for word in ("--set", value)]
    given = ["--model", str(checkpoint), "--corpus", str(rows), "--steps", "2"]
    done = CliRunner().invoke(app, ["train", *given, "-o", str(tmp_path / "out"), *changes])
    assert done.exit_code == 0, done.output
    assert "token F1" in done.stdout


def test_other_commands_say_what_they_are_for(run, rows):
    checkpoint = str(run[0] / "branches/main/02-train/checkpoints/step-00000400")
    assert type(load_model(checkpoint)).__name__ == "BertForQuestionAnswering"
    for command in (["generate", checkpoint, "a leaf"], ["evaluate", checkpoint, "--text", str(rows)]):
        asked = CliRunner().invoke(app, command)
        assert isinstance(asked.exception, DataError)
        assert "is a BertForQuestionAnswering" in str(asked.exception)
    planned = CliRunner().invoke(app, ["plan", checkpoint, "axformer"])
    assert isinstance(planned.exception, DataError)
    assert '"start_positions": start_positions, "end_positions": end_positions}]' in str(planned.exception)
    assert "do it in a recipe, whose data has answers" in str(planned.exception)
    # The data of its run is what this asks for by name, and no text.
    scored = CliRunner().invoke(app, ["evaluate", checkpoint, "--corpus", str(run[0] / "data")])
    assert isinstance(scored.exception, DataError)
    assert "holds data of the kind question_answering, and what is asked for is a prepared" in str(scored.exception)
