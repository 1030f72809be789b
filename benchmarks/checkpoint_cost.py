"""What saving a checkpoint costs, part by part, beside `save_pretrained` and `torch.save(optimizer.state_dict())`.

A Llama of about 100 million float32 parameters after one step of AdamW is written several times, in turns. Of each part
the median of processor seconds counts, and the largest rise of the resident set's peak over what is there before it
(Linux). The process starts itself anew with one thread, and with memory that is freed going back at once.

    python benchmarks/checkpoint_cost.py            about two minutes on a free core, and 3 GB of disk
    python benchmarks/checkpoint_cost.py --quick    a small model, to see that it runs
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from measuring import asked_quick, made_by, made_by_line, publish, reset_peak, resident
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from auxin.edits.saved import save_model
from auxin.files import flush_tree
from auxin.sums import damage, write_sums
from auxin.training import TrainingSettings, write_checkpoint_folder
from auxin.training.checkpoint import read_training, write_tensors
from auxin.training.optimizer import build_optimizer, optimizer_tensors

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "checkpoint_cost.json"
PAGE = ROOT / "docs" / "results" / "checkpoint_cost.md"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
ROUNDS = 5
MB = 1e6


def stepped(width: int) -> tuple[PreTrainedModel, Optimizer]:
    """A Llama of twelve layers, and its AdamW with both moments of every parameter."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    optimizer = build_optimizer(model, TrainingSettings(steps=1))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def programs(model: PreTrainedModel, optimizer: Optimizer, folder: Path) -> dict[str, Callable[[], object]]:
    """What is measured, in an order in which each finds what it reads; by name."""
    parts, trainer, other = (folder / name for name in ("parts", "trainer", "dcp"))
    for path in (parts / "training", trainer):
        path.mkdir(parents=True)

    def as_a_trainer() -> None:
        model.save_pretrained(trainer)
        torch.save(optimizer.state_dict(), trainer / "optimizer.pt")

    def by_dcp() -> None:
        moments = optimizer_tensors(model, optimizer)
        dcp.save(moments, storage_writer=HuggingFaceStorageWriter(path=str(other)), no_dist=True)

    return {
        "Auxin's weights": lambda: save_model(model, parts),
        "Auxin's moments": lambda: write_tensors(optimizer_tensors(model, optimizer), parts / "training"),
        "Auxin's sums": lambda: write_sums(parts),
        "Auxin's flush": lambda: flush_tree(parts),
        "Auxin's checkpoint, whole": lambda: write_checkpoint_folder(folder / "whole", model, optimizer=optimizer),
        "`save_pretrained` + `torch.save`": as_a_trainer,
        "the moments by torch.distributed.checkpoint": by_dcp,
        "reading: Auxin's sums compared": lambda: damage(parts),
        "reading: Auxin's moments": lambda: read_training(parts),
        "reading: `torch.load` of the moments": lambda: torch.load(trainer / "optimizer.pt", weights_only=True),
    }


def measured(model: PreTrainedModel, optimizer: Optimizer, rounds: int) -> dict[str, dict[str, float]]:
    """Processor seconds and risen megabytes of each program."""
    seconds: dict[str, list[float]] = {}
    rises: dict[str, list[float]] = {}
    for _ in range(rounds):
        folder = Path(tempfile.mkdtemp())
        try:
            for name, program in programs(model, optimizer, folder).items():
                before = resident("VmRSS")
                reset_peak()
                start = time.process_time()
                program()
                seconds.setdefault(name, []).append(time.process_time() - start)
                rises.setdefault(name, []).append((resident("VmHWM") - before) / MB)
        finally:
            shutil.rmtree(folder)
    return {name: {"seconds": statistics.median(seconds[name]), "megabytes": max(rises[name])} for name in seconds}


def page(results: dict[str, Any]) -> str:
    """The page of the results."""
    lines = [
        "# What a checkpoint costs",
        "",
        f"A Llama of {results['parameters']:,} float32 parameters ({results['weights'] / MB:,.0f} MB, and twice that "
        f"of AdamW's moments), one thread. Processor seconds are the median of {results['rounds']} rounds, memory is "
        "the largest rise of the resident set's peak over what was there before.",
        "",
        made_by_line(results),
        "",
        "| | processor s | memory, MB |",
        "|---|--:|--:|",
    ]
    costs = results["costs"].items()
    lines += [f"| {name} | {cost['seconds']:.2f} | {cost['megabytes']:,.0f} |" for name, cost in costs]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the page."""
    quick = asked_quick(__doc__)
    if any(os.environ.get(key) != value for key, value in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    torch.set_num_threads(1)
    model, optimizer = stepped(96 if quick else 768)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    results = {
        **made_by("python benchmarks/checkpoint_cost.py"),
        "parameters": parameters,
        "weights": 4 * parameters,
        "rounds": 1 if quick else ROUNDS,
        "costs": measured(model, optimizer, 1 if quick else ROUNDS),
    }
    publish(results, RESULTS, page(results), PAGE, quick)


if __name__ == "__main__":
    main()
