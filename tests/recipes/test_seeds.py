"""A recipe with several seeds: side by side, resumable, to the bits of runs alone; failures and signals stay local."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from auxin.accounting.comparison import Comparison
from auxin.errors import ConfigError, TrainingError
from auxin.locks import exclusive
from auxin.recipes import Recipe, price_recipe, price_seeds, run_recipe, run_seeds, seed_results
from auxin.training.metrics import metrics_in
from corpora import small_corpus, write_documents

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
BUILD = {
    "kind": "build",
    "model_type": "tokenformer",
    "config": {**SIZES, "qkv_tokens": 2, "proj_tokens": 2, "ffn_tokens": 8},
}
WAIT = 1200
"""Seconds after which a process that does not do what it should is given up, also on the busiest machine."""
INTERVAL = 25
"""Steps between checkpoints."""


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("corpus"), documents=40)


def recipe(corpus, steps=4, **changes) -> Recipe:
    tokens = {"qkv_tokens": 4, "proj_tokens": 4, "ffn_tokens": 16}
    base = {"kind": "train", "name": "base", "settings": {"steps": steps, "decay_fraction": 0.0}}
    branches = [
        {"name": "grown", "title": "grown", "stages": [BUILD, base, {"kind": "change", "tokens": tokens}]},
        {
            "name": "small",
            "title": "trained on",
            "fork": "grown/base",
            "stages": [{"kind": "train", "name": "more", "settings": {"steps": 2}}],
        },
        {"name": "other", "title": "other", "stages": [BUILD, base]},
    ]
    return Recipe.parse(
        {
            "name": "tiny",
            "title": "A tiny run",
            "data": small_corpus(corpus),
            "training": {"batch_size": 4, "log_interval": 2, "tensorboard": False, "checkpoint_interval": INTERVAL},
            "branches": branches,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """Two seeds, then a third one added: folder, lines of both, times of the first two seeds' weights, results."""
    directory, lines, later = tmp_path_factory.mktemp("seeds") / "out", [], []
    run_seeds(recipe(corpus, seeds=[0, 1]), directory, "", lines.append, jobs=2)
    before = weights(directory)
    comparison = run_seeds(recipe(corpus, seeds=[0, 1, 2]), directory, "auxin run", later.append, jobs=2)
    return directory, lines, later, before, comparison


def weights(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*.safetensors")}


def assert_same_weights(one: Path, other: Path) -> None:
    names = sorted(path.relative_to(one / "branches") for path in (one / "branches").rglob("model.safetensors"))
    finals = [name for name in names if name.parts[0] != "grown" or "change" in name.parts[1]]
    assert finals
    for name in finals:
        left, right = load_file(one / "branches" / name), load_file(other / "branches" / name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left), name


def test_every_seed_has_the_bits_of_a_run_alone(run, corpus, tmp_path):
    directory, *_ = run
    alone = run_recipe(recipe(corpus, seed=1), tmp_path / "alone", "", quiet)
    assert_same_weights(tmp_path / "alone", directory / "seed-1")
    assert [branch.value for branch in seed_results(directory)[1].branches] == [b.value for b in alone.branches]


def test_seeds_share_the_data_and_stand_alone_otherwise(run):
    directory, _, _, _, comparison = run
    assert (directory / "data").is_dir()
    for seed in (0, 1, 2):
        folder = directory / f"seed-{seed}"
        assert not (folder / "data").exists()
        assert Recipe.from_yaml(folder / "recipe.yaml").seed == seed
        assert (folder / "report.html").exists()
    read = Comparison.parse(json.loads((directory / "results.json").read_text()))
    assert read == comparison
    assert {"report.html", "chart.svg", "results.md"} <= {path.name for path in directory.iterdir()}
    by_seed = {seed: results.branches[1].value for seed, results in seed_results(directory).items()}
    assert comparison.branches[1].values == by_seed
    assert len(set(by_seed.values())) == 3


def test_a_seed_added_later_is_all_that_is_run(run):
    directory, lines, later, before, comparison = run
    assert {path: time for path, time in weights(directory).items() if path in before} == before
    assert comparison.seeds == [0, 1, 2]
    assert sum("done in" in line for line in lines) == 6
    assert [line for line in later if line.startswith("seed") and not line.startswith("seed 2")] == []
    assert any(line.startswith("seed 2, small: done in") for line in later)


def test_one_seed_and_several_are_not_mixed(run, corpus, tmp_path):
    directory, *_ = run
    with pytest.raises(ConfigError, match="holds a run with several seeds"):
        run_recipe(recipe(corpus), directory, "", quiet)
    (tmp_path / "out/branches").mkdir(parents=True)
    recipe(corpus).to_yaml(tmp_path / "out/recipe.yaml")
    with pytest.raises(ConfigError, match="holds a run with one seed"):
        run_seeds(recipe(corpus, seeds=[0]), tmp_path / "out", "", quiet)
    changed = {"batch_size": 4, "log_interval": 2, "tensorboard": False, "learning_rate": 1.0}
    with pytest.raises(ConfigError, match="learning_rate"):
        run_seeds(recipe(corpus, seeds=[0, 1], training=changed), directory, "", quiet)
    with pytest.raises(ConfigError, match="other data"):
        run_seeds(recipe(corpus, seeds=[5], data=small_corpus(corpus, context_length=8)), directory, "", quiet)
    assert not (directory / "seed-5").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"seed": 3, "seeds": [0]}, "contradict"), ({"seeds": [1, 1]}, "must differ"), ({"seeds": []}, "1 or more")],
)
def test_seeds_that_make_no_sense(corpus, changes, message):
    with pytest.raises(ConfigError, match=message):
        recipe(corpus, **changes)


def test_a_branch_needs_what_it_is_forked_from_and_goes_by(corpus):
    found = recipe(corpus)
    assert found.needed(["small"]) == ["grown", "small"]
    assert found.needed(["other"]) == ["other"]
    assert found.needed(None) == ["grown", "small", "other"]
    with pytest.raises(ConfigError, match="smal"):
        found.needed(["smal"])


def test_all_seeds_are_priced(corpus):
    one, three = price_recipe(recipe(corpus)), price_seeds(recipe(corpus, seeds=[4, 5, 6]))
    assert three.flops == pytest.approx(3 * sum(stage.flops for stage in one.stages))
    assert "seeds 4, 5, 6 together" in str(three)
    assert {stage.branch for stage in price_seeds(recipe(corpus, seeds=[4]), ["small"]).seeds[4].stages} == {
        "grown",
        "small",
    }


def test_a_branch_that_fails_leaves_the_others_to_be_finished(corpus, tmp_path):
    lines: list[str] = []
    held = tmp_path / "seed-1/branches/grown"
    chosen = recipe(corpus, seeds=[0, 1])
    held.mkdir(parents=True)
    chosen.to_yaml(tmp_path / "recipe.yaml")
    chosen.of_seed(1).to_yaml(tmp_path / "seed-1/recipe.yaml")
    with exclusive(held), pytest.raises(TrainingError, match=r"seed 1, grown: .*in use") as raised:
        run_seeds(chosen, tmp_path, "", lines.append, jobs=2)
    assert "seed 1, small: needs grown" in str(raised.value)
    assert raised.value.exit_code == 1
    done = sorted(line.partition(":")[0] for line in lines if "done in" in line)
    assert done == ["seed 0, grown", "seed 0, other", "seed 0, small", "seed 1, other"]
    comparison = Comparison.parse(json.loads((tmp_path / "results.json").read_text()))
    assert {branch.name: branch.seeds for branch in comparison.branches} == {
        "grown": [0],
        "small": [0],
        "other": [0, 1],
    }
    again = run_seeds(chosen, tmp_path, "", quiet, jobs=2)
    assert {tuple(branch.seeds) for branch in again.branches} == {(0, 1)}


def test_a_single_seed_s_branches_run_side_by_side_too(run, corpus, tmp_path):
    directory, *_ = run
    results = run_recipe(recipe(corpus, seed=0), tmp_path / "out", "", quiet, jobs=2, branches=["small"])
    assert [branch.name for branch in results.branches] == ["grown", "small"]
    assert_same_weights(tmp_path / "out", directory / "seed-0")


LONG = 400
"""Steps: some seconds of training, so that a process that waits for its turn still comes before the end."""


@pytest.fixture(scope="module")
def long(corpus, tmp_path_factory):
    """A recipe's file that trains long enough to be stopped, and the folder of its run with seed 0 alone."""
    folder = tmp_path_factory.mktemp("long")
    found = recipe(corpus, steps=LONG)
    found = found.model_copy(update={"branches": [found.branches[0]]})
    found.to_yaml(folder / "long.yaml")
    run_recipe(found, folder / "alone", "", quiet)
    return folder / "long.yaml", folder / "alone"


def start(path: Path, output: Path) -> subprocess.Popen:
    command = ["run", str(path), "--seeds", "0", "1", "--jobs", "2", "--output", str(output)]
    # A shell may let what runs in the background ignore Ctrl-C, and that would be inherited.
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += "from auxin.cli import main; sys.argv[0] = 'auxin'; main()"
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )


def wait_for(condition, process: subprocess.Popen | None = None) -> None:
    until = time.monotonic() + WAIT
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)


def trained(output: Path, seed: int) -> bool:
    """Whether the seed has a checkpoint in the middle of its training."""
    return latest_step(output, seed) > 0


def latest_step(output: Path, seed: int) -> int:
    """Step of the newest checkpoint; 0 where there is none."""
    latest = output / f"seed-{seed}/branches/grown/02-base/latest"
    return int(latest.read_text().strip().rpartition("-")[2]) if latest.exists() else 0


def last_logged(output: Path, seed: int) -> int:
    """The last step that the seed's metrics tell of; 0 where there is none."""
    return max((line["step"] for line in metrics_in(output / f"seed-{seed}/branches/grown/02-base")), default=0)


def goes_on(output: Path, seed: int, stopped: int) -> bool:
    """Whether the seed was saved behind the step at which it had stopped, and is behind that again."""
    return stopped < latest_step(output, seed) < last_logged(output, seed)


def is_free(folder: Path) -> bool:
    try:
        with exclusive(folder):
            return True
    except TrainingError:
        return False


def test_killed_then_interrupted_then_finished_to_the_same_bits(long, tmp_path):
    path, alone = long
    output = tmp_path / "out"
    with start(path, output) as process:
        wait_for(lambda: trained(output, 0) or trained(output, 1), process)
        process.kill()
    # The children die with their parent: nothing holds their folders any more.
    wait_for(lambda: all(is_free(folder) for folder in output.glob("seed-*/branches/grown")))
    stopped = [latest_step(output, seed) for seed in (0, 1)]
    assert min(stopped) < LONG, "it was killed too late to test anything"
    with start(path, output) as process:
        wait_for(lambda: any(goes_on(output, seed, stopped[seed]) for seed in (0, 1)), process)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate()
    assert process.returncode == 130, out + errors
    assert "Interrupted by SIGINT" in errors
    assert "Traceback" not in errors
    # Every second step is logged at once: where the last of these is saved, the signal has saved it. (That it meets
    # a run at a step of the interval is no fault.) A seed whose turn had not come has the log of what was killed.
    went_on = [seed for seed in (0, 1) if latest_step(output, seed) > stopped[seed]]
    assert went_on
    for seed in went_on:
        assert last_logged(output, seed) <= latest_step(output, seed), "the signal saves what was trained"
    with start(path, output) as process:
        out, errors = process.communicate()
    assert process.returncode == 0, out + errors
    assert_same_weights(alone, output / "seed-0")
