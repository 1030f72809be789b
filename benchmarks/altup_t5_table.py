"""Is it the table that keeps alternating updates from gaining anything on a T5? Its entries start with a standard
deviation of 1, and it is the head too: blocks of it that are random write into every logit at first.

The T5 of the recipe `altup-t5` is trained with its table as it is and with one scaled down to 1 / sqrt(d), all else
equal: plain, and with alternating updates of 4 blocks.

    python benchmarks/altup_t5_table.py
    python benchmarks/altup_t5_table.py --quick

About nine minutes of one core.
"""

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import asked_quick, made_by, made_by_line, publish

import auxin
from auxin.accounting.statistics import Estimate
from auxin.data import CorpusSettings
from auxin.data.corpus import prepare
from auxin.data.dataset import Dataset
from auxin.edits import Plan, ScaleParameter
from auxin.models.loading import new_model
from auxin.recipes import load_recipe
from auxin.recipes.schema import Recipe
from auxin.recipes.stage_models import stage_configs
from auxin.report.markdown import markdown_table
from auxin.training import train

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "altup_t5_table.json"
PAGE = ROOT / "docs" / "results" / "altup_t5_table.md"
BASELINE = "plain"
MODELS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "AltUp, K = 4": {"blocks": 4, "conversion": "random"},
}
"""What is done to the T5 before it is trained, as settings of the method `altup`."""


@dataclass(frozen=True)
class Trial:
    """Sizes of the comparison; the rest is the recipe's."""

    seeds: tuple[int, ...] = (0, 1, 2)
    deviations: tuple[float, ...] = (1.0, 0.125)
    """Standard deviations that the table starts with."""
    steps: int = 200


QUICK = Trial(seeds=(0,), steps=80)


def loss_of(recipe: Recipe, data: Dataset, changes: dict[str, Any], deviation: float, seed: int, steps: int) -> float:
    """Held-out loss after training, in nats per token."""
    recipe = recipe.of_seed(seed)
    torch.manual_seed(seed)
    model = new_model(stage_configs(recipe, data.form)["baseline"]["build"])
    if changes:
        auxin.apply(auxin.plan(model, "altup", seed=seed, **changes), model)
    scale = ScaleParameter(parameter="shared.weight", factor=deviation / model.shared.weight.std().item())
    auxin.apply(Plan(method="a table of another scale, by hand", promise="none", edits=[scale]), model)
    settings = recipe.training_settings(recipe.branches[0].stages[-1]).model_copy(update={"steps": steps})
    with tempfile.TemporaryDirectory() as folder:
        value = train(model, data, settings, folder, progress=False).value
    assert value is not None
    return value


def run(trial: Trial) -> dict[str, Any]:
    """Train every model with every table and seed."""
    recipe, start = load_recipe("altup-t5", []), time.process_time()
    assert isinstance(recipe.data, CorpusSettings)
    losses: dict[str, dict[str, list[float]]] = {name: {} for name in MODELS}
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(recipe.data, Path(folder) / "data")
        for seed in trial.seeds:
            for deviation in trial.deviations:
                for name, changes in MODELS.items():
                    loss = loss_of(recipe, data, changes, deviation, seed, trial.steps)
                    losses[name].setdefault(f"{deviation:g}", []).append(loss)
                    print(f"seed {seed}, standard deviation {deviation:g}, {name}: {loss:.4f}", flush=True)
    return {**made_by("python benchmarks/altup_t5_table.py"), "trial": asdict(trial), "losses": losses} | {
        "core_seconds": round(time.process_time() - start)
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    trial, losses = results["trial"], results["losses"]
    rows = []
    for name in losses:
        for deviation, values in losses[name].items():
            plain = losses[BASELINE][deviation]
            rows.append(
                [
                    name,
                    deviation,
                    Estimate.of(values).text(3),
                    "-"
                    if name == BASELINE
                    else Estimate.of([a - b for a, b in zip(values, plain, strict=True)]).text(3, signed=True),
                ]
            )
    lines = [
        "# Alternating updates on a T5, by what its table starts with",
        "",
        f"The T5 of `altup-t5` (4 and 4 layers, width 64, span corruption, tied table), {trial['steps']} steps, one "
        "learning rate. The table starts with the standard deviation that is given; all else is equal. Held-out loss "
        "in nats per token: mean over the seeds and 95 % interval (Student's t); differences are taken seed by seed.",
        "",
        f"{made_by_line(results)} Seeds: {', '.join(map(str, trial['seeds']))}. {results['core_seconds']} seconds of "
        "one core.",
        "",
    ]
    header = ["model", "table's standard deviation", "held-out loss", "minus plain"]
    return "\n".join([*lines, *markdown_table(header, rows)]) + "\n"


def main() -> None:
    """Run all seeds and write the page."""
    quick = asked_quick(__doc__)
    torch.set_num_threads(1)
    results = run(QUICK if quick else Trial())
    publish(results, RESULTS, table(results), PAGE, quick)


if __name__ == "__main__":
    main()
