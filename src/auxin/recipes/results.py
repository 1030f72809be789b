"""What the branches of a run measured: gathered, read again, and reported."""

import json
import math
from pathlib import Path

from auxin.accounting import Ledger, StageRecord
from auxin.accounting.comparison import Comparison
from auxin.accounting.ledger import software_versions
from auxin.accounting.machine import describe_machine
from auxin.accounting.results import (
    BranchResult,
    CurvePoint,
    GrowthPoint,
    MeasureDescription,
    RunResults,
    perplexity_of,
)
from auxin.data.dataset import Dataset
from auxin.errors import CheckpointError, reason
from auxin.files import existing_folder
from auxin.models.loading import load_config
from auxin.objectives.measures import Loss, Measure
from auxin.objectives.objective import Objective
from auxin.recipes.folder import stage_directory
from auxin.recipes.schema import Branch, Recipe
from auxin.report.html import write_report
from auxin.report.markdown import write_markdown
from auxin.report.picture import write_chart_svg
from auxin.training.metrics import HELD_OUT_SAMPLES, METRICS_FILE, VALIDATION, metrics_in

RESULTS_FILE = "results.json"
FINISHED_RUN = "the folder of a finished run"
_GIVE_ONE = f"Give {FINISHED_RUN}."

Curve = tuple[list[CurvePoint], list[GrowthPoint]]
"""Curve and growths from the first ancestor up to the end of a stage."""


def collect_results(
    recipe: Recipe,
    directory: Path,
    data: Dataset,
    final_checkpoints: dict[str, Path],
    command: str,
    threads: int | None = None,
) -> RunResults:
    """Read the ledgers and metrics of a run's finished branches.

    Args:
        recipe: the recipe that ran.
        directory: the run's folder.
        data: its data.
        final_checkpoints: the last checkpoint of each finished branch, one at least.
        command: the command line that reproduces the run.
        threads: with which the branches were run; None: this process's.
    """
    branches: list[BranchResult] = []
    courses: dict[str, Curve] = {}
    for branch in (branch for branch in recipe.branches if branch.name in final_checkpoints):
        ledger = Ledger.load(final_checkpoints[branch.name])
        objective = recipe.objective.bind(load_config(final_checkpoints[branch.name]), data.form)
        branches.append(branch_result(branch, ledger, directory, data, courses, recipe.measures[0], objective))
    return RunResults(
        name=recipe.name,
        title=recipe.title,
        description=recipe.description,
        command=command,
        seed=recipe.seed,
        machine=describe_machine(threads),
        versions=software_versions(),
        unit=data.form.unit,
        measure=describe_measure(recipe.measures[0], objective),
        other_measures=[describe_measure(measure, objective) for measure in recipe.measures[1:]],
        data={**data.describe(), **objective.describe(), "fingerprint": data.fingerprint},
        main_branch=recipe.main_branch or recipe.branches[0].name,
        branches=branches,
    )


def branch_result(
    branch: Branch,
    ledger: Ledger,
    directory: Path,
    data: Dataset,
    courses: dict[str, Curve],
    measure: Measure,
    objective: Objective,
) -> BranchResult:
    """The costs and the curve of one branch; a fork's begin with its parent's up to the fork.

    `courses` holds those of the stages before, by "branch/stage"; the branch's own are added.
    """
    parent, _, fork_stage = (branch.fork or "").partition("/")
    own = ledger.stages[len(ledger.stages) - len(branch.stages) :]
    inherited = ledger.stages[: len(ledger.stages) - len(branch.stages)]
    curve, growths = courses[branch.fork] if branch.fork else ([], [])
    spent = Ledger(stages=inherited)
    parameters_before = inherited[-1].parameters if inherited else 0
    for stage, record in zip(branch.stages, own, strict=True):
        if record.kind == "train":
            folder = stage_directory(directory, branch, stage)
            curve = [*curve, *stage_curve(folder, record, spent, data.form.unit, measure)]
        spent = spent.append(record)
        if record.kind == "change":
            growths = [*growths, growth_point(record, spent, parameters_before, data.form.unit)]
        parameters_before = record.parameters
        courses[f"{branch.name}/{record.name}"] = (curve, growths)
    value = own[-1].value_after
    loss = value if isinstance(measure, Loss) and objective.target == "token" else None
    # Of a corrupted text only a part is predicted, from what stands before and behind it: that measures no compression.
    bytes_per_unit = data.bytes_per_unit if objective.whole_text else None
    return BranchResult(
        name=branch.name,
        title=branch.title,
        parent=parent or None,
        fork_stage=fork_stage or None,
        ledger=ledger,
        curve=curve,
        growths=growths,
        parameters=own[-1].parameters,
        units=ledger.total_units(data.form.unit),
        flops=ledger.total_flops,
        seconds=ledger.total_seconds,
        value=value,
        measures=own[-1].measures,
        perplexity=None if loss is None else perplexity_of(loss),
        bits_per_byte=None if loss is None or bytes_per_unit is None else loss / math.log(2) / bytes_per_unit,
    )


def describe_measure(measure: Measure, objective: Objective) -> MeasureDescription:
    """What tables say about `measure` of `objective`."""
    return MeasureDescription(kind=measure.kind, name=measure.name, unit=measure.unit(objective), better=measure.better)


def stage_curve(folder: Path, record: StageRecord, spent: Ledger, unit: str, measure: Measure) -> list[CurvePoint]:
    """What was measured in one train stage; `spent` is what was spent before it, of data in `unit`s."""
    return [
        CurvePoint.parse(
            {
                "stage": record.name,
                "units": spent.total_units(unit) + line["units"],
                "flops": spent.total_flops + line["flops"],
                "seconds": spent.total_seconds + line["seconds"],
                "training_loss": line.get("loss"),
                "value": line.get(VALIDATION + measure.kind),
                "samples": line.get(HELD_OUT_SAMPLES),
            },
            source=f"{folder / METRICS_FILE}, step {line['step']}",
        )
        for line in metrics_in(folder)
        if "event" not in line
    ]


def growth_point(record: StageRecord, spent: Ledger, parameters_before: int, unit: str) -> GrowthPoint:
    """A growth as a point on the curve; `spent` includes it."""
    return GrowthPoint(
        stage=record.name,
        units=spent.total_units(unit),
        flops=spent.total_flops,
        seconds=spent.total_seconds,
        parameters_before=parameters_before,
        parameters_after=record.parameters,
        value_before=record.value_before,
        value_after=record.value_after,
        promise=str((record.plan or {}).get("promise", "none")),
    )


def read_results(directory: str | Path) -> RunResults | Comparison:
    """What a run has written into its folder `directory`: a comparison where it has several seeds.

    Raises:
        CheckpointError: the folder holds no finished run, or what it holds can't be read.
    """
    path = existing_folder(directory, FINISHED_RUN, RESULTS_FILE) / RESULTS_FILE
    if not path.exists():
        raise CheckpointError(f"{directory} holds no {RESULTS_FILE}, so that no run was finished there. {_GIVE_ONE}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # broken JSON and broken UTF-8 are ValueErrors
        raise CheckpointError(f"{path} can't be read: {reason(error)}. {_GIVE_ONE}") from error
    kind: type[RunResults | Comparison] = Comparison if isinstance(values, dict) and "seeds" in values else RunResults
    return kind.parse(values, source=str(path))


def rewrite_report(directory: str | Path) -> list[Path]:
    """Write `report.html` and `chart.svg` of the run in `directory` from its `results.json`; of one with several seeds
    `results.md` too, its tables as Markdown. Returns their paths.

    Raises:
        CheckpointError: as `read_results`.
    """
    directory, results = Path(directory), read_results(directory)
    paths = [write_report(results, directory / "report.html"), write_chart_svg(results, directory / "chart.svg")]
    if isinstance(results, Comparison):
        paths.append(write_markdown(results, directory / "results.md"))
    return paths
