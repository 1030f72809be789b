"""What FSDP2's mixed-precision policy would change: losses, and bytes that are gathered in a step.

Two processes train tiny models in pieces, in bfloat16: as it is here, with weights gathered in float32 and autocast;
and with layers' weights gathered in bfloat16, which FSDP2 calls a MixedPrecisionPolicy. One process is beside them.

    python benchmarks/gathered_precision.py
    python benchmarks/gathered_precision.py --quick

Each training is started by torchrun. Some three minutes of two cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from measuring import made_by, made_by_line, publish
from processes import BATCH, LENGTH, MODELS, PART, model_of, text
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from auxin.report.markdown import markdown_table
from auxin.training import TrainingSettings, strategies, train
from auxin.training.metrics import metrics_in
from auxin.training.ranks import joined

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gathered_precision.json"
PAGE = ROOT / "docs" / "results" / "gathered_precision.md"
STEPS, QUICK = 50, 4
WAYS = {"one process": 1, "autocast": 2, "policy": 2}
"""And how many processes train so."""
POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
Row = dict[str, Any]


class Gathered(TorchDispatchMode):
    """Counts bytes of what is gathered."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.name() == "c10d::_allgather_base_":
            self.bytes += args[0].nbytes
        return function(*args, **(kwargs or {}))


def by_policy(module: torch.nn.Module, **how: Any) -> None:
    """`fully_shard`, layers in bfloat16."""
    fully_shard(module, **how, **({} if isinstance(module, PreTrainedModel) else {"mp_policy": POLICY}))


def take_part(name: str, way: str, steps: int, folder: Path) -> None:
    """What a process of torchrun does."""
    settings = TrainingSettings(
        steps=steps, batch_size=BATCH, micro_batch_size=PART, learning_rate=3e-3, warmup_steps=2, log_interval=1,
        evaluation_batches=1, tensorboard=False, strategy="sharded", precision="bfloat16", device="cpu",
    )  # fmt: skip
    found: Row = {}
    shard = by_policy if way == "policy" else fully_shard
    with patch.object(strategies, "fully_shard", shard), joined() as ranks, Gathered() as gathered:
        try:
            train(model_of(name), text(), settings, folder, ranks=ranks, progress=False)
        except RuntimeError as error:
            found["error"] = str(error).splitlines()[0]
    found["bytes"] = gathered.bytes
    if ranks.leads:
        (folder / "found.json").write_text(json.dumps(found))


def measured(name: str, way: str, steps: int, folder: Path) -> Row:
    """Losses of all steps, or what went wrong; bytes gathered in all of it."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WAYS[way]}", __file__]
    options = ["--folder", folder, "--model", name, "--way", way, "--steps", steps]
    subprocess.run([sys.executable, "-W", "ignore", *launch, *map(str, options)], check=True)
    found: Row = json.loads((folder / "found.json").read_text())
    losses = [] if "error" in found else [line["loss"] for line in metrics_in(folder) if "loss" in line]
    return {"model": name, "way": way, "losses": losses, **found}


def page_of(results: Row) -> str:
    """The results as Markdown."""
    rows = {(row["model"], row["way"]): row for row in results["rows"]}
    table = []
    for name in MODELS:
        one, autocast, policy = (rows[name, way] for way in WAYS)
        apart = ["-" if not row["losses"] else f"{_apart(one, row):.1e}" for row in (autocast, policy)]
        sent = ["-" if not row["losses"] else f"{row['bytes'] / 2**20:,.1f}" for row in (autocast, policy)]
        between = "-" if not policy["losses"] else f"{_apart(autocast, policy):.1e}"
        table.append([name, *apart, between, *sent, policy.get("error", "")])
    header = (
        "model",
        "autocast",
        "policy",
        "policy to autocast",
        "MiB, autocast",
        "MiB, policy",
        "error of the policy",
    )
    return "\n".join([
        "# Weights gathered in bfloat16",
        "",
        f"{STEPS} steps of {BATCH} contexts of {LENGTH} bytes in micro-batches of {PART}, in bfloat16 on CPUs: how far "
        "the training losses of two processes that have a model in pieces are from those of one process at most; and "
        "what is gathered in all of it, evaluations included. autocast: weights are gathered in float32, and products "
        "are of their values in bfloat16, as in one process. policy: FSDP2's MixedPrecisionPolicy gathers layers in "
        "bfloat16; what lies outside of them stays in float32.",
        "",
        made_by_line(results),
        "",
        *markdown_table(header, table),
    ]) + "\n"  # fmt: skip


def _apart(one: Row, other: Row) -> float:
    return max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True))


def main() -> None:
    """Measure, or take part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps; nothing is written")
    for name in ("model", "way"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.folder is not None:
        take_part(arguments.model, arguments.way, arguments.steps, arguments.folder)
        sys.stdout.flush()
        os._exit(0)  # as the command line does
    steps = QUICK if arguments.quick else STEPS
    with tempfile.TemporaryDirectory() as work:
        folders = {(name, way): Path(work) / f"{name} {way}" for name in MODELS for way in WAYS}
        rows = [measured(name, way, steps, folder) for (name, way), folder in folders.items()]
    results = {**made_by("python benchmarks/gathered_precision.py"), "rows": rows}
    publish(results, RESULTS, page_of(results), PAGE, arguments.quick)


if __name__ == "__main__":
    main()
