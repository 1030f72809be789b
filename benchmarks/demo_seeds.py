"""Run the demo recipe with several seeds and write what it shows, with its spread, to docs/results/demo.md.

    .venv/bin/python benchmarks/demo_seeds.py --seeds 0 1 2

Each seed is a run folder of its own under --runs, resumed if it was stopped; a finished one is only read. The README's
table is the part of the page between its markers.
"""

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path

from auxin.accounting.results import BranchResult, RunResults
from auxin.recipes import load_recipe, run_recipe
from auxin.report import findings

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results" / "demo.md"


def spread(values: list[float], digits: int) -> str:
    """Mean, and the smallest and largest value where there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def branch_row(branches: list[BranchResult]) -> str:
    """One row of the result table: a branch over all seeds."""
    first = branches[0]
    cells = [
        first.title,
        f"{first.parameters:,}",
        f"{first.units / 1e6:.2f}M",
        f"{first.flops:.2e}",
        f"{first.seconds:.0f}",
        spread([branch.value or float("nan") for branch in branches], 3),
        spread([branch.perplexity or float("nan") for branch in branches], 2),
        spread([branch.bits_per_byte or float("nan") for branch in branches], 3),
    ]
    return f"| {' | '.join(cells)} |"


def page(runs: list[RunResults], command: str) -> str:
    """The page: table, growths, gaps, and how it was measured."""
    seeds = ", ".join(str(run.seed) for run in runs)
    machine = ", ".join(f"{key} {value}" for key, value in runs[0].machine.items())
    versions = ", ".join(f"{key} {value}" for key, value in runs[0].versions.items())
    lines = [
        "# The demo's result",
        "",
        runs[0].description,
        "",
        f"Command: `{command}`. Seeds: {seeds}. Machine: {machine}. Versions: {versions}.",
        f"Mean over the seeds, smallest and largest in brackets. Seconds are those of seed {runs[0].seed}, ancestors",
        "and evaluations included; the other seeds may have run beside something else. All branches have the same",
        "learning rate, batch and data order; none of them was tuned for one branch.",
        "",
        "<!-- demo-table:begin -->",
        "| branch | parameters | tokens | training FLOPs | seconds | validation loss | perplexity | bits per byte |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        *(branch_row([run.branches[index] for run in runs]) for index in range(len(runs[0].branches))),
        "<!-- demo-table:end -->",
        "",
        "Change of the held-out loss at each growth, in nats per token (promised: exact):",
        "",
        "| seed | growth | parameters | before | after | change |",
        "|--:|---|---|--:|--:|--:|",
    ]
    for run in runs:
        for point in run.branches[0].growths:
            parameters = f"{point.parameters_before:,} to {point.parameters_after:,}"
            losses = f"{point.value_before:.6f} | {point.value_after:.6f} | {point.change:+.1e}"
            lines.append(f"| {run.seed} | {point.stage} | {parameters} | {losses} |")
    lines += ["", "What each seed says:", ""]
    for run in runs:
        lines += [f"- Seed {run.seed}. {' '.join(findings(run))}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is not finished, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the run folders")
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    runs = []
    for seed in arguments.seeds:
        # Seed 0 is what `make demo` runs, so that its run is taken where it is there.
        directory = arguments.runs / ("demo" if seed == 0 else f"demo-seed-{seed}")
        finished = directory / "results.json"
        if finished.exists():
            runs.append(RunResults.parse(json.loads(finished.read_text(encoding="utf-8"))))
        else:
            changes = [f"seed={seed}"] if seed else []
            command = shlex.join(["auxin", "run", "demo", *(part for c in changes for part in ("--set", c))])
            runs.append(run_recipe(load_recipe("demo", changes), directory, command))
    arguments.page.parent.mkdir(parents=True, exist_ok=True)
    arguments.page.write_text(page(runs, shlex.join(["python", *sys.argv])), encoding="utf-8")
    print(f"Written to {arguments.page}")


if __name__ == "__main__":
    main()
