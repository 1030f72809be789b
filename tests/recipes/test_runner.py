"""A recipe runs end to end, goes on where it stopped, and its books add up."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from auxin.accounting import Ledger
from auxin.accounting.results import RunResults, perplexity_of
from auxin.data import CorpusReport
from auxin.data.collecting import Skipped
from auxin.errors import CheckpointError, ConfigError, PlanError
from auxin.methods.grow.tokenformer import TokenGrowth, plan_token_growth
from auxin.models.loading import load_config, load_model
from auxin.recipes import Recipe, price_recipe, run_recipe
from auxin.recipes.change import change_checkpoint
from auxin.recipes.stages import Run
from auxin.report.findings import findings
from auxin.report.html import write_report
from auxin.report.picture import write_chart_svg
from corpora import small_corpus, write_documents

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("corpus"), documents=40)


OLD_TOKENS = {"kind": "old_token_rates", "ratio": 0.5}


def tiny_recipe(corpus, **settings):
    return Recipe.parse(
        {
            "name": "tiny",
            "title": "A tiny run",
            "seed": 5,
            "data": small_corpus(corpus),
            "training": {"batch_size": 4, "log_interval": 2, "tensorboard": False, **settings},
            "branches": [
                {
                    "name": "grown",
                    "title": "grown",
                    "stages": [
                        {
                            "kind": "build",
                            "model_type": "tokenformer",
                            "config": {**SIZES, "qkv_tokens": 4, "proj_tokens": 4, "ffn_tokens": 8},
                        },
                        {"kind": "train", "name": "base", "settings": {"steps": 6, "decay_fraction": 0.0}},
                        {
                            "kind": "change",
                            "name": "grow",
                            "tokens": {"qkv_tokens": 8, "proj_tokens": 8, "ffn_tokens": 16},
                        },
                        {"kind": "train", "name": "final", "settings": {"steps": 6}, "hooks": [OLD_TOKENS]},
                        {"kind": "evaluate"},
                    ],
                },
                {
                    "name": "small",
                    "title": "trained on",
                    "fork": "grown/base",
                    "stages": [{"kind": "train", "name": "on", "flops_of": "grown"}],
                },
                {
                    "name": "scratch",
                    "title": "from scratch",
                    "stages": [
                        {"kind": "build", "like": "grown"},
                        {"kind": "train", "name": "train", "flops_of": "grown"},
                    ],
                },
            ],
        }
    )


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "out"
    lines = []
    return directory, run_recipe(tiny_recipe(corpus), directory, "auxin run tiny.yaml", announce=lines.append), lines


def test_the_books_add_up(run, corpus):
    _, results, _ = run
    price = price_recipe(tiny_recipe(corpus))
    flops = {branch.name: branch.flops for branch in results.branches}
    assert flops["grown"] == pytest.approx(price.branch_flops["grown"], rel=1e-9)
    # Budgets of FLOPs are met to half a step.
    assert flops["small"] == pytest.approx(flops["grown"], rel=0.05)
    assert flops["scratch"] == pytest.approx(flops["grown"], rel=0.1)
    grown, small = results.branches[0], results.branches[1]
    assert grown.units == sum(stage.units for stage in grown.ledger.stages) == 12 * 4 * 16
    assert [stage.kind for stage in grown.ledger.stages] == ["build", "train", "change", "train", "evaluate"]
    assert small.ledger.stages[:2] == grown.ledger.stages[:2]
    assert (small.parent, small.fork_stage) == ("grown", "base")


def test_the_growth_kept_its_promise(run):
    _, results, _ = run
    (growth,) = results.branches[0].growths
    assert growth.promise == "exact"
    assert abs(growth.change) < 1e-5
    assert growth.parameters_after > growth.parameters_before
    assert "validation loss" in findings(results)[0]


def test_what_other_defaults_built_is_not_built_on(corpus, tmp_path):
    """As where the first branch was run by a version whose TokenFormers were others."""
    made = tiny_recipe(corpus)
    run_recipe(made, tmp_path / "out", "auxin run", announce=lambda line: None, branches=["grown"])
    path = tmp_path / "out" / "branches" / "grown" / "01-build" / "checkpoint" / "config.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "score_function": "l2_norm_gelu"}))
    with pytest.raises(ConfigError, match=r"01-build holds a model with score_function = 'l2_norm_gelu'.*'gelu' now"):
        run_recipe(made, tmp_path / "out", "auxin run", announce=lambda line: None)
    assert not (tmp_path / "out" / "branches" / "scratch").exists()
    # Where nothing is left to build, nothing is mixed.
    run_recipe(made, tmp_path / "out", "auxin run", announce=lambda line: None, branches=["grown", "small"])


def test_a_hook_without_a_meaning_is_found_before_any_work(corpus, tmp_path):
    made = tiny_recipe(corpus).model_dump()
    made["branches"][0]["stages"][3]["hooks"] = [{"kind": "tau_anneal", "steps": 3}]
    with pytest.raises(PlanError, match="hooks: tau_anneal moves the scale"):
        run_recipe(Recipe.parse(made), tmp_path / "out", "auxin run")
    assert not (tmp_path / "out").exists()


def test_curves_are_cumulative_and_start_with_the_parents(run):
    _, results, _ = run
    for branch in results.branches:
        tokens = [point.units for point in branch.curve]
        assert tokens == sorted(tokens)
        assert branch.curve[-1].units == branch.units
        assert branch.curve[-1].flops == pytest.approx(branch.flops)
    small = results.branches[1].curve
    assert small[0] == results.branches[0].curve[0]
    assert {point.stage for point in small} == {"base", "on"}


def test_the_runs_folder_is_complete(run):
    directory, results, _ = run
    assert RunResults.parse(json.loads((directory / "results.json").read_text())) == results
    assert "</html>" in (directory / "report.html").read_text()
    assert (directory / "recipe.yaml").exists()
    assert Ledger.load(directory / "branches/grown/05-evaluate/checkpoint").total_flops == results.branches[0].flops


def test_a_finished_run_is_not_run_again(run, corpus):
    directory, results, _ = run
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*.safetensors")}
    again = run_recipe(tiny_recipe(corpus), directory, "auxin run tiny.yaml", announce=lambda line: None)
    assert again.branches == results.branches
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*.safetensors")} == before


def test_another_recipe_is_kept_out_of_a_runs_folder(run, corpus, tmp_path):
    directory, _, _ = run
    with pytest.raises(ConfigError, match="another recipe"):
        run_recipe(tiny_recipe(corpus, learning_rate=1e-4), directory, "")
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(ConfigError, match="not empty"):
        run_recipe(tiny_recipe(corpus), tmp_path, "")
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_what_a_corpus_leaves_out_is_told(run):
    _, results, lines = run
    assert any(line.startswith("Data: ") and "left out: 0 duplicates" in line for line in lines)
    assert results.data["left out"] == "0 duplicates"
    report = CorpusReport.model_construct(
        duplicates=2, skipped={"not UTF-8": Skipped(count=4, examples=("a", "b", "c", "d"))}, limit="max_bytes"
    )
    told = report.describe_left_out()
    assert told == "2 duplicates; 4 skipped: not UTF-8 (a, b, c, d); everything after max_bytes was reached"


def test_a_run_that_cant_be_done_writes_nothing(corpus, tmp_path):
    with pytest.raises(ConfigError, match="warmup_steps"):
        run_recipe(tiny_recipe(corpus, warmup_steps=50), tmp_path / "out", "")
    assert not (tmp_path / "out").exists()


def adopting(corpus, checkpoint, *stages, tokenizer=None, **changes):
    values = tiny_recipe(corpus).model_dump(mode="json", exclude_defaults=True)
    values["data"] |= {"tokenizer": None if tokenizer is None else str(tokenizer), **changes}
    build = {"kind": "build", "checkpoint": str(checkpoint)}
    values["branches"] = [{"name": "main", "title": "main", "stages": [build, *stages]}]
    return Recipe.parse(values)


TRAIN = {"kind": "train", "name": "train", "settings": {"steps": 2, "decay_fraction": 0.0}}


def test_evaluations_take_no_more_memory_than_training(corpus, tmp_path):
    for settings, expected in (({}, 4), ({"micro_batch_size": 2}, 2)):
        assert Run(tiny_recipe(corpus, **settings), tmp_path, None, {}, print, None).evaluation_batch_size == expected


def test_a_checkpoint_keeps_its_tokens(run, corpus, tmp_path):
    directory, _, _ = run
    checkpoint = directory / "branches/grown/03-grow/checkpoint"
    # With fewer entries, the tokenizer that this corpus would train is another.
    recipe = adopting(corpus, checkpoint, TRAIN, vocab_size=280)
    with pytest.raises(ConfigError, match=re.escape(f"Set data.tokenizer: {checkpoint}")):
        run_recipe(recipe, tmp_path / "out", "", announce=lambda line: None)
    assert not (tmp_path / "out/branches").exists()


def test_a_checkpoint_whose_tensors_are_damaged_is_refused_and_other_changes_are_told(run, corpus, tmp_path):
    directory, _, _ = run
    source = tmp_path / "source"
    shutil.copytree(directory / "branches/grown/03-grow/checkpoint", source)
    recipe = adopting(corpus, source, TRAIN, tokenizer=source)
    (source / "generation_config.json").write_text("{}")
    told = []
    results = run_recipe(recipe, tmp_path / "out", "", announce=told.append)
    note = "not as it was written: generation_config.json differs from its sum in SHA256SUMS"
    assert f"  Note: {note}" in told
    assert note in results.branches[0].ledger.stages[-2].notes
    weights = bytearray((source / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (source / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"source is damaged: .*model\.safetensors differs .* remove its"):
        run_recipe(recipe, tmp_path / "damaged", "", announce=told.append)
    (source / "SHA256SUMS").unlink()
    run_recipe(recipe, tmp_path / "meant", "", announce=told.append)


def test_a_half_precision_checkpoint_of_other_data_trains_on(run, corpus, tmp_path):
    directory, _, _ = run
    source = directory / "branches/grown/03-grow/checkpoint"
    half, other = tmp_path / "half", tmp_path / "other"
    shutil.copytree(source, half)
    load_model(source, dtype=torch.bfloat16).save_pretrained(half)
    (half / "SHA256SUMS").unlink()
    other.mkdir()
    for path in corpus.iterdir():
        (other / path.name).write_text(path.read_text().replace("growing", "going on"))
    recipe = adopting(other, half, TRAIN | {"hooks": [OLD_TOKENS | {"ratio": 0.0}]}, tokenizer=source)
    results = run_recipe(recipe, tmp_path / "out", "", announce=lambda line: None)
    notes = results.branches[0].ledger.stages[-2].notes
    assert any("torch.bfloat16" in note for note in notes)
    assert any("other data" in note for note in notes)
    # Nothing of this corpus was seen before: its first batch comes first, whatever the ancestors' tokens.
    line = json.loads((tmp_path / "out/branches/main/02-train/metrics.jsonl").read_text().splitlines()[0])
    assert line["data_position"] == line["step"] == 0
    # The tokens from before the growth were frozen, the others not.
    trained = load_model(tmp_path / "out/branches/main/02-train/checkpoints/step-00000002").state_dict()
    before = load_model(half, dtype=torch.float32).state_dict()
    name = "model.layers.0.mlp.value_tokens"
    assert torch.equal(trained[name][:8], before[name][:8])
    assert not torch.equal(trained[name][8:], before[name][8:])


def test_a_forks_curve_ends_with_the_fork_though_stage_names_repeat(corpus, tmp_path):
    values = tiny_recipe(corpus).model_dump(mode="json", exclude_defaults=True)
    build = values["branches"][0]["stages"][0]
    grow = {"kind": "change", "name": "grow", "tokens": {"qkv_tokens": 8}}
    values["branches"] = [
        {"name": "a", "title": "a", "stages": [build, TRAIN]},
        {"name": "d", "title": "d", "fork": "a/train", "stages": [grow, TRAIN]},
        {"name": "e", "title": "e", "fork": "d/grow", "stages": [TRAIN]},
    ]
    results = run_recipe(Recipe.parse(values), tmp_path, "", announce=lambda line: None)
    d, e = results.branches[1:]
    assert [point.units for point in e.curve] == [point.units for point in d.curve]
    assert [point.units for point in e.curve] == sorted(point.units for point in e.curve)
    assert len(e.growths) == 1
    assert e.growths == d.growths


def test_a_diverged_branch_has_an_infinite_perplexity_and_a_report(run, tmp_path):
    _, results, _ = run
    assert perplexity_of(2.0) == pytest.approx(7.389056)
    assert perplexity_of(1e4) == math.inf
    diverged = results.branches[1].model_copy(update={"value": 1e4, "perplexity": math.inf})
    infinite = results.model_copy(update={"branches": [results.branches[0], diverged]})
    write_report(infinite, tmp_path / "report.html")
    write_chart_svg(infinite, tmp_path / "chart.svg")
    assert "</html>" in (tmp_path / "report.html").read_text()
    assert RunResults.parse(json.loads(infinite.model_dump_json())).branches[1].value == 1e4


def test_a_grown_checkpoint_appears_with_its_own_ledger_or_not_at_all(run, tmp_path, monkeypatch):
    directory, _, _ = run
    source = directory / "branches/small/01-on"
    source = source / (source / "latest").read_text().strip()
    config = load_config(source)
    plan = plan_token_growth(config, TokenGrowth(qkv_tokens=6))
    change_checkpoint(plan, source, tmp_path / "grown")
    kinds = [stage.kind for stage in Ledger.load(tmp_path / "grown").stages]
    assert kinds == [*(stage.kind for stage in Ledger.load(source).stages), "change"]

    def full(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Ledger, "save", full)
    with pytest.raises(CheckpointError, match="No space left"):
        change_checkpoint(plan, source, tmp_path / "again")
    assert [path.name for path in tmp_path.iterdir()] == ["grown"]


DIES_AFTER_THE_GROWTH = """
import os, signal, sys
from pathlib import Path
import torch
from auxin.recipes import load_recipe, run_recipe

torch.set_num_threads(1)
recipe, output = sys.argv[1:]

def announce(line):
    if (Path(output) / "branches/grown/03-grow/checkpoint").exists():
        os.kill(os.getpid(), signal.SIGKILL)

run_recipe(load_recipe(recipe), output, "", announce=announce)
"""


def test_a_killed_run_goes_on_to_the_same_bits(run, corpus, tmp_path):
    directory, results, _ = run
    recipe, output = tmp_path / "tiny.yaml", tmp_path / "out"
    tiny_recipe(corpus).to_yaml(recipe)
    command = [sys.executable, "-c", DIES_AFTER_THE_GROWTH, str(recipe), str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.DEVNULL, env=environment)
    assert done.returncode == -signal.SIGKILL
    assert not (output / "branches/grown/05-evaluate").exists()
    assert not (output / "results.json").exists()
    again = run_recipe(tiny_recipe(corpus), output, "", announce=lambda line: None)
    losses = [branch.value for branch in results.branches]
    assert [branch.value for branch in again.branches] == losses
    final = "branches/grown/05-evaluate/checkpoint/model.safetensors"
    left, right = load_file(directory / final), load_file(output / final)
    assert all(torch.equal(left[name], right[name]) for name in left)
