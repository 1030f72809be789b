"""Run a recipe: every stage of every branch, each of which is done once however often the run is started."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from auxin.accounting import Ledger
from auxin.accounting.results import RunResults
from auxin.data.dataset import DATASETS, Dataset
from auxin.data.labelled_images import LabelledImages
from auxin.data.pictures import has_processor, processor_digest, read_processor
from auxin.data.tokenizer import has_tokenizer, read_tokenizer, same_tokens
from auxin.errors import ConfigError
from auxin.files import write_text
from auxin.interruption import ended_by_signals
from auxin.locks import exclusive
from auxin.recipes.beforehand import check_builds, check_needs, check_strategies
from auxin.recipes.course import Course
from auxin.recipes.folder import (
    BRANCHES,
    DATA,
    OUTCOME_FILE,
    StageOutcome,
    claim_directory,
    held,
    is_done,
    is_finished,
    left_checkpoint,
)
from auxin.recipes.price import price_recipe
from auxin.recipes.results import RESULTS_FILE, collect_results, rewrite_report
from auxin.recipes.schema import Branch, Recipe, TrainStage
from auxin.recipes.stage_models import stage_configs
from auxin.recipes.stages import STAGE_CHECKPOINT, Announce, Run, describe_last_stage, run_stage
from auxin.recipes.workers import Cell, raise_failures, run_cells
from auxin.sums import damage
from auxin.training.ranks import ALONE, Ranks
from auxin.training.run_folder import aside_name


def run_recipe(
    recipe: Recipe,
    output: str | Path,
    command: str,
    announce: Announce = print,
    jobs: int = 1,
    branches: Sequence[str] | None = None,
    ranks: Ranks = ALONE,
) -> RunResults:
    """Run `recipe` into the folder `output`, or go on where an earlier run into it stopped.

    Args:
        recipe: what to do, with one seed; `run_seeds` takes one with several.
        output: the run's folder; made if it does not exist.
        command: the command line that reproduces the run, for the report.
        announce: is told what happens, a line at a time.
        jobs: branches that are run at a time. 1: in this process, with all its threads; more: in processes of one
            thread each, whose numbers are therefore the same to rounding only.
        branches: names of the branches to run, with those that they need; None: all.
        ranks: the processes that train each stage together; this is the one that leads, and the others `follow`
            (`auxin.recipes.together`).

    Returns:
        What the finished branches measured; also written to `results.json` and `report.html` in `output`.

    Raises:
        ConfigError, PlanError: `output` holds another recipe's run, or the recipe asks for what can't be built or
            does not fit together; found before anything is written, as far as it does not depend on the corpus.
        CheckpointError: a stage's checkpoint is damaged, and nothing is whole to do it again from.
        TrainingError: a branch failed (with several jobs, after the others were done), a signal came, or another
            process is at work in `output`.
    """
    if recipe.seeds is not None:
        raise ConfigError(f"seeds: {recipe.seeds}: a run has one seed. Use run_seeds, or give the recipe one as seed.")
    wanted = recipe.needed(branches)
    with ranks.leading(), contextlib.ExitStack() as held_open:
        check_strategies(recipe, Path(output), wanted, ranks)
        run = held_open.enter_context(opened_run(recipe, output, announce, ranks))
        if jobs == 1:
            return run_here(run, command, wanted)
        check_builds(run, wanted)
        failures = run_cells(
            [Cell(run.directory, run.directory / DATA, recipe, name) for name in wanted], jobs, announce
        )
        results = finish_run(run, command, threads=1)
        raise_failures(failures)
        return results


def run_here(run: Run, command: str, wanted: list[str]) -> RunResults:
    """Do the branches `wanted` in this process, which holds the folder of `run`, and report.

    Args:
        run: is ready, its folder held.
        command: the command line that reproduces it, for the report.
        wanted: names of branches, those that they need before them.

    Raises:
        ConfigError, CheckpointError, TrainingError: as `run_recipe`.
    """
    check_builds(run, wanted)
    run = replace(run, course=run.course.of_branches(wanted))
    for name in wanted:
        run_branch(run, run.recipe.branch(name))
    return finish_run(run, command)


@contextmanager
def opened_run(recipe: Recipe, output: str | Path, announce: Announce = print, ranks: Ranks = ALONE) -> Iterator[Run]:
    """Within the context, the folder `output` is this process's alone and ready for the branches of `recipe`: the
    recipe is checked, the corpus prepared. `run_branch` does them, here or, by `prepared_run`, in other processes.

    Raises:
        ConfigError, PlanError, TrainingError: as `run_recipe`.
    """
    directory = Path(output)
    check_needs(recipe, directory / DATA)
    price_recipe(recipe, memory=False)
    with held(directory):
        claim_directory(recipe, directory, announce)
        yield prepared_run(recipe, directory, directory / DATA, announce, ranks)


def prepared_run(
    recipe: Recipe, directory: Path, data_directory: Path, announce: Announce, ranks: Ranks = ALONE
) -> Run:
    """The run of `recipe` in its folder `directory`, which is claimed; the data is prepared where it is not yet.

    Raises:
        ConfigError, PlanError: the recipe does not fit the data.
        DataError: it can't be prepared, or is damaged.
        Interrupted: a signal came.
    """
    with ended_by_signals("preparing the data"):
        data = DATASETS.find(recipe.data.kind).prepare(recipe.data, data_directory, True)
    announce("Data: " + "; ".join(f"{name}: {value}" for name, value in data.describe().items()))
    with recipe.at():
        check_processors(recipe, data)
    # Again, now that it is known what the data decides.
    structures = stage_configs(recipe, data.form)
    price = price_recipe(recipe, memory=False, form=data.form, structures=structures)
    return Run(recipe, directory, data, structures, announce, Course.of(recipe, directory, price), ranks)


def finish_run(run: Run, command: str, threads: int | None = None) -> RunResults:
    """Gather what the finished branches of `run` measured, and write `results.json` and the report.

    Args:
        run: the run, of which at least one branch is finished.
        command: the command line that reproduces it.
        threads: with which the branches were run; None: this process's.

    Raises:
        Interrupted: a signal came.
    """
    with ended_by_signals("writing the report"):
        finals = {
            branch.name: run.final_checkpoint(branch.name)
            for branch in run.recipe.branches
            if is_finished(run.directory, branch)
        }
        results = collect_results(run.recipe, run.directory, run.data, finals, command, threads)
        write_text(run.directory / RESULTS_FILE, results.model_dump_json(indent=2) + "\n")
        rewrite_report(run.directory)
    return results


def check_processors(recipe: Recipe, data: Dataset) -> None:
    """Make sure that adopted checkpoints meet the tokens that they know, or images as they know them.

    Raises:
        ConfigError: the data has another tokenizer or image processor than a checkpoint that a branch starts from, or
            that a stage's objective goes by.
    """
    own = data.processor()
    if not isinstance(own, PreTrainedTokenizerFast):
        for where, source in recipe.checkpoints() if isinstance(data, LabelledImages) else []:
            if has_processor(source) and processor_digest(read_processor(source)) != processor_digest(own):
                raise ConfigError(
                    f"{where}: {source} has another image processor than the data, so that it would see other numbers "
                    f"than it has learnt. Set data.processor: {source}"
                )
        return
    given = getattr(recipe.data, "tokenizer", None)
    # Saving a tokenizer with the data may have normalized it: the one that was loaded counts as well.
    tokenizers = [own, *([] if given is None else [read_tokenizer(given)])]
    for where, source in recipe.checkpoints():
        if not has_tokenizer(source):
            continue
        found = read_tokenizer(source)
        if not any(same_tokens(found, tokenizer) for tokenizer in tokenizers):
            raise ConfigError(
                f"{where}: {source} has another tokenizer than the data, so that its embeddings "
                f"would be taken for other tokens. Set data.tokenizer: {source}"
            )


def run_branch(run: Run, branch: Branch) -> None:
    """Do the stages of `branch` that are not done yet.

    Raises:
        TrainingError: another process is at it.
    """
    folder = run.directory / BRANCHES / branch.name
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder):
        _run_stages(run, branch)


def _run_stages(run: Run, branch: Branch) -> None:
    run.announce(f"\n{branch.title}")
    _take_back_damaged(run, branch)
    previous = run.checkpoint(*branch.fork.split("/", 1)) if branch.fork is not None else None
    for stage in branch.stages:
        directory = run.stage_directory(branch, stage)
        if not is_done(run.directory, branch, stage):
            directory.mkdir(parents=True, exist_ok=True)
            # The branch is held, so what a stage has left without its outcome is of a process that is dead: of a run
            # that was stopped before the stage was complete.
            shutil.rmtree(directory / STAGE_CHECKPOINT, ignore_errors=True)
            with ended_by_signals(f"doing the stage {branch.name}/{stage.name}"):
                checkpoint = run_stage(run, branch, stage, directory, previous)
            outcome = StageOutcome(
                name=stage.name, kind=stage.kind, checkpoint=checkpoint.relative_to(run.directory).as_posix()
            )
            write_text(directory / OUTCOME_FILE, outcome.model_dump_json(indent=2) + "\n")
        # What nothing starts from is not read: `_take_back_damaged` has looked at the newest.
        previous = left_checkpoint(run.directory, branch, stage)
        run.announce(f"  {describe_last_stage(Ledger.load(previous))}")


def _take_back_damaged(run: Run, branch: Branch) -> None:
    """Let the newest finished stages be done again whose checkpoint is damaged; it is kept aside."""
    for stage in reversed(branch.stages):
        record = run.stage_directory(branch, stage) / OUTCOME_FILE
        if not record.exists():
            continue
        checkpoint = left_checkpoint(run.directory, branch, stage)
        if (reason := damage(checkpoint)) is None:
            return
        run.announce(
            f"  {checkpoint} is damaged: {reason}. It is kept aside, and the stage {stage.name} is done again."
        )
        record.unlink()  # first: a kill after it leaves a stage that is not finished
        if not isinstance(stage, TrainStage):  # that goes back to an earlier checkpoint, and keeps this one itself
            checkpoint.rename(aside_name(checkpoint))
