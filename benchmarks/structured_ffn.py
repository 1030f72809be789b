"""Structured feed-forward parts from scratch: three sizes, three forms and dense, two lengths, with guides and without.

    python benchmarks/structured_ffn.py --seeds 0
    python benchmarks/structured_ffn.py --parts short --seeds 0 --branches middle middle-low-rank

The slope of a form is that of its held-out losses over the logarithm of training FLOPs, all sizes and lengths together,
by least squares. Finished branches are not run again. About 50 minutes of one core for a seed.
"""

import math
from pathlib import Path

from comparing import Part, by_loss, compare_parts, fitted, options

from auxin.accounting.comparison import Comparison
from auxin.recipes import load_recipe
from auxin.report.comparison import estimate_text
from auxin.report.markdown import markdown_table, origin

ROOT = Path(__file__).resolve().parents[1]
RECIPE = Path(__file__).with_suffix(".yaml")
RESULTS = ROOT / "benchmarks" / "results" / "structured_ffn.json"
TABLE = ROOT / "docs" / "results" / "structured_ffn.md"
FORMS = {"": "dense", "-low-rank": "low rank", "-block-dense": "BlockDense", "-block-shuffle": "BlockShuffle"}
SIZES = ("small", "middle", "large")
GUIDED = [number for number, one in enumerate(load_recipe(str(RECIPE)).branches) if one.name.endswith("-guided")]
LONG = [
    *("training.steps=500", "training.warmup_steps=100"),
    *(f"branches.{number}.stages.1.settings.guide_steps=250" for number in GUIDED),
]
PARTS = {
    "short": Part("250 steps", RECIPE),
    "long": Part("500 steps", RECIPE, tuple(LONG)),
}


def main() -> None:
    """Run what is missing, then write the results and the tables."""
    parser = options(__doc__, ROOT / "runs" / "structured-ffn")
    parser.set_defaults(results=RESULTS, table=TABLE)
    compare_parts(parser, PARTS, page)


def page(found: dict[str, Comparison]) -> str:
    """The results as Markdown."""
    lines = [
        "# Structured feed-forward parts, trained from scratch",
        "",
        "Held-out loss in nats per token at the end. The forms are those of [structured_ffn.md](../structured_ffn.md).",
    ]
    if slopes := slopes_of(found):
        lines += [
            "",
            "Losses over the decimal logarithm of training FLOPs, all sizes and lengths together, by least squares; "
            "95 % by Student's t over what is left of the points:",
            "",
            *markdown_table(("form", "points", "nats for ten times the FLOPs", "at 1e12 FLOPs"), slopes),
        ]
    for name, comparison in found.items():
        rows = [
            [
                branch.title,
                f"{branch.parameters:,}",
                f"{branch.flops:.3g}",
                estimate_text(branch.value, 3),
            ]
            for branch in by_loss(comparison)
        ]
        lines += ["", f"## {PARTS[name].heading}", "", comparison.description, "", origin(comparison), ""]
        lines += markdown_table(("model", "parameters at the end", "training FLOPs", "held-out loss"), rows)
    return "\n".join(lines) + "\n"


def slopes_of(found: dict[str, Comparison]) -> list[list[str]]:
    """A row for every form of which there are enough points."""
    rows = []
    for form, title in FORMS.items():
        points = [
            (math.log10(branch.flops), branch.value.mean)
            for comparison in found.values()
            for branch in comparison.branches
            if branch.name in {f"{size}{form}" for size in SIZES} and branch.value is not None
        ]
        if len(points) < 4:
            continue
        slope, half, height = fitted(points)
        rows.append([title, str(len(points)), f"{slope:+.3f} ± {half:.3f}", f"{height + 12 * slope:.3f}"])
    return rows


if __name__ == "__main__":
    main()
