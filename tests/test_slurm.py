"""The script for Slurm, by a stand-in that starts real processes on one machine and signals them as Slurm does.

What stands in: `srun` starts the command once for each node and ends with the highest exit code; `scontrol` names the
nodes and notes what is queued again; `squeue` says what state the job is in. Nothing here has met a real Slurm.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from auxin.training import latest_checkpoint
from recipes.torchruns import (
    STAGE,
    TORCHRUN,
    descendants,
    needs_proc,
    outcome,
    run_alone,
    same_end,
    saved,
    started,
    wait_until,
    write_recipe,
)

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "slurm.sh"
SRUN = """
import os, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    del command[0]
nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
tasks = [subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": str(node)}) for node in range(nodes)]
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("\\n".join(sys.argv[3].split(",")))
elif sys.argv[1] == "requeue":
    with open(os.environ["REQUEUED"], "a") as file:
        file.write(sys.argv[2] + "\\n")
"""
SQUEUE = """
import os
print(os.environ["STATE"])
"""
# Two nodes on one machine, at two of its addresses.
LAUNCH = f"""
import os, sys
address = os.environ["SLURM_JOB_NODELIST"].split(",")[int(os.environ["SLURM_NODEID"])]
command = {TORCHRUN!r} + ["--local-addr", address] + sys.argv[1:]
os.execv(command[0], command)
"""

pytestmark = needs_proc


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """What the jobs do."""
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory) -> Path:
    """What one torchrun with two workers comes to, left alone."""
    return run_alone(recipe, tmp_path_factory.mktemp("alone") / "run")


class Job:
    """A job of two nodes, with one process on each, in a folder with what stands in for Slurm."""

    def __init__(self, folder: Path, recipe: Path) -> None:
        self.output, self._recipe, self._requeued = folder / "run", recipe, folder / "requeued"
        self._programs = folder / "bin"
        self._programs.mkdir()
        for name, code in {"srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE, "torchrun": LAUNCH}.items():
            program = self._programs / name
            program.write_text(f"#!{sys.executable} -I{code}")
            program.chmod(0o755)

    def start(self, state: str = "RUNNING") -> subprocess.Popen[str]:
        """The script, as Slurm's daemon starts it; `state` is what Slurm says of the job from now on."""
        return started(
            ["bash", str(SCRIPT), str(self._recipe), str(self.output)],
            PATH=f"{self._programs}{os.pathsep}{os.environ['PATH']}",
            SLURM_JOB_ID=str(os.getpid()),  # the port goes by it
            SLURM_JOB_NODELIST="127.0.0.1,127.0.0.2",
            SLURM_JOB_NUM_NODES="2",
            PROCESSES_PER_NODE="1",
            REQUEUED=str(self._requeued),
            STATE=state,
        )

    def signal(self, process: subprocess.Popen[str], number: int) -> None:
        """To every process of the job's step, torchrun's workers among them, and not to the script or srun."""
        (srun,) = [one for one in descendants(process.pid) if b"srun" in command_line(one).split(b"\0")[2]]
        for one in descendants(srun):
            os.kill(one, number)

    def queued_again(self) -> int:
        """How often."""
        return len(self._requeued.read_text().splitlines()) if self._requeued.exists() else 0


def command_line(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes() + b"\0\0\0"
    except OSError:
        return b"\0\0\0"


def test_a_job_that_has_to_go_saves_and_is_queued_again_and_ends_in_the_same_bits(recipe, alone, tmp_path):
    """SIGTERM reaches the workers twice: from Slurm, and from torchrun, which has it from Slurm too."""
    job = Job(tmp_path, recipe)
    process = job.start()
    wait_until(lambda: saved(job.output, 20), process)
    job.signal(process, signal.SIGTERM)
    how = outcome(process)
    assert how.returncode == 75, how.stdout
    assert "Interrupted by SIGTERM after step" in how.stdout
    assert how.stdout.count("Stopping after this step") == 2, "one process of each node says so"
    assert job.queued_again() == 1
    step = int(latest_checkpoint(job.output / STAGE).name.removeprefix("step-"))
    assert 20 <= step < 200
    how = outcome(job.start())
    assert how.returncode == 0, how.stdout
    assert f"goes on from step {step} of 200" in how.stdout
    assert job.queued_again() == 1
    assert same_end(job.output, alone)


def test_a_job_that_is_cancelled_is_not_queued_again(recipe, tmp_path):
    job = Job(tmp_path, recipe)
    process = job.start(state="COMPLETING")
    wait_until(lambda: saved(job.output, 10), process)
    job.signal(process, signal.SIGTERM)
    assert outcome(process).returncode == 75
    assert not saved(job.output, 200)
    assert job.queued_again() == 0


def test_a_job_that_fails_is_not_queued_again(recipe, tmp_path):
    """A worker of the second node dies: the first node's gives up, too."""
    job = Job(tmp_path, recipe)
    process = job.start()
    wait_until(lambda: saved(job.output, 10), process)
    (worker,) = [one for one in descendants(process.pid) if b"RANK=1" in variables(one)]
    os.kill(worker, signal.SIGKILL)
    how = outcome(process)
    assert how.returncode == 1
    assert "waited in vain for the others" in how.stdout
    assert job.queued_again() == 0


def variables(process: int) -> list[bytes]:
    try:
        return Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
