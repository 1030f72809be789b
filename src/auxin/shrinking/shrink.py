"""The whole of it: search, choose, mend, measure on what nothing has looked at, and show why."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from auxin.accounting.ledger import books_in
from auxin.analysis.fingerprint import model_fingerprint
from auxin.data.dataset import DATASETS, Dataset
from auxin.edits.plan import Plan
from auxin.errors import CheckpointError, ConfigError, PlanError
from auxin.files import remove_folder, write_text
from auxin.locks import exclusive
from auxin.models.loading import load_model
from auxin.recipes import Recipe, run_recipe
from auxin.recipes.folder import DATA, RECIPE_FILE, left_checkpoint, stage_directory
from auxin.shrinking.candidates import Space
from auxin.shrinking.outcome import Measured, Outcome
from auxin.shrinking.page import front_picture, page
from auxin.shrinking.search import candidates, refuse_without_optuna
from auxin.shrinking.settings import ShrinkSettings
from auxin.shrinking.trials import Records, Trial, Workbench, measured_sizes
from auxin.sums import damage, has_sums, names_without_sums
from auxin.training.checkpoint import copy_checkpoint

SETTINGS, TRIALS, OUTCOME, PAGE, PICTURE, MODEL = (
    *("shrink.yaml", "trials.jsonl", "outcome.json", "shrink.md", "front.svg", "model"),
)
"""Files and folders beside those of the run that mends."""
WHOLE = "whole"
MAY_GROW = ("trials", "minutes")
"""Settings that another call may change: the search goes on."""


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
            `trials` and `minutes` may be others. It gets the trials, a page, a picture, the plans, the run that mends,
            and the model.
        command: the command line that reproduces it, for the report.
        announce: is told what happens, a line at a time.
        progress: whether a bar is shown on standard error.

    Returns:
        What was measured on the held-out split, which neither methods nor the choice looked at.

    Raises:
        ConfigError, DataError, CheckpointError: something of the settings, the data or the model is wrong, or the
            folder holds something else.
        PlanError: no way that was tried reaches the target.
    """
    refuse_without_optuna()
    settings.check_budget()
    output = Path(output)
    space = Space(settings.methods)
    model = load_model(settings.model)
    settings.target.of(model)  # what can't be measured is refused before work starts
    _check_folder(settings, output)
    if settings.budget is None:
        announce("No budget: what is chosen is not mended.")
    earlier = _earlier(output)
    base = settings.recipe(earlier)
    run_recipe(base, output, command, _but_changes(announce), branches=[WHOLE])
    with exclusive(output):
        settings.to_yaml(output / SETTINGS)
        records = _records(output, model_fingerprint(model), settings)
        bench = Workbench(model, _data(base, output), base.objective, settings)
        _search(bench, space, records, output, announce, progress)
    chosen, single = chosen_of(records.trials)
    branches = {f"trial-{trial.number}": _branch(bench, trial) for trial in (chosen, single) if trial is not None}
    main = f"trial-{chosen.number}"
    new = [branch for name, branch in branches.items() if name not in {branch["name"] for branch in earlier}]
    recipe = settings.recipe([*earlier, *new], main)
    run_recipe(recipe, output, command, _but_changes(announce), branches=[WHOLE, *branches])
    outcome = Outcome(
        target=bench.objective.bind(model.config, bench.data.form).target,
        seconds=sum(trial.seconds for trial in records.trials),
        trials=len(records.trials),
        alone=sum(trial.loss is not None and trial.candidate.is_plain for trial in records.trials),
        whole=_measured(bench, recipe, output, WHOLE, "the whole model"),
        chosen=_measured(bench, recipe, output, main, chosen.candidate.title, chosen),
        single=None
        if single is None
        else _measured(bench, recipe, output, f"trial-{single.number}", single.candidate.title, single),
    )
    _write(outcome, settings, records.trials, output, recipe, main)
    return outcome


def _but_changes(announce: Callable[[str], None]) -> Callable[[str], None]:
    """Tells all but that the recipe has got branches, which is what the search was for."""
    return lambda line: None if line.startswith("Recipe changed") else announce(line)


def chosen_of(trials: list[Trial]) -> tuple[Trial, Trial | None]:
    """The trial of the least loss, and the best of those of one method at default settings where that is another.

    Raises:
        PlanError: none of them reached the target.
    """
    done = [trial for trial in trials if trial.loss is not None]
    if not done:
        reasons = "; ".join(f"{trial.candidate.title}: {trial.refused}" for trial in trials[:3])
        raise PlanError(f"None of {len(trials)} ways reaches the target. {reasons}")
    best = min(done, key=_by_loss)
    single = min((trial for trial in done if trial.candidate.is_plain), key=_by_loss, default=None)
    return best, single if single is not best else None


def _by_loss(trial: Trial) -> tuple[float, int]:
    assert trial.loss is not None
    return trial.loss, trial.number


def _check_folder(settings: ShrinkSettings, output: Path) -> None:
    path = output / SETTINGS
    if not path.exists():
        return
    saved = ShrinkSettings.from_yaml(path).model_dump(exclude=set(MAY_GROW))
    asked = settings.model_dump(exclude=set(MAY_GROW))
    if changed := [name for name in asked if asked[name] != saved[name]]:
        raise ConfigError(
            f"{output} holds a search with other settings ({', '.join(changed)}). Give another --output, or the "
            f"settings in {path}; {' and '.join(MAY_GROW)} may be others."
        )


def _records(output: Path, fingerprint: str, settings: ShrinkSettings) -> Records:
    """The trials that were done before, of this model."""
    path = output / "searched.txt"
    if path.exists() and path.read_text(encoding="utf-8").strip() != fingerprint:
        raise ConfigError(
            f"{settings.model} is not the model that it was when the search in {output} began. Give another --output."
        )
    write_text(path, fingerprint + "\n")
    return Records(output / TRIALS)


def _earlier(output: Path) -> list[dict[str, Any]]:
    """The branches of ways that were chosen before, when there were fewer trials: a begun run keeps them."""
    path = output / RECIPE_FILE
    if not (output / SETTINGS).exists() or not path.exists():
        return []
    branches = Recipe.from_yaml(path).model_dump(mode="json", exclude_unset=True)["branches"]
    return [branch for branch in branches if branch["name"] != WHOLE]


def _data(recipe: Recipe, output: Path) -> Dataset:
    return DATASETS.find(recipe.data.kind).prepare(recipe.data, output / DATA, False)


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


def _measured(
    bench: Workbench, recipe: Recipe, output: Path, name: str, title: str, trial: Trial | None = None
) -> Measured:
    """A finished branch on the held-out split."""
    branch = recipe.branch(name)
    checkpoint = left_checkpoint(output, branch, branch.stages[-1])
    model, split = load_model(checkpoint), bench.data.split("validation")
    losses, loss = bench.losses(model, split, range(len(split)))
    changes = [record for record in books_in(checkpoint).stages if record.kind == "change"]
    return Measured(
        title=title,
        number=None if trial is None else trial.number,
        before=changes[-1].value_after if trial is not None and bench.settings.budget is not None else None,
        loss=loss,
        losses=losses,
        size=bench.settings.target.of(model),
        **measured_sizes(model, bench.settings.target),
    )


def _write(
    outcome: Outcome, settings: ShrinkSettings, trials: list[Trial], output: Path, recipe: Recipe, main: str
) -> None:
    """The model, and everything that a person reads."""
    branch = recipe.branch(main)
    checkpoint = left_checkpoint(output, branch, branch.stages[-1])
    records = books_in(checkpoint).stages[-len(branch.stages) :]
    for stage in branch.stages:
        if stage.kind == "change":  # beside its files
            folder = stage_directory(output, branch, stage)
            planned = next(record.plan for record in records if record.name == stage.name)
            Plan.model_validate(planned).beside(folder).to_yaml(folder / "plan.yaml")
    _put(checkpoint, output / MODEL)
    write_text(output / OUTCOME, outcome.model_dump_json(indent=1) + "\n")
    write_text(output / PICTURE, front_picture(trials, settings, outcome.chosen.number))
    write_text(output / PAGE, page(outcome, settings, trials))


def _put(checkpoint: Path, target: Path) -> None:
    """Copy the checkpoint to `target`, in the place of that of an earlier choice, but of nothing else.

    Raises:
        CheckpointError: what is there is not as it was written.
    """
    books = books_in(checkpoint)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        why = damage(target) if has_sums(target) else "it is no model of this search"
        if (others := names_without_sums(target)) and why is None:
            why = f"{others[0]} was added"
        if why is not None:
            raise CheckpointError(
                f"{target} is not as it was written: {why}. Move it away and run again: the chosen model is copied "
                "there."
            )
        if books_in(target) == books:
            return
        remove_folder(target)
    copy_checkpoint(checkpoint, target, books)
