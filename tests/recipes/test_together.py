"""Recipes that torchrun's processes run together, workers that are killed among them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from auxin.accounting import Ledger
from auxin.errors import ConfigError
from auxin.recipes import load_recipe, refuse_together
from auxin.training import latest_checkpoint
from corpora import small_corpus, write_documents
from training.tiny import checkpoint_bits

SOURCES = Path(__file__).parents[2] / "src"
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}
TOKENS = {"qkv_tokens": 8, "proj_tokens": 8, "ffn_tokens": 32}
MORE = {"qkv_tokens": 16, "proj_tokens": 16, "ffn_tokens": 64}
LAST = "branches/grown/04-after"
LONGEST = 300
"""Seconds that a run may take on a machine that is busy with others."""


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


def environment() -> dict[str, str]:
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**kept, "PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def command(recipe: Path, output: Path, *options: str, processes: int = 2, restarts: int = 0) -> list[str]:
    """What a user types; with one process, without torchrun."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launch += [f"--max-restarts={restarts}"]
    return [
        *(sys.executable, "-W", "ignore", *(launch if processes > 1 else [])),
        *("-m", "auxin", "run", str(recipe), "-o", str(output), *options),
    ]


def finished(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """How the command ended; what hangs is told by who waits for it, and does not outlive the test."""
    with subprocess.Popen(
        arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=LONGEST)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            out, err = process.communicate()
            raise AssertionError(f"still at work after {LONGEST} s: {out}{err}") from None
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@pytest.fixture(scope="module")
def together(recipe, tmp_path_factory) -> Path:
    """The run of two processes with copies of the model, left alone."""
    output = tmp_path_factory.mktemp("together") / "run"
    ended = finished(command(recipe, output, "--set", "training.strategy=replicated"))
    assert ended.returncode == 0, ended.stderr
    return output


def far(one: Path, other: Path) -> float:
    weights = [load_file(latest_checkpoint(folder / LAST) / "model.safetensors") for folder in (one, other)]
    return max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])


def test_a_recipe_with_a_growth_ends_where_one_process_ends(recipe, together, tmp_path):
    """To rounding, in pieces too; the books are the same, and the report is there."""
    assert finished(command(recipe, tmp_path / "alone", processes=1)).returncode == 0
    ended = finished(command(recipe, tmp_path / "sharded", "--set", "training.strategy=sharded", "--branches", "grown"))
    assert ended.returncode == 0, ended.stderr
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


def workers(of: int) -> dict[int, int]:
    """The living processes that a torchrun has started, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            values = folder.joinpath("environ").read_bytes().split(b"\0") if parent == of else []
        except (OSError, ValueError):
            continue
        found |= {int(value.removeprefix(b"RANK=")): int(folder.name) for value in values if value[:5] == b"RANK="}
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="workers are found in /proc, which this system does not have")
@pytest.mark.parametrize(("rank", "strategy"), [(0, "replicated"), (1, "sharded")])
def test_a_worker_that_is_killed_changes_no_bit(recipe, together, tmp_path, rank, strategy):
    """SIGKILL in the middle of the second training; torchrun starts both again, and they go on from what is saved."""
    output = tmp_path / "run"
    options = ("--set", f"training.strategy={strategy}", "--branches", "grown")
    with subprocess.Popen(
        command(recipe, output, *options, restarts=1),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        while process.poll() is None and not (output / LAST / "checkpoints" / "step-00000010").is_dir():
            time.sleep(0.01)
        os.kill(workers(process.pid)[rank], signal.SIGKILL)
        told, _ = process.communicate(timeout=LONGEST)
    assert process.returncode == 0, told.decode()
    assert (output / "report.html").exists()
    if strategy == "replicated":
        assert checkpoint_bits(latest_checkpoint(output / LAST)) == checkpoint_bits(latest_checkpoint(together / LAST))
    else:
        assert far(output, together) < 1e-5


def test_a_mistake_is_told_once_and_nothing_is_begun(recipe, tmp_path):
    """One process speaks for all."""
    ended = finished(command(recipe, tmp_path / "run", "--set", "training.batch_size=1"))
    assert ended.returncode != 0
    assert (ended.stdout + ended.stderr).count("batch_size: 1 samples can't be shared by 2 processes") == 1
    assert not (tmp_path / "run" / LAST).exists()


def test_what_runs_side_by_side_is_not_for_processes_that_train_together(recipe):
    """Seeds and jobs have processes of their own."""
    loaded = load_recipe(str(recipe))
    refuse_together(loaded, jobs=1)
    with pytest.raises(ConfigError, match="jobs: 2: torchrun's processes train one model together"):
        refuse_together(loaded, jobs=2)
    with pytest.raises(ConfigError, match=r"seeds: \[0, 1\]: torchrun's processes train one model together"):
        refuse_together(load_recipe(str(recipe), ["seeds=[0, 1]"]), jobs=1)
