"""What two processes that train together tell each other in each step beside gradients, and what it costs.

Each kind of exchange is timed alone, in rounds of many calls between two meetings, by turns; beside it stands a step of
a small TokenFormer. Started by torchrun, with gloo, on one machine. What else runs on it makes both wait: the least of
the rounds counts, and the median says how busy the machine was.

    python benchmarks/step_exchanges.py            a minute on two free cores
    python benchmarks/step_exchanges.py --quick    a few calls, to see that it runs
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measuring import asked_quick, made_by, made_by_line, publish
from processes import BATCH, PART, model_of, text

from auxin.report.markdown import markdown_table
from auxin.training import TrainingSettings, train
from auxin.training.metrics import metrics_in
from auxin.training.ranks import Ranks, joined

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "step_exchanges.json"
PAGE = ROOT / "docs" / "results" / "step_exchanges.md"
CALLS, ROUNDS, STEPS = 200, 15, 100
KINDS = {
    "note the step in the store, and that one waits": "notes",
    "ask whether one has been told to stop": "stop",
    "add up the loss": "loss",
    "find which parameters have a gradient": "used",
}
"""What is said in a step, in its order, and its name here."""


def exchanges(ranks: Ranks, parameters: int) -> dict[str, Callable[[], object]]:
    """What is done for each kind, once in a step."""

    def notes() -> None:
        ranks.begin_step(1)
        ranks.wait_for_others()

    return {
        "notes": notes,
        "stop": lambda: ranks.any(False),
        "loss": lambda: ranks.add_up(torch.zeros((), dtype=torch.float64)),
        "used": lambda: ranks.add_up(torch.ones(parameters)),
    }


def take_part(folder: Path, calls: int, rounds: int, steps: int) -> None:
    """What a process of torchrun does; the leader writes what it finds."""
    model = model_of("TokenFormer")
    parameters = len(list(model.parameters()))
    with joined() as ranks:
        kinds = exchanges(ranks, parameters)
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(rounds):
            for name, call in kinds.items():
                dist.barrier()
                begun = time.perf_counter()
                for _ in range(calls):
                    call()
                seconds[name].append((time.perf_counter() - begun) / calls)
        settings = TrainingSettings(
            steps=steps, batch_size=BATCH, micro_batch_size=PART, log_interval=1, tensorboard=False,
            strategy="replicated",
        )  # fmt: skip
        train(model, text(), settings, folder / "run", ranks=ranks, progress=False)
        if ranks.leads:
            times = [line["seconds"] for line in metrics_in(folder / "run") if "loss" in line]
            found = {"parameters": parameters, "seconds": seconds, "step": steps_of(times)}
            (folder / "found.json").write_text(json.dumps(found))


def steps_of(times: list[float]) -> list[float]:
    """The seconds of each step but the first, from the times at which they ended."""
    return [later - earlier for earlier, later in pairwise(times)]


def page_of(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    step = min(results["step"])
    found = {words: results["seconds"][name] for words, name in KINDS.items()}
    found["all of them"] = [sum(values) for values in zip(*found.values(), strict=True)]
    rows = []
    for words, values in found.items():
        least, median = min(values), statistics.median(values)
        rows.append([words, f"{1e6 * least:.0f}", f"{1e6 * median:.0f}", f"{100 * least / step:.1f} %"])
    return "\n".join([
        "# What processes tell each other in a step",
        "",
        f"Two processes by torchrun and gloo on one machine: microseconds of a call, the least and the median of "
        f"{len(results['seconds']['notes'])} rounds of {results['calls']} calls, and the least beside the shortest of "
        f"{len(results['step'])} steps of a TokenFormer of {results['parameters']} parameter tensors, width 128, four "
        f"layers, {BATCH} contexts of 64 bytes: {1e3 * step:.0f} ms. Gradients go round besides. Where the median is "
        "far above the least, others had the machine.",
        "",
        made_by_line(results),
        "",
        *markdown_table(("in each step", "least", "median", "least of a step"), rows),
    ]) + "\n"  # fmt: skip


def main() -> None:
    """Measure, or take part."""
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        take_part(Path(sys.argv[1]), *map(int, sys.argv[2:]))
        sys.stdout.flush()
        os._exit(0)  # as the command line does
    quick = asked_quick(__doc__)
    calls, rounds, steps = (5, 2, 4) if quick else (CALLS, ROUNDS, STEPS)
    with tempfile.TemporaryDirectory() as folder:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, folder]
        words = [sys.executable, "-W", "ignore", *launch, *map(str, (calls, rounds, steps))]
        subprocess.run(words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        found = json.loads((Path(folder) / "found.json").read_text())
    results = {**made_by("python benchmarks/step_exchanges.py"), "calls": calls, **found}
    publish(results, RESULTS, page_of(results), PAGE, quick)


if __name__ == "__main__":
    main()
