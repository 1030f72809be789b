"""A recipe that pretrains a T5: built with its sentinels, trained, grown, measured, priced and reported."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from auxin.accounting import Ledger, count_parameters, flops_per_token
from auxin.cli import app
from auxin.data import PackedData, SampleForm
from auxin.errors import ConfigError, DataError
from auxin.evaluation.inspection import describe_checkpoint
from auxin.models.loading import load_config, load_model
from auxin.recipes import Recipe, price_recipe, run_recipe
from auxin.recipes.stage_models import stage_configs
from auxin.training import load_model as load_trained
from corpora import small_corpus, write_documents

SIZES = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.1}
CONTEXT, SPANS, INPUTS, TARGETS = 24, 1, 24 - 4 + 1, 4 + 1 + 1
"""15% of 24 are 3.6, so 4, in 4 / 3, so 1 span."""


def t5_recipe(corpus, *stages, training=None, model_type="t5", config=None, **build) -> Recipe:
    if not stages:
        stages = (
            {"kind": "train", "name": "base", "settings": {"steps": 6, "decay_fraction": 0.0}},
            {"kind": "change", "method": "hypercloning", "settings": {"factor": 2}},
            {"kind": "train", "name": "more", "settings": {"steps": 3}},
            {"kind": "evaluate"},
        )
    common = {"batch_size": 4, "log_interval": 2, "tensorboard": False, "device": "cpu"}
    first = {"kind": "build", "model_type": model_type, "config": config or SIZES, "pad_to_multiple_of": 8, **build}
    return Recipe.parse(
        {
            "name": "t5",
            "title": "A tiny T5",
            "data": small_corpus(corpus, context_length=CONTEXT, validation_fraction=0.3),
            "training": {**common, **({"objective": "span_corruption"} if training is None else training)},
            "branches": [{"name": "main", "title": "main", "stages": [first, *stages]}],
        }
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("corpus"), phrase="span by span a text is mended ")


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "out"
    return directory, run_recipe(t5_recipe(corpus), directory, "auxin run t5.yaml", announce=lambda line: None)


def test_a_built_t5_has_its_sentinels_and_knows_where_texts_begin_and_end(run):
    directory, _ = run
    checkpoint = directory / "branches/main/01-build/checkpoint"
    config = load_config(checkpoint)
    tokens = json.loads((directory / "data/corpus.json").read_text())["report"]["vocab_size"]
    rows = config.vocab_size
    assert rows % 8 == 0
    assert tokens + SPANS <= rows < tokens + SPANS + 8
    assert (config.decoder_start_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, 0)
    generation = json.loads((checkpoint / "generation_config.json").read_text())
    assert (generation["decoder_start_token_id"], generation["eos_token_id"]) == (0, 0)
    model = load_model(directory / "branches/main/04-more/checkpoints/step-00000003")
    # transformers' own generation works with what was saved.
    assert model.generate(torch.tensor([[5, 6, tokens, 7]]), max_new_tokens=3).shape[0] == 1


def test_the_price_is_what_was_paid(run, corpus):
    directory, results = run
    (branch,) = results.branches
    price = price_recipe(t5_recipe(corpus))
    stages = {stage.stage: stage for stage in price.stages}
    assert branch.units == stages["base"].units + stages["more"].units == 9 * 4 * CONTEXT
    assert all(stage.memory_bytes for stage in price.stages if stage.kind == "train")
    # The vocabulary that the small corpus really gave is not the one that was asked for.
    known = price_recipe(t5_recipe(corpus), form=PackedData.load(directory / "data").form)
    assert branch.flops == pytest.approx(known.branch_flops["main"], rel=1e-9)
    paid = [stage.flops for stage in branch.ledger.stages if stage.kind == "train"]
    assert paid == pytest.approx([s.flops for s in known.stages if s.kind == "train"], rel=1e-9)


def test_the_flops_are_those_of_the_lengths_that_run(run):
    directory, results = run
    record = results.branches[0].ledger.stages[1]
    model = load_trained(directory / "branches/main/02-base/checkpoints/step-00000006")
    per_context = flops_per_token(model, 1, encoder_length=INPUTS, decoder_length=TARGETS).training
    assert record.flops == pytest.approx(6 * 4 * per_context)
    assert record.parameters == count_parameters(model).total


def test_growth_and_evaluation_measure_the_same_targets_as_training(run):
    _, results = run
    _, base, grow, more, evaluate = results.branches[0].ledger.stages
    assert grow.value_before == pytest.approx(base.value_after, abs=1e-6)
    assert grow.value_after == pytest.approx(grow.value_before, abs=1e-5)
    assert more.value_before == pytest.approx(grow.value_after, abs=1e-6)
    assert evaluate.value_after == pytest.approx(more.value_after, abs=1e-6)
    assert base.value_after < base.value_before


def test_the_report_leaves_out_bits_per_byte(run):
    directory, results = run
    (branch,) = results.branches
    assert branch.bits_per_byte is None
    assert branch.perplexity is not None
    told = f"4 of 24 tokens cut out, spans: 1; encoder {INPUTS} tokens, decoder {TARGETS}"
    assert results.data["span corruption"] == told
    assert "</html>" in (directory / "report.html").read_text()
    assert (directory / "chart.svg").exists()
    shown = describe_checkpoint(directory / "branches/main/05-evaluate/checkpoint")
    assert shown.model_type == "t5"
    assert shown.ledger == Ledger.load(directory / "branches/main/05-evaluate/checkpoint")


def test_commands_that_need_a_causal_model_say_so(run):
    directory, _ = run
    checkpoint = str(directory / "branches/main/05-evaluate/checkpoint")
    for arguments in (["generate", checkpoint, "a"], ["evaluate", checkpoint, "--corpus", str(directory / "data")]):
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, DataError)
        assert "is an encoder-decoder (t5)" in str(result.exception)


def test_a_t5_checkpoint_is_trained_on(run, corpus, tmp_path):
    directory, results = run
    source = directory / "branches/main/04-more/checkpoints/step-00000003"
    values = t5_recipe(corpus).model_dump(mode="json", exclude_defaults=True)
    values["data"]["tokenizer"] = str(source)
    values["branches"][0]["stages"] = [
        {"kind": "build", "checkpoint": str(source)},
        {"kind": "evaluate", "name": "before"},
        {"kind": "train", "name": "on", "settings": {"steps": 2}},
    ]
    again = run_recipe(Recipe.parse(values), tmp_path / "out", "", announce=lambda line: None)
    stages = again.branches[0].ledger.stages
    assert stages[-2].value_after == pytest.approx(results.branches[0].value, abs=1e-6)
    # A longer context has more spans than the checkpoint has rows for.
    values["data"]["context_length"] = 400
    with pytest.raises(ConfigError, match=r"main/build: vocab_size: \d+ has no room for the 20 tokens"):
        run_recipe(Recipe.parse(values), tmp_path / "longer", "", announce=lambda line: None)
    assert not (tmp_path / "longer").exists()


TRAIN = {"kind": "train", "name": "train", "settings": {"steps": 2}}
LLAMA = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"training": {}},
            "main/build: model_type: t5 has no class for the objective 'causal'.*another training.objective",
        ),
        (
            {"model_type": "llama", "config": LLAMA},
            "main/build: model_type: llama has no class for.*'span_corruption'.*another model_type",
        ),
        (
            {"training": {"objective": {"kind": "span_corruption", "noise_density": 0.01}}},
            "context_length: 24 is too short for span corruption: noise_density 0.01.*51 or more",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_work_starts(corpus, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_recipe(t5_recipe(corpus, TRAIN, **changes), tmp_path / "out", "", announce=lambda line: None)
    assert not (tmp_path / "out").exists()


def test_a_stage_may_learn_something_else_than_what_is_compared(run, corpus, tmp_path):
    """Its held-out loss is that of the recipe's objective: the one of the same weights elsewhere."""
    more = {"objective": {"kind": "span_corruption", "noise_density": 0.3}, "steps": 2, "learning_rate": 1e-12}
    recipe = t5_recipe(
        corpus,
        {"kind": "train", "name": "base", "settings": {"steps": 6, "decay_fraction": 0.0}},
        {"kind": "train", "name": "more", "settings": more},
    )
    results = run_recipe(recipe, tmp_path / "out", "", announce=lambda line: None)
    _, base, stage = results.branches[0].ledger.stages
    assert base.value_after == pytest.approx(run[1].branches[0].ledger.stages[1].value_after, abs=1e-6)
    assert stage.value_after == pytest.approx(base.value_after, abs=1e-6)
    # 30% of 24 are 7, in 2 spans: the encoder sees 19 tokens, the decoder 10.
    model = load_trained(tmp_path / "out/branches/main/03-more/checkpoints/step-00000002")
    cut = flops_per_token(model, 1, encoder_length=19, decoder_length=10).training
    assert stage.flops == pytest.approx(2 * 4 * cut)


def form_of(recipe: Recipe, **tokens: int) -> SampleForm:
    """The form of the recipe's data with a tokenizer of 300 tokens, some of them special."""
    return replace(recipe.data.form(), vocab_size=300, config_values={"vocab_size": 300, **tokens})


def test_what_the_stage_says_about_its_tokens_goes_first(corpus):
    recipe = t5_recipe(corpus, TRAIN, config={**SIZES, "vocab_size": 512, "decoder_start_token_id": 3})
    config = stage_configs(recipe, form_of(recipe, pad_token_id=1, eos_token_id=2))["main"]["build"]
    assert (config.vocab_size, config.decoder_start_token_id) == (512, 3)


def test_the_tokens_of_barts_own_tokenizer_are_not_taken_over(corpus):
    """BART's config names 2 as the token to start from and to be forced to end with."""
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
    recipe = t5_recipe(corpus, TRAIN, model_type="bart", config=sizes)
    config = stage_configs(recipe, form_of(recipe, eos_token_id=7, pad_token_id=5))["main"]["build"]
    assert (config.decoder_start_token_id, config.forced_eos_token_id, config.vocab_size) == (5, 7, 304)
    recipe = t5_recipe(corpus, TRAIN, config={**SIZES, "pad_token_id": None})
    config = stage_configs(recipe, form_of(recipe, eos_token_id=7))
    assert config["main"]["build"].decoder_start_token_id == 7
