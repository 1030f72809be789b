"""Which rule for new parameter tokens is best? The recipe `growth_rules.yaml`, for several growth factors and seeds.

    python benchmarks/growth_rules.py --jobs 2
    python benchmarks/growth_rules.py --factors 4 --seeds 0 --set data.max_bytes=1000000

Finished branches are not run again. About ten minutes of one core per factor and seed.
"""

import argparse
import json
import sys
from pathlib import Path

from comparing import chosen_recipe, compared, options

from auxin.accounting.comparison import BranchComparison, Comparison
from auxin.accounting.statistics import Estimate
from auxin.report.comparison import estimate_text
from auxin.report.markdown import markdown_table, origin

ROOT = Path(__file__).resolve().parents[1]
RECIPE = Path(__file__).with_suffix(".yaml")
RESULTS = ROOT / "benchmarks" / "results" / "growth_rules.json"
TABLE = ROOT / "docs" / "results" / "growth_rules.md"
TOKENS = 64
"""Parameter tokens of a projection after the growth; four times as many in the feed-forward part."""
HEADER = ("rule", "change at growth", "after a third", "final loss", "minus grouped")


def main() -> None:
    """Run what is missing, then write the results and the tables."""
    parser = options(__doc__, ROOT / "runs" / "growth-rules-seeds")
    parser.add_argument("--factors", type=int, nargs="+", default=[8, 4, 2])
    parser.set_defaults(results=RESULTS, table=TABLE)
    arguments = parser.parse_args()
    found = {factor: of_factor(factor, arguments) for factor in arguments.factors}
    record = {
        factor: {branch.name: branch.model_dump(mode="json", exclude={"curve"}) for branch in comparison.branches}
        for factor, comparison in found.items()
    }
    arguments.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    arguments.table.write_text(table(found), encoding="utf-8")
    print(f"Written to {arguments.table} and {arguments.results}", file=sys.stderr)


def of_factor(factor: int, arguments: argparse.Namespace) -> Comparison:
    """The recipe's small model is smaller by `factor` than the grown ones."""
    sizes = {"qkv_tokens": TOKENS // factor, "proj_tokens": TOKENS // factor, "ffn_tokens": 4 * TOKENS // factor}
    changes = [f"branches.0.stages.0.config.{name}={size}" for name, size in sizes.items()]
    own = {"set": [*changes, *arguments.set], "runs": arguments.runs / f"factor-{factor}"}
    recipe = chosen_recipe(str(RECIPE), argparse.Namespace(**{**vars(arguments), **own}))
    return compared(recipe, argparse.Namespace(**{**vars(arguments), "runs": own["runs"]}))


def table(found: dict[int, Comparison]) -> str:
    """The results as Markdown."""
    first = next(iter(found.values()))
    lines = [
        "# Growth rules compared",
        "",
        f"{first.description} Held-out loss in nats per token, which is a byte: mean over the seeds and 95 % interval "
        "(Student's t). All branches of a factor end at the same total training FLOPs. Differences from grouped are "
        "taken seed by seed.",
        "",
        origin(first),
    ]
    for factor, comparison in found.items():
        lines += ["", f"## Growth by a factor of {factor} ({TOKENS // factor} -> {TOKENS} tokens)", ""]
        order = sorted(comparison.branches, key=lambda branch: branch.value.mean if branch.value else 0.0)
        lines += markdown_table(HEADER, [_row(branch, branch.name == comparison.main_branch) for branch in order])
    return "\n".join(lines) + "\n"


def _row(branch: BranchComparison, is_main: bool) -> list[str]:
    growth = branch.growths[-1] if branch.growths else None
    # The second measurement of the last stage comes after a third of it.
    later = [point for point in branch.curve if point.stage == "after" and point.value is not None][1:2]
    third = None
    if growth is not None and later and later[0].value is not None:
        third = Estimate(mean=later[0].value, half_width=later[0].half_width, count=len(branch.seeds))
    return [
        f"**{branch.title}**" if is_main else branch.title,
        estimate_text(None if growth is None else growth.change_estimate, 5, signed=True),
        estimate_text(third, 4),
        estimate_text(branch.value, 4),
        estimate_text(branch.difference, 4, signed=True),
    ]


if __name__ == "__main__":
    main()
