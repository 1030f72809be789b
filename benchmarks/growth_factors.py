"""Does growing pay? One growth by a factor of 2, 4 or 8 beside what else the same FLOPs could have bought, over seeds.

Two parts: `short`, the recipe growth_factors.yaml, and `long`, the growth by a factor of 4 of it, six times
as long.

    python benchmarks/growth_factors.py --jobs 2
    python benchmarks/growth_factors.py --parts short --seeds 0 --branches grown-4 small-4

Finished branches are not run again; the page has what is finished. A short seed takes an hour of one core, a long
one three.
"""

from pathlib import Path

from comparing import Part, by_loss, compare_parts, options, signed

from auxin.accounting.comparison import Comparison
from auxin.accounting.statistics import Estimate
from auxin.recipes import load_recipe
from auxin.report.comparison import estimate_text
from auxin.report.markdown import markdown_table, origin

ROOT = Path(__file__).resolve().parents[1]
RECIPE = Path(__file__).with_suffix(".yaml")
RESULTS = ROOT / "benchmarks" / "results" / "growth_factors.json"
TABLE = ROOT / "docs" / "results" / "growth_factors.md"
LONGER = 6
"""How many times the FLOPs of the recipe the long part has."""
COLUMNS = ("trained on", "from scratch", "dense", "Llama", "started over")
"""What a grown model is compared with."""
GROWTHS = {
    "by 2": ("grown-2", "small-2", "scratch", "dense", "llama", "restarted"),
    "by 4": ("grown-4", "small-4", "scratch", "dense", "llama", "restarted"),
    "by 8": ("grown-8", "small-8", "scratch", "dense", "llama", "restarted"),
    "by 4, output projection linear and wide": (
        "grown-4-linear",
        "small-4-linear",
        "scratch-4-linear",
        "dense",
        "llama",
        "restarted-4-linear",
    ),
}
"""For each growth its branch, and those of COLUMNS."""
HEADER = ("model", "parameters", "training FLOPs", "seeds", "final loss")


def _long() -> Part:
    recipe = load_recipe(str(RECIPE))
    changes = [f"training.evaluation_interval={LONGER * recipe.training['evaluation_interval']}"]
    for number, branch in enumerate(recipe.branches):
        for place, stage in enumerate(branch.stages):
            if (flops := getattr(stage, "settings", {}).get("flops")) is not None:
                changes.append(f"branches.{number}.stages.{place}.settings.flops={LONGER * flops}")
    branches = ("scratch", "dense", "grown-4", "small-4", "restarted", "grown-4-linear", "scratch-4-linear", "llama")
    return Part(f"{LONGER} times as long", RECIPE, tuple(changes), branches)


PARTS = {"short": Part("7.2e12 FLOPs", RECIPE), "long": _long()}


def main() -> None:
    """Run what is missing, then write the results and the tables."""
    parser = options(__doc__, ROOT / "runs" / "growth-factors")
    parser.set_defaults(results=RESULTS, table=TABLE)
    compare_parts(parser, PARTS, page)


def page(found: dict[str, Comparison]) -> str:
    """The results as Markdown."""
    first = next(iter(found.values()))
    lines = [
        "# Growth by a factor of 2, 4 and 8 beside its alternatives",
        "",
        f"{first.description} Held-out loss in nats per token at the end: mean over the seeds and 95 % interval "
        "(Student's t). Differences are taken seed by seed; below zero the grown model is better.",
    ]
    for name, comparison in found.items():
        order = by_loss(comparison)
        rows = [
            [
                branch.title,
                f"{branch.parameters:,}",
                f"{branch.flops:.3g}",
                str(len(branch.seeds)),
                estimate_text(branch.value, 3),
            ]
            for branch in order
        ]
        lines += ["", f"## {PARTS[name].heading}", "", origin(comparison), "", *markdown_table(HEADER, rows)]
        lines += ["", "A grown model's loss minus that of", ""]
        lines += markdown_table(("growth", *COLUMNS), gaps(comparison))
    return "\n".join(lines) + "\n"


def gaps(comparison: Comparison) -> list[list[str]]:
    """A row for each growth: its loss minus each alternative's, and the seeds' own differences."""
    values = {branch.name: branch.values for branch in comparison.branches}
    rows = []
    for label, (growth, *others) in GROWTHS.items():
        if (grown := values.get(growth)) is None:
            continue
        row = [label]
        for name in others:
            against = values.get(name, {})
            pairs = [(loss, against.get(seed)) for seed, loss in grown.items()]
            found = [loss - other for loss, other in pairs if loss is not None and other is not None]
            each = ", ".join(map(signed, found))
            row.append(f"{estimate_text(Estimate.of(found), 3, signed=True)} ({each})" if found else "-")
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
