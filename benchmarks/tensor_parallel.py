"""Several processes that each compute a part of every layer, beside one: how far apart they end, and what one holds.

    python benchmarks/tensor_parallel.py
    python benchmarks/tensor_parallel.py --quick

The trainings are those of `processes.py`, which starts them, of TokenFormers without and with norms of scores and of a
Llama, whose heads three processes can't divide. Some ten minutes of two cores.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import asked_quick, made_by, made_by_line, publish
from processes import APART, LENGTH, NORMS, QUICK, STEPS, apart, bytes_of, model_of, started

from auxin.report.markdown import markdown_table
from auxin.training import TrainingSettings
from auxin.training.divided_linear import DividedLinear
from auxin.training.optimizer import build_optimizer
from auxin.training.ranks import joined
from auxin.training.tensor_parallel import Split

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "tensor_parallel.json"
PAGE = ROOT / "docs" / "results" / "tensor_parallel.md"
CELLS = {
    (NORMS, "float64"): ((2, "replicated"), (2, "tensor"), (3, "tensor"), (4, "tensor")),
    (NORMS, "float32"): ((2, "replicated"), (2, "tensor"), (4, "tensor")),
    ("TokenFormer", "float64"): ((2, "tensor"), (3, "tensor"), (4, "tensor")),
    ("TokenFormer", "float32"): ((2, "tensor"), (4, "tensor")),
    ("Llama", "float32"): ((2, "tensor"), (4, "tensor")),
}
"""What is trained, by how many processes in which way. Copies tell how much a training makes of rounding."""
HELD = "--held"
Row = dict[str, Any]


def hold(name: str, folder: Path) -> None:
    """What a process of torchrun does: note the bytes of its parameters, gradients and moments after a step."""
    model = model_of(name)
    with joined() as ranks:
        Split(ranks, DividedLinear(model, ranks.size)).place(model)
        optimizer = build_optimizer(model, TrainingSettings(steps=1))
        ids = torch.zeros(1, LENGTH, dtype=torch.long)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        parameters = list(model.parameters())
        moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        held = sum(bytes_of(tensor) for tensor in [*parameters, *(p.grad for p in parameters), *moments])
        (folder / f"{ranks.rank}.json").write_text(json.dumps(held))


def held_by(name: str, size: int) -> Row:
    """What the process that holds most does, and what one process alone would."""
    with tempfile.TemporaryDirectory() as folder:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", __file__]
        subprocess.run([sys.executable, "-W", "ignore", *launch, HELD, name, folder], check=True)
        found = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    model = model_of(name)
    embedding = bytes_of(model.get_input_embeddings().weight)
    whole = sum(bytes_of(parameter) for parameter in model.parameters())
    return {"model": name, "processes": size, "whole": 4 * whole, "embedding": 4 * embedding, "largest": max(found)}


def measured(work: Path, steps: int) -> list[Row]:
    """All trainings, beside that of one process."""
    rows = []
    for (name, type), ways in CELLS.items():
        alone = started(work / f"{name}-{type}-1", 1, "replicated", name, type, steps)
        for size, strategy in ways:
            folder = started(work / f"{name}-{type}-{size}-{strategy}", size, strategy, name, type, steps)
            row = {"model": name, "type": type, "processes": size, "strategy": strategy, **apart(alone, folder)}
            print(row, flush=True)
            rows.append(row)
    return rows


def page_of(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    names = ("loss", "validation_loss", "weights", "moments")
    apart_rows = [
        [row["model"], row["type"], str(row["processes"]), row["strategy"], *(f"{row[name]:.1e}" for name in names)]
        for row in results["apart"]
    ]
    held_rows = [
        [row["model"], str(row["processes"]), *(f"{row[key]:,}" for key in ("whole", "embedding", "largest"))]
        for row in results["held"]
    ]
    return "\n".join([
        "# Tensor parallelism beside one process",
        "",
        f"The trainings of [processes.md](processes.md), {STEPS} steps, by processes that each compute a part of every "
        "layer: the largest difference from one process of a step's training loss, of a held-out loss, and at the end "
        "of a weight and of a moment of the optimizer. Copies are there to compare with: a TokenFormer with norms of "
        "scores makes more of rounding than one without.",
        "",
        f"{made_by_line(results)} Seed 0.",
        "",
        *markdown_table(APART, apart_rows),
        "",
        "## What a process holds",
        "",
        "Bytes of parameters, gradients and moments after a step, in single precision: of the process that holds most. "
        "Embedding and norms are whole in each.",
        "",
        *markdown_table(("model", "processes", "of one process", "its embedding's", "of the largest"), held_rows),
    ]) + "\n"  # fmt: skip


def main() -> None:
    """Measure, or take part."""
    torch.set_num_threads(1)
    if HELD in sys.argv:
        hold(sys.argv[-2], Path(sys.argv[-1]))
        return
    quick = asked_quick(__doc__)
    with tempfile.TemporaryDirectory() as work:
        rows = measured(Path(work), QUICK if quick else STEPS)
    held = [held_by(name, size) for name in ("TokenFormer", "Llama") for size in (2, 4)]
    results = {**made_by("python benchmarks/tensor_parallel.py"), "seed": 0, "apart": rows, "held": held}
    publish(results, RESULTS, page_of(results), PAGE, quick)


if __name__ == "__main__":
    main()
