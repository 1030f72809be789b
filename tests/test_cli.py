"""The command line: every command end to end on a tiny model; errors are one message and an exit code."""

import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from auxin import cli
from auxin.accounting import Ledger
from auxin.cli import editing
from auxin.cli.listed import ListedOptions, repeated
from auxin.cli.printing import print_line, print_table
from auxin.errors import AuxinError, CheckpointError, ConfigError, DataError, TrainingError
from auxin.methods.grow.tokenformer import TokenGrowth
from auxin.models import TokenFormerForCausalLM
from auxin.models.tokenformer import PUBLISHED
from corpora import write_documents
from tiny_tokenizers import tiny_tokenizer

COMMANDS = [
    "run",
    "recipes",
    "train",
    "grow",
    "methods",
    "plan",
    "apply",
    "diff",
    "convert",
    "export",
    "generate",
    "evaluate",
]
COMMANDS += ["show", "doctor", "report", "analyse"]
CONFIG = {
    **PUBLISHED,  # others have no official form
    "model_type": "tokenformer",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "qkv_tokens": 6,
    "proj_tokens": 6,
    "ffn_tokens": 24,
    "max_position_embeddings": 32,
}


def call(*arguments: object, code: int = 0) -> SimpleNamespace:
    """Run a command in this process; an unexpected error is raised, so that its traceback is seen."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return SimpleNamespace(out=result.stdout, err=result.stderr)


def main(monkeypatch, capfd, *arguments: object) -> SimpleNamespace:
    """Run the entry point, which turns errors into messages and exit codes."""
    monkeypatch.setattr(sys, "argv", ["auxin", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    captured = capfd.readouterr()
    return SimpleNamespace(code=exit_.value.code, out=captured.out, err=captured.err)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write_documents(
        tmp_path_factory.mktemp("texts with a space"), phrase="roots and shoots grow towards light. "
    )


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory) -> SimpleNamespace:
    """What `auxin train` leaves after three steps, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    arguments = ["--steps", 3, "--batch-size", 2, "--context-length", 32, "--vocab-size", 280, "--seed", 3]
    settings = ["--set", "training.tensorboard=false", "--set", "data.validation_fraction=0.2"]
    output = folder / "out"
    printed = call(
        "train", "--model", folder / "config.json", "--corpus", texts, *arguments, *settings, "-o", output, "--json"
    )
    results = json.loads(printed.out)
    (checkpoint,) = (output / "branches" / "main").glob("*-train/checkpoints/step-00000003")
    return SimpleNamespace(output=output, checkpoint=checkpoint, results=results)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    text = call(command, "--help").out
    assert "Example" in text
    assert f"auxin {command}" in text


def test_train_trains_and_reports(trained):
    (branch,) = trained.results["branches"]
    assert branch["units"] == 3 * 2 * 32
    assert trained.results["seed"] == 3
    assert trained.results["command"].split()[0] == "auxin"
    assert "plotly" in (trained.output / "report.html").read_text(encoding="utf-8")


def test_train_goes_on_from_a_checkpoint(trained, texts, tmp_path):
    printed = call(
        *("train", "--model", trained.checkpoint, "--corpus", texts, "--steps", 2, "--batch-size", 2),
        *("--context-length", 32, "-o", tmp_path / "on", "--json"),
        *("--set", "training.tensorboard=false", "--set", "data.validation_fraction=0.2"),
    )
    (branch,) = json.loads(printed.out)["branches"]
    assert branch["units"] == (3 + 2) * 2 * 32, "the ancestors' tokens count"


def test_grow_shows_its_plan_and_writes_nothing(trained, tmp_path):
    printed = call("grow", trained.checkpoint, "--ffn-tokens", 40, "--dry-run", "-o", tmp_path / "grown")
    assert "exact" in printed.out
    assert "24 -> 40" in printed.out or "ffn" in printed.out
    assert not (tmp_path / "grown").exists()


def test_grow_keeps_the_function_and_the_books(trained, tmp_path):
    printed = call("grow", trained.checkpoint, "--qkv-tokens", 10, "--ffn-tokens", 40, "-o", tmp_path / "g", "--json")
    receipt = json.loads(printed.out)
    assert receipt["max_relative_change"] <= 1e-6
    old, new = (TokenFormerForCausalLM.from_pretrained(path) for path in (trained.checkpoint, tmp_path / "g"))
    ids = torch.arange(20)[None]
    assert torch.allclose(old(ids).logits, new(ids).logits, atol=1e-6)
    before, after = Ledger.load(trained.checkpoint), Ledger.load(tmp_path / "g")
    assert after.stages[:-1] == before.stages
    assert (after.stages[-1].kind, after.stages[-1].parameters) == ("change", receipt["parameters_after"])
    described = json.loads(call("show", tmp_path / "g", "--json").out)
    assert {group["slot"]: group["sizes"] for group in described["token_groups"]} == {
        "qkv": [6, 4],
        "proj": [6],
        "ffn": [24, 16],
    }
    sizes = [receipt["parameters_before"], receipt["parameters_after"]]
    assert [nested["parameters"] for nested in described["nested"]] == sizes
    scored = json.loads(call("show", tmp_path / "g", "--corpus", trained.output / "data", "--json").out)["nested"]
    # Right after an exact growth, the model inside is as good as the whole.
    assert scored[0]["validation_loss"] == pytest.approx(scored[1]["validation_loss"], abs=1e-6)
    assert scored[0]["validation_loss"] == pytest.approx(before.stages[-1].value_after, abs=1e-5)
    shown = call("show", tmp_path / "g").out
    assert "24 + 16" in shown
    assert shown.index("train") < shown.index("change"), "the lineage, in order"


def test_grow_has_every_setting_of_the_method(trained):
    options = set(inspect.signature(editing.grow).parameters)
    assert set(TokenGrowth.model_fields) < options
    copied = ["--regime", "duplicate", "--noise", 0.25, "--seed", 5]
    plan = json.loads(call("grow", trained.checkpoint, "--ffn-tokens", 48, *copied, "--dry-run", "--json").out)
    assert plan["settings"] == {"ffn_tokens": 48, "regime": "duplicate", "noise": 0.25, "seed": 5}
    rules = {"keys": "zeros", "values": "initial", "scale": "kept"}
    given = [word for name, value in rules.items() for word in (f"--{name}", value)]
    plan = json.loads(call("grow", trained.checkpoint, "--ffn-tokens", 48, *given, "--dry-run", "--json").out)
    assert plan["settings"] == {"ffn_tokens": 48, **rules}
    plan = json.loads(call("grow", trained.checkpoint, "--regime", "padding", "--dry-run", "--json").out)
    assert plan["edits"][0]["values"]["ffn_tokens"] == [64], "of each slot the next multiple of 64"
    with pytest.raises(ConfigError, match=r"keys: .*'nothing'"):
        call("grow", trained.checkpoint, "--ffn-tokens", 48, "--keys", "nothing", "--dry-run")


def test_methods_are_listed_and_explained():
    found = json.loads(call("methods", "--json").out)
    assert found["tokenformer"]["paper"].startswith("arXiv")
    text = call("methods").out
    assert all(name in text for name in found)
    assert max(map(len, text.splitlines())) <= 80
    assert text.index("grow: a larger model") < text.index("lemon") < text.index("adapt:") < text.index("graft")
    explained = call("methods", "tokenformer").out
    assert "ffn_tokens" in explained
    assert "the feed-forward part after the growth" in explained
    assert '"grouped"' in explained


def test_what_is_said_of_a_setting_names_its_choices_and_no_code():
    for method in json.loads(call("methods", "--json").out).values():
        for setting in method["settings"]:
            assert not re.search(r"the module|[Ss]ee `|\bNone\b", setting["meaning"]), setting
    (variant,) = (s for s in _settings("hypercloning") if s["name"] == "variant")
    assert all(f'"{choice}"' in variant["meaning"] for choice in ("symmetric", "noisy", "diagonal"))
    (start,) = (s for s in _settings("ligo") if s["name"] == "depth_start")
    assert start["meaning"].endswith(" One of: stack, interleave.")


def _settings(method: str) -> list[dict]:
    return json.loads(call("methods", method, "--json").out)["settings"]


def test_a_plan_is_made_applied_and_its_difference_shown(trained, tmp_path):
    arguments = (trained.checkpoint, "tokenformer", "--set", "ffn_tokens=40", "--set", "noise=0", "--set", "keys=null")
    printed = call("plan", *arguments, "-o", tmp_path / "plan.yaml").out
    assert "promise exact" in printed
    assert "pad axis 0 to 40" in printed
    assert str(tmp_path / "plan.yaml") in printed
    # A config is enough for a method that looks at no weights.
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(trained.checkpoint / "config.json", bare)
    for place in (bare, bare / "config.json"):
        assert json.loads(call("plan", place, *arguments[1:], "--json").out)["settings"] == {"ffn_tokens": 40}
    applied = call("apply", trained.checkpoint, tmp_path / "plan.yaml", "-o", tmp_path / "grown").out
    assert "Promise 'exact'" in applied
    assert Ledger.load(tmp_path / "grown").stages[-1].kind == "change"
    shown = call("diff", trained.checkpoint, tmp_path / "grown").out
    assert "ffn_tokens" in shown
    assert "model.layers.{0,1}.mlp.key_tokens" in shown
    assert "old block kept" in shown
    assert call("diff", trained.checkpoint, trained.checkpoint).out == "No difference.\n"


def test_two_plans_are_compared(trained, tmp_path):
    for name, tokens in (("a", 40), ("b", 48)):
        call("plan", trained.checkpoint, "tokenformer", "--set", f"ffn_tokens={tokens}", "-o", tmp_path / name)
    found = json.loads(call("diff", tmp_path / "a", tmp_path / "b", "--json").out)
    assert found["fields"] == {"settings.ffn_tokens": [40, 48]}
    assert len(found["changed"]) == 3, "the config, keys and values"
    assert "48" in call("diff", tmp_path / "a", tmp_path / "b").out


def test_a_method_learns_from_given_text_and_the_books_say_from_how_much(trained, texts, tmp_path):
    data = ["--data", f"corpus.paths={texts}", "--data", "length=8"]
    data += ["--data", "corpus.validation_fraction=0.2", "--data", "batch_size=3"]
    plan = tmp_path / "plans" / "plan.yaml"
    plan.parent.mkdir()
    settings = ["--set", "layers=3", "--set", "hidden_size=48", "--set", "steps=2"]
    printed = call("plan", trained.checkpoint, "ligo", *settings, *data, "-o", plan).out
    assert "Planning took 6 samples, 48 tokens" in printed
    assert f"; the samples were of {texts}\n" in printed
    assert len(list(plan.parent.glob("ligo-*.safetensors"))) == 1, "the operator lies beside the plan"
    call("apply", trained.checkpoint, plan, "-o", tmp_path / "larger")
    record = Ledger.load(tmp_path / "larger").stages[-1]
    assert (record.kind, record.samples, record.units) == ("change", 6, 48)
    assert record.flops > 0
    shown = call("show", tmp_path / "larger").out
    assert "48 tokens" in shown
    # It learned from data that is not the run's: whoever adopts it in a recipe is told so.
    assert record.data_fingerprint not in (None, Ledger.load(trained.checkpoint).stages[-1].data_fingerprint)


def test_generate_continues_a_text_reproducibly(trained):
    arguments = ("generate", trained.checkpoint, "roots and", "--max-new-tokens", 8, "--json", "--seed", 5)
    first, second = (json.loads(call(*arguments).out) for _ in range(2))
    assert first == second
    assert first["prompt"] == "roots and"
    assert call(*arguments[:-3]).out.startswith("roots and")


def test_evaluate_scores_texts_and_the_held_out_split(trained, texts):
    text = texts / "0.txt"
    data = trained.output / "data"
    printed = call("evaluate", trained.checkpoint, "--text", text, "--corpus", data, "--stride", 8, "--json")
    scores = json.loads(printed.out)
    assert scores[str(text)]["bytes"] == text.stat().st_size
    (branch,) = trained.results["branches"]
    assert scores[str(data)]["nats_per_token"] == pytest.approx(branch["value"], rel=1e-5)
    assert scores[str(data)]["bits_per_byte"] == pytest.approx(branch["bits_per_byte"], rel=1e-5)
    assert str(text) in call("evaluate", trained.checkpoint, "--text", text).out


def test_scores_that_are_no_numbers_are_null_in_json(trained, texts, monkeypatch):
    from auxin.evaluation import Perplexity

    values = {"nats_per_token": math.nan, "perplexity": math.inf, "bits_per_byte": math.nan}
    score = Perplexity(**values, tokens=1, bytes=1, unscored_tokens=0)
    monkeypatch.setattr("auxin.evaluation.files.score_files", lambda *arguments: {"x": score})
    printed = call("evaluate", trained.checkpoint, "--text", texts / "0.txt", "--json").out
    assert "NaN" not in printed
    assert "Infinity" not in printed
    assert json.loads(printed)["x"] == {**dict.fromkeys(values), "tokens": 1, "bytes": 1, "unscored_tokens": 0}


@pytest.mark.parametrize("command", ["show", "evaluate", "generate", "grow", "train"])
def test_the_folder_of_a_run_points_to_its_checkpoints(trained, texts, tmp_path, command):
    further = {
        "show": [],
        "evaluate": ["--text", texts / "0.txt"],
        "generate": ["roots"],
        "grow": ["--qkv-tokens", 9, "-o", tmp_path / "x"],
        "train": ["--steps", 1, "-o", tmp_path / "x"],
    }[command]
    place = ["--model", trained.output] if command == "train" else [trained.output]
    with pytest.raises(CheckpointError, match="holds checkpoints and is none itself") as raised:
        call(command, *place, *further)
    assert str(trained.checkpoint) in str(raised.value)
    assert not (tmp_path / "x").exists()


def test_so_does_every_folder_in_it(trained):
    for folder in trained.checkpoint.parents[:4]:
        with pytest.raises(CheckpointError, match="holds checkpoints and is none itself") as raised:
            call("show", folder)
        assert str(trained.checkpoint) in str(raised.value)
    with pytest.raises(CheckpointError, match=r"data has no config\.json: it is no model folder"):
        call("show", trained.output / "data")


def test_what_is_kept_aside_is_no_checkpoint_to_give(trained, tmp_path):
    for name in ("step-00000002", "damaged-step-00000003", "former-step-00000004"):
        shutil.copytree(trained.checkpoint, tmp_path / "checkpoints" / name)
    with pytest.raises(CheckpointError, match=r"Give one of those in it: \S*/step-00000002$"):
        call("show", tmp_path)


def test_the_folder_of_a_run_points_to_its_corpus(trained, texts):
    for option in (["evaluate", trained.checkpoint], ["show", trained.checkpoint]):
        with pytest.raises(DataError, match=r"holds no prepared corpus .* Give the one in it: .*/data$"):
            call(*option, "--corpus", trained.output)
        with pytest.raises(DataError, match=r"Give one that a run has prepared, its folder data/\.$"):
            call(*option, "--corpus", texts)
        with pytest.raises(
            DataError, match=r"is a file and no folder\. Give the folder of a prepared corpus: .*/data\.$"
        ):
            call(*option, "--corpus", trained.output / "data" / "corpus.json")


def test_what_cant_be_scored_is_told(trained, texts):
    for given, message in ((texts, "is a folder. Give the text files in it, each by itself."), ("x.txt", "not exist")):
        with pytest.raises(DataError, match=message):
            call("evaluate", trained.checkpoint, "--text", given)


def test_train_speaks_of_its_options_and_not_of_a_recipe(trained, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small.json").write_text(json.dumps(CONFIG))
    Path("recipe.yaml").write_text("name: x\n")
    model = ["train", "--model", "small.json", "--corpus", texts, "-o", tmp_path / "x"]
    for arguments, message in (
        (model, r"exactly one of --steps, --tokens, --flops and .*; given: none\.$"),
        ([*model, "--steps", 3, "--tokens", 9], r"exactly one of --steps.*; given: steps = 3, tokens = 9\.$"),
        ([*model, "--set", "training.step=3"], r"^training\.step: unknown field\. Did you mean 'steps'\?$"),
        (
            [*model, "--steps", 3],
            r"^--context-length, which was not given, is 512, but the model's max_positi.* is 32\.",
        ),
        ([*model, "--steps", 3, "--context-length", 40], r"^--context-length is 40, but"),
        ([*model, "--steps", 0], r"^--steps: must be 1 or more \(received 0\)$"),
        ([*model, "--steps", 3, "--vocab-size", 3], r"^--vocab-size: must be 257 or more \(received 3\)$"),
        ([*model, "--steps", 3, "--tokenizer", "y"], r"^--tokenizer: Tokenizer y does not exist"),
        ([*model, "--steps", 3, "--corpus", "z"], r"^--corpus: z does not exist"),
        (
            ["train", "--model", "recipe.yaml", "-o", "x"],
            r"is a file, and not of a model.* run by: auxin run recipe\.yaml$",
        ),
    ):
        with pytest.raises(AuxinError, match=message) as raised:
            call(*arguments)
        assert "main/" not in str(raised.value)
    assert not (tmp_path / "x").exists()


def test_a_log_says_from_which_step_a_run_goes_on(trained, texts, tmp_path, capsys):
    model = ["train", "--model", trained.checkpoint, "--corpus", texts, "--batch-size", 2, "--context-length", 32]
    model += ["--steps", 2, "-o", tmp_path / "run", "--set", "training.tensorboard=false"]
    model += ["--set", "data.validation_fraction=0.2", "--set", "training.checkpoint_interval=1"]
    call(*model)
    stage = next((tmp_path / "run/branches/main").glob("*-train"))
    (stage / "stage.json").unlink()
    shutil.rmtree(stage / "checkpoints/step-00000002")
    (stage / "latest").write_text("checkpoints/step-00000001\n")
    told = call(*model).err
    assert f"train: goes on from step 1 of 2, saved in {stage}/checkpoints/step-00000001\n" in told


def test_a_config_under_any_name_is_enough_for_a_plan(tmp_path):
    for name, content in (("small.json", CONFIG), ("other.json", {"a": 1})):
        (tmp_path / name).write_text(json.dumps(content))
    assert "stacking" in call("plan", tmp_path / "small.json", "stacking", "--set", "layers=4").out
    with pytest.raises(CheckpointError, match=r"other\.json has no model_type: it is no config"):
        call("plan", tmp_path / "other.json", "stacking", "--set", "layers=4")
    with pytest.raises(ConfigError, match=r"ligo looks at the model's weights, and .*small\.json is a config alone"):
        call("plan", tmp_path / "small.json", "ligo", "--set", "layers=4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "--model", "124m", "--steps", "abc", "-o", "x"],
            "'--steps': must be a whole number (received 'abc')",
        ),
        (
            ["train", "--model", "124m", "--flops", "abc", "-o", "x"],
            "'--flops': must be a finite number (received 'abc')",
        ),
        (["run", "demo", "--jobs", "0"], "'--jobs': must be 1 or more (received '0')"),
        (["analyse", "x", "similarity", "--length", "1"], "'--length': must be 2 or more (received '1')"),
    ],
)
def test_a_wrong_option_is_told_with_its_value(monkeypatch, capfd, arguments, message):
    monkeypatch.setenv("COLUMNS", "200")
    done = main(monkeypatch, capfd, *arguments)
    assert done.code == 2
    assert f"Invalid value for {message}" in done.err


def test_a_folder_that_is_no_model_is_told_before_its_tokenizer_is_missed(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        call("train", "--model", tmp_path, "--steps", 1, "-o", tmp_path / "x")


def test_seeds_that_torch_can_not_take(trained, monkeypatch, capfd):
    seed = 99999999999999999999
    done = main(monkeypatch, capfd, "grow", trained.checkpoint, "--qkv-tokens", 9, "--dry-run", "--seed", seed)
    assert done.code == 2
    assert "Traceback" not in done.err
    done = main(monkeypatch, capfd, "generate", trained.checkpoint, "roots", "--seed", seed)
    assert done.code == 2
    assert f"seed {seed}" in done.err


def test_a_prompt_in_another_encoding_is_one_message(trained, monkeypatch, capfd):
    done = main(monkeypatch, capfd, "generate", trained.checkpoint, "roots \udce4")
    assert done.code == 2
    assert done.err.startswith("auxin: The prompt is no valid Unicode text")


def test_a_source_that_is_gone_is_one_line(trained, texts, tmp_path, monkeypatch, capfd):
    corpus, run = shutil.copytree(texts, tmp_path / "texts"), tmp_path / "run"
    arguments = ["train", "--model", trained.checkpoint, "--corpus", corpus, "--batch-size", 2, "--context-length", 32]
    arguments += ["--steps", 1, "--set", "training.tensorboard=false", "--set", "data.validation_fraction=0.2"]
    assert main(monkeypatch, capfd, *arguments, "-o", run).code == 0
    shutil.rmtree(corpus)
    done = main(monkeypatch, capfd, *arguments, "-o", run)
    assert done.code == 0
    (line,) = [line for line in done.err.splitlines() if "can't be compared any more" in line]
    assert line.startswith(f"auxin: warning: {run / 'data'} is used as prepared")
    assert "warnings.warn" not in done.err


def test_evaluate_refuses_a_corpus_of_another_tokenizer(trained, texts, tmp_path):
    other = shutil.copytree(trained.checkpoint, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(AuxinError, match="another tokenizer"):
        call("evaluate", other, "--corpus", trained.output / "data")


def test_convert_there_and_back(trained, tmp_path):
    call("convert", trained.checkpoint, "--to-official", "-o", tmp_path / "official.bin")
    printed = call(
        *("convert", tmp_path / "official.bin", "-o", tmp_path / "back", "--num-attention-heads", 2, "--json"),
        *("--tokenizer", trained.checkpoint),
    )
    assert json.loads(printed.out)["max_relative_difference"] <= 1e-4
    old, new = (
        TokenFormerForCausalLM.from_pretrained(path).state_dict() for path in (trained.checkpoint, tmp_path / "back")
    )
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_export_writes_a_file_and_says_what_is_in_it(tmp_path):
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=310, num_hidden_layers=1, **sizes))
    model.save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer("byte_level")
    tokenizer.save_pretrained(tmp_path / "words")
    arguments = ("export", tmp_path / "model", "-o", tmp_path / "m.gguf", "--type", "q8_0")
    with pytest.raises(AuxinError, match="the model comes with none"):
        call(*arguments)
    out = call(*arguments, "--tokenizer", tmp_path / "words").out
    assert "F16, since their rows are no multiple of 32: token_embd.weight" in out
    assert out.splitlines()[-1].startswith(f"Written to {tmp_path / 'm.gguf'}: ")
    with pytest.raises(AuxinError, match="exists already"):
        call(*arguments)
    again = json.loads(call(*arguments, "--tokenizer", tmp_path / "words", "--overwrite", "--json").out)
    assert again["tensors"] == {"F16": 8, "F32": 3, "Q8_0": 1}
    assert again["bytes"] == (tmp_path / "m.gguf").stat().st_size


def test_a_checkpoint_says_whether_it_is_whole(trained, tmp_path, monkeypatch, capfd):
    shutil.copytree(trained.checkpoint, tmp_path / "c")
    assert "as it was written" in call("show", tmp_path / "c", "--verify").err
    weights = bytearray((tmp_path / "c/model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "c/model.safetensors").write_bytes(weights)
    answer = main(monkeypatch, capfd, "show", tmp_path / "c", "--verify")
    assert answer.code == 1
    assert "not as it was written: model.safetensors differs" in answer.err
    (tmp_path / "text.txt").write_text("some text to score\n" * 20)
    refused = main(monkeypatch, capfd, "evaluate", tmp_path / "c", "--text", tmp_path / "text.txt")
    assert refused.code == 1
    assert "c is damaged: model.safetensors differs" in refused.err
    (tmp_path / "c/SHA256SUMS").unlink()
    assert "SHA256SUMS is missing" in main(monkeypatch, capfd, "show", tmp_path / "c", "--verify").err
    (tmp_path / "c/training/state.json").unlink()
    assert "has no SHA256SUMS" in main(monkeypatch, capfd, "show", tmp_path / "c", "--verify").err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_a_command_that_is_ended_says_so_and_leaves_nothing(trained, tmp_path, monkeypatch, capfd, name):
    number = signal.Signals[name]
    # As in a shell's foreground, wherever the tests run.
    before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    former = signal.signal(number, before)

    def carry(*arguments):
        signal.raise_signal(number)

    monkeypatch.setattr("auxin.edits.folder_executor.carry", carry)
    sizes = ("--qkv-tokens", 8, "--proj-tokens", 8, "--ffn-tokens", 32)
    try:
        answer = main(monkeypatch, capfd, "grow", trained.checkpoint, *sizes, "-o", tmp_path / "g")
        after = signal.getsignal(number)
    finally:
        signal.signal(number, former)
    assert answer.code == 128 + number
    assert f"auxin: Ended by {name}; nothing half-written is left" in answer.err
    assert list(tmp_path.iterdir()) == []
    assert after is before


def test_a_command_in_the_background_ignores_what_its_shell_lets_it_ignore(trained, tmp_path, monkeypatch, capfd):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        monkeypatch.setattr("auxin.edits.folder_executor.carry", lambda *arguments: signal.raise_signal(signal.SIGINT))
        sizes = ("--qkv-tokens", 8, "--proj-tokens", 8, "--ffn-tokens", 32)
        answer = main(monkeypatch, capfd, "grow", trained.checkpoint, *sizes, "-o", tmp_path / "g")
        assert answer.code != 130
        assert "SIGINT" not in answer.err
    finally:
        signal.signal(signal.SIGINT, before)


def test_report_is_made_again(trained):
    page = trained.output / "report.html"
    page.unlink()
    assert str(page) in call("report", trained.output).out
    assert page.stat().st_size > 1_000_000


def test_recipes_and_their_price():
    known = json.loads(call("recipes", "--json").out)
    assert {"demo", "tokenformer-124m-to-1.4b"} <= set(known)
    price = json.loads(call("run", "demo", "--dry-run", "--json", "--set", "seed=4").out)
    assert {stage["branch"] for stage in price["stages"]} >= {"grown", "small", "scratch", "dense"}


def test_doctor_says_what_will_be_used():
    found = json.loads(call("doctor", "--json").out)
    assert found["used"]["device"].startswith(("cpu", "cuda"))
    assert found["versions"]["torch"] == torch.__version__
    assert "Will be used" in call("doctor").out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["show", "no/such/folder"], 1, "no/such/folder does not exist"),
        (["run", "dmeo"], 2, "Did you mean 'demo'?"),
        (["run", "demo", "--dry-run", "--set", "training.batchsize=3"], 2, "Did you mean 'batch_size'?"),
        (["train", "--model", "124n", "--steps", "1", "-o", "x"], 2, "Did you mean '124m'"),
        (["evaluate", "x"], 2, "Give --text FILE or --corpus FOLDER"),
        (
            ["report", "."],
            1,
            ". holds no results.json, so that no run was finished there. Give the folder of a finished",
        ),
        (["report", "nowhere"], 1, "nowhere does not exist. Give the folder of a finished run."),
        (["report", "plan.yaml"], 1, "plan.yaml is a file and no folder. Give the folder of a finished run."),
        (["methods", "tokenfromer"], 2, "Did you mean 'tokenformer'"),
        (["plan", "model", "tokenfromer"], 2, "Did you mean 'tokenformer'"),
        (["plan", "model", "tokenformer", "--set", "ffn_token=9"], 2, "Did you mean 'ffn_tokens'?"),
        (["plan", "model", "tokenformer", "--set", "ffn_tokens=many"], 2, "received 'many'"),
        (["plan", "model", "tokenformer", "--set", "ffn_tokens"], 2, "is no key=value. Write --set ffn_tokens=VALUE"),
        (["show", "model/config.json"], 1, "is a file and no folder. Give the folder of a checkpoint: model."),
        (["show", "plan.yaml"], 1, "plan.yaml is a file and no folder. Give the folder of a checkpoint.\n"),
        (
            ["apply", "plan.yaml", "model", "-o", "x"],
            2,
            "stand the other way round. Give auxin apply model plan.yaml, ",
        ),
        (
            ["plan", "stacking", "model"],
            2,
            "'stacking' and 'model' stand the other way round. Give auxin plan model stack",
        ),
        (["analyse", "similarity", "model"], 2, "stand the other way round. Give auxin analyse model similarity"),
        (["generate", "some text", "model"], 2, "stand the other way round. Give auxin generate model 'some text'"),
        (["run", "model"], 2, "model is a folder. Give the path of a YAML file or the name of a built-in recipe."),
        (["apply", "model/config.json", "plan.yaml", "-o", "x"], 1, "Give the folder of a checkpoint: model."),
        (["apply", "model", "model/config.json", "-o", "x"], 2, "is no plan: it has none of method, promise, edits."),
        (["run", "plan.yaml"], 2, "plan.yaml is no recipe: it has none of name, title, data, branches."),
        (["plan", "model", "tokenformer"], 2, "nothing to grow"),
        (
            ["plan", "model", "tokenformer"],
            2,
            "For example: --set qkv_tokens=12 --set proj_tokens=12 --set ffn_tokens=",
        ),
        (["plan", "model", "hypercloning"], 2, "For example: --set factor=2"),
        (["plan", "model", "tokenformer", "--data", "samples"], 2, "--data 'samples' is no key=value"),
        (["plan", "model", "tokenformer", "--set", "ffn_tokens=30", "--data", "samples=2"], 2, "looks at no data"),
        (["plan", "model", "ligo", "--set", "layers=3", "--data", "sample=2"], 2, "Did you mean 'samples'?"),
        (["plan", "model", "tokenformer", "--set", "ffn_tokens=9"], 2, "Ask for more than 24"),
        (["plan", "plan.yaml", "tokenformer"], 2, "Give a checkpoint's folder, or a config.json"),
        (["plan", "nowhere", "tokenformer"], 1, "nowhere does not exist"),
        (["apply", "model", "nowhere.yaml", "-o", "x"], 2, "nowhere.yaml does not exist"),
        (["apply", "model", "plan.yaml", "-o", "x"], 1, "holds no *.safetensors file"),
        (["diff", "model", "plan.yaml"], 2, "can't be compared"),
        (["diff", "model", "nowhere"], 2, "can't be compared"),
        (["diff", "model", "model"], 1, "there are no weights to compare"),
        (["diff", "plan.yaml", "nowhere.yaml"], 2, "nowhere.yaml does not exist"),
    ],
)
def test_a_mistake_is_one_message_and_an_exit_code(monkeypatch, capfd, tmp_path, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(CONFIG))
    Path("plan.yaml").write_text("method: by hand\npromise: exact\nedits: []\n")
    done = main(monkeypatch, capfd, *arguments)
    assert done.code == code
    assert done.out == ""
    assert not Path("x").exists()
    assert words in done.err
    assert done.err.startswith("auxin: ")
    assert "Traceback" not in done.err


def test_usage_errors_exit_with_2(monkeypatch, capfd):
    assert main(monkeypatch, capfd, "grow").code == 2
    assert main(monkeypatch, capfd, "grwo").code == 2


def test_grow_wants_one_target(trained, tmp_path):
    for target in ([], ["--to", "757m", "--qkv-tokens", "9"]):
        with pytest.raises(ConfigError, match="Give either --to"):
            call("grow", trained.checkpoint, *target, "-o", tmp_path / "x")
    with pytest.raises(ConfigError, match="--output"):
        call("grow", trained.checkpoint, "--qkv-tokens", 9)


RESULT_HEADER = ["branch", "val. loss", "training FLOPs", "parameters", "tokens", "seconds", "perplexity", "bits/byte"]
RESULT_ROWS = [
    ["Identity blocks (LLaMA Pro), grown twice", "6.2355", "1.585e+09", "74,016", "3,584", "12", "510.532", "4.0152"],
    ["small", "35.6312", "3.563e+11", "1,309,705,728", "61,440", "3", "-", "-"],
]


@pytest.mark.parametrize("width", range(20, 121, 4))
def test_tables_take_no_number_and_no_name_apart(monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    print_table(RESULT_HEADER, RESULT_ROWS, optional=6)
    table, _, note = capsys.readouterr().out.partition("Not shown, for want of room: ")
    lines = table.splitlines()
    left_out = note.rstrip(".\n").split(", ") if note else []
    assert left_out == RESULT_HEADER[len(RESULT_HEADER) - len(left_out) :], "from the right"
    assert len(left_out) <= 6
    words = {word for line in lines for word in line.split()}
    for row in RESULT_ROWS:
        for title, cell in zip(RESULT_HEADER, row, strict=True):
            assert title in left_out or set(cell.split()) <= words
    assert max(map(len, lines)) <= width


def test_a_table_of_80_columns_keeps_names_legible_and_breaks_titles(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    print_table(RESULT_HEADER, RESULT_ROWS[:1], optional=6)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:2]] == [
        ["val.", "training"],
        ["branch", "loss", "FLOPs", "parameters", "tokens", "seconds"],
    ]
    assert lines[2].startswith("Identity blocks (LLaMA")
    assert lines[-1] == "Not shown, for want of room: perplexity, bits/byte."


@pytest.mark.parametrize("words", [False, True])
def test_a_table_that_has_no_room_becomes_blocks(monkeypatch, capsys, words):
    monkeypatch.setenv("COLUMNS", "30")
    header, row = ["setting", "default", "meaning"], ["shared_expert_intermediate_size", "1024", "Hidden units."]
    print_table(header, [row], words=words)
    assert capsys.readouterr().out == f"{row[0]}\n  default: 1024\n  meaning: Hidden units.\n"


def test_a_terminal_is_shown_no_character_that_it_obeys(capsys):
    print_table(["a", "b"], [["\x1b[31mred\x9b2J", "[bold]"]])
    print_line("\x1b]0;title\x07 \ud800")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (TrainingError("a [bold] loss"), 1),
        (PermissionError(13, "Permission denied", "/a/b"), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_stops_a_command_becomes_its_exit_code(monkeypatch, capfd, error, code):
    def stop():
        raise error

    monkeypatch.setattr("auxin.recipes.builtin_recipes", stop)
    done = main(monkeypatch, capfd, "recipes")
    assert done.code == code
    assert "Traceback" not in done.err
    told = error.strerror if isinstance(error, OSError) else str(error)
    assert code == 130 or told in done.err, "brackets in a message are no markup"
    assert "Errno" not in done.err


def test_debugging_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("AUXIN_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["auxin", "run", "dmeo"])
    with pytest.raises(ConfigError):
        cli.main()


AUXIN = [sys.executable, "-c", "import sys; sys.argv[0] = 'auxin'; from auxin.cli import main; main()"]
"""What the installed `auxin` script does."""


LOADED = """
import atexit, sys
sys.argv[0] = "auxin"
atexit.register(lambda: print("loaded:", sorted({"torch", "transformers"} & {*sys.modules})))
from auxin.cli import main
main()
"""


@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], ["train", "--help"], ["analyse", "--help"]], ids=" ".join
)
def test_help_and_version_come_at_once(arguments):
    """torch and transformers, which take seconds, are not imported for them."""
    done = subprocess.run([sys.executable, "-c", LOADED, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"


@pytest.mark.parametrize("module", [["-m", "auxin"], ["-mauxin"]], ids=" ".join)
def test_so_do_they_by_python_m(module):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *module, "--help"], capture_output=True, text=True, check=True
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"auxin", "auxin.cli"} <= imported
    assert not {"torch", "transformers"} & imported


def test_a_reader_who_goes_away_is_no_error():
    # The pipe's reading end is closed before the command writes.
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([*AUXIN, "--version"], stdout=write, stderr=subprocess.PIPE)
    finally:
        os.close(write)
    assert done.stderr == b""
    assert done.returncode in (1, 141)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (["demo", "--seeds", "0", "1", "2", "--jobs", "2"], "demo --seeds 0 --seeds 1 --seeds 2 --jobs 2"),
        (["--seeds", "0", "1", "demo"], "--seeds 0 --seeds 1 demo"),
        (
            ["demo", "--seeds", "0,1", "--branches", "a", "b", "-o", "x"],
            "demo --seeds 0,1 --branches a --branches b -o x",
        ),
        (["demo", "--seeds", "x", "1"], "demo --seeds x --seeds 1"),
        (["demo", "--set", "seeds=1", "2"], "demo --set seeds=1 2"),
    ],
)
def test_an_option_takes_the_values_that_follow(written, read):
    assert repeated(written, ListedOptions.listed) == read.split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "3", "--seeds", "0", "1"], "--seed 3 and --seeds 0 1 contradict"),
        (["--seed", "0", "--set", "seeds=[0, 1]"], "the recipe has seeds"),
        (["--seeds", "0", "x"], "extra argument"),
        (["--seeds", "1,-2"], "'-2' is no whole number"),
        (["--seeds", "1", "1"], "must differ"),
        (["--branches", "grwon"], "auxin: --branches: Unknown branch 'grwon'. Did you mean 'grown'"),
    ],
)
def test_seeds_and_branches_that_make_no_sense(monkeypatch, capfd, arguments, message):
    result = main(monkeypatch, capfd, "run", "demo", *arguments, "--dry-run")
    assert result.code == 2
    assert message in result.err


def test_all_seeds_are_priced_without_training():
    told = json.loads(call("run", "demo", "--seeds", "3", "4", "--branches", "small", "--dry-run", "--json").out)
    assert list(told["seeds"]) == ["3", "4"]
    assert {stage["branch"] for stage in told["seeds"]["3"]["stages"]} == {"grown", "small"}


def test_a_value_without_its_option_is_told_how_it_is_written(monkeypatch, capfd, tmp_path):
    for command in (["plan", tmp_path, "taylor"], ["analyse", tmp_path, "similarity"], ["run", "demo"]):
        told = main(monkeypatch, capfd, *command, "ffn=0.5").err
        assert "ffn=0.5: a value is given with an option. Write --set ffn=0.5." in told
    assert "unexpected extra argument (more)" in main(monkeypatch, capfd, "plan", tmp_path, "taylor", "more").err
