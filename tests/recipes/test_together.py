"""Recipes that torchrun's processes run together, workers that are killed among them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from torch.distributed import HashStore

from auxin.accounting import Ledger
from auxin.errors import ConfigError
from auxin.recipes import load_recipe, refuse_together
from auxin.recipes.beforehand import check_strategies
from auxin.recipes.schema import Recipe
from auxin.training import latest_checkpoint
from auxin.training.ranks import ALONE, Ranks
from corpora import small_corpus, write_documents
from recipes.torchruns import SOURCES, TORCHRUN, children, needs_proc, outcome, started, wait_until, workers
from training.tiny import checkpoint_bits

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}
TOKENS = {"qkv_tokens": 8, "proj_tokens": 8, "ffn_tokens": 32}
MORE = {"qkv_tokens": 16, "proj_tokens": 16, "ffn_tokens": 64}
LAST = "branches/grown/04-after"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A TokenFormer that is trained, grown and trained on, and beside that tuned by a LoRA, which is merged."""
    folder = tmp_path_factory.mktemp("recipe")
    stages = [
        {"kind": "build", "model_type": "tokenformer", "config": {**SIZES, **TOKENS}},
        {"kind": "train", "name": "base", "settings": {"steps": 30, "decay_fraction": 0.0}},
        {"kind": "change", "name": "grow", "tokens": MORE},
        {"kind": "train", "name": "after", "settings": {"steps": 60}},
    ]
    lora = {"rank": 2, "parameters": ["key_tokens", "value_tokens"]}
    values = {
        "name": "together",
        "title": "Together",
        "data": small_corpus(write_documents(folder / "documents")),
        "training": {"batch_size": 6, "learning_rate": 3e-3, "tensorboard": False, "checkpoint_interval": 10},
        "branches": [
            {"name": "grown", "title": "grown", "stages": stages},
            {
                "name": "tuned",
                "title": "tuned",
                "fork": "grown/base",
                "stages": [{"kind": "train", "name": "lora", "lora": lora, "settings": {"steps": 10}}],
            },
        ],
        "main_branch": "grown",
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def command(recipe: Path, output: Path, *options: str, processes: int = 2, restarts: int = 0) -> list[str]:
    """What a user types; with one process, without torchrun."""
    launch = [*TORCHRUN, "--standalone", f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    alone = [sys.executable, "-W", "ignore"]
    return [*(launch if processes > 1 else alone), *("-m", "auxin", "run", str(recipe), "-o", str(output), *options)]


def finished(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """How the command ended."""
    return outcome(started(arguments))


@pytest.fixture(scope="module")
def together(recipe, tmp_path_factory) -> Path:
    """The run of two processes with copies of the model, left alone."""
    output = tmp_path_factory.mktemp("together") / "run"
    ended = finished(command(recipe, output, "--set", "training.strategy=replicated"))
    assert ended.returncode == 0, ended.stdout
    return output


def far(one: Path, other: Path) -> float:
    weights = [load_file(latest_checkpoint(folder / LAST) / "model.safetensors") for folder in (one, other)]
    return max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])


def test_a_recipe_with_a_growth_ends_where_one_process_ends(recipe, together, tmp_path):
    """To rounding, in pieces too; the books are the same, and the report is there."""
    assert finished(command(recipe, tmp_path / "alone", processes=1)).returncode == 0
    ended = finished(command(recipe, tmp_path / "sharded", "--set", "training.strategy=sharded", "--branches", "grown"))
    assert ended.returncode == 0, ended.stdout
    ledgers = []
    for folder in (tmp_path / "alone", together, tmp_path / "sharded"):
        assert far(tmp_path / "alone", folder) < 1e-5
        assert (folder / "report.html").exists()
        stages = Ledger.load(latest_checkpoint(folder / LAST)).stages
        ledgers.append([(stage.name, stage.parameters, stage.units, stage.flops) for stage in stages])
        results = json.loads((folder / "results.json").read_text())
        branches = ["grown"] if folder.name == "sharded" else ["grown", "tuned"]
        assert [branch["name"] for branch in results["branches"]] == branches
    assert ledgers[0] == ledgers[1] == ledgers[2]


def same_end(one: Path, other: Path) -> bool:
    """Whether weights and the whole training state of the last stage are equal to the bit."""
    return checkpoint_bits(latest_checkpoint(one / LAST)) == checkpoint_bits(latest_checkpoint(other / LAST))


def begun(output: Path) -> bool:
    """Whether the second training has saved on the way."""
    return (output / LAST / "checkpoints" / "step-00000010").is_dir()


@needs_proc
@pytest.mark.parametrize(
    ("rank", "strategy", "number"),
    [(0, "replicated", signal.SIGKILL), (1, "sharded", signal.SIGKILL), (1, "replicated", signal.SIGTERM)],
)
def test_a_worker_that_is_ended_changes_no_bit(recipe, together, tmp_path, rank, strategy, number):
    """By a signal to it alone in the middle of the second training; torchrun starts both again, and they go on from
    what is saved."""
    output = tmp_path / "run"
    options = ("--set", f"training.strategy={strategy}", "--branches", "grown")
    process = started(command(recipe, output, *options, restarts=1))
    wait_until(lambda: begun(output), process)
    os.kill(workers(process.pid)[rank], number)
    how = outcome(process)
    assert how.returncode == 0, how.stdout
    assert (output / "report.html").exists()
    if number == signal.SIGTERM:
        assert "Interrupted by a signal to another process after step" in how.stdout
    if strategy == "replicated":
        assert same_end(output, together)
    else:
        assert far(output, together) < 1e-5


@needs_proc
def test_all_processes_are_killed_and_the_same_command_ends_in_the_same_bits(recipe, together, tmp_path):
    """torchrun and its workers at once, as when a machine goes down."""
    output = tmp_path / "run"
    arguments = command(recipe, output, "--set", "training.strategy=replicated", "--branches", "grown")
    process = started(arguments)
    wait_until(lambda: begun(output), process)
    for one in (process.pid, *children(process.pid)):
        os.kill(one, signal.SIGKILL)
    assert outcome(process).returncode == -signal.SIGKILL
    how = finished(arguments)
    assert how.returncode == 0, how.stdout
    assert "goes on from step" in how.stdout
    assert same_end(output, together)


@needs_proc
def test_a_second_torchrun_on_the_same_folder_is_told_and_the_first_ends_as_it_would_have(recipe, together, tmp_path):
    """The second ends at once, its follower with it, and touches nothing."""
    output = tmp_path / "run"
    arguments = command(recipe, output, "--set", "training.strategy=replicated", "--branches", "grown")
    first = started(arguments)
    wait_until(lambda: begun(output), first)
    at_work = workers(first.pid)
    for one in at_work.values():
        os.kill(one, signal.SIGSTOP)  # however long the second takes to start
    before = sorted(output.rglob("*"))
    second = finished(arguments)
    assert second.returncode == 1
    assert second.stdout.count("auxin:") == 1
    assert f"process {at_work[0]}" in second.stdout
    assert sorted(output.rglob("*")) == before
    for one in at_work.values():
        os.kill(one, signal.SIGCONT)
    how = outcome(first)
    assert how.returncode == 0, how.stdout
    assert same_end(output, together)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("batch_size=1", "grown/base: training.batch_size: 1 samples can't be shared by 2 processes"),
        # Only the last branch's stage, a LoRA, can't be trained so.
        ("strategy=sharded", "tuned/lora: training.strategy: 'sharded' cuts parameters into pieces, and an adapter"),
    ],
)
def test_a_mistake_is_told_once_and_nothing_is_begun(recipe, tmp_path, change, message):
    """One process speaks for all; of whatever stage it is, before the first one."""
    ended = finished(command(recipe, tmp_path / "run", "--set", f"training.{change}"))
    assert ended.returncode != 0
    assert ended.stdout.count(message) == 1, ended.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("training", "hooks", "message"),
    [
        ({"strategy": "sharded"}, [], None),
        ({"strategy": "sharded"}, [{"kind": "old_rates", "ratio": 0.5}], r"reads or changes whole ones \(old_rates\)"),
        ({"strategy": "tensor"}, [{"kind": "old_rates", "ratio": 0.5}], r"reads or changes whole ones \(old_rates\)"),
        ({"strategy": "hybrid", "processes_per_copy": 3}, [], "processes_per_copy: copies of 3 processes don't divide"),
        ({"strategy": "tensor"}, [], None),
        ({"strategy": "replicated"}, [{"kind": "old_rates", "ratio": 0.5}], None),
    ],
)
def test_what_processes_can_not_train_is_known_before(recipe, tmp_path, training, hooks, message):
    """By shapes, of the stage behind a growth; what is done already is not asked for."""
    values = yaml.safe_load(recipe.read_text())
    values["training"] |= training
    values["branches"][0]["stages"][-1]["hooks"] = hooks
    loaded = Recipe.model_validate(values)
    check_strategies(loaded, tmp_path, ["grown"], ALONE)
    two = Ranks(0, 2, HashStore())
    if message is None:
        check_strategies(loaded, tmp_path, ["grown"], two)
        return
    where = r"grown/after: (training|settings)\." if hooks else "grown/base: training."
    with pytest.raises(ConfigError, match=where + ".*" + message):
        check_strategies(loaded, tmp_path, ["grown"], two)


LATE = """
import os, time
if os.environ.get("RANK") == "0":
    time.sleep(2)
"""
ELSEWHERE = """
import os
if os.environ.get("RANK") == "1":
    os.chdir("/")
"""


@pytest.mark.parametrize(
    ("what_happens", "options", "message"),
    [
        (LATE, ["--set", "training.strategy=shraded"], "training.strategy: must be"),
        (ELSEWHERE, [], "recipe.yaml does not exist"),
    ],
    ids=["late", "elsewhere"],
)
def test_a_mistake_is_told_whichever_process_meets_it_first(
    recipe, tmp_path, monkeypatch, what_happens, options, message
):
    """torchrun ends the others when one has ended: also where the one that speaks is late, or has nothing to say."""
    (tmp_path / "sitecustomize.py").write_text(what_happens)
    monkeypatch.chdir(recipe.parent)
    launch = command(Path(recipe.name), tmp_path / "run", *options)
    ended = outcome(started(launch, PYTHONPATH=f"{tmp_path}:{SOURCES}"))
    assert ended.returncode != 0
    assert ended.stdout.count(message) == 1, ended.stdout


def test_what_runs_side_by_side_is_not_for_processes_that_train_together(recipe):
    """Seeds and jobs have processes of their own."""
    loaded = load_recipe(str(recipe))
    refuse_together(loaded, jobs=1)
    with pytest.raises(ConfigError, match="jobs: 2: torchrun's processes train one model together"):
        refuse_together(loaded, jobs=2)
    with pytest.raises(ConfigError, match=r"seeds: \[0, 1\]: torchrun's processes train one model together"):
        refuse_together(load_recipe(str(recipe), ["seeds=[0, 1]"]), jobs=1)
