"""Models of parity.yaml with something changed that no config says: one cell for each way of changing and each seed."""

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import made_by, made_by_line
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from auxin.accounting.statistics import Estimate
from auxin.data import PackedData, prepare
from auxin.files import write_text
from auxin.nn import Pattention
from auxin.nn.scores import ScoreFunction
from auxin.recipes import Recipe, load_recipe
from auxin.report.markdown import markdown_table
from auxin.training import Hook, TrainingSettings, train

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "benchmarks" / "parity.yaml"
QUICK = ["training.steps=20", "training.warmup_steps=2", "data.max_bytes=400000", "data.validation_fraction=0.2"]
Cell = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """A model to train."""

    title: str
    branch: str
    """Of the recipe: the model and its rate."""
    form: str | None = None
    """What is changed about the model, by the names that the benchmark gives it."""


@dataclass(frozen=True)
class Task:
    """A cell to measure."""

    way: Way
    seed: int
    runs: Path
    changes: list[str]
    """Of the recipe."""

    def recipe(self) -> Recipe:
        """The recipe of this seed."""
        return load_recipe(str(RECIPE), self.changes).of_seed(self.seed)

    def data(self) -> PackedData:
        """What the recipe trains on."""
        return prepare(self.recipe().data, self.runs / "data")

    def settings(self) -> TrainingSettings:
        """How the way's branch is trained."""
        recipe = self.recipe()
        return recipe.training_settings(recipe.branch(self.way.branch).stages[1])

    def model(self) -> PreTrainedModel:
        """The untrained model of the way's branch, nothing changed."""
        recipe = self.recipe()
        stage = recipe.branch(self.way.branch).stages[0]
        config = AutoConfig.for_model(stage.model_type, **stage.config, vocab_size=recipe.data.vocab_size)
        torch.manual_seed(self.seed)
        return AutoModelForCausalLM.from_config(config)

    def trained(self, model: PreTrainedModel, hooks: Sequence[Hook] = ()) -> float:
        """Train `model`; its held-out loss."""
        with tempfile.TemporaryDirectory() as folder:
            return train(model, self.data(), self.settings(), folder, hooks=hooks, progress=False).value


def asked(description: str | None, runs: Path) -> argparse.Namespace:
    """The options of such a benchmark; with --quick fewer steps, one seed, and cells of its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--runs", type=Path, default=runs)
    parser.add_argument("--quick", action="store_true", help="twenty steps, one seed; nothing is written but cells")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.runs = arguments.seeds[:1], arguments.runs / "quick"
    return arguments


def measured(
    arguments: argparse.Namespace,
    ways: Mapping[str, Way],
    measure: Callable[[Task], Cell],
    script: str,
    changes: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure every cell that is missing; the results of the seeds that were asked for, and what made them.

    Args:
        arguments: of `asked`.
        ways: the ways by name.
        measure: what a process does for one cell.
        script: the benchmark's file name.
        changes: of the recipe, for all cells.
    """
    runs, seeds, changes = arguments.runs, arguments.seeds, [*changes, *(QUICK if arguments.quick else [])]
    path = runs / "cells.json"
    cells: dict[str, Cell] = json.loads(path.read_text()) if path.exists() else {}
    tasks = {f"{name}/{seed}": Task(ways[name], seed, runs, changes) for seed in seeds for name in ways}
    prepare(load_recipe(str(RECIPE), changes).data, runs / "data")
    missing = {key: task for key, task in tasks.items() if key not in cells}
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        found = pool.imap_unordered(_Measured(measure), missing.items())
        for key, cell in found:
            cells[key] = cell
            print(f"{key}: {cell['loss']:.4f}", flush=True)
            write_text(path, json.dumps(cells))
    command = f"python benchmarks/{script} --seeds {' '.join(map(str, seeds))}"
    return {**made_by(command), "seeds": seeds, "cells": {key: cells[key] for key in cells if key in tasks}}


@dataclass(frozen=True)
class _Measured:
    measure: Callable[[Task], Cell]

    def __call__(self, keyed: tuple[str, Task]) -> tuple[str, Cell]:
        torch.set_num_threads(1)
        key, task = keyed
        return key, self.measure(task)


def values(results: Mapping[str, Any], way: str, *keys: str) -> list[float]:
    """What the seeds of one way measured; nothing of what its model does not have."""
    found: list[Any] = [results["cells"][f"{way}/{seed}"] for seed in results["seeds"]]
    for key in keys:
        found = [cell[key] for cell in found if key in cell]
    return found


def excess(results: Mapping[str, Any], way: str, other: str) -> list[float]:
    """The loss of one way minus that of another, seed by seed."""
    pairs = zip(values(results, way, "loss"), values(results, other, "loss"), strict=True)
    return [loss - against for loss, against in pairs]


class Same(Pattention):
    """A Pattention of one group with the tokens of `module`; whatever derives from it computes something else of them.

    Args:
        module: whose tokens it begins with.
        score_function: how its scores become weights.
    """

    def __init__(self, module: Pattention, score_function: ScoreFunction = "gelu") -> None:
        super().__init__(module.in_features, module.out_features, module.group_sizes, score_function=score_function)
        self.load_state_dict(module.state_dict())


def with_attention(task: Task, forms: Mapping[str, Callable[[Any], nn.Module]]) -> PreTrainedModel:
    """The untrained model of `task`, in which projections of the attention have become another form; what is changed
    about a way says which form, and then which projections."""
    model = task.model()
    form, *slots = (task.way.form or "none").split()
    for layer in model.base_model.layers if slots else ():
        for slot in slots:
            setattr(layer.attention, slot, forms[form](getattr(layer.attention, slot)))
    return model


def learnt(task: Task, model: PreTrainedModel, hooks: Sequence[Hook] = ()) -> Cell:
    """Train one way with one seed."""
    return {"parameters": model.num_parameters(), "loss": task.trained(model, hooks)}


def losses_page(
    results: Mapping[str, Any], ways: Mapping[str, Way], title: str, section: str, steps: int, header: Sequence[str]
) -> str:
    """Losses of ways beside that of the way "new", as Markdown.

    Args:
        results: of `measured`.
        ways: the ways by name.
        title: of the page.
        section: of parity.md, which says what follows.
        steps: of the trainings.
        header: of the table.
    """
    rows = [
        [
            way.title,
            f"{values(results, name, 'parameters')[0]:,}",
            Estimate.of(values(results, name, "loss")).text(3),
            "-" if name == "new" else Estimate.of(excess(results, name, "new")).text(3, True),
        ]
        for name, way in ways.items()
    ]
    return "\n".join([
        f"# {title}",
        "",
        "Models, data and rates are those of [parity.yaml](../../benchmarks/parity.yaml), over "
        f"{steps:,} steps. What follows is in [parity.md](../parity.md#{section}). Held-out loss in nats per token"
        + (": mean over the seeds and 95 % interval (Student's t)." if len(results["seeds"]) > 1 else "."),
        "",
        f"{made_by_line(results)} Seeds: {results['seeds']}.",
        "",
        *markdown_table(header, rows),
    ]) + "\n"  # fmt: skip
