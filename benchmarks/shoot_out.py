"""Every growth method on one budget: runs the recipe `shoot-out` over seeds and writes its tables and its picture.

    python benchmarks/shoot_out.py --jobs 2
    python benchmarks/shoot_out.py --seeds 0 --branches tokens stack scratch-wide

Finished branches are not run again. About 900 seconds of one core per seed.
"""

import itertools
import json
import math
import shlex
import statistics
import sys
from pathlib import Path

from branches import command_line, curve_since, interval, results_of, run_all, seed_folder, where
from drawing import COLOURS, Curve, Line, draw

from auxin.accounting.results import BranchResult
from auxin.recipes import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "shoot_out.json"
TABLE = ROOT / "docs" / "results" / "shoot_out.md"
PICTURE = ROOT / "docs" / "images" / "shoot_out.svg"

SMALL = {"tokenformer": "tokenformer", "wide": "dense", "deep": "dense"}
"""The small model of each final shape's family, trained on."""
SCRATCH = {"tokenformer": "scratch-tokenformer", "wide": "scratch-wide", "deep": "scratch-deep"}
"""The branch from scratch of each final shape."""
DEEP = {"stack", "interleave", "solar", "llama-pro", "llama-pro-all", "scratch-deep", "stack-lower", "llama-pro-lower"}
TOKENS = {"tokens", "tokens-official", "tokens-lower", "tokenformer", "scratch-tokenformer"}
UNGROWN = {"dense", "dense-lower", "tokenformer"}
SHOWN = ("tokens", "tokens-official", "hypercloning", "stack", "llama-pro-all", "net2net", "scratch-wide",
         "scratch-deep", "scratch-tokenformer", "dense")  # fmt: skip
"""The branches that the picture shows; more would not be told apart."""

Cell = dict[str, float | None]


def recipe(seed: int) -> Recipe:
    """The built-in recipe with a seed."""
    return load_recipe("shoot-out", [f"seed={seed}"])


def shape(name: str) -> str:
    """What a branch's final model is: of parameter tokens, or a deeper or a wider Llama."""
    return "tokenformer" if name in TOKENS else "deep" if name in DEEP else "wide"


def measured(result: BranchResult) -> Cell:
    """What one branch of one seed shows, losses in nats per token."""
    assert result.value is not None
    cell: Cell = {"final": result.value, "flops": result.flops, "parameters": float(result.parameters)}
    if result.growths:
        before, after = result.growths[0].value_before, max(growth.value_after or 0.0 for growth in result.growths)
        assert before is not None
        last = [growth for growth in result.growths if growth.stage != "unmask"][-1]
        later = [loss for _, loss in curve_since(result, {"ramp", "after"})]
        cell |= {
            "before": before,
            "grown_at": result.growths[0].flops,
            "at_growth": (last.value_after or math.nan) - before,
            "worst": max(after, *later) - before,
        }
    elif before := next((record.value_after for record in result.ledger.stages if record.name == "base"), None):
        # The small model that trains on rises too: what a growth adds has to be told from that.
        cell["worst"] = max(loss for _, loss in curve_since(result, {"after"})) - before
    return cell


def saved_flops(curve: Curve, target: float, total: float) -> float | None:
    """The share of `total` FLOPs that is left when `curve` first is at `target`, between its points linearly; None when
    it never is."""
    for (flops_before, before), (flops, loss) in itertools.pairwise(curve):
        if loss <= target:
            share = 1.0 if before <= target else (before - target) / (before - loss)
            return 1 - (flops_before + share * (flops - flops_before)) / total
    return None


def summary(cells: dict[str, dict[str, Cell]], curves: dict[str, dict[str, Curve]]) -> list[list[str]]:
    """One row for each branch, the best final loss first."""
    rows = []
    for name, by_seed in cells.items():
        scratch = SCRATCH[shape(name)]
        finals = [cell["final"] or math.nan for cell in by_seed.values()]
        common = [seed for seed in by_seed if seed in cells.get(scratch, {})]
        saved = [
            saved_flops(curves[name][seed], _value(cells[scratch][seed]["final"]), _value(by_seed[seed]["flops"]))
            for seed in common
        ]
        reached = [share for share in saved if share is not None]
        jumps, rises = (
            [_value(cell[key]) for cell in by_seed.values() if key in cell] for key in ("at_growth", "worst")
        )
        rows.append(
            (
                statistics.mean(finals),
                [
                    titles()[name],
                    "small" if name in UNGROWN else shape(name),
                    f"{next(iter(by_seed.values()))['parameters']:,.0f}",
                    interval(jumps, sign=True),
                    interval(rises, sign=True),
                    interval(finals),
                    _gap(cells, name, scratch),
                    _gap(cells, name, SMALL[shape(name)]),
                    "-" if name == scratch or not common else _saved(reached, len(common)),
                ],
            )
        )
    return [row for _, row in sorted(rows)]


def _gap(cells: dict[str, dict[str, Cell]], name: str, other: str) -> str:
    """How much lower the final loss of a branch is than another's, seed by seed."""
    if name == other:
        return "-"
    common = [seed for seed in cells[name] if seed in cells.get(other, {})]
    return interval([_value(cells[name][s]["final"]) - _value(cells[other][s]["final"]) for s in common], sign=True)


def _saved(reached: list[float], seeds: int) -> str:
    if not reached:
        return "never reached"
    mean = f"{statistics.mean(reached):.0%} ({min(reached):.0%} to {max(reached):.0%})"
    return mean if len(reached) == seeds else f"{mean}, {len(reached)} of {seeds} seeds"


def _value(number: float | None) -> float:
    return math.nan if number is None else number


def titles() -> dict[str, str]:
    """The branches' titles by name, in the recipe's order."""
    return {branch.name: branch.title for branch in recipe(0).branches}


def table(cells: dict[str, dict[str, Cell]], curves: dict[str, dict[str, Curve]], command: str) -> str:
    """The results as Markdown."""
    seeds = sorted({int(seed) for by_seed in cells.values() for seed in by_seed})
    flops = [_value(cell["flops"]) for by_seed in cells.values() for cell in by_seed.values()]
    before = [_value(cell["before"]) for cell in cells.get("hypercloning", {}).values()]
    tokens_before = [_value(cell["before"]) for cell in cells.get("tokens", {}).values()]
    lines = [
        "# The shoot-out's result",
        "",
        f"{recipe(0).description} Held-out loss in nats per token: mean over the seeds and 95 % interval (Student's "
        f"t). Training FLOPs of every branch, ancestors included: {min(flops):.3g} to {max(flops):.3g}. Loss before "
        f"the growth: {interval(before)} (Llama), {interval(tokens_before)} (TokenFormer). Rises are against it; the "
        "worst is the highest of the measurements from the growth (or where the small model trains on) to the end, "
        "every 20 steps or as many FLOPs. From scratch is the "
        "branch of the same final shape; FLOPs saved are those left of the budget when the branch first reaches its "
        "final loss. Small is the model before the growth, trained on. Differences are taken seed by seed.",
        "",
        where(command, seeds),
        "",
        "| branch | shape | parameters | rise at growth | worst rise | final loss | minus from scratch | minus small "
        "| FLOPs saved |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
        *(f"| {' | '.join(row)} |" for row in summary(cells, curves)),
    ]
    return "\n".join(lines) + "\n"


def picture(cells: dict[str, dict[str, Cell]], curves: dict[str, dict[str, Curve]]) -> str:
    """Held-out loss against training FLOPs since the growth."""
    lines = [
        Line(titles()[name], COLOURS[number], list(curves[name].values()), dashed=name in {*SCRATCH.values(), "dense"})
        for number, name in enumerate(SHOWN)
        if name in curves
    ]
    start = min(
        _value(cell["grown_at"]) for by_seed in cells.values() for cell in by_seed.values() if "grown_at" in cell
    )
    return draw("Held-out loss after the growth, at equal training FLOPs", lines, start)


def main() -> None:
    """Run what is missing, then write the results, the table and the picture."""
    arguments = command_line(__doc__, ROOT / "runs" / "shoot-out", RESULTS, TABLE, PICTURE)
    if not arguments.read_only:
        run_all(recipe, arguments.seeds, arguments.runs, arguments.branches, arguments.jobs)
    cells: dict[str, dict[str, Cell]] = {}
    curves: dict[str, dict[str, Curve]] = {}
    for seed in arguments.seeds:
        for name, result in results_of(recipe(seed), seed_folder(arguments.runs, seed)).items():
            cells.setdefault(name, {})[str(seed)] = measured(result)
            curves.setdefault(name, {})[str(seed)] = curve_since(result, {"base", "ramp", "after"})
    command = shlex.join(["python", "benchmarks/shoot_out.py", "--seeds", *map(str, arguments.seeds)])
    record = {"command": command, "cells": cells, "curves": curves}
    arguments.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    arguments.table.write_text(table(cells, curves, command), encoding="utf-8")
    arguments.picture.write_text(picture(cells, curves), encoding="utf-8")
    print(f"Written to {arguments.table}, {arguments.picture} and {arguments.results}", file=sys.stderr)


if __name__ == "__main__":
    main()
