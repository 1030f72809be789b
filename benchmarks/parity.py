"""TokenFormer beside dense Transformers of as many parameters, one thing at a time, over seeds.

Six parts: `small` (590,000 parameters, the recipe parity.yaml), `large` (3.3 million in the paper's proportions,
parity_3m.yaml), `bytes` (some of the small ones on bytes instead of a vocabulary of 512), and trainings of 4,200 steps
of some of the small ones (`long`), of some of the large ones (`large-long`) and of 135,000 parameters in the paper's
proportions (`tiny-long`, parity_135k.yaml).

    python benchmarks/parity.py --jobs 2
    python benchmarks/parity.py --parts small --seeds 0 --branches dense new

Finished branches are not run again; the page has what is finished. A branch and seed takes a minute and a half of one
core, a large one ten, a long one fifteen (of 135,000 parameters five), a large and long one an hour.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from comparing import Curves, Part, PartResults, by_loss, compare_parts, fitted, options, signed

from auxin.accounting.comparison import BranchComparison, Comparison
from auxin.accounting.statistics import Estimate
from auxin.recipes import load_recipe
from auxin.report.comparison import estimate_text
from auxin.report.markdown import markdown_table, origin

ROOT = Path(__file__).resolve().parents[1]
RECIPE = Path(__file__).with_suffix(".yaml")
RESULTS = ROOT / "benchmarks" / "results" / "parity.json"
TABLE = ROOT / "docs" / "results" / "parity.md"
HEADER = ("model", "parameters", "training FLOPs", "seeds", "final loss")
PAIRS = ("model", "minus", "difference", "of each seed")


PARTS = {
    "small": Part(
        "590,000 parameters",
        RECIPE,
        branches=(
            *("dense", "dense-0060", "dense-0030", "dense-0240", "dense-quarter", "dense-wide", "dense-wide-0060"),
            *("llama", "llama-0120", "llama-0030", "llama-0015", "published", "published-0010", "published-0030"),
            *("rotated", "rotated-0030", "keys", "no-norm-qkv", "no-norm-ffn", "no-norm-proj", "no-norm-proj-0060"),
            *("softmax", "gelu-first", "epsilon", "half-scale", "normed-no-decay", "normed-no-clip"),
            *("new", "new-0017", "new-0060", "new-0120", "new-quarter", "new-keys", "new-values", "new-embedding"),
            *("new-tokens", "new-ffn", "new-deep", "new-no-decay", "new-no-clip", "new-cosine"),
            *("linear", "linear-proj-wide", "proj-wide"),
        ),
    ),
    "large": Part("3.3 million parameters, the paper's proportions", RECIPE.with_name("parity_3m.yaml")),
    "bytes": Part(
        "The small ones on bytes, 560,000 parameters",
        RECIPE,
        (
            "data.vocab_size=257",  # the bytes and a separator
            "description=The models of the first part with the bytes for a vocabulary.",
        ),
        ("dense", "dense-0060", "dense-0030", "llama", "llama-0030", "llama-0015", "published", "new", "new-0060"),
    ),
    "long": Part(
        "590,000 parameters, six times as long",
        RECIPE,
        (
            "training.steps=4200",
            "training.evaluation_interval=700",
            "training.checkpoint_interval=700",
            "description=The models of the first part, trained for 4,200 steps instead of 700.",
        ),
        (
            *("dense-0030", "dense-0060", "dense-0060-decay", "dense-wide-0060"),
            *("new-0017", "new", "new-0060", "new-tokens", "new-ffn", "new-no-decay", "new-cosine", "new-half"),
            *("linear-proj-decay", "linear-proj-wide", "linear-proj-wide-decay", "proj-wide", "narrow"),
            *("rotated", "published", "llama", "llama-0030"),
        ),
    ),
    "large-long": Part(
        "3.3 million parameters, more than five times as long",
        RECIPE.with_name("parity_3m.yaml"),
        (
            "training.steps=4200",
            "training.evaluation_interval=700",
            "training.checkpoint_interval=700",
            "main_branch=dense-0020",
            "description=The models of the second part, trained for 4,200 steps instead of 800.",
        ),
        ("dense-0020", "new"),
    ),
    "tiny-long": Part("135,000 parameters, 4,200 steps", RECIPE.with_name("parity_135k.yaml")),
}
SIZES = {
    "tiny-long": (("new", "new-0030", "new-0120"), ("dense", "dense-0120", "dense-0240")),
    "long": (("new-tokens",), ("dense-0030", "dense-0060")),
    "large-long": (("new",), ("dense-0020",)),
}
"""Of each size the TokenFormers in the paper's proportions that trained for 4,200 steps, and the dense models in the
usual ones; of several the best counts."""
CHANGES = {
    "new": (
        *("new-0017", "new-0060", "new-0120", "new-quarter", "new-keys", "new-values", "new-embedding", "new-no-decay"),
        *("new-no-clip", "new-cosine", "new-half", "new-tokens", "new-ffn", "new-deep", "narrow", "linear"),
    ),
    "rotated": (
        *("softmax", "gelu-first", "epsilon", "half-scale", "normed-no-decay", "normed-no-clip", "rotated-0030"),
    ),
}
"""Branches that differ from one other in one thing."""
LONG = tuple(SIZES)
"""The parts of which the page has losses on the way."""
DIFFERENCES = (
    ("new", "dense-0060"),
    ("new", "dense-0020"),
    ("new", "llama-0020"),
    ("no-norm-proj", "dense-0060"),
    ("published", "dense-0060"),
    ("dense", "dense-0060"),
    ("rotated", "published"),
    ("no-norm-proj", "rotated"),
    ("new", "no-norm-proj"),
    ("new", "published"),
    ("rotated", "new"),
    ("keys", "rotated-0030"),
    ("no-norm-proj", "keys"),
    ("no-norm-qkv", "rotated-0030"),
    ("no-norm-ffn", "rotated-0030"),
    ("no-norm-proj", "rotated-0030"),
    ("dense-wide-0060", "dense-0060"),
    ("new", "dense-wide-0060"),
    ("linear-proj-wide", "new"),
    ("linear-proj-wide", "proj-wide"),
    ("proj-wide", "new"),
    ("linear-proj-wide", "dense-0060"),
    ("linear-proj-wide", "llama"),
    ("linear-proj-wide", "llama-0030"),
    ("published-0010", "published"),
    ("llama-0030", "llama"),
    ("llama-0120", "llama"),
    ("llama-0015", "llama-0030"),
    ("llama-0010", "llama-0020"),
    *((other, "dense-0020") for other in ("dense", "dense-0010", "llama-0020", "llama-0010", "published-0020")),
    ("new", "llama"),
    ("new", "llama-0030"),
    ("new", "llama-0015"),
    ("new", "llama-0010"),
    ("llama-0030", "dense-0060"),
    *((changed, branch) for branch, changes in CHANGES.items() for changed in changes),
)
"""Pairs of branches: what docs/parity.md says about one beside the other."""


def main() -> None:
    """Run what is missing, then write the results and the tables."""
    parser = options(__doc__, ROOT / "runs" / "parity")
    parser.set_defaults(results=RESULTS, table=TABLE)
    compare_parts(parser, PARTS, page, LONG)


def page(found: dict[str, PartResults]) -> str:
    """The results as Markdown."""
    lines = [
        "# TokenFormer beside dense Transformers, one thing at a time",
        "",
        "Held-out loss in nats per token at the end: mean over the seeds and 95 % interval (Student's t). Differences "
        "are taken seed by seed. What follows from it is in [parity.md](../parity.md).",
    ]
    for name, comparison in found.items():
        part = PARTS[name]
        order = by_loss(comparison)
        rows = [
            [
                branch.title,
                f"{branch.parameters:,}",
                f"{branch.flops:.3g}",
                str(len(branch.seeds)),
                estimate_text(branch.value, 3),
                "-" if branch.name == comparison.main_branch else estimate_text(branch.difference, 3, signed=True),
            ]
            for branch in order
        ]
        lines += ["", f"## {part.heading}", "", comparison.description, "", origin(comparison), ""]
        recipe, have = load_recipe(str(part.recipe)), {branch.name for branch in order}
        lines += markdown_table((*HEADER, f"minus {recipe.branch(comparison.main_branch).title}"), rows)
        wanted = [branch for branch in recipe.branches if part.branches is None or branch.name in part.branches]
        if missing := [branch.title for branch in wanted if branch.name not in have]:
            lines += ["", f"In the recipe, and not run yet: {'; '.join(missing)}."]
        if comparison.on_the_way and (way := on_the_way(order, comparison.on_the_way)):
            lines += ["", "On the way, after so many million tokens, the mean over the seeds:", "", *way]
        if pairs := differences(comparison):
            lines += ["", "One beside the other, seed by seed:", "", *markdown_table(PAIRS, pairs)]
    return "\n".join([*lines, *by_size(found)]) + "\n"


def on_the_way(branches: Sequence[BranchComparison], curves: Curves) -> list[str]:
    """A table of the losses that were measured before the end."""
    means = {branch.title: mean(list(curves[branch.name].values())) for branch in branches if branch.name in curves}
    units = sorted(set.intersection(*map(set, means.values())) - {0}) if means else []
    rows = [[title, *(f"{points[at]:.3f}" for at in units)] for title, points in means.items()]
    return markdown_table(("model", *(f"{at / 1e6:.2f}" for at in units)), rows) if units else []


def mean(curves: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """The mean of curves, where all of them were measured."""
    return {at: fmean(curve[at] for curve in curves) for at in curves[0] if all(at in curve for curve in curves)}


def by_size(found: dict[str, PartResults]) -> list[str]:
    """The gap on the way and after 4,200 steps over the sizes, and where a line through the last meets zero; nothing of
    fewer than three."""
    rows, points, ways = [], [], {}
    for name, sides in SIZES.items():
        order = by_loss(found[name]) if name in found else []
        new, dense = (next((branch for branch in order if branch.name in side), None) for side in sides)
        if new is None or dense is None or not (gaps := paired(new, dense)):
            continue
        gap = Estimate.of(gaps)
        points.append((math.log10(new.parameters), gap.mean))
        size = f"{new.parameters:,}"
        rows.append([size, new.title, dense.title, str(len(gaps)), estimate_text(gap, 3, signed=True)])
        if curves := found[name].on_the_way:
            ways[size] = curve_of_gaps(curves.get(new.name, {}), curves.get(dense.name, {}))
    if len(points) < 3:
        return []
    slope, half, height = fitted(points)
    meets = "" if slope >= 0 else f" and meets zero at {10 ** (-height / slope):,.0f} parameters"
    lines = [
        "", "## Over sizes", "",
        "After 4,200 steps, in the paper's proportions: the best TokenFormer minus the best dense model of the usual "
        "ones, of the seeds that both have.", "",
        *markdown_table(("parameters", "TokenFormer", "dense", "seeds", "difference"), rows), "",
        f"A line through these over the decimal logarithm of the parameters has a slope of {slope:+.3f} ± "
        f"{half:.3f}{meets}.",
    ]  # fmt: skip
    units = sorted(set.intersection(*map(set, ways.values())) - {0}) if ways else []
    if units:
        table = [[size, *(signed(way[at]) for at in units)] for size, way in ways.items()]
        header = ("parameters", *(f"{at / 1e6:.2f}" for at in units))
        lines += ["", "The same on the way, after so many million tokens:", "", *markdown_table(header, table)]
    return lines


def curve_of_gaps(new: Mapping[int, Mapping[int, float]], dense: Mapping[int, Mapping[int, float]]) -> dict[int, float]:
    """The mean difference of two branches' curves by seed, over the seeds that both have."""
    common = [
        {at: value - dense[seed][at] for at, value in curve.items() if at in dense[seed]}
        for seed, curve in new.items()
        if seed in dense
    ]
    return mean(common) if common else {}


def paired(one: BranchComparison, other: BranchComparison) -> list[float]:
    """The loss of one branch minus that of the other, of every seed that both have."""
    return [value - other.values[seed] for seed, value in one.values.items() if seed in other.values]


def differences(comparison: Comparison) -> list[list[str]]:
    """A row for each pair of `DIFFERENCES` that was run."""
    branches = {branch.name: branch for branch in comparison.branches}
    rows = []
    for one, other in DIFFERENCES:
        if one in branches and other in branches and (gaps := paired(branches[one], branches[other])):
            rows.append([
                branches[one].title, branches[other].title, estimate_text(Estimate.of(gaps), 3, signed=True),
                ", ".join(map(signed, gaps)),
            ])  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
