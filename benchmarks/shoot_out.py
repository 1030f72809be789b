"""Every growth method on one budget: runs the recipe `shoot-out` over seeds and writes its tables and its picture.

    python benchmarks/shoot_out.py --jobs 2
    python benchmarks/shoot_out.py --seeds 0 --branches tokens stack scratch-wide

Finished branches are not run again. About 900 seconds of one core per seed.
"""

import argparse
import itertools
import json
import math
import shlex
import statistics
import sys
from pathlib import Path
from xml.sax.saxutils import escape

from branches import curve_since, interval, results_of, run_all, seed_folder, where

from auxin.accounting.results import BranchResult
from auxin.recipes import Recipe, load_recipe
from auxin.report.picture import spread

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "shoot_out.json"
TABLE = ROOT / "docs" / "results" / "shoot_out.md"
PICTURE = ROOT / "docs" / "images" / "shoot_out.svg"

SCRATCH = {"tokenformer": "scratch-tokenformer", "wide": "scratch-wide", "deep": "scratch-deep"}
"""The branch from scratch of each final shape."""
DEEP = {"stack", "interleave", "solar", "llama-pro", "llama-pro-all", "scratch-deep"}
TOKENS = {"tokens", "tokens-official", "tokenformer", "scratch-tokenformer"}
SHOWN = ("tokens", "tokens-official", "hypercloning", "stack", "llama-pro-all", "net2net", "scratch-wide",
         "scratch-deep", "scratch-tokenformer", "dense")  # fmt: skip
"""The branches that the picture shows; more would not be told apart."""

Cell = dict[str, float | None]
Curve = list[tuple[float, float]]


def recipe(seed: int) -> Recipe:
    """The built-in recipe with a seed."""
    return load_recipe("shoot-out", [f"seed={seed}"])


def shape(name: str) -> str:
    """What a branch's final model is: of parameter tokens, or a deeper or a wider Llama."""
    return "tokenformer" if name in TOKENS else "deep" if name in DEEP else "wide"


def measured(result: BranchResult) -> Cell:
    """What one branch of one seed shows, losses in nats per token."""
    assert result.validation_loss is not None
    cell: Cell = {"final": result.validation_loss, "flops": result.flops, "parameters": float(result.parameters)}
    if result.growths:
        before, after = result.growths[0].loss_before, max(growth.loss_after or 0.0 for growth in result.growths)
        assert before is not None
        last = [growth for growth in result.growths if growth.stage != "unmask"][-1]
        later = [loss for _, loss in curve_since(result, {"ramp", "after"})]
        cell |= {
            "before": before,
            "at_growth": (last.loss_after or math.nan) - before,
            "worst": max(after, *later) - before,
        }
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
        gaps = [_value(by_seed[seed]["final"]) - _value(cells[scratch][seed]["final"]) for seed in common]
        saved = [
            saved_flops(curves[name][seed], _value(cells[scratch][seed]["final"]), _value(by_seed[seed]["flops"]))
            for seed in common
        ]
        reached = [share for share in saved if share is not None]
        grown = [cell for cell in by_seed.values() if "before" in cell]
        rows.append(
            (
                statistics.mean(finals),
                [
                    titles()[name],
                    shape(name),
                    f"{next(iter(by_seed.values()))['parameters']:,.0f}",
                    interval([_value(cell["at_growth"]) for cell in grown], sign=True),
                    interval([_value(cell["worst"]) for cell in grown], sign=True),
                    interval(finals),
                    "-" if name == scratch else interval(gaps, sign=True),
                    "-" if name == scratch or not common else _saved(reached, len(common)),
                ],
            )
        )
    return [row for _, row in sorted(rows)]


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
        "worst is the highest of the measurements from the growth to the end, every 20 steps. From scratch is the "
        "branch of the same final shape; FLOPs saved are those left of the budget when the branch first reaches its "
        "final loss.",
        "",
        where(command, seeds),
        "",
        "| branch | shape | parameters | rise at growth | worst rise | final loss | minus from scratch | FLOPs saved |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
        *(f"| {' | '.join(row)} |" for row in summary(cells, curves)),
    ]
    return "\n".join(lines) + "\n"


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 520, 64, 250, 48, 56
COLOURS = ("#D55E00", "#E69F00", "#2F8AC9", "#009E73", "#BF659A", "#A88418", "#7D8590", "#56707f", "#9b6b43", "#8a8ad0")


def picture(curves: dict[str, dict[str, Curve]]) -> str:
    """Mean held-out loss against training FLOPs since the growth, as SVG that reads on white and on black."""
    shown = {name: _mean_curve(list(curves[name].values())) for name in SHOWN if name in curves}
    start = min(curve[0][0] for name, curve in shown.items() if not name.startswith("scratch"))
    shown = {name: [point for point in curve if point[0] >= start] for name, curve in shown.items()}
    right = max(curve[-1][0] for curve in shown.values())
    losses = sorted(loss for curve in shown.values() for _, loss in curve)
    low = losses[0] - 0.05
    # The top of a curve that explodes is cut off; the table has its height.
    high = min(losses[-1], 1.25 * statistics.median(losses)) + 0.05

    def x(flops: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (flops - start) / (right - start)

    def y(loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - min(loss, high)) / (high - low)

    parts = [_text(LEFT, 26, "Held-out loss after the growth, at equal training FLOPs", size=16, weight=600)]
    step = 0.1 if high - low < 1.2 else 0.25
    for number in range(math.ceil(low / step), math.floor(high / step) + 1):
        loss = number * step
        parts.append(f'<path d="M{LEFT} {y(loss):.1f}H{WIDTH - RIGHT}" stroke="#7d8590" stroke-opacity="0.22"/>')
        parts.append(_text(LEFT - 8, y(loss) + 4, f"{loss:.2f}", anchor="end"))
    for number in range(5):
        flops = start + (right - start) * number / 4
        parts.append(_text(x(flops), HEIGHT - BOTTOM + 22, f"{flops / 1e12:.2f}", anchor="middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(_text(middle, HEIGHT - 12, "training FLOPs × 10¹², ancestors included", anchor="middle"))
    names = sorted(shown, key=lambda name: -shown[name][-1][1])
    places = [y(shown[name][-1][1]) for name in names]
    for name, place, moved in zip(names, places, spread(places), strict=True):
        colour = COLOURS[SHOWN.index(name)]
        dash = ' stroke-dasharray="6 4"' if name.startswith("scratch") or name == "dense" else ""
        points = " ".join(f"{x(flops):.1f},{y(loss):.1f}" for flops, loss in shown[name])
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        edge = WIDTH - RIGHT
        parts.append(f'<path d="M{edge + 2} {place:.1f}L{edge + 12} {moved:.1f}" stroke="{colour}" fill="none"/>')
        label = f"{titles()[name]} {shown[name][-1][1]:.3f}"
        parts.append(_text(edge + 15, moved + 4, label, colour=colour, weight=600, size=11.5))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif">\n'
        "<title>Held-out loss after the growth by method, against training FLOPs</title>\n"
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _mean_curve(curves: list[Curve]) -> Curve:
    """Seeds measure at the same FLOPs."""
    return [(points[0][0], statistics.mean(loss for _, loss in points)) for points in zip(*curves, strict=False)]


def _text(
    x: float, y: float, text: str, size: float = 12, anchor: str = "start", weight: int = 400, colour: str = "#7d8590"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{escape(text)}</text>'
    )


def main() -> None:
    """Run what is missing, then write the results, the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--branches", nargs="+", help="only these, and what they need")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "shoot-out")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--read-only", action="store_true", help="run nothing; write what the finished branches show")
    arguments = parser.parse_args()
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
    arguments.picture.write_text(picture(curves), encoding="utf-8")
    print(f"Written to {arguments.table}, {arguments.picture} and {arguments.results}", file=sys.stderr)


if __name__ == "__main__":
    main()
