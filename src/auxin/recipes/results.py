"""Gather what the branches of a run measured."""

import json
import math
from pathlib import Path
from typing import Any

from auxin.accounting import Ledger, StageRecord
from auxin.accounting.ledger import software_versions
from auxin.accounting.machine import describe_machine
from auxin.accounting.results import BranchResult, CurvePoint, GrowthPoint, RunResults, perplexity_of
from auxin.data import CorpusReport, PackedData
from auxin.objectives import ObjectiveSettings
from auxin.recipes.schema import Branch, Recipe
from auxin.training.metrics import METRICS_FILE

_EXAMPLES = 3
"""Names of skipped documents that are shown for each reason."""

Course = tuple[list[CurvePoint], list[GrowthPoint]]
"""Curve and growths from the first ancestor up to the end of a stage."""


def collect_results(
    recipe: Recipe, directory: Path, data: PackedData, final_checkpoints: dict[str, Path], command: str
) -> RunResults:
    """Read the ledgers and metrics of a finished run.

    Args:
        recipe: the recipe that ran.
        directory: the run's folder.
        data: its corpus.
        final_checkpoints: the last checkpoint of each branch.
        command: the command line that reproduces the run.
    """
    branches: list[BranchResult] = []
    courses: dict[str, Course] = {}
    for branch in recipe.branches:
        ledger = Ledger.load(final_checkpoints[branch.name])
        branches.append(branch_result(branch, ledger, directory, data, courses, recipe.objective))
    report = data.report
    return RunResults(
        name=recipe.name,
        title=recipe.title,
        description=recipe.description,
        command=command,
        seed=recipe.seed,
        machine=describe_machine(),
        versions=software_versions(),
        corpus={
            "source": recipe.corpus.source,
            "documents": f"{report.documents:,}",
            "left out": describe_left_out(report),
            "vocabulary": f"{data.vocab_size:,}",
            "context length": f"{data.context_length:,}",
            **_corruption(recipe.objective, data.context_length),
            "training tokens": f"{report.train.tokens:,}",
            "validation tokens": f"{report.validation.tokens:,}",
            "fingerprint": data.fingerprint,
        },
        main_branch=recipe.main_branch or recipe.branches[0].name,
        branches=branches,
    )


def branch_result(
    branch: Branch,
    ledger: Ledger,
    directory: Path,
    data: PackedData,
    courses: dict[str, Course],
    objective: ObjectiveSettings,
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
    for number, record in enumerate(own, start=1):
        if record.kind == "train":
            folder = directory / "branches" / branch.name / f"{number:02d}-{record.name}"
            curve = [*curve, *stage_curve(folder, record, spent)]
        spent = spent.append(record)
        if record.kind == "grow":
            growths = [*growths, growth_point(record, spent, parameters_before)]
        parameters_before = record.parameters
        courses[f"{branch.name}/{record.name}"] = (curve, growths)
    loss = own[-1].loss_after
    # Of a corrupted text only a part is predicted, from what stands before and behind it: that measures no compression.
    whole_text = objective.objective == "causal"
    return BranchResult(
        name=branch.name,
        title=branch.title,
        parent=parent or None,
        fork_stage=fork_stage or None,
        ledger=ledger,
        curve=curve,
        growths=growths,
        parameters=own[-1].parameters,
        tokens=ledger.total_tokens,
        flops=ledger.total_flops,
        seconds=ledger.total_seconds,
        validation_loss=loss,
        perplexity=None if loss is None else perplexity_of(loss),
        bits_per_byte=loss / math.log(2) / data.bytes_per_token if loss is not None and whole_text else None,
    )


def _corruption(objective: ObjectiveSettings, context_length: int) -> dict[str, str]:
    """What the losses are of, where they are not of the next token."""
    lengths = objective.lengths(context_length)
    if lengths is None:
        return {}
    cut = f"{lengths.noise:,} of {lengths.context:,} tokens cut out, spans: {lengths.spans:,}"
    return {"span corruption": f"{cut}; encoder {lengths.inputs:,} tokens, decoder {lengths.targets:,}"}


def describe_left_out(report: CorpusReport) -> str:
    """What of the source is not in the corpus, in one line: duplicates, skipped documents with examples, the limit."""
    parts = [f"{report.duplicates:,} duplicates"]
    for reason, skipped in report.skipped.items():
        examples = ", ".join(skipped.examples[:_EXAMPLES]) + (", ..." if skipped.count > _EXAMPLES else "")
        parts.append(f"{skipped.count:,} skipped: {reason} ({examples})")
    if report.limit is not None:
        parts.append(f"everything after {report.limit} was reached")
    return "; ".join(parts)


def stage_curve(folder: Path, record: StageRecord, spent: Ledger) -> list[CurvePoint]:
    """The measurements of one train stage; `spent` is what was spent before it."""
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    ]
    return [
        CurvePoint(
            stage=record.name,
            tokens=spent.total_tokens + line["tokens"],
            flops=spent.total_flops + line["flops"],
            seconds=spent.total_seconds + line["seconds"],
            training_loss=line.get("loss"),
            validation_loss=line.get("validation_loss"),
        )
        for line in lines
        if "event" not in line
    ]


def growth_point(record: StageRecord, spent: Ledger, parameters_before: int) -> GrowthPoint:
    """A growth as a point on the curve; `spent` includes it."""
    return GrowthPoint(
        stage=record.name,
        tokens=spent.total_tokens,
        flops=spent.total_flops,
        seconds=spent.total_seconds,
        parameters_before=parameters_before,
        parameters_after=record.parameters,
        loss_before=record.loss_before,
        loss_after=record.loss_after,
        promise=str((record.plan or {}).get("promise", "none")),
    )
