"""A recipe of a classifier: priced, built, trained, grown exactly, measured in accuracy, reported; from a checkpoint
with a new head; and what does not fit."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel, GPT2Config, GPT2Model
from typer.testing import CliRunner

from auxin.accounting import Ledger, count_parameters
from auxin.cli import app
from auxin.errors import CheckpointError, ConfigError, DataError
from auxin.models.loading import load_config, load_model
from auxin.recipes import Recipe, price_recipe, run_recipe
from labelled import WORDS, labelled_rows, write_rows
from tiny_tokenizers import tiny_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT = {**SIZES, "max_position_embeddings": 32}
NAMES = tuple(sorted(WORDS))
TRAIN = {"kind": "train", "name": "train", "settings": {"samples": 1200}}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of which every twentieth has the label of another, so that no classifier is always right."""
    found = labelled_rows(240)
    for number in range(0, 240, 20):
        found[number]["label"] = NAMES[(NAMES.index(found[number]["label"]) + 1) % 3]
    return write_rows(tmp_path_factory.mktemp("rows") / "texts.jsonl", found)


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer("wordpiece").save_pretrained(folder)
    return folder


def classifier_recipe(rows: Path, *stages: dict[str, Any], build: dict[str, Any] | None = None, **data: Any) -> Recipe:
    texts = {"kind": "labelled_text", "paths": [str(rows)], "vocab_size": 400, "context_length": 20}
    common = {"batch_size": 16, "learning_rate": 5e-3, "log_interval": 5, "tensorboard": False, "device": "cpu"}
    first = {"kind": "build", **(build or {"model_type": "bert", "config": BERT})}
    return Recipe.parse(
        {
            "name": "classes",
            "title": "A tiny classifier",
            "data": {**texts, "validation_fraction": 0.25, **data},
            "training": {"objective": "classification", **common},
            "measures": ["accuracy", "macro_f1", "loss"],
            "branches": [{"name": "main", "title": "main", "stages": [first, *stages]}],
        }
    )


GROWN = (
    TRAIN,
    {"kind": "change", "name": "wider", "method": "net2net", "settings": {"intermediate_size": 96}},
    {"kind": "train", "name": "more", "settings": {"samples": 320}},
    {"kind": "evaluate"},
)


@pytest.fixture(scope="module")
def run(rows, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "out"
    lines: list[str] = []
    return directory, run_recipe(classifier_recipe(rows, *GROWN), directory, "auxin run c.yaml", lines.append), lines


def test_a_bert_learns_to_classify(run, rows):
    directory, results, _ = run
    (branch,) = results.branches
    _, first, _, _, last = branch.ledger.stages
    assert first.value_before < 0.6, "before it has learnt anything it guesses one of three"
    assert 0.8 < first.value_after < 1
    assert branch.value == last.value_after > 0.8
    assert branch.measures.keys() == {"accuracy", "macro_f1", "loss"}
    assert branch.measures["macro_f1"] > 0.8
    model = load_model(directory / "branches/main/04-more/checkpoints/step-00000020")
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.intermediate_size == 96
    # Who loads it with transformers alone gets names.
    folder = directory / "branches/main/05-evaluate/checkpoint"
    plain, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    inputs = tokenizer([row["text"] + tokenizer.eos_token for row in found], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = plain.eval()(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    told = [plain.config.id2label[number] for number in logits.argmax(-1).tolist()]
    assert sum(label == row["label"] for label, row in zip(told, found, strict=True)) > 0.85 * len(found)


def test_growth_is_exact_and_measured_in_accuracy(run):
    _, results, _ = run
    _, first, grown, more, _ = results.branches[0].ledger.stages
    assert grown.measure == first.measure == "accuracy"
    assert grown.value_before == grown.value_after == first.value_after
    assert grown.parameters > first.parameters
    assert more.value_before == grown.value_after
    (point,) = results.branches[0].growths
    assert (point.change, point.promise) == (0.0, "exact")


def test_the_price_is_what_was_paid(run, rows):
    _, results, _ = run
    (branch,) = results.branches
    known = classifier_recipe(rows, *GROWN, labels=list(NAMES))
    assert int(results.data["vocabulary"]) == known.data.vocab_size, "the source fills it"
    price = price_recipe(known)
    assert price.unit == "example"
    assert branch.units == sum(stage.units for stage in price.stages) == 1200 + 320
    assert branch.flops == pytest.approx(price.branch_flops["main"], rel=1e-9)
    paid = [stage.parameters for stage in branch.ledger.stages]
    assert paid == [stage.parameters for stage in price.stages]
    assert all(stage.memory_bytes for stage in price.stages if stage.kind == "train")
    assert "examples" in str(price).splitlines()[0]
    # Where no labels are named, the price before the data is read is that of two classes.
    (early, *_) = price_recipe(classifier_recipe(rows, TRAIN), memory=False).stages
    assert paid[0] - early.parameters == BERT["hidden_size"] + 1


def test_the_report_and_the_command_line_speak_of_examples_and_accuracy(run, rows, tmp_path):
    directory, results, lines = run
    assert (results.unit, results.measure.name, results.measure.better) == ("example", "accuracy", "higher")
    assert (results.branches[0].perplexity, results.branches[0].bits_per_byte) == (None, None)
    assert results.data["classes"] == f"3 ({', '.join(NAMES)})"
    counts = [int(count) for count in re.findall(r"[a-z] (\d+)", results.data["training examples"])]
    assert sum(counts) == int(results.data["training examples"].split()[0])
    text = "\n".join(lines)
    assert "1,200 examples" in text
    assert "validation accuracy" in text
    report = (directory / "report.html").read_text()
    assert "examples" in report
    assert "accuracy" in report.lower()
    checkpoint = str(directory / "branches/main/05-evaluate/checkpoint")
    for command in (["generate", checkpoint, "a leaf"], ["evaluate", checkpoint, "--text", str(rows)]):
        asked = CliRunner().invoke(app, command)
        assert isinstance(asked.exception, DataError)
        assert "is a BertForSequenceClassification, which neither continues a text" in str(asked.exception)
    recipe = tmp_path / "c.yaml"
    classifier_recipe(rows, TRAIN).to_yaml(recipe)
    priced = CliRunner().invoke(app, ["run", str(recipe), "--dry-run"])
    assert priced.exit_code == 0, priced.output
    assert "examples" in priced.stdout
    assert "1,200" in priced.stdout
    done = CliRunner().invoke(app, ["run", str(recipe), "-o", str(tmp_path / "run"), "--set", "training.batch_size=32"])
    assert done.exit_code == 0, done.output
    assert "accuracy" in done.stdout
    assert "perplexity" not in done.stdout


def encoder(folder: Path, tokenizer: Path, **changes: Any) -> Path:
    """A BERT without a head that was trained by somebody else, with its tokenizer."""
    torch.manual_seed(5)
    words = AutoTokenizer.from_pretrained(tokenizer)
    sizes = {**BERT, "vocab_size": len(words), "pad_token_id": words.pad_token_id, **changes}
    BertModel(BertConfig(**sizes)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def masked_language_model(folder: Path, tokenizer: Path) -> Path:
    """A run's checkpoint of another task: with moments and books."""
    texts = [row["text"] for row in labelled_rows(60)]
    (folder / "texts").mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / "texts" / f"{number}.txt").write_text(" ".join([text] * 5))
    words = AutoTokenizer.from_pretrained(tokenizer)
    words.eos_token = words.sep_token
    words.save_pretrained(folder / "tokenizer")
    recipe = Recipe.parse(
        {
            "name": "mlm",
            "title": "",
            "data": {
                "source": "files",
                "paths": [str(folder / "texts")],
                "tokenizer": str(folder / "tokenizer"),
                "context_length": 16,
                "validation_fraction": 0.2,
            },
            "training": {"objective": "masked_language", "batch_size": 4, "tensorboard": False, "device": "cpu"},
            "branches": [
                {
                    "name": "main",
                    "title": "",
                    "stages": [
                        {"kind": "build", "model_type": "bert", "config": BERT},
                        {"kind": "train", "name": "train", "settings": {"steps": 2}},
                    ],
                }
            ],
        }
    )
    run_recipe(recipe, folder / "run", "", lambda line: None)
    return folder / "run/branches/main/02-train/checkpoints/step-00000002"


def adopted(source: Path, rows: Path, output: Path, seed: int = 0, **data: Any) -> tuple[Path, Ledger]:
    stage = {"kind": "train", "name": "train", "settings": {"steps": 2}}
    recipe = classifier_recipe(rows, stage, build={"checkpoint": str(source)}, **{"tokenizer": str(source), **data})
    run_recipe(recipe.model_copy(update={"seed": seed}), output, "", lambda line: None)
    folder = output / "branches/main/01-build/checkpoint"
    return folder, Ledger.load(folder)


def test_a_checkpoint_without_a_head_gets_one_from_the_seed(rows, wordpiece, tmp_path):
    source = encoder(tmp_path / "source", wordpiece)
    found = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder, ledger = adopted(source, rows, tmp_path / name, seed)
        found[name] = load_file(folder / "model.safetensors")
        assert load_config(folder).architectures == ["BertForSequenceClassification"]
        assert load_config(folder).id2label == dict(enumerate(NAMES))
        record = ledger.stages[-1]
        told = f"new random weights from seed {seed}: classifier.bias, classifier.weight"
        assert record.notes == [f"started from {source}", f"a BertModel became a BertForSequenceClassification; {told}"]
        assert record.seed == seed
        assert record.parameters == count_parameters(load_model(folder)).total
    assert all(torch.equal(found["a"][key], found["b"][key]) for key in found["a"])
    different = {key for key in found["a"] if not torch.equal(found["a"][key], found["c"][key])}
    assert different == {"classifier.weight"}
    kept = {f"bert.{key}": value for key, value in load_file(source / "model.safetensors").items()}
    assert kept.keys() == found["a"].keys() - {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(value, found["a"][key]) for key, value in kept.items())


def test_a_masked_language_model_is_taken_over_with_its_books_and_without_its_moments(rows, wordpiece, tmp_path):
    source = masked_language_model(tmp_path / "mlm", wordpiece)
    folder, ledger = adopted(source, rows, tmp_path / "run")
    assert [(stage.kind, stage.unit, stage.units) for stage in ledger.stages[:2]] == [
        ("build", "token", 0),
        ("train", "token", 2 * 4 * 16),
    ]
    notes = ledger.stages[-1].notes
    # A BERT that names hidden tokens has no pooler, which belongs to a classifier's head.
    head = "bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias, classifier.weight"
    assert any(note.startswith("a BertForMaskedLM became") and note.endswith(head) for note in notes)
    assert any("moments are left behind" in note for note in notes)
    assert any("trained before on other data" in note for note in notes)
    assert not (folder / "training").exists()
    before, after = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
    shared = before.keys() & after.keys()
    assert len(shared) > 10
    assert all(torch.equal(before[key], after[key]) for key in shared)


def test_a_decoder_learns_what_its_padding_is(rows, tmp_path):
    tokenizer = tiny_tokenizer("gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=32)
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    GPT2Model(config).save_pretrained(tmp_path / "gpt2")
    folder, ledger = adopted(tmp_path / "gpt2", rows, tmp_path / "run")
    assert load_config(folder).pad_token_id == tokenizer.eos_token_id
    assert "score.weight" in ledger.stages[-1].notes[-1]


def test_a_classifier_of_these_classes_is_taken_over_as_it_is(run, rows, tmp_path):
    directory, results, _ = run
    source = directory / "branches/main/04-more/checkpoints/step-00000020"
    folder, ledger = adopted(source, rows, tmp_path / "again")
    assert ledger.stages[-1].notes == [f"started from {source}"]
    assert (folder / "training").exists()
    trained = Ledger.load(tmp_path / "again/branches/main/02-train/checkpoints/step-00000002").stages[-1]
    assert trained.value_before == results.branches[0].value


def damaged(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    del tensors["encoder.layer.0.output.dense.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


def two_classes(source: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(source, num_labels=2).save_pretrained(source)


def other_order(source: Path) -> None:
    names = dict(enumerate(reversed(NAMES)))
    AutoModelForSequenceClassification.from_pretrained(source, id2label=names).save_pretrained(source)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (damaged, CheckpointError, r"lacks 1 weight\(s\).*first: bert.encoder.layer.0.output.dense.weight"),
        (two_classes, ConfigError, r"main/build: num_labels: the model tells 2 classes apart, and the data has 3"),
        (other_order, ConfigError, r"main/build: id2label: the model's classes are nature, music, money"),
    ],
)
def test_a_head_of_something_else_or_a_missing_weight_is_an_error(rows, wordpiece, tmp_path, change, error, message):
    source = encoder(tmp_path / "source", wordpiece)
    change(source)
    with pytest.raises(error, match=message):
        adopted(source, rows, tmp_path / "out")


def test_another_tokenizer_than_the_checkpoints_is_refused(rows, wordpiece, tmp_path):
    source = encoder(tmp_path / "source", wordpiece, vocab_size=500)
    with pytest.raises(ConfigError, match="has another tokenizer than the data"):
        adopted(source, rows, tmp_path / "out", tokenizer=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {}}, r"'causal' learns from packed text.*input_ids, attention_mask, labels.*classification"),
        (
            {"training": {"objective": "span_corruption"}},
            r"'span_corruption' learns from packed text.*objective: classification",
        ),
        ({"data": {"source": "stdlib"}}, r"needs a class for each sample.*Set data.kind: labelled_text"),
        ({"model_type": "t5"}, r"t5 is an encoder-decoder"),
        ({"model_type": "clip_text_model"}, "has no class for the objective 'classification'"),
        ({"preset": "124m"}, r"main/build: preset: tokenformer has no class for the objective"),
        ({"tokens": 100}, r"tokens: 100 is no budget for data that is counted in examples\. Give samples"),
        ({"context_length": 64}, "context_length is 64, but the model's max_position_embeddings is 32"),
    ],
)
def test_what_does_not_fit_is_said_before_work_starts(rows, tmp_path, changes, message):
    recipe = classifier_recipe(rows, TRAIN).model_dump(mode="json", exclude_defaults=True)
    build, train = recipe["branches"][0]["stages"]
    if "training" in changes:
        recipe["training"] = {**changes["training"], "batch_size": 4}
    if "data" in changes:
        recipe["data"] = changes["data"]
    if "model_type" in changes:
        build |= {"model_type": changes["model_type"], "config": {}}
    if "preset" in changes:
        recipe["branches"][0]["stages"][0] = {"kind": "build", "preset": changes["preset"]}
    if "tokens" in changes:
        train["settings"] = {"tokens": changes["tokens"]}
    if "context_length" in changes:
        recipe["data"]["context_length"] = changes["context_length"]
    with pytest.raises(ConfigError, match=message):
        run_recipe(Recipe.parse(json.loads(json.dumps(recipe))), tmp_path / "out", "", lambda line: None)
    assert not (tmp_path / "out").exists()
