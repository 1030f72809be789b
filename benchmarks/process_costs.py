"""What a process of several holds in a step, beside what `auxin run --dry-run --gpus` computes of it: bytes of tensors
by torch's MemTracker, of one to four processes by every strategy; the resident set, from 100 million parameters on; and
the time of a step of one process and of two.

Weights and tokens are random: neither memory nor time depends on them. AdamW has its moments before a step is measured.

    python benchmarks/process_costs.py
    python benchmarks/process_costs.py --quick

Each measurement is one of torchrun's, as a user's training is. Some twenty minutes of two cores and 8 GB; finished ones
are not run again.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import made_by, made_by_line, publish, reset_peak, resident
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from auxin.accounting.recomputation import recomputed
from auxin.data import SampleForm
from auxin.files import write_text
from auxin.models import TokenFormerConfig, TokenFormerForCausalLM
from auxin.objectives.objective import Objective
from auxin.recipes.price import pass_memory
from auxin.recipes.process_costs import Layout, process_costs
from auxin.report.markdown import markdown_table
from auxin.training import TrainingSettings
from auxin.training.gradients import BatchGradients
from auxin.training.optimizer import build_optimizer
from auxin.training.ranks import Ranks, joined
from auxin.training.strategies import choose_strategy

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "process_costs.json"
PAGE = ROOT / "docs" / "results" / "process_costs.md"
LENGTH, PART, TIMED = 64, 2, 5
"""Tokens of a context, contexts of a forward pass, steps that are timed."""
NONE: dict[str, Any] = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": None}
EMPTY = "TokenFormer tiny"
"""What a process trains whose resident set is that of an empty one."""
MAPPED = "resident, mapped"
"""What is measured where malloc gives every larger block back to the system as soon as it is freed."""
KINDS = ("TokenFormer", "GPT-2", "Llama")
Row = dict[str, Any]


def model_of(name: str) -> PreTrainedModel:
    """The untrained model, always the same: "TokenFormer 124M" has the size in its name."""
    torch.manual_seed(0)
    kind, size = name.split()
    width, layers, heads, words = {
        "tiny": (32, 1, 1, 64),
        "7M": (256, 6, 4, 4096),
        "124M": (768, 12, 12, 32768),
    }[size]
    sizes = {"vocab_size": words, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    if kind == "Llama":
        ends = {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": True}
        config = LlamaConfig(**sizes, **ends, intermediate_size=8 * width // 3, max_position_embeddings=LENGTH)
        return LlamaForCausalLM(config)
    if kind == "GPT-2":
        return GPT2LMHeadModel(GPT2Config(**sizes, **NONE, eos_token_id=None, n_positions=LENGTH))
    tokens = {"qkv_tokens": width, "proj_tokens": width, "ffn_tokens": 4 * width}
    return TokenFormerForCausalLM(TokenFormerConfig(**sizes, **tokens, max_position_embeddings=LENGTH))


def settings_of(row: Row) -> TrainingSettings:
    """Of a training with so many passes of each process in a step."""
    return TrainingSettings(
        steps=1, batch_size=PART * row["passes"] * row["processes"], micro_batch_size=PART, strategy=row["strategy"],
        processes_per_copy=2 if row["strategy"] == "hybrid" else None, gather_once=row["once"],
        activation_checkpointing=row["again"], device="cpu",
    )  # fmt: skip


def objective_of(model: PreTrainedModel, settings: TrainingSettings) -> Objective:
    """To predict tokens."""
    words = model.config.vocab_size
    form = SampleForm("token", LENGTH, ("input_ids",), length=LENGTH, vocab_size=words)
    return settings.objective.bind(model.config, form)


def computed(row: Row) -> int:
    """Bytes at once, as the dry run says."""
    model, settings = model_of(row["model"]), settings_of(row)
    group = {"replicated": 1, "sharded": row["processes"], "hybrid": 2}[row["strategy"]]
    costs = process_costs(model, Layout(row["processes"], group, row["once"]), row["passes"])
    kept = pass_memory(model, objective_of(model, settings), PART, row["again"]).activations
    return costs.at_once(kept)


def take_part(rows: list[Row], folder: Path) -> None:
    """What a process of torchrun does: of each row one step for the moments, then those that are measured."""
    with joined() as ranks:
        found = [measured_here(row, ranks) for row in rows]
        (folder / f"{ranks.rank}.json").write_text(json.dumps(found))


def measured_here(row: Row, ranks: Ranks) -> Row:
    """Of this process: bytes at once, and of a resident set the seconds of a step, too."""
    model, settings = model_of(row["model"]), settings_of(row)
    objective = objective_of(model, settings)
    strategy = choose_strategy(settings, ranks, model.device, model, objective, ())
    strategy.place(model)
    optimizer = build_optimizer(model, settings)
    gradients = BatchGradients(model, objective, settings, strategy)
    batch = objective.example(settings.batch_size)

    def step() -> None:
        gradients.of(batch, 0)
        optimizer.step()

    with recomputed(model, settings.activation_checkpointing):
        step()
        for parameter in model.parameters():
            parameter.grad = None
        if row["what"] == "tensors":
            tracker = MemTracker()
            tracker.track_external(model, optimizer)
            begin_pass = strategy.begin_pass

            def begin(*arguments: Any) -> None:
                tracker.reset_mod_stats()  # of modules, which it knows one pass of; the peak stays
                begin_pass(*arguments)

            vars(strategy)["begin_pass"] = begin
            with tracker:
                step()
            return {"bytes": tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]}
        ctypes.CDLL(None).malloc_trim(0)  # what building the model left behind
        reset_peak()
        step()
        held, times = resident("VmHWM"), []
        for _ in range(TIMED):
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)
        return {"bytes": held, "seconds": min(times)}


def launched(rows: list[Row], work: Path) -> list[Row]:
    """`rows`, of as many processes, with the most that one of those holds that don't lead (the leader has a copy to
    save from), and with the slowest's time."""
    size = rows[0]["processes"]
    with tempfile.TemporaryDirectory(dir=work) as folder:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", __file__]
        options = ["--folder", folder, "--rows", json.dumps(rows)]
        mapped = {"MALLOC_MMAP_THRESHOLD_": "65536"} if rows[0]["what"] == MAPPED else {}
        command, environment = [sys.executable, "-W", "ignore", *launch, *options], {**os.environ, **mapped}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(size)]
    followers = found[1:] or found
    return [
        {
            **row,
            "bytes": max(one[number]["bytes"] for one in followers),
            "seconds": max(one[number].get("seconds", 0.0) for one in found),
        }
        for number, row in enumerate(rows)
    ]


def row_of(what: str, model: str, processes: int, strategy: str, passes: int = 1, **how: bool) -> Row:
    """What is measured: how many processes, passes of each in a step, layers gathered once, or computed again."""
    row = {"what": what, "model": model, "processes": processes, "strategy": strategy, "passes": passes}
    return {**row, "once": False, "again": False, **how}


def rows_to_measure(quick: bool) -> list[list[Row]]:
    """Each list is one launch."""
    size = "tiny" if quick else "7M"
    launches = []
    for processes in (1, 2, 3, 4):
        strategies = ["replicated"] if processes == 1 else ["replicated", "sharded"]
        strategies += ["hybrid"] if processes == 4 else []
        rows = [
            row_of("tensors", f"{kind} {size}", processes, strategy, passes)
            for kind in KINDS
            for strategy in strategies
            for passes in (1, 2)
        ]
        model = f"{KINDS[0]} {size}"
        rows += [row_of("tensors", model, processes, strategy, again=True) for strategy in strategies]
        cut = [strategy for strategy in strategies if strategy != "replicated"]
        rows += [
            row_of("tensors", model, processes, strategy, passes, once=True) for strategy in cut for passes in (1, 2)
        ]
        launches.append(rows)
    for model in (EMPTY,) if quick else (EMPTY, "TokenFormer 124M", "GPT-2 124M"):
        for processes, strategy in ((1, "replicated"), (2, "replicated"), (2, "sharded")):
            launches += [[row_of(what, model, processes, strategy)] for what in ("resident", MAPPED)]
    return launches


def page_of(results: Row) -> str:
    """The results as Markdown."""
    rows = results["rows"]
    tensors = [
        [
            *(row["model"], str(row["processes"]), row["strategy"], str(row["passes"])),
            "gathered once" if row["once"] else "computed again" if row["again"] else "",
            *(f"{number / 2**20:,.1f}" for number in (row["bytes"], row["computed"])),
            f"{row['computed'] / row['bytes']:.2f}",
        ]
        for row in rows
        if row["what"] == "tensors"
    ]
    shares = [float(row[-1]) for row in tensors]
    sets = {
        (row["what"], row["model"], row["processes"], row["strategy"]): row for row in rows if row["what"] != "tensors"
    }

    def above(what: str, row: Row) -> int:
        """What is resident beyond what is of an empty process."""
        found = (sets[what, model, row["processes"], row["strategy"]]["bytes"] for model in (row["model"], EMPTY))
        return next(found) - next(found)

    resident_rows = [
        [
            *(row["model"], str(row["processes"]), row["strategy"]),
            *(f"{n / 2**20:,.0f}" for n in (above("resident", row), above(MAPPED, row), row["computed"])),
            *(f"{row['computed'] / above(MAPPED, row):.2f}", f"{row['seconds']:.1f}"),
        ]
        for row in sets.values()
        if row["what"] == MAPPED and row["model"] != EMPTY
    ]
    sizes = ", ".join(
        f"{name} {sum(p.numel() for p in model_of(name).parameters()) / 1e6:.0f}M"
        for name in dict.fromkeys(row["model"] for row in rows if row["what"] == MAPPED and row["model"] != EMPTY)
    )
    return "\n".join([
        "# What a process of several holds, measured and computed",
        "",
        f"Steps of passes of {PART} contexts of {LENGTH} random tokens, in single precision on CPUs, by torchrun and "
        "gloo on one machine; every process has as many passes in a step. A hybrid has two processes to a copy. "
        "Computed is what `auxin run --dry-run --gpus` says of the same: its model is written down in "
        "[process_costs.py](../../src/auxin/recipes/process_costs.py).",
        "",
        made_by_line(results),
        "",
        "## Bytes of tensors",
        "",
        "MiB at the highest in a step, by torch's MemTracker, which counts weights, gradients, moments, activations "
        "and temporaries; of the process that holds most, but for the leader, which keeps a copy to save from. "
        f"Computed is {min(shares):.2f} to {max(shares):.2f} times as much.",
        "",
        *markdown_table(
            ("model", "processes", "strategy", "passes", "layers", "measured", "computed", "share"), tensors
        ),
        "",
        "## Resident memory and time",
        "",
        "MiB of the resident set at its highest in a step of one pass, less that of a process that trains a "
        f"{EMPTY} the same way (parameters, with 32,768 tokens: {sizes}); what building the model left behind was "
        "given back to the system before. The leader "
        "is left out where there are others. By default glibc's malloc keeps freed blocks of up to 32 MB, and pieces "
        "leave many holes; mapped, with MALLOC_MMAP_THRESHOLD_=65536, every larger block goes back to the system when "
        f"it is freed. The share is of the latter. Seconds are of the fastest of {TIMED} steps, of the slower process. "
        "**Other work was running on the machine**, so that they are an upper bound. Each of two processes has as many "
        "contexts as one alone.",
        "",
        *markdown_table(
            ("model", "processes", "strategy", "by default", "mapped", "computed", "share", "seconds of a step"),
            resident_rows,
        ),
    ]) + "\n"  # fmt: skip


def main() -> None:
    """Measure, or take part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "process_costs", help="keeps what is measured")
    parser.add_argument("--quick", action="store_true", help="tiny models; nothing is written")
    parser.add_argument("--rows", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.rows is not None:
        take_part(arguments.rows, arguments.folder)
        sys.stdout.flush()
        os._exit(0)  # as the command line does
    cells = arguments.runs / ("quick.json" if arguments.quick else "cells.json")
    cells.parent.mkdir(parents=True, exist_ok=True)
    done: list[Row] = json.loads(cells.read_text(encoding="utf-8")) if cells.exists() else []
    for rows in rows_to_measure(arguments.quick):
        missing = [row for row in rows if not any(row.items() <= other.items() for other in done)]
        if missing:
            done += launched(missing, cells.parent)
            write_text(cells, json.dumps(done))
    found = [{**row, "computed": computed(row)} for row in done]
    results = {**made_by("python benchmarks/process_costs.py"), "rows": found}
    publish(results, RESULTS, page_of(results), PAGE, arguments.quick)


if __name__ == "__main__":
    main()
