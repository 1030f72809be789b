"""Grafts beside PEFT's LoRA at equal trainable parameters: what is learnt, what is forgotten, and what it takes.

A byte-level Llama (4 layers, width 128) is trained on the Python standard library's source, then adapted to another
text, Python's reference manual as `pydoc` carries it (English in reStructuredText), in five ways: LoRA of rank r on
every linear layer of the stack; grafts of r tokens beside the same layers, the rest frozen (equal parameters: both have
r (in + out) for each layer); grafts of r/2 tokens that grow by r/2 more half-way, the old ones then frozen, too; full
fine-tuning; grafts with everything trained. Each way gets the best of several learning rates, chosen with seed 0 on
contexts that are not reported. Forgetting is the rise of the loss on held-out source code. All ways of a seed start
from the same base (each seed has its own) and see the same batches.

Both texts are prepared corpora, an eighth of the documents held out by the hash of their content; a token is a byte, or
the separator between documents. Losses are means over the tokens of contexts spread evenly over the held-out split,
every other one for the choice of the rate. All training is `auxin.training.train`'s, the adapters' too.

    python benchmarks/graft_against_lora.py            about 12 minutes on one free core
    python benchmarks/graft_against_lora.py --quick    a minute, to see that it runs

What is finished in the folder --runs is not run again.
"""

import argparse
import functools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from excerpt import Excerpt, manual, source_code, spread_rows
from growth_memory import ENVIRONMENT
from measuring import StepCosts, made_by, made_by_line, mean_and_range, publish
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from auxin.data import Contexts, CorpusSettings, PackedData, prepare
from auxin.files import write_text
from auxin.methods.adapt.graft import freeze_all_but_branches, graft
from auxin.objectives.causal import Causal
from auxin.objectives.measures import Loss
from auxin.training import Hook, TrainingResult, TrainingSettings, load_model, train

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "graft_against_lora.json"
PAGE = ROOT / "docs" / "results" / "graft_against_lora.md"
BASE, LORA, GRAFT, STAGES, FULL, GRAFT_ALL = (
    "not adapted",
    "LoRA",
    "graft",
    "graft in two stages",
    "full fine-tuning",
    "graft, all trained",
)
WAYS = (LORA, GRAFT, STAGES, FULL, GRAFT_ALL)
BYTE_TOKENS = 257
"""A vocabulary of the bytes and the separator."""


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
    contexts: int = 96
    """Held-out contexts of each text; for the choice of the rate as many others."""

    def rates(self, way: str) -> tuple[float, ...]:
        """The learning rates that are tried."""
        return self.full_rates if way in (FULL, GRAFT_ALL) else self.adapter_rates

    def training(self, seed: int, rate: float, steps: int, **changes: Any) -> TrainingSettings:
        """AdamW without weight decay; warmup, then linear decay to zero."""
        values = {
            "steps": steps,
            "batch_size": self.batch_size,
            "learning_rate": rate,
            "warmup_steps": self.warmup_steps,
            "decay_fraction": 1 - self.warmup_steps / steps,
            "weight_decay": 0.0,
            "checkpoint_interval": None,
            "evaluation_batches": 1,
            "tensorboard": False,
            "seed": seed,
            # A rate that is too high shall be seen to be.
            "guard": {"spike_multiple": None},
        }
        return TrainingSettings.parse({**values, **changes})


QUICK = Trial((0,), base_steps=20, adaptation_steps=6, adapter_rates=(3e-3,), full_rates=(1e-3,), warmup_steps=1)

# ---------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Text:
    """What is learnt of a text, and what is reported."""

    data: Excerpt
    """Its held-out side is what rates are chosen by."""
    reported: Contexts

    @classmethod
    def of(cls, corpus: PackedData, trial: Trial) -> "Text":
        """The contexts of a prepared corpus."""
        held_out = spread_rows(corpus.validation, 2 * trial.contexts)
        return cls(Excerpt(corpus.train, held_out[1::2], BYTE_TOKENS), Contexts(held_out[::2]))

    def loss(self, model: PreTrainedModel) -> float:
        """Nats per byte of what is reported."""
        return Loss()(model, self.reported, Causal().bind(model.config, self.data.form), batch_size=32)


def corpora(runs: Path, trial: Trial) -> tuple[PackedData, PackedData]:
    """The manual and the source code as bytes, prepared in `runs` or opened there."""
    found: list[PackedData] = []
    for name, documents in (("manual", manual()), ("code", source_code())):
        folder = runs / f"{name}-text"
        if not folder.exists():
            folder.mkdir(parents=True)
            for number, (_, content) in enumerate(documents):
                (folder / f"{number:05d}.txt").write_bytes(content)
        settings = CorpusSettings(
            source="files",
            paths=(folder,),
            tokenizer=found[0].directory / "tokenizer" if found else None,
            vocab_size=BYTE_TOKENS,
            context_length=trial.sequence_length,
            validation_fraction=1 / 8,
        )
        found.append(prepare(settings, runs / name, progress=False))
    return found[0], found[1]


@functools.cache
def texts(runs: Path, trial: Trial) -> tuple[Text, Text]:
    """The new text and the old one, as `corpora` left them."""
    new, old = (Text.of(PackedData.load(runs / name), trial) for name in ("manual", "code"))
    return new, old


# ------------------------------------------------------------------------------------------------------------- measure


def build(trial: Trial, seed: int) -> LlamaForCausalLM:
    """A fresh model."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=BYTE_TOKENS,
        hidden_size=trial.hidden_size,
        intermediate_size=trial.intermediate_size,
        num_hidden_layers=trial.layers,
        num_attention_heads=trial.heads,
        max_position_embeddings=trial.sequence_length,
    )
    return LlamaForCausalLM(config)


def ready(model: PreTrainedModel, way: str, trial: Trial, seed: int) -> PreTrainedModel:
    """Make `model` ready for being adapted in one way; what shall not be trained is frozen."""
    torch.manual_seed(seed)
    if way == LORA:
        model.add_adapter(peft.LoraConfig(r=trial.rank, lora_alpha=2 * trial.rank, target_modules="all-linear"))
    if way in (GRAFT, STAGES, GRAFT_ALL):
        graft(model, tokens=trial.rank // 2 if way == STAGES else trial.rank, seed=seed)
    if way in (GRAFT, STAGES):
        freeze_all_but_branches(model)
    return model


def second_stage(model: PreTrainedModel, trial: Trial, seed: int) -> list[Hook]:
    """Grow the branches to all their tokens and freeze the old ones."""
    graft(model, tokens=trial.rank - trial.rank // 2, seed=seed + 1)
    return freeze_all_but_branches(model, "newest")


def adapt(base: Path, way: str, trial: Trial, seed: int, rate: float, new: Text, old: Text) -> dict[str, float]:
    """Adapt the model in `base` in one way and measure it."""
    model, steps, costs = ready(load_model(base), way, trial, seed), trial.adaptation_steps, StepCosts()

    def stage(settings: TrainingSettings, hooks: Iterable[Hook] = (), position: int = 0) -> TrainingResult:
        with tempfile.TemporaryDirectory() as folder:
            all_hooks = [costs, *hooks, costs]
            return train(model, new.data, settings, folder, hooks=all_hooks, data_position=position, progress=False)

    if way == STAGES:
        half = steps // 2
        # Together one line from the warmup to zero.
        stage(trial.training(seed, rate, half, minimum_learning_rate_ratio=1 - half / steps))
        rest = trial.training(seed, rate * (1 - half / steps), steps - half, warmup_steps=0, decay_fraction=1.0)
        result = stage(rest, second_stage(model, trial, seed), half)
    else:
        result = stage(trial.training(seed, rate, steps))
    assert result.value is not None  # it is at its end
    return {
        "tuning_loss": result.value,
        "new_loss": new.loss(model),
        "old_loss": old.loss(model),
        "step_seconds": statistics.median(costs.seconds),
    }


def measure_memory(way: str, trial: Trial) -> dict[str, int]:
    """Parameters, bytes of the optimizer's state, and by how much the resident set rises above the model in a training
    step (the two stages' second one); in this process, which should be a fresh one."""
    model = ready(build(trial, 0), way, trial, 0)
    hooks = second_stage(model, trial, 0) if way == STAGES else []
    rows = np.zeros((trial.batch_size, trial.sequence_length), dtype=np.int64)
    costs = StepCosts(trim=True)
    with tempfile.TemporaryDirectory() as folder:
        settings = trial.training(0, 1e-3, steps=3, warmup_steps=0, decay_fraction=1.0)
        train(model, Excerpt(rows, rows, BYTE_TOKENS), settings, folder, hooks=[costs, *hooks, costs], progress=False)
    return {
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "optimizer_bytes": costs.state_bytes,
        "peak_bytes": costs.rises[-1],
    }


def memory_of(way: str) -> dict[str, int]:
    """`measure_memory` in a process of its own."""
    command = [sys.executable, __file__, "--memory", way]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


# --------------------------------------------------------------------------------------------------------------- books

Cell = tuple[Trial, Path, int, str, float]
"""Sizes, folder of the runs, seed, way, learning rate."""


def measure(cell: Cell) -> tuple[str, dict[str, float]]:
    """One cell of the results under its name; the base itself where there is nothing to adapt."""
    torch.set_num_threads(1)
    trial, runs, seed, way, rate = cell
    new, old = texts(runs, trial)
    settings = trial.training(seed, trial.base_rate, trial.base_steps)
    # Where it is trained already, this opens it.
    base = train(build(trial, seed), old.data, settings, runs / f"base-{seed}", progress=False).checkpoint
    if way == BASE:
        model = load_model(base)
        return cell_key(seed, way, rate), {"new_loss": new.loss(model), "old_loss": old.loss(model)}
    return cell_key(seed, way, rate), adapt(base, way, trial, seed, rate, new, old)


def run(trial: Trial, runs: Path, workers: int) -> dict[str, dict[str, float]]:
    """Measure every cell that is missing: bases, the first seed at all rates, the others at the best."""
    path, first = runs / "cells.json", trial.seeds[0]
    cells: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for seeds, ways in (
            (trial.seeds, (BASE,)),
            ((first,), tuple(way for way in WAYS if way != STAGES)),
            (trial.seeds, WAYS),
        ):
            wanted = [
                (trial, runs, seed, way, rate)
                for seed in seeds
                for way in ways
                for rate in chosen_rates(trial, cells, way, seed)
                if cell_key(seed, way, rate) not in cells
            ]
            for key, cell in pool.imap_unordered(measure, wanted):
                cells[key] = cell
                print(f"{key}: {json.dumps(cell)}", flush=True)
                write_text(path, json.dumps(cells))
    return cells


def chosen_rates(trial: Trial, cells: dict[str, Any], way: str, seed: int) -> tuple[float, ...]:
    """All rates for the first seed, the best of them for the others; two stages take what was best for one."""
    if way == BASE:
        return (0.0,)
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


def page_of(results: dict[str, Any], trial: Trial) -> str:
    """The results as Markdown: means over the seeds (least to largest)."""
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
        "at the best of several learning rates, chosen with seed 0 on other contexts (two stages take that of one). "
        "Forgotten: what the adaptation added to the loss on source code. Peak: how far the resident "
        "set rises above the model in a training step. Time: median processor time of a step, mean over the seeds.",
        "",
        f"{made_by_line(results)} Seeds: {list(trial.seeds)}.",
        "",
        "| way | seeds | rate | trained | new text | new text minus LoRA, same seed | source code | forgotten "
        "| optimizer state, KiB | peak, MiB | step, ms |",
        "|---|---|---|---:|---|---|---|---|---:|---:|---:|",
        *(_row(way, results, trial) for way in (BASE, *WAYS)),
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


def _row(way: str, results: dict[str, Any], trial: Trial) -> str:
    cells, memory = results["cells"], results["memory"].get(way)

    def of(other: str) -> list[dict[str, float]]:
        rate = chosen_rates(trial, cells, other, -1)[0]
        return [cells[cell_key(seed, other, rate)] for seed in trial.seeds]

    found, (rate,) = of(way), chosen_rates(trial, cells, way, -1)
    paired = [cell["new_loss"] - lora["new_loss"] for cell, lora in zip(found, of(LORA), strict=True)]
    forgotten = [cell["old_loss"] - base["old_loss"] for cell, base in zip(found, of(BASE), strict=True)]
    columns = [
        way,
        str(len(found)),
        f"{rate:g}" if rate else "-",
        f"{memory['trainable']:,}" if memory else "-",
        mean_and_range([cell["new_loss"] for cell in found]),
        mean_and_range(paired, "+.4f"),
        mean_and_range([cell["old_loss"] for cell in found]),
        mean_and_range(forgotten, "+.4f"),
        f"{memory['optimizer_bytes'] / 2**10:,.0f}" if memory else "-",
        f"{memory['peak_bytes'] / 2**20:.1f}" if memory else "-",
        f"{1e3 * statistics.mean(cell['step_seconds'] for cell in found):.0f}" if memory else "-",
    ]
    return f"| {' | '.join(columns)} |"


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short run that writes nothing")
    parser.add_argument("--memory", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--runs", type=Path, help="a folder for what is trained, for a run that is taken up again")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trial = QUICK if arguments.quick else Trial()
    if arguments.memory:
        print(json.dumps(measure_memory(arguments.memory, Trial())))
        return
    with tempfile.TemporaryDirectory() as temporary:
        runs = arguments.runs or Path(temporary)
        new, old = corpora(runs, trial)
        sizes = {
            name: [corpus.report.train.bytes, corpus.report.validation.bytes]
            for name, corpus in (("manual", new), ("source code", old))
        }
        results = {
            **made_by("python benchmarks/graft_against_lora.py", peft=peft.__version__),
            "trial": asdict(trial),
            "bytes": sizes,
            "cells": run(trial, runs, arguments.workers),
            "memory": {way: memory_of(way) for way in WAYS},
        }
    publish(results, RESULTS, page_of(results, trial), PAGE, arguments.quick)


if __name__ == "__main__":
    main()
