"""Classification: of texts and of images by one objective, and what does not fit."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
)

from auxin.accounting import count_parameters, training_memory
from auxin.accounting.flops import forward_flops
from auxin.data.dataset import SampleForm
from auxin.errors import ConfigError
from auxin.models.loading import load_model
from auxin.objectives.calibration import Calibration, CalibrationSettings
from auxin.objectives.causal import Causal
from auxin.objectives.classification import Classification
from auxin.objectives.masked_language import MaskedLanguage
from auxin.objectives.measures import Accuracy, Loss, MacroF1
from auxin.objectives.objective import Objective, Reference
from auxin.training import train
from labelled import Images, TinyLabelled
from training.tiny import tiny_settings

DATA = TinyLabelled()
FORM = DATA.form
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL: dict[str, dict[str, Any]] = {
    "bert": {**SIZES, "max_position_embeddings": 16},
    "roberta": {**SIZES, "max_position_embeddings": 20},
    "llama": SIZES,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0},
    "vit": {**SIZES, "image_size": 8, "patch_size": 4},
}
TEXT = ["bert", "roberta", "llama", "gpt2"]


def config_of(family: str, form: SampleForm = FORM, **changes: Any) -> Any:
    return AutoConfig.for_model(
        family, **{**SMALL[family], **form.config_values, **Classification().config_values(form), **changes}
    )


def classifier(
    family: str, form: SampleForm = FORM, seed: int = 0, **changes: Any
) -> tuple[PreTrainedModel, Objective]:
    torch.manual_seed(seed)
    config = config_of(family, form, **changes)
    model = Classification().auto_class(form).from_config(config)
    return model, Classification().bind(config, form)


@pytest.mark.parametrize("family", TEXT)
def test_padding_says_nothing(family: str) -> None:
    """The loss of a padded text is that of the text alone, by a softmax that is written out."""
    model, objective = classifier(family, initializer_range=0.5)
    split = DATA.split("validation")
    batch = split.rows(range(len(split)))
    assert 0 < float(batch["attention_mask"].float().mean()) < 1
    expected, guesses = [], []
    with torch.no_grad():
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            scores = model.eval()(input_ids=ids[mask.bool()][None]).logits[0].double().tolist()
            expected.append(math.log(sum(map(math.exp, scores))) - scores[label])
            guesses.append(scores.index(max(scores)) == label)
        found = objective.losses(model, objective.inputs(batch, np.random.default_rng(0)))
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert np.std(expected) > 0.1, "texts differ"
    for size in (3, 100):
        assert Loss()(model, split, objective, size) == pytest.approx(np.mean(expected), rel=1e-4)
        assert Accuracy()(model, split, objective, size) == pytest.approx(np.mean(guesses))
    assert (objective.target, Loss().unit(objective)) == ("example", "nats/example")


@pytest.mark.parametrize("family", TEXT)
def test_what_is_learnt_is_the_mean_over_examples(family: str) -> None:
    model, objective = classifier(family, initializer_range=0.5)
    inputs = objective.inputs(DATA.split("train").rows(range(7)), np.random.default_rng(0))
    with torch.no_grad():
        loss = objective.loss(model.eval(), inputs)
        assert float(loss) == pytest.approx(float(objective.losses(model, inputs).mean()), rel=1e-5)
    assert objective.targets(inputs) == 7


@pytest.mark.parametrize("family", [*TEXT, "vit"])
def test_a_classifier_learns(tmp_path, family: str) -> None:
    data = Images() if family == "vit" else TinyLabelled(256)
    model, _ = classifier(family, data.form)
    settings = tiny_settings(objective="classification", steps=150, batch_size=32, learning_rate=5e-3)
    result = train(
        model, data, settings, tmp_path, measures=(Accuracy(), MacroF1(), Loss()), progress=False, stage_name="learn"
    )
    chance = 1 / len(data.labels)
    assert result.measures["accuracy"] > 0.5 + chance / 2
    assert result.measures["macro_f1"] > 0.5 + chance / 2
    assert result.value == result.measures["accuracy"]
    record = result.ledger.stages[-1]
    assert (record.units, record.unit, record.measure) == (150 * 32, data.form.unit, "accuracy")
    saved = load_model(result.checkpoint)
    assert type(saved) is type(model)
    assert saved.config.id2label == dict(enumerate(data.labels))


@pytest.mark.parametrize("family", [*TEXT, "vit"])
def test_costs_are_those_of_the_batches_that_are_learnt(family: str) -> None:
    data = Images() if family == "vit" else DATA
    model, objective = classifier(family, data.form)
    inputs = objective.inputs(data.split("train").rows(range(3)), np.random.default_rng(0))
    example = objective.example(3)
    assert {name: (x.shape, x.dtype) for name, x in example.items()} == {
        name: (x.shape, x.dtype) for name, x in inputs.items()
    }
    per_batch = forward_flops(model, {**inputs, **objective.call})
    assert 3 * objective.training_flops(model) == pytest.approx(3 * per_batch, rel=1e-9)
    memory = training_memory(model, 3, inputs={**inputs, **objective.call})
    assert memory == training_memory(model, 3, inputs={**example, **objective.call})
    assert memory.weights == 4 * count_parameters(model).total
    # What is made up where no inputs are given is nearly the same; it has no mask.
    made_up = training_memory(model, 3, None if family == "vit" else FORM.length)
    assert made_up.activations == pytest.approx(memory.activations, rel=0.05)


def test_pairs_give_their_segments_to_models_that_have_some() -> None:
    """GPT-2 takes token_type_ids as well, and would add the embeddings of the tokens 0 and 1."""
    pairs = replace(FORM, tensors=("input_ids", "attention_mask", "token_type_ids", "labels"))
    names = {family: classifier(family, pairs)[1].example(1).keys() for family in ("bert", "gpt2", "llama")}
    assert names["bert"] == set(pairs.tensors)
    assert names["gpt2"] == names["llama"] == set(FORM.tensors)
    sizes = {"dim": 32, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}
    bound = Classification().bind(
        DistilBertConfig(**sizes, vocab_size=64, pad_token_id=0, **Classification().config_values(pairs)), pairs
    )
    assert bound.example(1).keys() == set(FORM.tensors)
    two_texts = {**DATA.split("train").rows([0, 1]), "token_type_ids": torch.ones(2, 10, dtype=torch.long)}
    assert classifier("bert", pairs)[1].inputs(two_texts, np.random.default_rng(0))["token_type_ids"].all()


def test_the_class_goes_by_what_the_samples_hold() -> None:
    assert Classification().auto_class(FORM) is AutoModelForSequenceClassification
    assert Classification().auto_class(Images().form) is AutoModelForImageClassification
    values = Classification().config_values(FORM)
    assert values["id2label"] == {0: "zero", 1: "one", 2: "two"}
    assert values["label2id"] == {"zero": 0, "one": 1, "two": 2}
    assert Classification().config_values(replace(FORM, labels=None)) == {}
    _, objective = classifier("bert")
    assert objective.describe() == {"classes": "3 (zero, one, two)"}


PACKED = SampleForm("token", 10, ("input_ids",), length=10, vocab_size=64, config_values={"vocab_size": 64})


@pytest.mark.parametrize(
    ("config", "form", "message"),
    [
        (lambda: config_of("bert"), PACKED, "needs a class for each sample.*Set data.kind: labelled_text"),
        (
            lambda: config_of("bert", problem_type="regression"),
            FORM,
            "problem_type: the model's config says 'regression'",
        ),
        (lambda: config_of("bert", problem_type="multi_label_classification"), FORM, "each example has one class"),
        (lambda: BertConfig(vocab_size=64, num_labels=2), FORM, "num_labels: the model tells 2.*has 3 .zero, one, two"),
        (
            lambda: config_of("bert", id2label={0: "two", 1: "one", 2: "zero"}),
            FORM,
            "id2label: the model's classes are two, one, zero.*Set data.labels",
        ),
        (
            lambda: config_of("llama", pad_token_id=None),
            FORM,
            "pad_token_id: .*has None, and the data is padded with 0",
        ),
        (
            lambda: config_of("gpt2", pad_token_id=5),
            FORM,
            "pad_token_id: the model's config has 5.*Set pad_token_id: 0",
        ),
        (
            lambda: config_of("bert", max_position_embeddings=9),
            FORM,
            "context_length is 10.*max_position_embeddings is 9",
        ),
        (lambda: config_of("bert", vocab_size=60), FORM, "tokenizer has 64 tokens, but the model's vocab_size is 60"),
        (lambda: AutoConfig.for_model("t5"), FORM, "t5 is an encoder-decoder"),
        (lambda: ViTConfig(num_labels=3), FORM, r"vit has no class that learns this \(AutoModelForSequenceClass"),
        (lambda: config_of("bert"), Images().form, r"bert has no class that learns this \(AutoModelForImage"),
        (
            lambda: config_of("bert"),
            replace(FORM, tensors=("input_ids", "bbox", "labels")),
            "a BertForSequenceClassification takes no bbox",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_mend(config, form, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Classification().bind(config(), form)


@pytest.mark.parametrize("settings", [Causal(), MaskedLanguage()])
def test_labelled_text_is_no_packed_text(settings) -> None:
    with pytest.raises(ConfigError, match=r"Set data.kind: text, or training.objective: classification\.$"):
        settings.check_form(FORM)


def test_names_that_say_nothing_are_no_hindrance() -> None:
    config = config_of(
        "bert", id2label={n: f"LABEL_{n}" for n in range(3)}, label2id={f"LABEL_{n}": n for n in range(3)}
    )
    assert Classification().bind(config, FORM).describe()["classes"] == "3 (zero, one, two)"


def test_a_model_with_another_head_is_refused_before_the_folder_is_made(tmp_path) -> None:
    model = LlamaForCausalLM(config_of("llama"))
    with pytest.raises(
        ConfigError, match="is learnt by a LlamaForSequenceClassification, and this is a LlamaForCausalLM"
    ):
        train(model, DATA, tiny_settings(objective="classification", steps=2), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


class Halves:
    """Stands in for a processor of images: what it does is in the file that it writes."""

    def save_pretrained(self, save_directory: Any) -> None:
        (save_directory / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Halves"}))


def test_images_keep_their_processor_and_count_in_images(tmp_path) -> None:
    try:
        from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

        processor: Any = ViTImageProcessorPil(size={"height": 8, "width": 8})
    except ImportError:
        processor = Halves()
    data = Images(processor=processor)
    model, _ = classifier("vit", data.form)
    settings = tiny_settings(objective="classification", samples=12)
    result = train(model, data, settings, tmp_path, measures=(Accuracy(),), progress=False)
    assert (result.units, result.steps) == (12, 3)
    assert (result.checkpoint / "preprocessor_config.json").exists()
    assert type(load_model(result.checkpoint)) is type(model)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_a_classifier_learns_from_a_teacher(tmp_path, family: str) -> None:
    data = Images() if family == "vit" else TinyLabelled()
    teacher, _ = classifier(family, data.form, seed=3, num_hidden_layers=3, initializer_range=0.5)
    objective = {"kind": "distillation", "teacher": "t", "objective": "classification", "weight": 1.0}
    settings = tiny_settings(objective=objective, steps=60, batch_size=16, decay_fraction=0.0)
    student, plain = classifier(family, data.form)
    rows = data.split("train").rows(range(64))
    inputs = plain.inputs(rows, np.random.default_rng(0))
    told = plain.predictions(teacher.eval(), inputs)[0]
    before = (plain.predictions(student.eval(), inputs)[0] == told).float().mean()
    train(
        student,
        data,
        settings,
        tmp_path,
        references={"t": Reference(teacher, "t")},
        measures=(Accuracy(),),
        progress=False,
    )
    after = (plain.predictions(student.eval(), inputs)[0] == told).float().mean()
    assert after > max(0.8, before)


def test_methods_look_at_labelled_samples_too() -> None:
    config = config_of("bert")
    wanted = CalibrationSettings(samples=10, batch_size=4, length=5)
    found = Calibration.of_split(DATA, config, wanted, Classification())
    batches = list(found.batches())
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 2]
    assert all(
        batch["input_ids"].shape == batch["attention_mask"].shape == (len(batch["labels"]), 5) for batch in batches
    )
    assert (found.unit, found.units_per_sample, found.distinct) == ("example", 1, 64)
    loss = classifier("bert")[0](**batches[0]).loss
    assert torch.isfinite(loss)
