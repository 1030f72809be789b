"""What a model in pieces costs beyond its training: saving it, and changing its size where it lies.

Saving: a Llama of some 25 million parameters with its moments, by one process and by two; how long training waits for a
checkpoint that is written in pieces in the background, when that is there, and how long for one that is written whole.
Growing: the most that a process of two and of four holds while a plan is carried out, by torch's MemTracker, beside
what it holds of the old and the new model and their moments. Weights, gradients and moments are random.

    python benchmarks/pieces.py
    python benchmarks/pieces.py --quick

Each measurement is started by torchrun, as a user's training is. Some five minutes of two cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import made_by, made_by_line, publish
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import auxin
from auxin.accounting import Ledger
from auxin.edits.resolution import ResolvedPlan
from auxin.models import TokenFormerConfig, TokenFormerForCausalLM
from auxin.report.markdown import markdown_table
from auxin.training import TrainingSettings, apply_in_pieces, growth
from auxin.training.guard import Guard
from auxin.training.keeper import Keeper
from auxin.training.optimizer import build_optimizer, optimizer_tensors
from auxin.training.ranks import Ranks, joined
from auxin.training.saving import Saver
from auxin.training.state import TrainingState
from auxin.training.strategies import Copies, Sharded

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "pieces.json"
PAGE = ROOT / "docs" / "results" / "pieces.md"
SIZES, QUICK_SIZES = {"width": 384, "layers": 8, "words": 16384}, {"width": 64, "layers": 2, "words": 512}
PLANS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama, HyperCloning by 2": ("hypercloning", {"factor": 2}),
    "Llama, stacking to twice the layers": ("stacking", {}),
    "Llama, LoRA-like factors (Greenformers)": ("greenformers", {"rank": 0.25, "solver": "svd"}),
    "TokenFormer, twice the tokens": ("tokenformer", {}),
}
ROUNDS = 5
MB = 1e6
Row = dict[str, Any]


def model_of(kind: str, width: int, layers: int, words: int) -> PreTrainedModel:
    """The untrained model, always the same."""
    torch.manual_seed(0)
    sizes = {"vocab_size": words, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 32}
    if kind == "Llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=8 * width // 3, max_position_embeddings=128))
    tokens = {"qkv_tokens": width, "proj_tokens": width, "ffn_tokens": 4 * width}
    return TokenFormerForCausalLM(TokenFormerConfig(**sizes, **tokens, max_position_embeddings=128))


def stepped(model: PreTrainedModel) -> Optimizer:
    """AdamW with both moments of every parameter."""
    optimizer = build_optimizer(model, TrainingSettings(steps=1))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def saved(ranks: Ranks, folder: Path, sizes: dict[str, int], rounds: int) -> Row:
    """Seconds for which training waits, and until a checkpoint is there."""
    model = model_of("Llama", **sizes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    strategy = Sharded(ranks) if ranks.several else Copies(ranks)
    strategy.place(model)
    folder.mkdir(exist_ok=True)
    saver = Saver(Keeper(folder, ranks, keep=1, tensorboard=False), strategy, None)
    state = TrainingState(model, stepped(model), (), Guard(TrainingSettings(steps=1).guard), 0, 0)
    times: dict[str, list[float]] = {"waits": [], "is there": [], "whole": []}
    for kind in [*["waits"] * rounds, *["whole"] * rounds]:
        state.step += 1
        began = time.perf_counter()
        saver.save(state, Ledger(), {"state": {}}, is_last=kind == "whole")
        times[kind].append(time.perf_counter() - began)
        saver.settle()
        if kind == "waits":
            times["is there"].append(time.perf_counter() - began)
    saver.close()
    return {"parameters": parameters, **{name: statistics.median(values) for name, values in times.items()}}


def grown(ranks: Ranks, name: str, sizes: dict[str, int]) -> Row:
    """The most that this process holds while a plan is carried out, and what it holds before and after; in bytes."""
    method, settings = PLANS[name]
    whole = model_of(name.partition(",")[0], **sizes)
    settings = {**settings, **growth_settings(method, sizes)}
    plan = auxin.plan(whole, method, **settings)
    largest_before = max(bytes_of([parameter]) for parameter in whole.parameters())
    Sharded(ranks).place(whole)
    optimizer = stepped(whole)
    before, peaks = bytes_of(held(whole, optimizer)), list[int]()
    carry = growth.carry

    def tracked(resolved: ResolvedPlan, seed: int, store: growth._Pieces) -> list[str]:
        tracker = MemTracker()
        tracker.track_external(whole, optimizer, store.made)
        with tracker:
            fresh = carry(resolved, seed, store)
        peaks.append(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])
        return fresh

    growth.carry = tracked
    made, _ = apply_in_pieces(plan, whole, optimizer)
    largest = max(parameter.numel() * parameter.element_size() for parameter in made.parameters())
    everything = sum(3 * parameter.numel() * parameter.element_size() for parameter in made.parameters())
    return {
        "peak": peaks[0],
        "before": before,
        "after": bytes_of(held(made, optimizer)),
        "largest": [largest_before, largest],
        "new model whole": everything,
    }


def growth_settings(method: str, sizes: dict[str, int]) -> dict[str, Any]:
    """What of a plan's settings depends on the model."""
    width = sizes["width"]
    more = {"qkv_tokens": 2 * width, "proj_tokens": 2 * width, "ffn_tokens": 8 * width}
    return {"stacking": {"layers": 2 * sizes["layers"]}, "tokenformer": more}.get(method, {})


def held(model: PreTrainedModel, optimizer: Optimizer) -> list[Tensor]:
    """What lies in this process of a model and its optimizer."""
    tensors = [*model.parameters(), *optimizer_tensors(model, optimizer).values()]
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def bytes_of(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def take_part(arguments: argparse.Namespace) -> None:
    """What a process of torchrun does; the leader writes what it found."""
    sizes = QUICK_SIZES if arguments.quick else SIZES
    with joined() as ranks:
        if arguments.what == "saving":
            row = saved(ranks, arguments.folder / "run", sizes, 1 if arguments.quick else ROUNDS)
        else:
            row = grown(ranks, arguments.what, sizes)
        if ranks.leads:
            (arguments.folder / "row.json").write_text(json.dumps(row))


def measured(what: str, processes: int, quick: bool) -> Row:
    """Run so many processes; what their leader found."""
    with tempfile.TemporaryDirectory() as folder:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", __file__]
        options = ["--folder", folder, "--what", what, *(["--quick"] if quick else [])]
        subprocess.run([sys.executable, "-W", "ignore", *launch, *options], check=True)
        row = json.loads((Path(folder) / "row.json").read_text())
    print(what, processes, row, file=sys.stderr, flush=True)
    return {"what": what, "processes": processes, **row}


def page(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    saving = [row for row in results["rows"] if row["what"] == "saving"]
    growing = [row for row in results["rows"] if row["what"] != "saving"]
    times = [
        [
            str(row["processes"]),
            "in pieces, in the background" if row["processes"] > 1 else "whole, at once",
            f"{row['waits']:.2f}",
            f"{row['is there']:.2f}",
            f"{row['whole']:.2f}",
        ]
        for row in saving
    ]
    bytes_held = [
        [
            row["what"],
            str(row["processes"]),
            *(f"{row[name] / MB:.1f}" for name in ("before", "after", "peak")),
            f"{(row['peak'] - row['before'] - row['after']) / sum(row['largest']):.2f}",
            f"{row['new model whole'] / MB:.1f}",
        ]
        for row in growing
    ]
    return "\n".join([
        "# Models in pieces: saving and growing",
        "",
        f"{made_by_line(results)} Weights, gradients and moments are random; no training took place.",
        "",
        "## Saving",
        "",
        f"A Llama of {saving[0]['parameters']:,} parameters and AdamW's moments of all of them, in float32: seconds "
        "for which training waits for a checkpoint, until it is there, and for the last one of a stage, which is "
        f"whole; medians of {results['rounds']}. All processes share one disk and two cores, on which training would "
        "go on.",
        "",
        *markdown_table(["processes", "a checkpoint", "training waits", "is there", "the last one, whole"], times),
        "",
        "## Growing",
        "",
        "Megabytes of tensors that the leader holds: weights and moments before, those after, and the most while a "
        "plan is carried out (torch's MemTracker, without the runs on the probe). What is beyond both, in units of the "
        "largest tensor before and the largest after together: what a tensor is gathered from, is made of, and "
        "becomes. Beside it what the new model and its moments take whole.",
        "",
        *markdown_table(
            ["plan", "processes", "before", "after", "peak", "beyond, in tensors", "new, whole"], bytes_held
        ),
    ]) + "\n"  # fmt: skip


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models, to see that it runs; writes nothing")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--what", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.what is not None:
        take_part(arguments)
        sys.stdout.flush()
        os._exit(0)  # as the command line does
    rows = [measured("saving", size, arguments.quick) for size in ((2,) if arguments.quick else (1, 2))]
    for name in PLANS:
        rows += [measured(name, size, arguments.quick) for size in ((2,) if arguments.quick else (2, 4))]
    results = {**made_by("python benchmarks/pieces.py"), "rounds": ROUNDS, "rows": rows}
    publish(results, RESULTS, page(results), PAGE, arguments.quick)


if __name__ == "__main__":
    main()
