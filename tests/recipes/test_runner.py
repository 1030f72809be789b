"""A recipe runs end to end, goes on where it stopped, and its books add up."""

import json
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from auxin.accounting import Ledger
from auxin.accounting.results import RunResults
from auxin.errors import ConfigError
from auxin.recipes import Recipe, price_recipe, run_recipe
from auxin.report import findings

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        (folder / f"{number}.txt").write_text(
            f"document {number} says " + "growing is cheaper than starting over " * 20
        )
    return folder


def tiny_recipe(corpus, **settings):
    return Recipe.parse(
        {
            "name": "tiny",
            "title": "A tiny run",
            "seed": 5,
            "corpus": {
                "source": "files",
                "paths": [str(corpus)],
                "vocab_size": 300,
                "context_length": 16,
                "validation_fraction": 0.2,
            },
            "training": {"batch_size": 4, "log_interval": 2, "tensorboard": False, **settings},
            "branches": [
                {
                    "name": "grown",
                    "title": "grown",
                    "stages": [
                        {
                            "kind": "build",
                            "model_type": "tokenformer",
                            "config": {**SIZES, "qkv_tokens": 2, "proj_tokens": 2, "ffn_tokens": 8},
                        },
                        {"kind": "train", "name": "base", "settings": {"steps": 6, "decay_fraction": 0.0}},
                        {
                            "kind": "grow",
                            "name": "grow",
                            "tokens": {"qkv_tokens": 4, "proj_tokens": 4, "ffn_tokens": 16},
                        },
                        {"kind": "train", "name": "final", "settings": {"steps": 6}, "old_tokens_rate": 0.5},
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
    assert grown.tokens == sum(stage.tokens for stage in grown.ledger.stages) == 12 * 4 * 16
    assert [stage.kind for stage in grown.ledger.stages] == ["build", "train", "grow", "train", "evaluate"]
    assert small.ledger.stages[:2] == grown.ledger.stages[:2]
    assert (small.parent, small.fork_stage) == ("grown", "base")


def test_the_growth_kept_its_promise(run):
    _, results, _ = run
    (growth,) = results.branches[0].growths
    assert growth.promise == "exact"
    assert abs(growth.change) < 1e-5
    assert growth.parameters_after > growth.parameters_before
    assert "validation loss" in findings(results)[0]


def test_curves_are_cumulative_and_start_with_the_parents(run):
    _, results, _ = run
    for branch in results.branches:
        tokens = [point.tokens for point in branch.curve]
        assert tokens == sorted(tokens)
        assert branch.curve[-1].tokens == branch.tokens
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


def test_a_killed_run_goes_on_to_the_same_bits(run, corpus, tmp_path):
    directory, results, _ = run
    recipe, output = tmp_path / "tiny.yaml", tmp_path / "out"
    tiny_recipe(corpus).to_yaml(recipe)
    code = (
        "import sys, torch; torch.set_num_threads(1); from auxin.recipes import load_recipe, run_recipe;"
        "run_recipe(load_recipe(sys.argv[1]), sys.argv[2], '')"
    )
    killed = subprocess.Popen([sys.executable, "-c", code, str(recipe), str(output)], stdout=subprocess.DEVNULL)
    marker = output / "branches/grown/03-grow"
    while killed.poll() is None and not marker.exists():
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert not (output / "results.json").exists()
    again = run_recipe(tiny_recipe(corpus), output, "", announce=lambda line: None)
    losses = [branch.validation_loss for branch in results.branches]
    assert [branch.validation_loss for branch in again.branches] == losses
    final = "branches/grown/05-evaluate/checkpoint/model.safetensors"
    left, right = load_file(directory / final), load_file(output / final)
    assert all(torch.equal(left[name], right[name]) for name in left)
