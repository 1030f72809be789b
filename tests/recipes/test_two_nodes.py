"""Two torchruns, each of which is a machine to the other: at an address and under a name of its own."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from recipes.torchruns import (
    SOURCES,
    TORCHRUN,
    free_port,
    needs_proc,
    outcome,
    run_alone,
    same_end,
    saved,
    started,
    wait_until,
    workers,
    write_recipe,
)

NAMED = """
import os, platform
name = "node" + os.environ["NODE"]
platform.node = lambda: name
"""
"""Read by Python when it starts: processes of another machine can't be looked for, only listened to."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """What they do."""
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory) -> Path:
    """What one torchrun with two workers comes to."""
    return run_alone(recipe, tmp_path_factory.mktemp("alone") / "run")


def nodes(recipe: Path, output: Path, names: Path, *options: str) -> list[subprocess.Popen[str]]:
    """A torchrun for each node; in the options, `NODE` is its number."""
    names.mkdir(exist_ok=True)
    (names / "sitecustomize.py").write_text(NAMED)
    found = []
    for node in (0, 1):
        own = [option.replace("NODE", str(node)) for option in options]
        launch = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", f"--local-addr=127.0.0.{node + 1}", *own]
        command = [*launch, "-m", "auxin", "run", str(recipe), "-o", str(output)]
        found.append(started(command, PYTHONPATH=f"{names}{os.pathsep}{SOURCES}", NODE=str(node)))
    return found


def test_two_machines_end_in_the_bits_of_one_with_two_workers(recipe, alone, tmp_path):
    """They meet at an address that is the first one's, and each has its number."""
    meeting = (f"--master-port={free_port()}", "--master-addr=127.0.0.1", "--node-rank=NODE")
    for node in nodes(recipe, tmp_path / "run", tmp_path / "names", *meeting):
        how = outcome(node)
        assert how.returncode == 0, how.stdout
    assert same_end(tmp_path / "run", alone)


@needs_proc
@pytest.mark.parametrize(("rank", "step"), [(0, None), (1, 10)])
def test_both_start_again_when_a_process_of_one_of_them_dies(recipe, alone, tmp_path, rank, step):
    """The leader before there is anything to train, for which the other waits without asking: its torchrun is told by
    the leader's, and counts no restart. And the follower within a step, which both torchruns see."""
    output = tmp_path / "run"
    meeting = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.2:{free_port()}", "--rdzv-id=two", "--max-restarts=1")
    both = nodes(recipe, output, tmp_path / "names", *meeting)
    wait_until(lambda: (output / "recipe.yaml").exists() if step is None else saved(output, step), *both)
    by_rank = {found: process for node in both for found, process in workers(node.pid).items()}
    os.kill(by_rank[rank], signal.SIGKILL)
    for node in both:
        how = outcome(node)
        assert how.returncode == 0, how.stdout
    assert same_end(output, alone)
