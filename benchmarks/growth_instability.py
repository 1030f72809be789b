"""Why does the loss rise after a growth, and what removes it? One remedy at a time, all together, and all but one.

A small TokenFormer is trained on the Python standard library and grown to four times its parameter tokens, as the
released code does it: new keys and values random as at initialisation, one norm over all tokens with a scale of
sqrt(n') (regime "official"), a fresh optimizer, and a schedule that begins again: warmup to the full peak, then
cosine. Every remedy changes one of these. The small model comes from a cosine schedule that has ended; for
warmup-stable-decay it comes from the stable phase, to which it goes back. All branches end at the same total training
FLOPs. The recipe is growth_instability.yaml.

    python benchmarks/growth_instability.py --jobs 2
    python benchmarks/growth_instability.py --seeds 0 --branches reference all

Finished branches are not run again.
"""

import json
import math
import statistics
import sys
from pathlib import Path

from comparing import chosen_recipe, compared, curve_since, interval, options
from drawing import COLOURS, Curve, Line, draw

from auxin.accounting.comparison import Comparison
from auxin.accounting.results import BranchResult
from auxin.recipes import seed_results
from auxin.report.markdown import markdown_table, origin

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "benchmarks" / "growth_instability.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "growth_instability.json"
TABLE = ROOT / "docs" / "results" / "growth_instability.md"
PICTURE = ROOT / "docs" / "images" / "growth_instability.svg"
SHOWN = ("control", "control-wsd", "reference", "grouped", "wsd", "lower", "grouped-moments-wsd", "all-but-held")
"""The branches that the picture shows; more would not be told apart."""

INTERVAL = 16
"""Steps between measurements."""
Cells = dict[str, dict[str, dict[str, float]]]
"""Branch -> seed -> what it measured."""
CONTROLS, REFERENCE = ("control", "control-wsd"), "reference"


def measured(result: BranchResult) -> dict[str, float]:
    """What one branch of one seed shows, losses in nats per token."""
    curve = [loss for _, loss in curve_since(result, {"after"})]
    before = result.ledger.stages[-2].value_before if result.growths else curve[0]
    assert before is not None
    assert result.value is not None
    # A branch that never rose is back at once.
    back = next((i for i, loss in enumerate(curve) if i and loss <= before), None)
    return {
        "before": before,
        "at_growth": curve[0] - before,
        "worst": max(curve) - before,
        "steps_above": math.inf if back is None else float(back * INTERVAL),
        "final": result.value,
        "flops": result.flops,
        "parameters": float(result.parameters),
    }


def table(comparison: Comparison, cells: Cells) -> str:
    """The results as Markdown."""
    some = next(iter(cells[REFERENCE].values()))
    lines = [
        f"# {comparison.title}",
        "",
        f"{comparison.description} After the growth the model has {some['parameters']:,.0f} parameters. Held-out loss "
        f"in nats per token, measured every {INTERVAL} steps: mean over the seeds and 95 % interval (Student's t). "
        "Rises are against the loss right before the growth, which is that of the stable phase, and higher, with "
        f"warmup-stable-decay. All end at the same training FLOPs ({some['flops']:.3g}).",
        "",
        origin(comparison),
        "",
    ]
    titles = {branch.name: branch.title for branch in comparison.branches}
    header = ["remedy", "before", "rise at growth", "worst rise", "steps to be back", "final loss", "minus reference"]
    rows = []
    for name in sorted(cells, key=lambda name: name not in CONTROLS):
        by_seed = cells[name]
        values = {key: [cell[key] for cell in by_seed.values()] for key in some}
        gaps = [cell["final"] - cells[REFERENCE][seed]["final"] for seed, cell in by_seed.items()
                if seed in cells[REFERENCE]]  # fmt: skip
        above = values["steps_above"]
        rows.append([
            titles[name],
            f"{statistics.mean(values['before']):.3f}",
            interval(values["at_growth"], signed=True),
            interval(values["worst"], signed=True),
            "never" if math.inf in above else f"{min(above):.0f} to {max(above):.0f}",
            interval(values["final"]),
            interval(gaps, signed=True),
        ])  # fmt: skip
    return "\n".join([*lines, *markdown_table(header, rows)]) + "\n"


def picture(curves: dict[str, dict[str, Curve]], titles: dict[str, str]) -> str:
    """Held-out loss against training FLOPs since the growth."""
    lines = [
        Line(titles[name], COLOURS[number], list(curves[name].values()), dashed=name in CONTROLS)
        for number, name in enumerate(SHOWN)
        if name in curves
    ]
    return draw("Held-out loss after a growth of TokenFormer by four times", lines, lines[0].mean[0][0])


def main() -> None:
    """Run what is missing, then write the results and the table."""
    parser = options(__doc__, ROOT / "runs" / "growth-instability-seeds")
    parser.set_defaults(results=RESULTS, table=TABLE, picture=PICTURE)
    arguments = parser.parse_args()
    comparison = compared(chosen_recipe(str(RECIPE), arguments), arguments)
    cells: Cells = {}
    curves: dict[str, dict[str, Curve]] = {}
    for seed, results in seed_results(arguments.runs).items():
        for result in results.branches:
            if result.parent is not None:
                cells.setdefault(result.name, {})[str(seed)] = measured(result)
                curves.setdefault(result.name, {})[str(seed)] = curve_since(result, {"after"})
    record = {"command": comparison.command, "cells": cells, "curves": curves}
    titles = {branch.name: branch.title for branch in comparison.branches}
    arguments.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    arguments.table.write_text(table(comparison, cells), encoding="utf-8")
    arguments.picture.write_text(picture(curves, titles), encoding="utf-8")
    print(f"Written to {arguments.table}, {arguments.picture} and {arguments.results}", file=sys.stderr)


if __name__ == "__main__":
    main()
