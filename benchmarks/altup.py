"""What alternating updates buy: runs the recipe `altup` (a decoder) or `altup-t5` over seeds, times a training step of
every branch's model, and writes tables and pictures.

    python benchmarks/altup.py decoder --jobs 2
    python benchmarks/altup.py t5 --jobs 2
    python benchmarks/altup.py decoder --seeds 0 --branches baseline altup-2

Finished branches are not run again; step times that were measured are kept, unless --time asks for them again. About
900 seconds of one core per seed. A step is forward, backward and AdamW on one batch, timed in CPU time on one thread,
the models taking turns in shuffled order; the ratios are medians over the repetitions, each to the baseline's of the
same repetition.
"""

import argparse
import itertools
import json
import random
import shlex
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from branches import interval, results_of, run_all, seed_folder, where
from drawing import COLOURS, GREY, Point, scatter
from measuring import chosen_clock
from torch import Tensor
from torch.optim import AdamW

from auxin.models.loading import load_model
from auxin.recipes import Recipe, load_recipe
from auxin.recipes.folder import left_checkpoint

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {"decoder": "altup", "t5": "altup-t5"}
BASELINE = "baseline"
KINDS = ("eager", "compiled")
Cells = dict[str, dict[str, dict[str, float]]]
"""Branch -> seed -> what it measured."""


def decoder(seed: int) -> Recipe:
    """The decoder's recipe with a seed."""
    return load_recipe(RECIPES["decoder"], [f"seed={seed}"])


def t5(seed: int) -> Recipe:
    """The T5's recipe with a seed."""
    return load_recipe(RECIPES["t5"], [f"seed={seed}"])


MAKE = {"decoder": decoder, "t5": t5}


def step_times(
    recipe: Recipe, folder: Path, finished: Iterable[str], kind: str, repetitions: int
) -> dict[str, dict[str, float]]:
    """Seconds of a training step of every finished branch's last model, and their ratio to the baseline's."""
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 64
    runs = {}
    for branch in recipe.branches:
        if branch.name not in finished or branch.name.endswith("-flops"):
            continue  # the latter are the same models as other branches'
        model = load_model(left_checkpoint(folder, branch, branch.stages[-1]), dtype=torch.float32).train()
        forward = model if kind == "eager" else torch.compile(model, dynamic=False)
        optimizer = AdamW(model.parameters(), lr=1e-4, fused=True)
        runs[branch.name] = (forward, optimizer, batch(recipe, model))
    _, clock = chosen_clock("cpu")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0)
    for repetition in range(repetitions + 2):
        shuffle.shuffle(order)
        for name in order:
            forward, optimizer, inputs = runs[name]
            start = clock()
            forward(**inputs, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if repetition >= 2:  # compiling and warming up
                seconds[name].append(clock() - start)
    return {
        name: {
            "seconds": statistics.median(values),
            "ratio": statistics.median(a / b for a, b in zip(values, seconds[BASELINE], strict=True)),
        }
        for name, values in seconds.items()
    }


def batch(recipe: Recipe, model: Any) -> dict[str, Tensor]:
    """Random inputs and labels of the lengths that the recipe trains on."""
    settings = recipe.training_settings(recipe.branches[0].stages[-1])  # type: ignore[arg-type]
    zeros = recipe.objective.bind(model.config, recipe.data.form()).example(settings.batch_size)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randint(model.config.vocab_size, ids.shape, generator=generator) for name, ids in zeros.items()}


def speedup(loss: float, seconds: float, dense: list[tuple[float, float]]) -> str:
    """How much faster a step is than that of the dense model of the same loss, between the dense models linearly.

    Args:
        loss: of the branch.
        seconds: of its step.
        dense: (seconds, loss) of the dense models, narrow to wide.
    """
    if loss >= dense[0][1]:
        return "no gain"
    for (cheap, high), (dear, low) in itertools.pairwise(dense):
        if low <= loss < high:
            return f"{(cheap + (dear - cheap) * (high - loss) / (high - low)) / seconds - 1:+.0%}"
    return f"beyond the widest, {dense[-1][0] / seconds - 1:+.0%} or more"


def table(model: str, cells: Cells, times: dict[str, Any], command: str) -> str:
    """The results as Markdown."""
    recipe = MAKE[model](0)
    titles = {branch.name: branch.title for branch in recipe.branches}
    seeds = sorted({int(seed) for by_seed in cells.values() for seed in by_seed})
    unit = "token that the decoder writes" if model == "t5" else "token"
    lines = [
        f"# Alternating updates: {recipe.title.lower()}",
        "",
        f"{recipe.description} Held-out loss in nats per {unit}: mean over the seeds and 95 % interval (Student's t); "
        "differences are taken seed by seed. Step: forward, backward and AdamW on one batch, relative to the baseline "
        "(CPU time of one thread, models taking turns). Speed-up: how much longer a step of the dense model of the "
        "same mean loss takes, between the measured widths linearly.",
        "",
        where(command, seeds),
        "",
        "| branch | parameters | training FLOPs | step, eager | step, compiled | held-out loss | minus baseline "
        "| speed-up at equal loss, eager | compiled |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    means = {name: statistics.mean(cell["loss"] for cell in by_seed.values()) for name, by_seed in cells.items()}
    for name in sorted(means, key=lambda name: means[name]):
        by_seed = cells[name]
        first = next(iter(by_seed.values()))
        gaps = [cell["loss"] - cells[BASELINE][s]["loss"] for s, cell in by_seed.items() if s in cells[BASELINE]]
        same = name.removesuffix("-flops")
        row = [titles[name], f"{first['parameters']:,.0f}", f"{first['flops']:.3g}"]
        row += [f"{times[kind][same]['ratio']:.2f}" if same in times.get(kind, {}) else "-" for kind in KINDS]
        row += [interval([cell["loss"] for cell in by_seed.values()])]
        row += ["-" if name == BASELINE else interval(gaps, sign=True)]
        row += [_speedup(name, means, times.get(kind, {})) for kind in KINDS]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _speedup(name: str, means: dict[str, float], times: dict[str, Any]) -> str:
    widths = [other for other in means if other == BASELINE or _is_dense(other)]
    if name in widths or name.endswith("-flops") or not {name, *widths} <= times.keys():
        return "-"
    dense = sorted((times[other]["seconds"], means[other]) for other in widths)
    return speedup(means[name], times[name]["seconds"], dense)


def _is_dense(name: str) -> bool:
    return name.startswith("dense-") and not name.endswith("-flops")


def picture(model: str, cells: Cells, times: dict[str, Any]) -> str:
    """Held-out loss against the time of a step."""
    kind = "compiled" if times.get("compiled") else "eager"
    recipe = MAKE[model](0)
    points, colours = [], iter([colour for colour in COLOURS * 3 if colour.upper() != GREY.upper()])
    along = []
    for branch in recipe.branches:
        if branch.name not in cells or branch.name not in times.get(kind, {}):
            continue
        dense = branch.name == BASELINE or _is_dense(branch.name)
        along += [branch.title] if dense else []
        losses = [cell["loss"] for cell in cells[branch.name].values()]
        colour = GREY if dense else next(colours)
        points.append(Point(branch.title, colour, times[kind][branch.name]["ratio"], losses))
    heading = "Held-out loss after equal steps against the time of a step"
    label = f"time of a training step, {kind}, baseline = 1; held-out loss in nats per token, bars span the seeds"
    return scatter(heading, label, points, along)


def main() -> None:
    """Run what is missing, then write results, table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--branches", nargs="+", help="only these, and what they need")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--runs", type=Path, help="folder of the runs; default: runs/altup-<model>")
    parser.add_argument("--read-only", action="store_true", help="run nothing; write what the finished branches show")
    parser.add_argument("--time", nargs="+", choices=KINDS, default=[], help="time the steps again")
    parser.add_argument("--repetitions", type=int, default=15, help="of the timed steps")
    options = parser.parse_args()
    name, make = RECIPES[options.model], MAKE[options.model]
    runs = options.runs or ROOT / "runs" / f"altup-{options.model}"
    results = ROOT / "benchmarks" / "results" / f"{name.replace('-', '_')}.json"
    if not options.read_only:
        run_all(make, options.seeds, runs, options.branches, options.jobs)
    cells: Cells = {}
    for seed in options.seeds:
        for branch, result in results_of(make(seed), seed_folder(runs, seed)).items():
            assert result.value is not None
            cells.setdefault(branch, {})[str(seed)] = {
                "loss": result.value,
                "flops": result.flops,
                "parameters": float(result.parameters),
            }
    # A branch that was not run with every seed would be compared on other terms than the rest.
    cells = {branch: by_seed for branch, by_seed in cells.items() if len(by_seed) == len(options.seeds)}
    times: dict[str, Any] = json.loads(results.read_text())["times"] if results.exists() else {}
    torch.set_num_threads(1)
    for kind in options.time:
        times[kind] = step_times(make(0), seed_folder(runs, 0), cells, kind, options.repetitions)
    command = shlex.join(["python", "benchmarks/altup.py", options.model, "--time", *KINDS])
    record = {"command": command, "cells": cells, "times": times}
    page = ROOT / "docs" / "results" / f"{name.replace('-', '_')}.md"
    image = ROOT / "docs" / "images" / f"{name.replace('-', '_')}_loss.svg"
    results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    page.write_text(table(options.model, cells, times, command), encoding="utf-8")
    if times:
        image.write_text(picture(options.model, cells, times), encoding="utf-8")
    print(f"Written to {results}, {page} and {image}", file=sys.stderr)


if __name__ == "__main__":
    main()
