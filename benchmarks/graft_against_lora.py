"""Grafts beside PEFT's LoRA at equal trainable parameters: what is learnt, what is forgotten, and what it takes.

A byte-level Llama (4 layers, width 128) is trained on the Python standard library's source, then adapted to another
text, Python's reference manual as `pydoc` carries it (English in reStructuredText), in five ways: LoRA of rank r on
every linear layer of the stack; grafts of r tokens beside the same layers, the rest frozen (equal parameters: both have
r (in + out) for each layer); grafts of r/2 tokens that grow by r/2 more half-way, the old ones then frozen, too; full
fine-tuning; grafts with everything trained. Each way gets the best of several learning rates, chosen with seed 0 on
windows that are not reported. Forgetting is the rise of the loss on held-out source code. All ways of a seed start from
the same base (each seed has its own) and see the same batches.

    python benchmarks/graft_against_lora.py            about 10 minutes on one free core
    python benchmarks/graft_against_lora.py --quick    half a minute, to see that it runs

Finished cells are in the JSON file and are not run again.
"""

import argparse
import copy
import ctypes
import functools
import hashlib
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import peft
import torch
import transformers
from growth_memory import ENVIRONMENT, resident
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from auxin.accounting.machine import describe_machine
from auxin.data import CorpusSettings
from auxin.data.sources import read_documents
from auxin.methods.adapt.graft import freeze_all_but_branches, graft
from auxin.planning.hooks import Hook

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "graft_against_lora.json"
TABLE = ROOT / "docs" / "results" / "graft_against_lora.md"
BASE, LORA, GRAFT, STAGES, FULL, GRAFT_ALL = (
    "not adapted",
    "LoRA",
    "graft",
    "graft in two stages",
    "full fine-tuning",
    "graft, all trained",
)
WAYS = (LORA, GRAFT, STAGES, FULL, GRAFT_ALL)
HELD_OUT = 32
"""Documents whose name's hash starts with a byte below this are held out: one in eight."""


@dataclass(frozen=True)
class Trial:
    """Sizes and lengths of one run of the benchmark."""

    seeds: tuple[int, ...] = (0, 1, 2)
    rank: int = 8
    """LoRA's rank and the number of tokens of a graft."""
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 336
    sequence_length: int = 128
    batch_size: int = 8
    base_steps: int = 900
    base_rate: float = 3e-3
    adaptation_steps: int = 100
    adapter_rates: tuple[float, ...] = (2e-3, 6e-3, 2e-2, 6e-2)
    full_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    warmup_steps: int = 10
    betas: tuple[float, float] = (0.9, 0.95)
    windows: int = 96
    """Held-out windows of each text; for the choice of the rate as many others."""

    def rates(self, way: str) -> tuple[float, ...]:
        """The learning rates that are tried."""
        return self.full_rates if way in (FULL, GRAFT_ALL) else self.adapter_rates


QUICK = Trial(seeds=(0,), base_steps=20, adaptation_steps=6, adapter_rates=(3e-3,), full_rates=(1e-3,), windows=8)


@dataclass
class Text:
    """The bytes of one domain."""

    training: Tensor
    held_out: Tensor

    @classmethod
    def of(cls, documents: dict[str, bytes]) -> "Text":
        """Split by document."""
        held_out = {name for name in documents if hashlib.sha256(name.encode()).digest()[0] < HELD_OUT}
        parts = [b"\0".join(d for name, d in documents.items() if (name in held_out) == side) for side in (False, True)]
        return cls(*(torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts))

    def batch(self, trial: Trial, seed: int, step: int) -> Tensor:
        """Random windows; they depend on seed and step only."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(self.training) - trial.sequence_length, (trial.batch_size,), generator=generator)
        return torch.stack([self.training[start : start + trial.sequence_length] for start in starts]).long()

    @torch.no_grad()
    def loss(self, model: nn.Module, trial: Trial, tuning: bool = False) -> float:
        """Nats per byte on windows spread evenly over the held-out documents; those for tuning lie between the
        others."""
        starts = torch.linspace(0, len(self.held_out) - trial.sequence_length, 2 * trial.windows).long()
        windows = [self.held_out[start : start + trial.sequence_length] for start in starts[int(tuning) :: 2]]
        losses = [
            model(input_ids=ids, labels=ids).loss.item() * len(ids) for ids in torch.stack(windows).long().split(32)
        ]
        return sum(losses) / len(windows)


def source_code() -> dict[str, bytes]:
    """The standard library's files, without the manual."""
    documents = read_documents(CorpusSettings(source="stdlib"))
    return {d.name: d.data for d in documents if d.data is not None and not d.name.startswith("pydoc_data/")}


def manual() -> dict[str, bytes]:
    """The reference manual's topics. They share sections, so that each paragraph is kept where it comes first only."""
    seen: set[str] = set()
    documents = {}
    for name in sorted(topics):
        kept = []
        for paragraph in topics[name].split("\n\n"):
            key = re.sub(r"\s+", " ", paragraph).strip()
            if key and key not in seen:
                seen.add(key)
                kept.append(paragraph)
        documents[name] = "\n\n".join(kept).encode()
    return documents


def build(trial: Trial, seed: int) -> LlamaForCausalLM:
    """A fresh model."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=trial.hidden_size,
            intermediate_size=trial.intermediate_size,
            num_hidden_layers=trial.layers,
            num_attention_heads=trial.heads,
            max_position_embeddings=trial.sequence_length,
            tie_word_embeddings=True,
        )
    )


def train(
    model: nn.Module,
    batch: Callable[[int], Tensor],
    trial: Trial,
    steps: range,
    of: int,
    rate: float,
    hooks: Sequence[Hook] = (),
) -> float:
    """Train what is trainable in `model`, in `steps` of a schedule of `of` steps (warmup, then linear decay to zero).

    Returns:
        Median processor seconds of a step.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=trial.betas, weight_decay=0.0, fused=True)
    for hook in hooks:
        hook.attach(model, optimizer)
    seconds = []
    for step in steps:
        start = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / trial.warmup_steps, (of - step) / of)
        ids = batch(step)
        for hook in hooks:
            hook.before_step(step)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for hook in hooks:
            hook.after_step(step)
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def trained_base(trial: Trial, seed: int, old: Text, bases: Path) -> LlamaForCausalLM:
    """The model that is adapted, out of the folder `bases` if it is there."""
    folder = bases / f"seed-{seed}"
    if folder.exists():
        return LlamaForCausalLM.from_pretrained(folder).train()
    base, steps = build(trial, seed), trial.base_steps
    train(base, lambda step: old.batch(trial, seed, step), trial, range(steps), steps, trial.base_rate)
    base.save_pretrained(folder)
    return base


def prepare(model: LlamaForCausalLM, way: str, trial: Trial, seed: int) -> nn.Module:
    """Make `model` ready for being adapted in one way; what shall not be trained is frozen."""
    torch.manual_seed(seed)
    if way == LORA:
        config = peft.LoraConfig(r=trial.rank, lora_alpha=2 * trial.rank, target_modules="all-linear")
        return peft.get_peft_model(model, config)
    if way in (GRAFT, STAGES, GRAFT_ALL):
        graft(model, tokens=trial.rank // 2 if way == STAGES else trial.rank, seed=seed)
    if way in (GRAFT, STAGES):
        freeze_all_but_branches(model)
    return model


def second_stage(model: nn.Module, trial: Trial, seed: int) -> list[Hook]:
    """Grow the branches to all their tokens and freeze the old ones."""
    graft(model, tokens=trial.rank - trial.rank // 2, seed=seed + 1)
    return freeze_all_but_branches(model, "newest")


def adapt(base: LlamaForCausalLM, way: str, trial: Trial, seed: int, rate: float, new: Text, old: Text) -> dict:
    """Adapt a copy of `base` in one way and measure it."""
    model, steps = prepare(copy.deepcopy(base), way, trial, seed), trial.adaptation_steps

    def batch(step: int) -> Tensor:
        return new.batch(trial, seed, step)

    if way == STAGES:
        half = steps // 2
        train(model, batch, trial, range(half), steps, rate)
        hooks = second_stage(model, trial, seed)
        seconds = train(model, batch, trial, range(half, steps), steps, rate, hooks)
    else:
        seconds = train(model, batch, trial, range(steps), steps, rate)
    return {
        "rate": rate,
        "tuning_loss": new.loss(model, trial, tuning=True),
        "new_loss": new.loss(model, trial),
        "old_loss": old.loss(model, trial),
        "step_seconds": seconds,
    }


def measure_memory(way: str, trial: Trial) -> dict[str, int]:
    """Parameters, bytes of the optimizer's state, and by how much the resident set rises above the model in a training
    step (the two stages' second one); in this process, which should be a fresh one."""
    model = prepare(build(trial, 0), way, trial, 0)
    hooks = second_stage(model, trial, 0) if way == STAGES else []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    for hook in hooks:
        hook.attach(model, optimizer)
    ids = torch.zeros(trial.batch_size, trial.sequence_length, dtype=torch.long)
    # Code that a first pass pages in, and what was freed since the start, are none of the step's.
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.zero_grad()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    for _ in range(2):  # the second step has the optimizer's state beside the activations
        Path("/proc/self/clear_refs").write_text("5")
        for hook in hooks:
            hook.before_step(0)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for hook in hooks:
            hook.after_step(0)
    states = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    return {
        "trainable": sum(parameter.numel() for parameter in trained),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "optimizer_bytes": sum(tensor.nbytes for tensor in states),
        "peak_bytes": resident("VmHWM") - before,
    }


def memory_of(way: str, quick: bool) -> dict[str, int]:
    """`measure_memory` in a process of its own."""
    command = [sys.executable, __file__, "--memory", way, *(["--quick"] if quick else [])]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


Cell = tuple[Trial, Path, int, str, float]
"""Sizes, folder of the bases, seed, way, learning rate."""


@functools.cache
def texts() -> tuple[Text, Text]:
    """The new text and the old one."""
    return Text.of(manual()), Text.of(source_code())


def measure(cell: Cell) -> tuple[str, dict[str, Any]]:
    """One cell of the results under its name; the base itself where there is nothing to adapt."""
    torch.set_num_threads(1)
    trial, bases, seed, way, rate = cell
    (new, old), base = texts(), trained_base(trial, seed, texts()[1], bases)
    if way == BASE:
        return cell_key(seed, way, rate), {"new_loss": new.loss(base, trial), "old_loss": old.loss(base, trial)}
    return cell_key(seed, way, rate), adapt(base, way, trial, seed, rate, new, old)


def run(trial: Trial, path: Path, page: Path, quick: bool, bases: Path, workers: int) -> None:
    """Measure every cell that is missing: bases, the first seed at all rates, the others at the best."""
    results = read(path)
    sizes = {
        name: [len(t.training), len(t.held_out)] for name, t in zip(("manual", "source code"), texts(), strict=True)
    }
    results["bytes"] = sizes
    first = trial.seeds[0]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for seeds, ways in (
            (trial.seeds, (BASE,)),
            ((first,), tuple(way for way in WAYS if way != STAGES)),
            (trial.seeds, WAYS),
        ):
            wanted = [
                (trial, bases, seed, way, rate)
                for seed in seeds
                for way in ways
                for rate in ((0.0,) if way == BASE else chosen_rates(trial, results["cells"], way, seed))
                if cell_key(seed, way, rate) not in results["cells"]
            ]
            for key, cell in pool.imap_unordered(measure, wanted):
                results["cells"][key] = cell
                print(f"{key}: {json.dumps(cell)}", flush=True)
                write(path, results)
                page.write_text(table(results), encoding="utf-8")
    for way in WAYS:
        if way not in results["memory"]:
            results["memory"][way] = memory_of(way, quick)
    write(path, results)
    page.write_text(table(results), encoding="utf-8")


def chosen_rates(trial: Trial, cells: dict[str, Any], way: str, seed: int) -> tuple[float, ...]:
    """All rates for the first seed, the best of them for the others; two stages take what was best for one."""
    if way == STAGES:
        return chosen_rates(trial, cells, GRAFT, -1)
    rates = trial.rates(way)
    tried = {rate: cells[key] for rate in rates if (key := cell_key(trial.seeds[0], way, rate)) in cells}
    if seed == trial.seeds[0] or len(tried) < len(rates):
        return rates
    return (min(tried, key=lambda rate: tried[rate]["tuning_loss"]),)


def cell_key(seed: int, way: str, rate: float) -> str:
    """The name of one cell of the results."""
    return f"{seed}/{way}/{rate:g}"


def read(path: Path) -> dict[str, Any]:
    """The results so far."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cells": {}, "memory": {}}


def write(path: Path, results: dict[str, Any]) -> None:
    """Write the results so that they are never half there."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: means over the seeds (least to largest)."""
    trial = Trial(**{key: tuple(v) if isinstance(v, list) else v for key, v in results["trial"].items()})
    cells, size = results["cells"], results["bytes"]
    lines = [
        "# Grafts beside LoRA",
        "",
        f"A byte-level Llama ({trial.layers} layers, width {trial.hidden_size}) trained for {trial.base_steps} steps "
        f"on the Python standard library's source ({size['source code'][0]:,} bytes), then adapted for "
        f"{trial.adaptation_steps} steps to the reference manual ({size['manual'][0]:,} bytes), {trial.batch_size} x "
        f"{trial.sequence_length} bytes a step, AdamW without weight decay, warmup and linear decay to zero. LoRA of "
        f"rank {trial.rank} (alpha {2 * trial.rank}) and grafts of {trial.rank} tokens, both on every linear layer of "
        "the stack. Losses in nats per byte on held-out documents: mean over the seeds (least to largest); each way "
        "at the best of several learning rates, chosen with seed 0 on other windows (two stages take that of one). "
        "Forgotten: what the adaptation added to the loss on source code. Peak: how far the resident "
        "set rises above the model in a training step. Time: median processor time of a step, mean over the seeds.",
        "",
        f"Command: `{results['command']}`. Machine: {results['machine']}. Seeds: {list(trial.seeds)}. "
        f"Versions: {results['versions']}.",
        "",
        "| way | seeds | rate | trained | new text | new text minus LoRA, same seed | source code | forgotten "
        "| optimizer state, KiB | peak, MiB | step, ms |",
        "|---|---|---|---:|---|---|---|---|---:|---:|---:|",
    ]
    for way in (BASE, *WAYS):
        rate = 0.0 if way == BASE else chosen_rates(trial, cells, way, -1)[0]
        found = {seed: cells[key] for seed in trial.seeds if (key := cell_key(seed, way, rate)) in cells}
        if not found:
            continue
        lora = cells.get(cell_key(min(found), LORA, rate_of_lora := chosen_rates(trial, cells, LORA, -1)[0]))
        paired = [
            cell["new_loss"] - cells[key]["new_loss"]
            for seed, cell in found.items()
            if lora and (key := cell_key(seed, LORA, rate_of_lora)) in cells
        ]
        forgotten = [cell["old_loss"] - cells[cell_key(seed, BASE, 0)]["old_loss"] for seed, cell in found.items()]
        memory = results["memory"].get(way)
        columns = [
            way,
            str(len(found)),
            f"{rate:g}" if rate else "-",
            f"{memory['trainable']:,}" if memory else "-",
            spread([cell["new_loss"] for cell in found.values()]),
            spread(paired, "+.4f"),
            spread([cell["old_loss"] for cell in found.values()]),
            spread(forgotten, "+.4f"),
            f"{memory['optimizer_bytes'] / 2**10:,.0f}" if memory else "-",
            f"{memory['peak_bytes'] / 2**20:.1f}" if memory else "-",
            f"{1e3 * statistics.mean(cell['step_seconds'] for cell in found.values()):.0f}" if memory else "-",
        ]
        lines.append("| " + " | ".join(columns) + " |")
    lines += [
        "",
        "## Every learning rate, seed 0",
        "",
        "| way | rate | new text | source code | forgotten |",
        "|---|---|---:|---:|---:|",
    ]
    before = cells[cell_key(trial.seeds[0], BASE, 0)]["old_loss"]
    for way in WAYS:
        for rate in trial.rates(way):
            if cell := cells.get(cell_key(trial.seeds[0], way, rate)):
                row = f"{cell['new_loss']:.4f} | {cell['old_loss']:.4f} | {cell['old_loss'] - before:+.4f}"
                lines.append(f"| {way} | {rate:g} | {row} |")
    return "\n".join(lines) + "\n"


def spread(numbers: Sequence[float], form: str = ".4f") -> str:
    """Mean, least and largest."""
    if not numbers:
        return "-"
    return f"{statistics.mean(numbers):{form}} ({min(numbers):{form}} to {max(numbers):{form}})"


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short run into a temporary file")
    parser.add_argument("--memory", choices=WAYS, help="only measure the memory of one way, and print it")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--bases", type=Path, help="a folder for the trained bases, for a run that is taken up again")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(Trial.seeds))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trial = QUICK if arguments.quick else replace(Trial(), seeds=tuple(arguments.seeds))
    if arguments.memory:
        print(json.dumps(measure_memory(arguments.memory, trial)))
        return
    path, page = arguments.results, arguments.table
    if arguments.quick:
        folder = Path(tempfile.mkdtemp())
        path, page = folder / RESULTS.name, folder / TABLE.name
    for folder in (path.parent, page.parent):
        folder.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(asdict(trial)))
    results = read(path)
    fixed = {key: value for key, value in settings.items() if key != "seeds"}
    if any(results.get("trial", fixed)[key] != value for key, value in fixed.items()):
        sys.exit(f"{path} holds results of other sizes or lengths. Remove it or give another --results.")
    machine = describe_machine()
    results |= {
        "trial": settings,
        "command": f"python benchmarks/graft_against_lora.py --workers {arguments.workers}",
        "machine": f"{machine['processor']}, {machine['cores']} cores, one thread per worker",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }
    write(path, results)
    bases = arguments.bases or Path(tempfile.mkdtemp())
    run(trial, path, page, arguments.quick, bases, arguments.workers)
    print(page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
