"""A run that is killed in the middle of a stage, and what it comes to when it is finished."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from auxin.recipes import Recipe, run_recipe

DIES = """
import os, signal, sys
from pathlib import Path
import torch
from auxin.recipes import load_recipe, run_recipe

torch.set_num_threads(1)
recipe, output, begun = sys.argv[1:]

def announce(line):
    if (Path(output) / begun).exists():
        os.kill(os.getpid(), signal.SIGKILL)

run_recipe(load_recipe(recipe), output, "", announce=announce)
"""


def check_killed_and_finished(recipe: Recipe, folder: Path, begun: str, final: str, whole: Path) -> None:
    """Fail where a run that dies once it has something in `begun`, and is run again, ends with other weights in `final`
    than the one in `whole`, which ran through."""
    recipe.to_yaml(folder / "recipe.yaml")
    command = [sys.executable, "-c", DIES, str(folder / "recipe.yaml"), str(folder / "out"), begun]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.DEVNULL, env=environment)
    assert done.returncode == -signal.SIGKILL
    assert not (folder / "out/results.json").exists()
    run_recipe(recipe, folder / "out", "", announce=lambda line: None)
    left, right = load_file(whole / final), load_file(folder / "out" / final)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
