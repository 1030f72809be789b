"""`auxin analyse`: a table, a folder that a person can read, messages for what can't be measured."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from typer.testing import CliRunner

import auxin
from auxin import cli
from auxin.analysis import measurements
from auxin.analysis.similarity import Similarities
from auxin.cli.analysing import measurement_names
from auxin.edits import apply_to_checkpoint
from auxin.errors import AuxinError, ConfigError, DataError
from auxin.objectives import calibration
from plugins import install
from tiny_models import tiny
from tiny_tokenizers import tiny_tokenizer

QUICK = ("--samples", 5, "--length", 12)
SMALL = {"vocab_size": 330, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def call(*arguments: object) -> SimpleNamespace:
    result = CliRunner().invoke(cli.app, ["analyse", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return SimpleNamespace(out=result.stdout, err=result.stderr, code=result.exit_code)


@pytest.fixture(autouse=True)
def little_text(monkeypatch, tmp_path):
    monkeypatch.setattr(calibration, "STANDARD_BYTES", 800_000)
    monkeypatch.setenv("AUXIN_CACHE", str(tmp_path / "kept"))


@pytest.fixture
def llama(tmp_path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, intermediate_size=24, max_position_embeddings=64)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    tiny_tokenizer("byte_level").save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def test_it_prints_a_table_that_fits_a_terminal(llama, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    printed = call(llama, "similarity", *QUICK)
    lines = printed.out.splitlines()
    assert lines[0] == "model.layers"
    assert lines[1].split() == ["layer", "attention", "feed-forward", "whole", "layer"]
    assert [line.split()[0] for line in lines[2:5]] == ["0", "1", "2"]
    assert max(map(len, lines[:6])) <= 80
    assert "Parts that change the stream least: the " in printed.out


def test_a_bert_without_a_mask_token_is_measured_where_none_is_needed_and_told_what_to_do_elsewhere(tmp_path):
    """Its vocabulary is as large as its tokenizer, which names no token to hide others behind."""
    folder, tokenizer = tmp_path / "bert", tiny_tokenizer("byte_level")
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**{**SMALL, "vocab_size": len(tokenizer)}, intermediate_size=24)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for measurement in ("similarity", "outliers"):
        printed = call(folder, measurement, *QUICK, "--json")
        assert "The texts are whole, with no token masked" in printed.err
        assert json.loads(printed.out)["subject"]["samples"] == 5
    with pytest.raises(ConfigError, match=r"has no room for the 1 tokens that masked_language") as refused:
        call(folder, "importance", *QUICK)
    rows = re.search(
        r"Name one of the tokenizer's .*\[MASK\].*, or .* vocabulary with rows = (\d+)\.", str(refused.value)
    )[1]
    # What is advised helps.
    plan = auxin.plan(folder, "vocabulary", rows=int(rows), folder=tmp_path)
    apply_to_checkpoint(plan, folder, tmp_path / "larger")
    assert call(tmp_path / "larger", "importance", *QUICK).out
    tokenizer.mask_token = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    tokenizer.save_pretrained(folder)
    printed = call(folder, "similarity", *QUICK)
    assert printed.out
    assert "no token masked" not in printed.err
    assert call(folder, "importance", *QUICK).out


def test_it_writes_a_folder_that_a_person_can_read(llama, tmp_path):
    printed = call(llama, "similarity", *QUICK, "-o", tmp_path / "out", "--json")
    written = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert json.loads(printed.out) == written
    assert written["subject"]["measurement"] == "similarity"
    assert written["subject"]["samples"] == 5
    result = Similarities.model_validate(written["result"])
    assert len(result.stacks[0].layers) == 3
    root = ElementTree.parse(tmp_path / "out" / "picture.svg").getroot()
    assert "Similarity of small" in "".join(root.itertext())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["picture.svg", "result.json"]


def test_importance_is_measured_by_the_score_that_is_set(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    printed = call(llama, "importance", *QUICK, "--set", "score=fisher", "-o", tmp_path / "out")
    lines = printed.out.splitlines()
    assert lines[0] == "model.layers: query heads"
    assert lines[1].split() == ["layer", "units", "smallest", "median", "largest", "margin"]
    assert [line.split()[:2] for line in lines[2:5]] == [["0", "2"], ["1", "2"], ["2", "2"]]
    assert max(map(len, lines[:20])) <= 80
    assert "Feed-forward units that matter least by fisher: number " in printed.out
    written = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert written["subject"]["settings"] == {"score": "fisher"}
    root = ElementTree.parse(tmp_path / "out" / "picture.svg").getroot()
    assert "Importance of small" in "".join(root.itertext())


def test_the_second_time_nothing_is_run_and_options_count(llama, monkeypatch):
    calls: list[str] = []
    original = torch.nn.Module.__call__

    def counting(module, *arguments, **named):
        calls.append(type(module).__name__)
        return original(module, *arguments, **named)

    monkeypatch.setattr(torch.nn.Module, "__call__", counting)
    first = call(llama, "similarity", *QUICK, "--json")
    assert calls.count("LlamaModel") == 1
    assert call(llama, "similarity", *QUICK, "--json").out == first.out
    assert calls.count("LlamaModel") == 1
    other = call(llama, "similarity", *QUICK, "--seed", 1, "--json")
    longer = call(llama, "similarity", "--samples", 5, "--length", 20, "--json")
    assert calls.count("LlamaModel") == 3
    # Rounding and FLOPs go by the batches, so that what a plan costs would go by who measured before.
    call(llama, "similarity", *QUICK, "--batch-size", 2, "--json")
    assert calls.count("LlamaModel") == 3 + 3
    assert len({json.loads(item.out)["subject"]["data"] for item in (first, other, longer)}) == 3


def test_an_encoder_decoder_is_measured_on_what_it_is_trained_with(tmp_path):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=330, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0, eos_token_id=1
    )
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny_tokenizer("byte_level").save_pretrained(tmp_path)
    printed = call(tmp_path, "similarity", *QUICK)
    assert "encoder.block" in printed.out
    assert "cross-attention" in printed.out


def test_its_help_names_all_that_is_installed(tmp_path, monkeypatch):
    """It reads them from files, as importing takes seconds: none may be missing."""
    assert measurement_names() == sorted(measurements())
    assert {"attention-targets", "outliers", "similarity"} <= set(measurement_names())
    install(tmp_path, monkeypatch, "loudness", "raise SystemError('not imported')", "measurements", "Loudness")
    assert "loudness" in measurement_names()
    text = " ".join(call("--help").out.split())
    assert all(name in text for name in measurement_names())


@pytest.mark.parametrize(
    ("name", "setting", "told"),
    [
        ("attention-targets", "special_ids=[5, 7]", ("special_ids", [5, 7])),
        ("outliers", "deviations=3", ("deviations", 3)),
    ],
)
def test_every_measurement_is_printed_and_written(llama, tmp_path, monkeypatch, name, setting, told):
    monkeypatch.setenv("COLUMNS", "80")
    printed = call(llama, name, *QUICK, "--set", setting, "-o", tmp_path / "out")
    assert printed.out.startswith("model.layers")
    table = printed.out.partition("\n\n")[0].splitlines()
    assert max(map(len, table)) <= 80
    root = ElementTree.parse(tmp_path / "out" / "picture.svg").getroot()
    assert f"{name.capitalize().replace('-', ' ')} of small" in "".join(root.itertext())
    written = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert written["subject"]["measurement"] == name
    assert written["result"][told[0]] == told[1]


def test_what_cannot_be_measured_is_one_message(llama, tmp_path):
    tiny("vit", dtype=torch.float32).save_pretrained(tmp_path / "vit")
    LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=24)).save_pretrained(tmp_path / "mute")
    LlamaForCausalLM(LlamaConfig(**{**SMALL, "vocab_size": 20}, intermediate_size=24)).save_pretrained(tmp_path / "few")
    tiny_tokenizer("byte_level").save_pretrained(tmp_path / "few")
    for arguments, error, words in (
        ((llama, "similarty"), ConfigError, "Did you mean 'similarity'"),
        ((llama, "similarity", "--set", "layers=3"), ConfigError, "similarity: layers: unknown field"),
        ((llama, "outliers", "--set", "sample_share=2"), ConfigError, "outliers: sample_share: "),
        ((llama, "importance", "--set", "score=size"), ConfigError, "importance: score: .*'taylor'"),
        ((llama, "similarity", "--length", 65), ConfigError, "length is 65, but .* is 64"),
        ((llama, "similarity", "--length", 12, "--samples", 100_000), DataError, r"the text makes \d+ samples of 12"),
        ((tmp_path / "vit", "similarity"), DataError, "Text has no labels for a ViT"),
        ((tmp_path / "mute", "similarity"), DataError, "no data to look at.*Save the model with its tokenizer"),
        (
            (tmp_path / "few", "similarity", *QUICK),
            ConfigError,
            r"tokenizer has \d+ tokens, but the model's vocab_size is 20",
        ),
        ((tmp_path, "similarity"), AuxinError, "holds checkpoints and is none itself"),
        ((tmp_path, "similarity", "-o", tmp_path / "few"), ConfigError, "few exists. Give a folder that doesn't"),
    ):
        with pytest.raises(error, match=words):
            call(*arguments)


def test_what_integers_would_do_is_told(llama, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    printed = call(llama, "quantized", *QUICK, "--set", "calibration_samples=3", "--set", 'schemes=["w8a8"]')
    lines = printed.out.splitlines()
    assert lines[0] == "loss"
    assert lines[1].split() == ["quantized", "loss", "change", "accuracy", "output", "error"]
    assert [line.split()[0] for line in lines[2:4]] == ["nothing", "w8a8"]
    assert max(map(len, lines[:4])) <= 80
    assert "W8A8 changes the loss by " in printed.out
