"""Recipes that learn a stream: killed in the middle of a shard, without the cache, by several processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from auxin import cli
from auxin.data.shard_cache import INDEX
from auxin.data.streamed_text import SHARDS, StreamedText
from auxin.errors import ConfigError
from auxin.recipes import Recipe, run_recipe
from recipes.test_together import command
from recipes.torchruns import LONGEST, children, environment, outcome, started
from streams import documents, stream_of, write_parquet

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}
TOKENS = {"qkv_tokens": 8, "proj_tokens": 8, "ffn_tokens": 32}
MORE = {"qkv_tokens": 16, "proj_tokens": 16, "ffn_tokens": 64}
FINAL = "branches/grown/04-after/checkpoints/step-00000060/model.safetensors"
STEPS = (40, 60)
BATCH = 4


@pytest.fixture(scope="module")
def values(tmp_path_factory) -> dict:
    """A TokenFormer that is grown on the way, on a stream of many files, in several epochs."""
    folder = tmp_path_factory.mktemp("stream")
    for number in range(12):
        write_parquet(folder / f"corpus/{number:02}.parquet", documents(12, 12 * number), rows=6)
    stages = [
        {"kind": "build", "model_type": "tokenformer", "config": {**SIZES, **TOKENS}},
        {"kind": "train", "name": "base", "settings": {"steps": STEPS[0], "decay_fraction": 0.0}},
        {"kind": "change", "name": "grow", "tokens": MORE},
        {"kind": "train", "name": "after", "settings": {"tokens": STEPS[1] * BATCH * 8}},
    ]
    return {
        "name": "streamed",
        "title": "Streamed",
        "data": {"kind": "streamed_text", **stream_of(folder, folder / "corpus/*.parquet", shuffle_shards=3)},
        "training": {"batch_size": BATCH, "learning_rate": 3e-3, "tensorboard": False, "checkpoint_interval": 7},
        "branches": [{"name": "grown", "title": "grown", "stages": stages}],
        "main_branch": "grown",
    }


@pytest.fixture(scope="module")
def whole(values, tmp_path_factory) -> Path:
    """The run, left alone."""
    output = tmp_path_factory.mktemp("whole") / "run"
    run_recipe(Recipe.parse(values), output, "", announce=lambda line: None)
    return output


DIES = """
import os, signal, sys, threading, time
from pathlib import Path
import torch
from auxin.recipes import load_recipe, run_recipe

torch.set_num_threads(1)
recipe, output, begun = sys.argv[1:]

def watch():
    while not (Path(output) / begun).exists():
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=watch, daemon=True).start()
run_recipe(load_recipe(recipe), output, "", announce=lambda line: None)
"""


def test_killed_in_the_middle_of_a_shard_it_ends_in_the_same_bits(values, whole, tmp_path):
    """At whatever step it has come to behind the checkpoint; with it dies what works ahead."""
    Recipe.parse(values).to_yaml(tmp_path / "recipe.yaml")
    words = [str(tmp_path / "recipe.yaml"), str(tmp_path / "run"), "branches/grown/04-after/checkpoints/step-00000028"]
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", DIES, *words], env=environment(), timeout=LONGEST)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "run/results.json").exists()
    run_recipe(Recipe.parse(values), tmp_path / "run", "", announce=lambda line: None)
    assert same_weights(whole, tmp_path / "run")


def same_weights(one: Path, other: Path) -> bool:
    left, right = load_file(one / FINAL), load_file(other / FINAL)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_without_the_cache_and_with_other_readers_it_ends_in_the_same_bits(values, whole, tmp_path):
    """Stopped after the first stage, all of the cache is gone, processes read, and room is for nothing but windows."""
    output = tmp_path / "run"
    first = {**values, "branches": [{**values["branches"][0], "stages": values["branches"][0]["stages"][:2]}]}
    told: list[str] = []
    run_recipe(Recipe.parse(first), output, "", announce=told.append)
    assert any("about" in line and line.endswith("tokens to learn from") for line in told), told
    assert not working_ahead(output)
    shutil.rmtree(output / "data" / SHARDS)
    changed = {**values["training"], "num_workers": 2}
    rest = {**values, "training": changed, "data": {**values["data"], "cache_bytes": 0}}
    run_recipe(Recipe.parse(rest), output, "", announce=lambda line: None)
    assert same_weights(whole, output)
    kept = list((output / "data" / SHARDS).glob("*.npy"))
    assert len(kept) <= 3 * 3
    assert not working_ahead(output)


def working_ahead(output: Path) -> list[int]:
    """Processes of this one that tokenize for a run."""
    folder = str(output / "data").encode()
    return [child for child in children(os.getpid()) if folder in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_what_was_learnt_is_the_stream_and_the_books_say_how_much(whole):
    """The stages together go once through what an order from the beginning gives, and waiting for data is told."""
    data = StreamedText.load(whole / "data")
    records = [json.loads(line)[0] for line in (whole / "data" / SHARDS / INDEX).read_text().splitlines()]
    assert len(records) == len(data.plan.shards) == 24
    assert sum(record["contexts"] for record in records) < sum(STEPS) * BATCH  # more than an epoch
    stages = json.loads((whole / FINAL).parent.joinpath("ledger.json").read_text())["stages"]
    assert [stage["units"] for stage in stages if stage["kind"] == "train"] == [steps * BATCH * 8 for steps in STEPS]
    lines = [json.loads(line) for line in (whole / "branches/grown/04-after/metrics.jsonl").read_text().splitlines()]
    shares = [line["data_share"] for line in lines if "data_share" in line]
    assert shares
    assert all(0 < share < 1 for share in shares)
    assert lines[-1]["data_position"] == sum(STEPS)


def test_a_model_is_scored_on_what_was_held_out_of_a_stream(whole):
    """As the stage has measured it."""
    folder = (whole / FINAL).parent
    (found,) = said("evaluate", folder, whole / "data").values()
    (*_, last) = json.loads((folder / "ledger.json").read_text())["stages"]
    assert found["nats_per_token"] == pytest.approx(last["value_after"], rel=1e-5)
    (*_, largest) = said("show", folder, whole / "data")["nested"]
    assert largest["validation_loss"] == pytest.approx(last["value_after"], rel=1e-5)


def said(command: str, checkpoint: Path, corpus: Path) -> dict:
    result = CliRunner().invoke(cli.app, [command, str(checkpoint), "--corpus", str(corpus), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_several_processes_share_the_cache_and_end_where_one_ends(values, whole, tmp_path):
    """To rounding. Each shard is tokenized once."""
    Recipe.parse(values).to_yaml(tmp_path / "recipe.yaml")
    ended = outcome(started(command(tmp_path / "recipe.yaml", tmp_path / "run")))
    assert ended.returncode == 0, ended.stderr
    left, right = load_file(whole / FINAL), load_file(tmp_path / "run" / FINAL)
    assert max(float((left[name] - right[name]).abs().max()) for name in left) < 1e-5
    index = (tmp_path / "run/data" / SHARDS / INDEX).read_text().splitlines()
    assert len(index) == len({json.loads(line)[0]["shard"] for line in index}) == 24


def test_room_for_shards_may_change_and_what_decides_batches_may_not(values, whole):
    changed = {**values, "data": {**values["data"], "cache_bytes": 10**6}}
    run_recipe(Recipe.parse(changed), whole, "", announce=lambda line: None)
    changed["data"]["shuffle_shards"] = 2
    with pytest.raises(ConfigError, match=r"data.shuffle_shards: 3 there, 2 asked"):
        run_recipe(Recipe.parse(changed), whole, "", announce=lambda line: None)
