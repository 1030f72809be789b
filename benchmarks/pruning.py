"""What is left of a small Llama that methods prune to four sizes, before and after it is mended, over seeds.

    python benchmarks/pruning.py --jobs 2
    python benchmarks/pruning.py --seeds 0 --branches taylor-30 finercut-30 scratch-30

Finished branches are not run again; the page has what is finished. A seed takes half an hour of one core.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from comparing import chosen_recipe, compared, interval, options
from drawing import COLOURS, Line, draw
from measuring import write_results

from auxin.accounting.comparison import BranchComparison, Comparison
from auxin.accounting.statistics import Estimate, paired_difference
from auxin.files import write_text
from auxin.recipes import Recipe
from auxin.report.comparison import estimate_text
from auxin.report.markdown import markdown_table, origin

ROOT = Path(__file__).resolve().parents[1]
RECIPE = Path(__file__).with_suffix(".yaml")
RESULTS = ROOT / "benchmarks" / "results" / "pruning.json"
TABLE = ROOT / "docs" / "results" / "pruning.md"
PICTURE = ROOT / "docs" / "images" / "pruning.svg"
SIZES = (10, 20, 30, 50)
"""Per cent of the parameters that were to go."""
METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "random": ("chance", "random", {}),
    "magnitude": ("magnitude", "magnitude", {}),
    "taylor": ("Taylor", "taylor", {}),
    "fisher": ("Fisher", "fisher", {}),
    "wanda": ("Wanda", "wanda-structured", {}),
    "fluctuation": ("fluctuation", "fluctuation", {}),
    "minitron": ("Minitron", "minitron", {}),
    "slicegpt": ("SliceGPT, one rotation", "slicegpt", {}),
    "optin": ("OPTIN", "optin", {"group_size": 4}),
    "taylor-uneven": ("Taylor, layers may differ", "taylor", {"uniform": False}),
    "fluctuation-uneven": ("FLAP: fluctuation, layers may differ", "fluctuation", {"uniform": False}),
    "finercut": ("FinerCut", "finercut", {}),
    "finercut-at-once": ("FinerCut, all at once", "finercut", {"one_shot": True}),
    "finercut-layers": ("FinerCut, whole layers", "finercut", {"candidates": "layers"}),
    "shortgpt": ("ShortGPT", "shortgpt", {}),
}
"""By the name of its branches, a method's title, its name and its settings beside the target."""
TAUGHT = ("taylor", "finercut")
"""Those that are mended by the whole model's answers, too, at the sizes `TAUGHT_AT`."""
TAUGHT_AT = (30, 50)
TEACHER = {"kind": "distillation", "teacher": "dense/train", "weight": 0.5}
HEADER = ("method", "parameters", "seeds", "loss without training", "loss when mended", "minus from scratch")
LABEL = "per cent of the parameters that were to go; held-out loss in nats per token"


def main() -> None:
    """Run what is missing, then write the results, the tables and the picture."""
    parser = options(__doc__, ROOT / "runs" / "pruning")
    parser.set_defaults(results=RESULTS, table=TABLE, picture=PICTURE)
    arguments = parser.parse_args()
    comparison = compared(whole_recipe(arguments), arguments)
    record = comparison.model_dump(mode="json", exclude={"branches": {"__all__": {"curve"}}})
    write_results(record, arguments.results, page(comparison), arguments.table)
    write_text(arguments.picture, picture(comparison))
    print(f"Written to {arguments.table}, {arguments.picture} and {arguments.results}", file=sys.stderr)


def whole_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe with a branch for each method and size."""
    base = chosen_recipe(str(RECIPE), arguments)
    repair = base.branch("dense-on").stage("repair").model_dump(mode="json")
    branches: list[dict[str, Any]] = [branch.model_dump(mode="json") for branch in base.branches]
    for name, (title, method, settings) in METHODS.items():
        for size in SIZES:
            target = {"parameters": (100 - size) / 100}
            change = {"kind": "change", "method": method, "settings": {"target": target, **settings}}
            stages = [change, repair]
            branches.append({"name": f"{name}-{size}", "title": title, "fork": "dense/train", "stages": stages})
    for size in SIZES:
        like = f"taylor-{size}"
        stages = [{"kind": "build", "like": like}, {"kind": "train", "name": "train", "flops_of": like}]
        branches.append({"name": f"scratch-{size}", "title": "from scratch, in Taylor's shape", "stages": stages})
    taught = {**repair, "name": "taught", "settings": {**repair["settings"], "objective": TEACHER}}
    for name in TAUGHT:
        title = f"{METHODS[name][0]}, taught by the whole model"
        branches += [
            {"name": f"{name}-{size}-taught", "title": title, "fork": f"{name}-{size}/change", "stages": [taught]}
            for size in TAUGHT_AT
        ]
    return Recipe.parse({**base.model_dump(mode="json"), "branches": branches})


def of_size(comparison: Comparison, size: int) -> list[BranchComparison]:
    """The branches of which `size` per cent were to go, the best first."""
    found = [branch for branch in comparison.branches if str(size) in branch.name.split("-")]
    return sorted(found, key=lambda branch: branch.value.mean if branch.value else float("inf"))


def without_training(branch: BranchComparison) -> Estimate | None:
    """The loss of what a removal left, before anything mended it; None where nothing was removed."""
    if not branch.growths or branch.growths[0].value_after is None:
        return None
    change = branch.growths[0].change_estimate
    return Estimate(
        mean=branch.growths[0].value_after, half_width=change.half_width if change else None, count=len(branch.seeds)
    )


def page(comparison: Comparison) -> str:
    """The results as Markdown."""
    branches = {branch.name: branch for branch in comparison.branches}
    whole, trained_on = (
        interval(branches[name].values.values()) if name in branches else "-" for name in ("dense", "dense-on")
    )
    lines = [
        "# Methods that prune, on one small Llama",
        "",
        f"{comparison.description} Held-out loss in nats per token: mean over the seeds and 95 % interval (Student's "
        "t); the interval of a loss without training is that of its rise. From scratch is a model of the shape that "
        "Taylor leaves, with as many training FLOPs as Taylor's has behind it, those of the whole model included. "
        f"Differences are taken seed by seed; below zero pruning is better. The whole model: {whole}; trained on for "
        f"as many steps as the others are mended: {trained_on}.",
        "",
        origin(comparison),
    ]
    for size in SIZES:
        scratch = branches.get(f"scratch-{size}")
        rows = []
        for branch in of_size(comparison, size):
            gap = paired_difference(branch.values, scratch.values) if scratch and branch is not scratch else None
            cells = estimate_text(without_training(branch), 3), estimate_text(branch.value, 3)
            shape = f"{branch.parameters:,}", str(len(branch.seeds))
            rows.append([branch.title, *shape, *cells, estimate_text(gap, 3, signed=True)])
        if rows:
            lines += ["", f"## {size} % to go", "", *markdown_table(HEADER, rows)]
    return "\n".join(lines) + "\n"


def picture(comparison: Comparison) -> str:
    """The loss of what is mended against how much was to go."""
    curves: dict[str, dict[int, list[tuple[float, float]]]] = {}
    titles: dict[str, str] = {}
    for size in SIZES:
        for branch in of_size(comparison, size):
            if branch.name.endswith("taught"):
                continue
            name = branch.name.removesuffix(f"-{size}")
            titles[name] = branch.title
            for seed, value in branch.values.items():
                if value is not None:
                    curves.setdefault(name, {}).setdefault(seed, []).append((float(size), value))
    whole = [name for name, seeds in curves.items() if all(len(curve) == len(SIZES) for curve in seeds.values())]
    lines = [
        Line(
            titles[name],
            COLOURS[number % len(COLOURS)],
            list(curves[name].values()),
            dashed=name == "scratch" or number >= len(COLOURS),
        )
        for number, name in enumerate(sorted(whole))
    ]
    return draw("Mended after pruning, beside models of those sizes from scratch", lines, SIZES[0], LABEL)


if __name__ == "__main__":
    main()
