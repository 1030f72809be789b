"""Structured feed-forward parts from scratch: three sizes, three forms and dense, two lengths, with guides and without.

    python benchmarks/structured_ffn.py --parts short long --seeds 0
    python benchmarks/structured_ffn.py --parts fast --seeds 0
    python benchmarks/structured_ffn.py --parts short --seeds 0 --branches middle middle-low-rank

The slope of a form is that of its held-out losses over the logarithm of training FLOPs, all sizes and lengths together,
by least squares. Branches that begin with `middle-equal` or `middle-wide` have the training FLOPs of a dense one.
Spikes of the loss are counted in all parts; `fast` is there for them alone. Finished branches are not run again. The
short part of a seed takes about 25 minutes of one core, the long one 50, and `fast` eight.
"""

import math
import statistics
from pathlib import Path

from comparing import Part, PartResults, by_loss, compare_parts, fitted, options

from auxin.accounting.comparison import BranchComparison
from auxin.accounting.results import BranchResult
from auxin.recipes import Recipe, load_recipe
from auxin.report.comparison import estimate_text
from auxin.report.markdown import markdown_table, origin
from auxin.training.guard import Guard
from auxin.training.settings import GuardSettings

ROOT = Path(__file__).resolve().parents[1]
RECIPE = Path(__file__).with_suffix(".yaml")
RESULTS = ROOT / "benchmarks" / "results" / "structured_ffn.json"
TABLE = ROOT / "docs" / "results" / "structured_ffn.md"
FORMS = {"": "dense", "-low-rank": "low rank", "-block-dense": "BlockDense", "-block-shuffle": "BlockShuffle"}
SIZES = ("small", "middle", "large")
EQUAL = {"middle-equal": "the middle size", "middle-wide": "wide and structured, with grouped queries"}
"""What the branches begin with that are compared at equal FLOPs, and what the page calls them."""
SPIKE = GuardSettings(spike_multiple=5.0, window=32, minimum_history=8)
"""What is called a spike. These trainings are short and their losses fall all the time, so that the guard's default
window would reach back to losses above every spike."""


def twice_as_long(recipe: Recipe) -> tuple[str, ...]:
    """The changes of `recipe` that double its trainings, warm-ups and guides."""
    changes = [f"training.{name}={2 * recipe.training[name]}" for name in ("steps", "warmup_steps")]
    for number, branch in enumerate(recipe.branches):
        for place, stage in enumerate(branch.stages):
            settings = getattr(stage, "settings", {})
            changes += [
                f"branches.{number}.stages.{place}.settings.{name}={2 * settings[name]}"
                for name in ("steps", "guide_steps")
                if settings.get(name) is not None
            ]
    return tuple(changes)


def guided_and_not(recipe: Recipe) -> tuple[str, ...]:
    """The branches of the middle size: dense, every form, and every form guided."""
    names = [branch.name for branch in recipe.branches if branch.name.startswith("middle")]
    return tuple(name for name in names if not name.startswith(tuple(EQUAL)))


_READ = load_recipe(str(RECIPE))
PARTS = {
    "short": Part("250 steps", RECIPE),
    "long": Part("500 steps", RECIPE, twice_as_long(_READ)),
    "fast": Part(
        "250 steps, ten times the learning rate", RECIPE, ("training.learning_rate=4e-2",), guided_and_not(_READ)
    ),
}


def main() -> None:
    """Run what is missing, then write the results and the tables."""
    parser = options(__doc__, ROOT / "runs" / "structured-ffn")
    parser.set_defaults(results=RESULTS, table=TABLE)
    compare_parts(parser, PARTS, page, count=spikes)


def spikes(result: BranchResult) -> dict[str, float]:
    """What the losses of a branch's steps show: `spikes`, the number of steps that the guard would call bad by their
    loss, and `rise`, how far a loss rose above the median of those before it at most, in nats."""
    guard, count, rise = Guard(SPIKE), 0, 0.0
    for point in result.curve:
        if point.value is not None:
            continue  # a measurement, not a step
        loss = math.inf if point.training_loss is None else point.training_loss
        if math.isfinite(loss) and len(guard.losses) >= SPIKE.minimum_history:
            rise = max(rise, loss - statistics.median(guard.losses))
        if guard.problem(loss, gradient_norm=0.0) is None:
            guard.accept(loss)
        else:
            count += 1
    return {"spikes": count, "rise": rise}


def page(found: dict[str, PartResults]) -> str:
    """The results as Markdown."""
    lines = [
        "# Structured feed-forward parts, trained from scratch",
        "",
        "Held-out loss in nats per token at the end. The forms are those of [structured_ffn.md](../structured_ffn.md). "
        f"A spike is a step whose loss lies more than {SPIKE.spike_multiple:g} robust standard deviations above the "
        f"median of the last {SPIKE.window} losses, by the rule of the guard; the largest rise is how far above that "
        "median a loss lay at most, in nats. Both are means over the seeds.",
    ]
    if slopes := slopes_of(found):
        lines += [
            "",
            "Losses over the decimal logarithm of training FLOPs, all sizes and lengths together, by least squares; "
            "95 % by Student's t over what is left of the points:",
            "",
            *markdown_table(("form", "points", "nats for ten times the FLOPs", "at 1e12 FLOPs"), slopes),
        ]
    for name, part in found.items():
        lines += ["", f"## {PARTS[name].heading}", "", part.description, "", origin(part), ""]
        lines += part_tables(part)
    return "\n".join(lines) + "\n"


HEADER = ("model", "parameters at the end", "training FLOPs", "held-out loss", "spikes", "largest rise")


def part_tables(part: PartResults) -> list[str]:
    """The tables of one part, those of equal FLOPs by themselves."""
    rows = {branch.name: row_of(branch, (part.counted or {}).get(branch.name, {})) for branch in by_loss(part)}
    lines = markdown_table(HEADER, [row for name, row in rows.items() if not name.startswith(tuple(EQUAL))])
    for beginning, title in EQUAL.items():
        if equal := [name for name in rows if name.startswith(beginning)]:
            beside = ["middle"] if beginning == "middle-equal" else []
            chosen = [row for name, row in rows.items() if name in {*equal, *beside}]
            lines += ["", f"At equal training FLOPs, {title}:", "", *markdown_table(HEADER, chosen)]
    return lines


def row_of(branch: BranchComparison, counted: dict[int, dict[str, float]]) -> list[str]:
    """A branch in the tables; `counted` by seed."""
    spikes, rise = (
        statistics.mean(one[name] for one in counted.values()) if counted else None for name in ("spikes", "rise")
    )
    return [
        branch.title,
        f"{branch.parameters:,}",
        f"{branch.flops:.3g}",
        estimate_text(branch.value, 3),
        "-" if spikes is None else f"{spikes:g}",
        "-" if rise is None else f"{rise:.2f}",
    ]


def slopes_of(found: dict[str, PartResults]) -> list[list[str]]:
    """A row for every form of which there are enough points; trainings at another rate are no points."""
    rows = []
    for form, title in FORMS.items():
        points = [
            (math.log10(branch.flops), branch.value.mean)
            for part in ("short", "long")
            for branch in (found[part].branches if part in found else ())
            if branch.name in {f"{size}{form}" for size in SIZES} and branch.value is not None
        ]
        if len(points) < 4:
            continue
        slope, half, height = fitted(points)
        rows.append([title, str(len(points)), f"{slope:+.3f} ± {half:.3f}", f"{height + 12 * slope:.3f}"])
    return rows


if __name__ == "__main__":
    main()
