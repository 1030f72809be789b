"""What eight bits do to the models of the benchmark that prunes: their bytes, and the loss, simulated."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from comparing import Counts, PartResults, interval
from held_out import HeldOut
from transformers import PreTrainedModel

from auxin.accounting.comparison import BranchComparison
from auxin.analysis import measure
from auxin.analysis.quantized import QuantizedMeasurement
from auxin.analysis.quantized_weights import Weights
from auxin.data.dataset import DATASETS
from auxin.errors import PlanError
from auxin.models.loading import load_model
from auxin.recipes import Recipe
from auxin.recipes.folder import DATA, branch_checkpoint, seed_directory
from auxin.report.markdown import markdown_table

SAMPLES = 32
"""Held-out samples from which the ranges of activations come; losses are of as many others."""
SCHEMES = ("w8", "w8a8")


def counted(recipe: Recipe, found: PartResults, names: Collection[str], runs: Path) -> Counts:
    """Of the branches `names` that the folder of runs holds: how many of a model's numbers are quantized, `int8`, and
    what each scheme adds to the loss, in nats. Those whose parts can't be quantized are left out."""
    data = DATASETS.find(recipe.data.kind).prepare(recipe.data, runs / DATA, False)
    counts: Counts = {}
    for branch in found.branches:
        for seed in branch.seeds if branch.name in names else ():
            run = seed_directory(runs, seed)
            if not (run / "branches" / branch.name).is_dir():
                continue  # measured before, on another machine
            model = load_model(branch_checkpoint(run, recipe.branch(branch.name))).eval()
            held_out: Any = HeldOut(data, SAMPLES, recipe.objective.bind(model.config, data.form))
            asked = QuantizedMeasurement(schemes=list(SCHEMES), calibration_samples=SAMPLES, alone="nothing")
            try:
                result = measure(asked, model, held_out, cache=False)
            except PlanError as error:
                print(f"{branch.name}: {error}")
                continue
            changes = {scheme: result.of(scheme).change for scheme in SCHEMES}
            counts.setdefault(branch.name, {})[seed] = {
                "int8": float(entries(model)),
                **{scheme: change.mean for scheme, change in changes.items() if change is not None},
            }
    return counts


def entries(model: PreTrainedModel) -> int:
    """Numbers of the weights that are quantized; an embedding that is the head, too, is not one."""
    kinds: dict[int, tuple[int, set[str]]] = {}
    for _, tensor, kind in Weights(model).tensors():
        kinds.setdefault(id(tensor), (tensor.numel(), set()))[1].add(kind)
    return sum(count for count, found in kinds.values() if found <= {"matrix", "embedding", "gain"})


def section(found: PartResults) -> list[str]:
    """The table of the models that were measured, by their bytes in INT8; nothing where none were."""
    rows = []
    by_name = {branch.name: branch for branch in found.branches}
    for name, seeds in (found.counted or {}).items():
        cells = list(seeds.values())
        whole, eight = megabytes(by_name[name], 0.0), megabytes(by_name[name], cells[0]["int8"])
        losses = [interval(cell[scheme] for cell in cells) for scheme in SCHEMES]
        row = [by_name[name].title, str(len(cells)), f"{whole:.2f}", f"{eight:.2f}"]
        rows.append((eight, [*row, interval(by_name[name].values.values()), *losses]))
    if not rows:
        return []
    header = ("model", "seeds", "MB", "MB with INT8 weights", "loss", "W8 adds", "W8A8 adds")
    return [
        "",
        "## In eight bits",
        "",
        "The models of the front and the whole one, once mended, by their size with INT8 weights, where all other "
        "tensors, the head among them, stay in float32. What [INT8](../analysis.md#int8) adds to the loss is "
        f"simulated, with ranges of {SAMPLES} held-out samples, on as many others.",
        "",
        *markdown_table(header, [row for _, row in sorted(rows, key=lambda one: one[0])]),
    ]


def megabytes(branch: BranchComparison, int8: float) -> float:
    """Of a model's parameters, `int8` of them in one byte and the others in four."""
    return (4 * branch.parameters - 3 * int8) / 1e6
