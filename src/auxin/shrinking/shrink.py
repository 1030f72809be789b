"""The whole of it: search, choose, mend, measure on what nothing has looked at, and show why."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from auxin.accounting.inputs import unit_of_cost
from auxin.accounting.ledger import books_in
from auxin.analysis.fingerprint import model_fingerprint
from auxin.edits.plan import Plan
from auxin.errors import PlanError
from auxin.files import write_text
from auxin.models.loading import load_model
from auxin.recipes import Recipe, price_recipe
from auxin.recipes.beforehand import check_needs
from auxin.recipes.folder import DATA, branch_checkpoint, claim_directory, held, stage_directory
from auxin.recipes.runner import prepared_run, run_here
from auxin.recipes.stages import Run
from auxin.shrinking.candidates import Space
from auxin.shrinking.folder import (
    MODEL,
    OUTCOME,
    PAGE,
    PICTURE,
    SETTINGS,
    TRIALS,
    WHOLE,
    begin,
    earlier_branches,
    put_model,
    refuse_other_model,
)
from auxin.shrinking.outcome import Measured, Outcome
from auxin.shrinking.page import front_picture, page
from auxin.shrinking.search import candidates, refuse_without_optuna
from auxin.shrinking.settings import ShrinkSettings
from auxin.shrinking.trials import Records, Trial, Workbench, measured_sizes


def shrink(
    settings: ShrinkSettings,
    output: str | Path,
    command: str = "",
    announce: Callable[[str], None] = print,
    progress: bool = True,
) -> Outcome:
    """Find a way to make a model smaller, do it, mend it, and measure what is left.

    Args:
        settings: the model, how small it shall be, and what may be spent.
        output: a folder that does not exist, is empty, or holds a search with the same settings, which goes on:
            `trials` and `minutes` may be others. A search in which nothing reached its target makes way for another
            one of the same model and data. The folder gets the trials, a page, a picture, the plans, the run that
            mends, and the model.
        command: the command line that reproduces it, for the report.
        announce: is told what happens, a line at a time.
        progress: whether a bar is shown on standard error.

    Returns:
        What was measured on the held-out split, which neither methods nor the choice looked at.

    Raises:
        ConfigError, DataError, CheckpointError: something of the settings, the data or the model is wrong, or the
            folder holds something else.
        PlanError: the model meets the target already, or no way that was tried reaches it.
        TrainingError: another process is at work in `output`, or a signal came.
    """
    refuse_without_optuna()
    output = Path(output)
    space = Space(settings.methods)
    model = load_model(settings.model)
    settings.target.refuse_met(settings.target.of(model))
    base = settings.recipe()
    check_needs(base, output / DATA)
    price_recipe(base, memory=False)
    with held(output):
        begin(settings, output, announce)
        if settings.budget is None:
            announce("No budget: what is chosen is not mended.")
        earlier = earlier_branches(output)
        run = _claimed(settings.recipe(earlier), output, announce)
        settings.to_yaml(output / SETTINGS)
        run_here(run, command, [WHOLE])
        refuse_other_model(output, model_fingerprint(model), settings)
        records = Records(output / TRIALS)
        bench = Workbench(model, run.data, base.objective, settings)
        _search(bench, space, records, output, announce, progress)
        chosen, single = chosen_of(records.trials, settings)
        branches = {f"trial-{trial.number}": _branch(bench, trial) for trial in (chosen, single) if trial is not None}
        main = f"trial-{chosen.number}"
        new = [branch for name, branch in branches.items() if name not in {branch["name"] for branch in earlier}]
        run = _claimed(settings.recipe([*earlier, *new], main), output, announce)
        run_here(run, command, [WHOLE, *branches])
        outcome = _outcome(bench, run, records.trials, chosen, single)
        _write(outcome, settings, records.trials, run)
    return outcome


def _claimed(recipe: Recipe, output: Path, announce: Callable[[str], None]) -> Run:
    """The run of `recipe` in the held folder. That it has got branches is not told: they are what is searched for."""
    claim_directory(recipe, output, lambda line: None)
    return prepared_run(recipe, output, output / DATA, announce)


def chosen_of(trials: list[Trial], settings: ShrinkSettings) -> tuple[Trial, Trial | None]:
    """The trial of the least loss, and the best of those of one method at default settings where that is another.

    Raises:
        PlanError: none of them reached the target.
    """
    done = [trial for trial in trials if trial.loss is not None]
    if not done:
        first = trials[0]
        raise PlanError(
            f"None of {len(trials)} ways reaches {settings.target}. {first.candidate.title}: {first.refused} Give "
            f"another --target or other --methods, with the same --output; all reasons are in its {TRIALS}."
        )
    best = min(done, key=_by_loss)
    single = min((trial for trial in done if trial.candidate.is_plain), key=_by_loss, default=None)
    return best, single if single is not best else None


def _by_loss(trial: Trial) -> tuple[float, int]:
    assert trial.loss is not None
    return trial.loss, trial.number


def _search(
    bench: Workbench,
    space: Space,
    records: Records,
    output: Path,
    announce: Callable[[str], None],
    progress: bool,
) -> None:
    """Try until there are enough trials, or no time is left."""
    settings = bench.settings
    spent = sum(trial.seconds for trial in records.trials)
    if records.trials:
        announce(f"{len(records.trials)} trials are done already.")
    started = time.perf_counter()

    def may_begin() -> bool:
        if settings.minutes is None or not records.trials:
            return True
        return spent + time.perf_counter() - started < 60 * settings.minutes

    with _bar(settings.trials, len(records.trials), progress) as (show, is_shown):
        for candidate in candidates(space, records.trials, settings.seed, settings.trials, may_begin):
            show(candidate.title, records.trials)
            trial = bench.tried(len(records.trials) + 1, candidate, output)
            records.add(trial)
            told = f"loss {trial.loss:.4f}" if trial.loss is not None else f"not possible: {trial.refused}"
            if not is_shown:
                announce(f"Trial {len(records.trials)} of {settings.trials}: {candidate.title}: {told}")
    if len(records.trials) < settings.trials:
        why = "no time is left" if not may_begin() else "there is nothing else to try"
        announce(f"{len(records.trials)} of {settings.trials} trials: {why}.")


@contextmanager
def _bar(total: int, done: int, enabled: bool) -> Iterator[tuple[Callable[[str, list[Trial]], None], bool]]:
    console = Console(stderr=True)
    is_shown = enabled and console.is_terminal
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=12), MofNCompleteColumn(),
        TextColumn("{task.fields[best]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not is_shown, transient=True) as bars:
        task = bars.add_task("trials", total=total, completed=done, best="")

        def show(title: str, trials: list[Trial]) -> None:
            losses = [trial.loss for trial in trials if trial.loss is not None]
            best = f"best {min(losses):.4f}" if losses else ""
            bars.update(task, completed=len(trials), description=title[:34], best=best)

        yield show, is_shown


def _branch(bench: Workbench, trial: Trial) -> dict[str, Any]:
    """The branch of a recipe that does what was tried, and mends it."""
    settings = bench.settings
    stages: list[dict[str, Any]] = []
    for number, change in enumerate(bench.changes(trial.candidate), 1):
        stages.append({"kind": "change", "name": f"change-{number}", **change})
    if settings.budget is None:
        stages.append({"kind": "evaluate"})
    else:
        form = bench.data.form
        budget = {"tokens": settings.budget} if form.unit == "token" else {"samples": settings.budget // form.units}
        objective = bench.objective.model_dump(mode="json")
        if settings.teacher_weight:
            weight = {"weight": settings.teacher_weight}
            objective = {"kind": "distillation", "teacher": f"{WHOLE}/build", "objective": objective, **weight}
        stages.append({"kind": "train", "name": "mend", "settings": {**budget, "objective": objective}})
    return {
        "name": f"trial-{trial.number}",
        "title": trial.candidate.title,
        "fork": f"{WHOLE}/build",
        "stages": stages,
    }


def _outcome(bench: Workbench, run: Run, trials: list[Trial], chosen: Trial, single: Trial | None) -> Outcome:
    """What the finished branches measure on the held-out split."""
    form, cost = bench.data.form, unit_of_cost(bench.model)
    return Outcome(
        target=bench.objective.bind(bench.model.config, form).target,
        unit=form.unit,
        flops_unit=form.unit if cost == "sample" else cost,
        seconds=sum(trial.seconds for trial in trials),
        trials=len(trials),
        alone=sum(trial.loss is not None and trial.candidate.is_plain for trial in trials),
        whole=_measured(bench, run, None),
        chosen=_measured(bench, run, chosen),
        single=None if single is None else _measured(bench, run, single),
    )


def _measured(bench: Workbench, run: Run, trial: Trial | None) -> Measured:
    """A finished branch, that of the whole model or of a trial, on the held-out split."""
    name = WHOLE if trial is None else f"trial-{trial.number}"
    checkpoint = branch_checkpoint(run.directory, run.recipe.branch(name))
    model, split = load_model(checkpoint), bench.data.split("validation")
    losses, loss = bench.losses(model, split, range(len(split)))
    changes = [record for record in books_in(checkpoint).stages if record.kind == "change"]
    return Measured(
        title="the whole model" if trial is None else trial.candidate.title,
        number=None if trial is None else trial.number,
        before=changes[-1].value_after if trial is not None and bench.settings.budget is not None else None,
        loss=loss,
        losses=losses,
        size=bench.settings.target.of(model),
        **measured_sizes(model, bench.settings.target),
    )


def _write(outcome: Outcome, settings: ShrinkSettings, trials: list[Trial], run: Run) -> None:
    """The model, and everything that a person reads."""
    output, branch = run.directory, run.recipe.branch(f"trial-{outcome.chosen.number}")
    checkpoint = branch_checkpoint(output, branch)
    records = books_in(checkpoint).stages[-len(branch.stages) :]
    for stage in branch.stages:
        if stage.kind == "change":  # beside its files
            folder = stage_directory(output, branch, stage)
            planned = next(record.plan for record in records if record.name == stage.name)
            Plan.model_validate(planned).beside(folder).to_yaml(folder / "plan.yaml")
    put_model(checkpoint, output / MODEL)
    write_text(output / OUTCOME, outcome.model_dump_json(indent=1) + "\n")
    write_text(output / PICTURE, front_picture(outcome, settings, trials))
    write_text(output / PAGE, page(outcome, settings, trials))
