"""Which rule for new parameter tokens is best? Every growth regime, over growth factors and seeds, on the same budget.

A byte-level TokenFormer (4 layers, width 128) is trained on the Python standard library, grown to 64 parameter tokens
per projection (256 in the feed-forward part) by every regime, and trained on. Beside them: the small model trained on,
and a model of the final size trained from scratch, both to the grown models' total training FLOPs. All branches of one
factor and seed start from the same base and see the same batches in the same order. AdamW's moments are carried through
the growth. Schedule: warmup, stable, linear decay over the last third of the steps after the growth (from scratch: over
the last third of all steps).

    python benchmarks/growth_rules.py --workers 2          about 35 minutes on 2 free cores
    python benchmarks/growth_rules.py --quick              two minutes, to see that it runs

Finished cells are in the JSON file and are not run again.
"""

import argparse
import fcntl
import hashlib
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import auxin
from auxin.accounting import count_parameters, flops_per_token
from auxin.methods.grow.tokenformer import REGIMES, TauAnneal
from auxin.models.tokenformer import TokenFormerConfig, TokenFormerForCausalLM

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "growth_rules.json"
TABLE = ROOT / "docs" / "results" / "growth_rules.md"
SMALL, SCRATCH = "small, trained on", "from scratch, final size"
TITLES = {**{regime: regime for regime in REGIMES}, SMALL: SMALL, SCRATCH: SCRATCH}


@dataclass(frozen=True)
class Trial:
    """Sizes and lengths of one run of the benchmark."""

    factors: tuple[int, ...] = (8, 4, 2)
    seeds: tuple[int, ...] = (0, 1, 2)
    tokens: int = 64
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    sequence_length: int = 128
    batch_size: int = 8
    base_steps: int = 1200
    growth_steps: int = 400
    warmup_steps: int = 50
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    noise: float = 0.1
    """Relative noise on copied values (regime duplicate)."""
    validation_windows: int = 256


QUICK = Trial(factors=(4,), seeds=(0,), base_steps=60, growth_steps=30, validation_windows=32)


def corpus() -> tuple[Tensor, Tensor, str]:
    """Bytes of the standard library's files for training and validation, split by document, and a fingerprint."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    split: dict[bool, list[bytes]] = {True: [], False: []}
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if left_out & set(path.relative_to(root).parts):
            continue
        name, text = path.relative_to(root).as_posix(), path.read_bytes()
        held_out = hashlib.sha256(name.encode()).digest()[0] < 13  # one document in twenty
        split[held_out].append(text + b"\0")
        digest.update(name.encode() + text)
    training, validation = (
        torch.frombuffer(bytearray(b"".join(split[key])), dtype=torch.uint8) for key in (False, True)
    )
    return training, validation, digest.hexdigest()[:16]


def batches(data: Tensor, trial: Trial, seed: int, position: int) -> Iterator[Tensor]:
    """Random windows of `data`; the batch at a position depends on seed and position only."""
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
        starts = torch.randint(len(data) - trial.sequence_length, (trial.batch_size,), generator=generator)
        yield torch.stack([data[start : start + trial.sequence_length] for start in starts]).long()
        position += 1


class Branch:
    """A model in training with its optimizer and its position in the data."""

    def __init__(self, trial: Trial, tokens: int, seed: int, corpus: tuple[Tensor, Tensor, str]) -> None:
        self.trial, self.seed, self.corpus, self.position, self.flops = trial, seed, corpus, 0, 0.0
        torch.manual_seed(seed)
        self.model = TokenFormerForCausalLM(
            TokenFormerConfig(
                vocab_size=256,
                hidden_size=trial.hidden_size,
                num_hidden_layers=trial.layers,
                num_attention_heads=trial.heads,
                qkv_tokens=tokens,
                proj_tokens=tokens,
                ffn_tokens=4 * tokens,
                max_position_embeddings=trial.sequence_length,
            )
        )
        self.optimizer = self._optimizer()

    def fork(self) -> "Branch":
        """A copy with data of its own."""
        other = object.__new__(Branch)
        other.__dict__ |= self.__dict__
        other.model = TokenFormerForCausalLM(type(self.model.config).from_dict(self.model.config.to_dict()))
        other.model.load_state_dict(self.model.state_dict())
        other.optimizer = other._optimizer()
        other.optimizer.load_state_dict(self.optimizer.state_dict())
        return other

    def _optimizer(self) -> torch.optim.AdamW:
        trial = self.trial
        return torch.optim.AdamW(
            self.model.parameters(), lr=trial.learning_rate, betas=trial.betas, weight_decay=trial.weight_decay
        )

    def step_flops(self) -> float:
        """Training FLOPs of one step."""
        trial = self.trial
        return flops_per_token(self.model, trial.sequence_length).training * trial.batch_size * trial.sequence_length

    def train(self, steps: int, warmup: int = 0, decay: int = 0, hook: TauAnneal | None = None, until: int = 0) -> None:
        """Train `steps` steps, the first `warmup` and the last `decay` of them at a lower rate; only those from the
        present one to `until` (0: to the end) are done now."""
        self._step = getattr(self, "_step", 0)
        cost, data = self.step_flops(), batches(self.corpus[0], self.trial, self.seed, self.position)
        while self._step < (until or steps):
            scale = min(1.0, (self._step + 1) / max(1, warmup), (steps - self._step) / max(1, decay))
            for group in self.optimizer.param_groups:
                group["lr"] = self.trial.learning_rate * scale
            ids = next(data)
            self.model(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if hook is not None:
                hook.after_step(self._step)
            self._step, self.position, self.flops = self._step + 1, self.position + 1, self.flops + cost
        if self._step == steps:
            del self._step

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Nats per byte on held-out windows spread evenly over the held-out documents."""
        trial, data = self.trial, self.corpus[1]
        starts = torch.linspace(0, len(data) - trial.sequence_length - 1, trial.validation_windows).long()
        windows = torch.stack([data[start : start + trial.sequence_length] for start in starts]).long()
        losses = [self.model(input_ids=ids, labels=ids).loss.item() * len(ids) for ids in windows.split(32)]
        return sum(losses) / len(windows)


def run_unit(trial: Trial, factor: int, seed: int, path: Path) -> None:
    """Train one base and all its branches that are not in the results yet."""
    missing = [name for name in TITLES if cell_key(factor, seed, name) not in read(path)["cells"]]
    if not missing:
        return
    text = corpus()
    base = Branch(trial, trial.tokens // factor, seed, text)
    base.train(trial.base_steps, warmup=trial.warmup_steps)
    base_loss = base.validation_loss()
    grown = Branch(trial, trial.tokens, seed, text)
    total = base.flops + trial.growth_steps * grown.step_flops()
    for name in missing:
        start = time.perf_counter()
        if name == SMALL:
            branch = base.fork()
            steps = round((total - base.flops) / base.step_flops())
            cell = finish(branch, steps, decay=round(steps / 3))
        elif name == SCRATCH:
            branch = Branch(trial, trial.tokens, seed, text)
            steps = round(total / branch.step_flops())
            cell = finish(branch, steps, warmup=trial.warmup_steps, decay=round(steps / 3))
        else:
            branch = base.fork()
            cell = grow_and_train(branch, name)
        cell |= {
            "base_loss": base_loss,
            "parameters": count_parameters(branch.model).total,
            "flops": branch.flops,
            "seconds": time.perf_counter() - start,
        }
        record(path, cell_key(factor, seed, name), cell)
        print(f"factor {factor}, seed {seed}, {name}: {json.dumps(cell)}", flush=True)


def grow_and_train(branch: Branch, regime: str) -> dict[str, Any]:
    """Grow by one regime and train on."""
    trial = branch.trial
    receipt = auxin.grow(
        branch.model,
        qkv_tokens=trial.tokens,
        proj_tokens=trial.tokens,
        ffn_tokens=4 * trial.tokens,
        regime=regime,
        optimizer=branch.optimizer,
        seed=branch.seed,
        noise=trial.noise if regime == "duplicate" else 0.0,
    )
    hook = TauAnneal(trial.growth_steps // 3) if regime == "annealed" else None
    if hook is not None:
        hook.attach(branch.model, branch.optimizer)
    loss = branch.validation_loss()
    decay = round(trial.growth_steps / 3)
    branch.train(trial.growth_steps, decay=decay, hook=hook, until=trial.growth_steps // 3)
    early = branch.validation_loss()
    branch.train(trial.growth_steps, decay=decay, hook=hook)
    return {
        "relative_change": receipt.max_relative_change,
        "loss_at_growth": loss,
        "loss_after_a_third": early,
        "final_loss": branch.validation_loss(),
    }


def finish(branch: Branch, steps: int, warmup: int = 0, decay: int = 0) -> dict[str, Any]:
    """Train to the end."""
    branch.train(steps, warmup=warmup, decay=decay)
    return {"steps": steps, "final_loss": branch.validation_loss()}


def cell_key(factor: int, seed: int, name: str) -> str:
    """The name of one cell of the results."""
    return f"{factor}/{seed}/{name}"


def read(path: Path) -> dict[str, Any]:
    """The results so far."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cells": {}}


def record(path: Path, key: str, cell: dict[str, Any]) -> None:
    """Add one cell; several workers may do so at once."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = read(path)
        results["cells"][key] = cell
        write(path, results)


def write(path: Path, results: dict[str, Any]) -> None:
    """Write the results so that they are never half there."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: means over the seeds, with the spread from the least to the largest."""
    trial = results["trial"]
    lines = [
        "# Growth rules compared",
        "",
        f"Byte-level TokenFormer on the Python standard library: {trial['layers']} layers, width "
        f"{trial['hidden_size']}, grown to {trial['tokens']} parameter tokens per projection ({4 * trial['tokens']} in "
        f"the feed-forward part) after {trial['base_steps']} steps, then {trial['growth_steps']} steps more; "
        f"{trial['batch_size']} x {trial['sequence_length']} bytes a step, AdamW with its moments carried through the "
        f"growth, learning rate {trial['learning_rate']:g}, linear decay over the last third. All branches of a factor "
        "end at the same total training FLOPs. Held-out loss in nats per byte: mean over the seeds (least to largest).",
        "",
        f"Command: `{results['command']}`. Machine: {results['machine']}. Seeds: {trial['seeds']}. "
        f"Versions: {results['versions']}. Corpus: {results['corpus']}.",
    ]
    for factor in trial["factors"]:
        lines += [
            "",
            f"## Growth by a factor of {factor} ({trial['tokens'] // factor} -> {trial['tokens']} tokens)",
            "",
        ]
        lines += ["| rule | seeds | change at growth | after a third | final loss | final minus grouped, same seed |"]
        lines += ["|---|---|---|---|---|---|"]
        rows = [_row(results["cells"], factor, trial["seeds"], name) for name in TITLES]
        lines += [row for _, row in sorted(row for row in rows if row is not None)]
    return "\n".join(lines) + "\n"


def _row(cells: dict[str, Any], factor: int, seeds: list[int], name: str) -> tuple[float, str] | None:
    found = {seed: cells[key] for seed in seeds if (key := cell_key(factor, seed, name)) in cells}
    if not found:
        return None
    finals = [cell["final_loss"] for cell in found.values()]
    jumps = [cell["loss_at_growth"] - cell["base_loss"] for cell in found.values() if "loss_at_growth" in cell]
    early = [cell["loss_after_a_third"] for cell in found.values() if "loss_after_a_third" in cell]
    paired = [
        cell["final_loss"] - cells[key]["final_loss"]
        for seed, cell in found.items()
        if (key := cell_key(factor, seed, "grouped")) in cells
    ]
    columns = [
        f"**{name}**" if name == "grouped" else TITLES[name],
        str(len(found)),
        f"{statistics.mean(jumps):+.5f}" if jumps else "-",
        f"{statistics.mean(early):.4f}" if early else "-",
        f"{statistics.mean(finals):.4f} ({min(finals):.4f} to {max(finals):.4f})",
        f"{statistics.mean(paired):+.4f} ({min(paired):+.4f} to {max(paired):+.4f})" if paired else "-",
    ]
    return statistics.mean(finals), "| " + " | ".join(columns) + " |"


def _worker(arguments: tuple[Trial, int, int, Path]) -> None:
    torch.set_num_threads(1)
    run_unit(*arguments)


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--quick", action="store_true", help="a short run into a temporary file")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(Trial.seeds))
    arguments = parser.parse_args()
    trial = QUICK if arguments.quick else replace(Trial(), seeds=tuple(arguments.seeds))
    path, page = arguments.results, arguments.table
    if arguments.quick:
        folder = Path(tempfile.mkdtemp())
        path, page = folder / RESULTS.name, folder / TABLE.name
    for folder in (path.parent, page.parent):
        folder.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(asdict(trial)))
    results = read(path)
    fixed = {key: value for key, value in settings.items() if key not in ("seeds", "factors")}
    if any(results.get("trial", fixed)[key] != value for key, value in fixed.items()):
        sys.exit(f"{path} holds results of other sizes or lengths. Remove it or give another --results.")
    results |= {
        "trial": settings,
        "command": shlex.join(["python", "benchmarks/growth_rules.py", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), one thread per worker",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "corpus": f"standard library of Python {platform.python_version()}, fingerprint {corpus()[2]}",
    }
    write(path, results)
    units = [(trial, factor, seed, path) for seed in trial.seeds for factor in trial.factors]
    context = multiprocessing.get_context("spawn")
    with context.Pool(arguments.workers) as pool:
        for _ in pool.imap_unordered(_worker, units):
            page.write_text(table(read(path)), encoding="utf-8")
    page.write_text(table(read(path)), encoding="utf-8")
    path.with_suffix(".lock").unlink(missing_ok=True)
    print(page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
