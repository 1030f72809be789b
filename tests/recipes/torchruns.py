"""Starts torchrun as a user does, and finds the processes that it has started."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from auxin.training import latest_checkpoint
from corpora import small_corpus, write_documents
from training.tiny import checkpoint_bits

SOURCES = Path(__file__).parents[2] / "src"
STAGE = "branches/main/02-train"
LONGEST = 300
"""Seconds that a run may take on a machine that is busy with others."""
TORCHRUN = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
needs_proc = pytest.mark.skipif(
    not Path("/proc").is_dir(), reason="workers are found in /proc, which this system does not have"
)


def environment(**more: str) -> dict[str, str]:
    """That of a process that nobody has started together with others, of one thread."""
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**kept, "PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **more}


def started(arguments: list[str], **more: str) -> subprocess.Popen[str]:
    """The command, in a session of its own; what it says, on both outputs, is kept for `outcome`."""
    return subprocess.Popen(
        arguments,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def outcome(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """How the command ended, and what it said on either output; what hangs is told, and does not outlive the test."""
    try:
        said = process.communicate(timeout=LONGEST)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        said = process.communicate()[0]
        raise AssertionError(f"still at work after {LONGEST} s: {said}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, said)


def wait_until(found: Callable[[], object], *processes: subprocess.Popen[str]) -> None:
    """Until `found` finds something; fails where one of the processes has ended before."""
    while not found():
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port: int = chosen.getsockname()[1]
        return port


def children(of: int) -> list[int]:
    """The living processes that a process has started, not those that these have."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        found += [int(folder.name)] * (parent == of)
    return found


def descendants(of: int) -> list[int]:
    """All that have come of a process, whatever sessions they are in."""
    return [one for child in children(of) for one in (child, *descendants(child))]


def workers(of: int) -> dict[int, int]:
    """The living processes that a torchrun has started, by rank."""
    found = {}
    for child in children(of):
        try:
            values = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        found |= {int(value.removeprefix(b"RANK=")): child for value in values if value[:5] == b"RANK="}
    return found


def write_recipe(folder: Path) -> Path:
    """The file of a recipe that trains a TokenFormer in 200 steps, long enough to be stopped on the way."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    config = {**sizes, "qkv_tokens": 8, "proj_tokens": 8, "ffn_tokens": 8}
    stages = [
        {"kind": "build", "model_type": "tokenformer", "config": config},
        {"kind": "train", "name": "train", "settings": {"steps": 200}},
    ]
    values = {
        "name": "short",
        "title": "Short",
        "data": small_corpus(write_documents(folder / "documents")),
        "training": {"batch_size": 4, "tensorboard": False, "checkpoint_interval": 10},
        "branches": [{"name": "main", "title": "main", "stages": stages}],
        "main_branch": "main",
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run_alone(recipe: Path, output: Path) -> Path:
    """The folder of what one torchrun with two workers comes to, left alone."""
    launch = [*TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", "auxin", "run", str(recipe), "-o", str(output)]
    how = outcome(started(launch))
    assert how.returncode == 0, how.stdout
    return output


def saved(output: Path, step: int) -> bool:
    """Whether the checkpoint after so many steps is there."""
    return (output / STAGE / "checkpoints" / f"step-{step:08}").is_dir()


def same_end(one: Path, other: Path) -> bool:
    """Whether weights and the whole training state are equal to the bit."""
    return checkpoint_bits(latest_checkpoint(one / STAGE)) == checkpoint_bits(latest_checkpoint(other / STAGE))
