"""Why does a TokenFormer trail a dense Transformer here? The recipe `parity.yaml` over seeds, one thing at a time.

    python benchmarks/parity.py --jobs 2
    python benchmarks/parity.py --seeds 0 --branches dense full-0017

Finished branches are not run again. About a minute and a half of one core per branch and seed.
"""

import sys
from pathlib import Path

from comparing import chosen_recipe, compared, options

from auxin.accounting.comparison import Comparison
from auxin.report.comparison import estimate_text
from auxin.report.markdown import markdown_table, origin

ROOT = Path(__file__).resolve().parents[1]
RECIPE = Path(__file__).with_suffix(".yaml")
RESULTS = ROOT / "benchmarks" / "results" / "parity.json"
TABLE = ROOT / "docs" / "results" / "parity.md"
HEADER = ("model", "parameters", "final loss", "minus the best dense one's")


def main() -> None:
    """Run what is missing, then write the results and the table."""
    parser = options(__doc__, ROOT / "runs" / "parity-seeds")
    parser.set_defaults(results=RESULTS, table=TABLE)
    arguments = parser.parse_args()
    comparison = compared(chosen_recipe(str(RECIPE), arguments), arguments)
    arguments.results.write_text(comparison.model_dump_json(indent=1) + "\n", encoding="utf-8")
    arguments.table.write_text(table(comparison), encoding="utf-8")
    print(f"Written to {arguments.table} and {arguments.results}", file=sys.stderr)


def table(comparison: Comparison) -> str:
    """The results as Markdown, the best first."""
    order = sorted(comparison.branches, key=lambda branch: branch.value.mean if branch.value else float("inf"))
    rows = [
        [
            branch.title,
            f"{branch.parameters:,}",
            estimate_text(branch.value, 4),
            "-" if branch.name == comparison.main_branch else estimate_text(branch.difference, 4, signed=True),
        ]
        for branch in order
    ]
    lines = [
        f"# {comparison.title}",
        "",
        f"{comparison.description} Held-out loss in nats per token at the end: mean over the seeds and 95 % interval "
        "(Student's t). Differences are taken seed by seed.",
        "",
        origin(comparison),
        "",
        *markdown_table(HEADER, rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
