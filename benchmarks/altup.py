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

import itertools
import json
import random
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from comparing import chosen_recipe, compared, interval, options
from drawing import COLOURS, GREY, Point, scatter
from torch import Tensor
from torch.optim import AdamW

from auxin.accounting.comparison import BranchComparison, Comparison
from auxin.accounting.inputs import example_inputs
from auxin.accounting.latency import chosen_clock
from auxin.models.loading import load_model
from auxin.objectives.span_corruption import SpanCorruption
from auxin.recipes import Recipe
from auxin.recipes.folder import branch_checkpoint, seed_directory
from auxin.report.comparison import unit_words
from auxin.report.markdown import markdown_table, origin

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {"decoder": "altup", "t5": "altup-t5"}
BASELINE = "baseline"
KINDS = ("eager", "compiled")
Cells = dict[str, BranchComparison]
"""The branches that were run with every seed, by name."""


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
        model = load_model(branch_checkpoint(folder, branch), dtype=torch.float32).train()
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
    if not isinstance(recipe.objective, SpanCorruption):
        inputs = example_inputs(model, settings.batch_size, recipe.data.context_length, seed=0)
        return inputs | {"labels": inputs["input_ids"]}
    lengths = recipe.objective.lengths(recipe.data.form())
    inputs = example_inputs(model, settings.batch_size, lengths.inputs, seed=0, decoder_length=lengths.targets)
    return {"input_ids": inputs["input_ids"], "labels": inputs["decoder_input_ids"]}


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


def table(comparison: Comparison, cells: Cells, times: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"# Alternating updates: {comparison.title.lower()}",
        "",
        f"{comparison.description} Held-out loss in {unit_words(comparison.measure).strip()}: mean over the seeds and "
        "95 % interval (Student's t); differences are taken seed by seed. Step: forward, backward and AdamW on one "
        "batch, relative to the baseline (CPU time of one thread, models taking turns), written with --time. Speed-up: "
        "how much longer a step of the dense model of the same mean loss takes, between the measured widths linearly.",
        "",
        origin(comparison),
        "",
    ]
    header = ["branch", "parameters", "training FLOPs", "step, eager", "step, compiled", "held-out loss"]
    header += ["minus baseline", "speed-up at equal loss, eager", "compiled"]
    means = {name: branch.value.mean for name, branch in cells.items() if branch.value is not None}
    rows = []
    for name in sorted(means, key=lambda name: means[name]):
        branch, same = cells[name], name.removesuffix("-flops")
        row = [branch.title, f"{branch.parameters:,}", f"{branch.flops:.3g}"]
        row += [f"{times[kind][same]['ratio']:.2f}" if same in times.get(kind, {}) else "-" for kind in KINDS]
        row += [interval(branch.values.values())]
        row += ["-" if branch.difference is None else branch.difference.text(signed=True)]
        rows.append(row + [_speedup(name, means, times.get(kind, {})) for kind in KINDS])
    return "\n".join([*lines, *markdown_table(header, rows)]) + "\n"


def _speedup(name: str, means: dict[str, float], times: dict[str, Any]) -> str:
    widths = [other for other in means if other == BASELINE or _is_dense(other)]
    if name in widths or name.endswith("-flops") or not {name, *widths} <= times.keys():
        return "-"
    dense = sorted((times[other]["seconds"], means[other]) for other in widths)
    return speedup(means[name], times[name]["seconds"], dense)


def _is_dense(name: str) -> bool:
    return name.startswith("dense-") and not name.endswith("-flops")


def picture(cells: Cells, times: dict[str, Any]) -> str:
    """Held-out loss against the time of a step."""
    kind = "compiled" if times.get("compiled") else "eager"
    points, colours = [], iter([colour for colour in COLOURS * 3 if colour.upper() != GREY.upper()])
    along = []
    for name, branch in cells.items():
        if name not in times.get(kind, {}):
            continue
        dense = name == BASELINE or _is_dense(name)
        along += [branch.title] if dense else []
        losses = [value for value in branch.values.values() if value is not None]
        colour = GREY if dense else next(colours)
        points.append(Point(branch.title, colour, times[kind][name]["ratio"], losses))
    heading = "Held-out loss after equal steps against the time of a step"
    label = f"time of a training step, {kind}, baseline = 1; held-out loss in nats per token, bars span the seeds"
    return scatter(heading, label, points, along)


def main() -> None:
    """Run what is missing, then write results, table and picture."""
    parser = options(__doc__, None)
    parser.add_argument("model", choices=list(RECIPES))
    parser.add_argument("--time", nargs="+", choices=KINDS, default=[], help="time the steps again")
    parser.add_argument("--repetitions", type=int, default=15, help="of the timed steps")
    arguments = parser.parse_args()
    name = RECIPES[arguments.model]
    stem = name.replace("-", "_")
    arguments.runs = arguments.runs or ROOT / "runs" / f"{name}-seeds"
    results = arguments.results or ROOT / "benchmarks" / "results" / f"{stem}.json"
    page = arguments.table or ROOT / "docs" / "results" / f"{stem}.md"
    image = arguments.picture or ROOT / "docs" / "images" / f"{stem}_loss.svg"
    recipe = chosen_recipe(name, arguments)
    comparison = compared(recipe, arguments)
    cells = {
        branch.name: branch
        for branch in comparison.branches
        # A branch that was not run with every seed would be compared on other terms than the rest.
        if branch.seeds == comparison.seeds and branch.value is not None
    }
    times: dict[str, Any] = json.loads(results.read_text())["times"] if results.exists() else {}
    torch.set_num_threads(1)
    first = comparison.seeds[0]
    for kind in arguments.time:
        folder = seed_directory(arguments.runs, first)
        times[kind] = step_times(recipe.of_seed(first), folder, cells, kind, arguments.repetitions)
    record = {"cells": {name: branch.values for name, branch in cells.items()}, "times": times}
    results.write_text(json.dumps({"command": comparison.command, **record}, indent=1) + "\n", encoding="utf-8")
    page.write_text(table(comparison, cells, times), encoding="utf-8")
    if times:
        image.write_text(picture(cells, times), encoding="utf-8")
    print(f"Written to {results}, {page} and {image}", file=sys.stderr)


if __name__ == "__main__":
    main()
