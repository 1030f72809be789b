"""Run a recipe: every stage of every branch, each of which is done once however often the run is started."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from auxin.accounting import Ledger, StageRecord, count_parameters
from auxin.accounting.comparison import Comparison
from auxin.accounting.results import RunResults
from auxin.data.dataset import DATASETS, Dataset, Processor
from auxin.data.tokenizer import read_tokenizer, same_tokens
from auxin.edits.folder_store import TRAINING_FOLDER
from auxin.errors import CheckpointError, ConfigError
from auxin.files import new_folder, sweep, write_text
from auxin.models.loading import load_config, load_model, new_model
from auxin.objectives.calibration import Calibration
from auxin.objectives.measures import Measure
from auxin.objectives.objective import ObjectiveSettings, Reference
from auxin.planning.bench import Bench
from auxin.recipes.adopting import adopt
from auxin.recipes.beforehand import check
from auxin.recipes.change import change_checkpoint
from auxin.recipes.course import Course
from auxin.recipes.folder import (
    BRANCHES,
    DATA,
    OUTCOME_FILE,
    StageOutcome,
    claim_directory,
    held,
    is_finished,
    left_checkpoint,
    stage_directory,
)
from auxin.recipes.price import price_recipe, remaining_flops
from auxin.recipes.references import reference_model
from auxin.recipes.results import collect_results
from auxin.recipes.schema import Branch, BuildStage, ChangeStage, EvaluateStage, Recipe, Stage, TrainStage
from auxin.recipes.stage_hooks import stage_hooks
from auxin.recipes.stage_models import (
    StageConfigs,
    built_config,
    change_data,
    change_plan,
    estimated_stages,
    stage_configs,
)
from auxin.recipes.workers import Cell, raise_failures, run_cells
from auxin.report import write_chart_svg, write_markdown, write_report
from auxin.sums import damage, write_sums
from auxin.training import train, write_checkpoint_folder
from auxin.training.hardware import choose_device
from auxin.training.held_out import HeldOut
from auxin.training.interruption import ended_by_signals
from auxin.training.lock import exclusive
from auxin.training.progress import Place
from auxin.training.run_folder import aside_name, refuse_damaged

RESULTS_FILE = "results.json"
STAGE_CHECKPOINT = "checkpoint"
"""Folder in a stage's that holds what it left; a train stage keeps several in `checkpoints` instead."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
"""One of these is in every folder that holds a tokenizer."""

Announce = Callable[[str], None]
"""Takes one line for the person who waits."""


@dataclass(frozen=True)
class Run:
    """What all stages of a run share."""

    recipe: Recipe
    directory: Path
    data: Dataset
    structures: StageConfigs
    announce: Announce
    course: Course
    whole: set[Path] = field(default_factory=set)
    """Checkpoints whose files were compared with their sums by this process."""

    def stage_directory(self, branch: Branch, stage: Stage) -> Path:
        """Where `stage` of `branch` keeps everything it writes."""
        return stage_directory(self.directory, branch, stage)

    def checkpoint(self, branch_name: str, stage_name: str) -> Path:
        """The checkpoint that a finished stage left, as it left it.

        Raises:
            CheckpointError: it is gone or damaged.
        """
        branch = self.recipe.branch(branch_name)
        stage = next(stage for stage in branch.stages if stage.name == stage_name)
        checkpoint = left_checkpoint(self.directory, branch, stage)
        if checkpoint not in self.whole:
            record = self.stage_directory(branch, stage) / OUTCOME_FILE
            refuse_damaged(
                checkpoint, f"Restore it from a copy, or remove {record} and run again: the stage is redone."
            )
            self.whole.add(checkpoint)
        return checkpoint

    def config_to_build(self, branch: Branch, stage: BuildStage) -> PreTrainedConfig:
        """The config of the model that `stage` of `branch` builds. Where it goes by the end of a branch that was only
        estimated before the run, by the checkpoint which that branch has left."""
        if (branch.name, stage.name) not in estimated_stages(self.recipe):
            return self.structures[branch.name][stage.name]
        names = {name for name in (stage.like, stage.parameters_of) if name is not None}
        ends = {name: {"": load_config(self.final_checkpoint(name))} for name in names}
        return built_config(stage, ends, self.data.form, self.recipe.objective)

    def bench(self, stage: ChangeStage, model: PreTrainedModel, folder: Path) -> Bench:
        """What the method of `stage` works at: it looks at documents of the training split alone."""
        asked, seed = change_data(stage), self.recipe.seed
        if asked is None:
            return Bench(model, seed=seed, folder=folder)
        data = Calibration.of_split(self.data, model.config, asked, self.recipe.objective, seed)
        return Bench(model, data, seed, folder)

    def references(self, objective: ObjectiveSettings, ledger: Ledger) -> dict[str, Reference]:
        """The models, of finished stages or in folders, that `objective` goes by, for a model of `ledger`."""
        found: dict[str, Reference] = {}
        for name in objective.references():
            branch, _, stage = name.partition("/")
            ours = any(branch == other.name for other in self.recipe.branches)
            found[name] = reference_model(self.checkpoint(branch, stage) if ours else Path(name), ledger)
        return found

    def final_checkpoint(self, branch_name: str) -> Path:
        """The checkpoint that a finished branch left."""
        return self.checkpoint(branch_name, self.recipe.branch(branch_name).stages[-1].name)

    def measured(self, checkpoint: Path, measures: Sequence[Measure]) -> dict[str, float]:
        """What `measures` give for `checkpoint` on the whole held-out split, by name."""
        model = load_model(checkpoint, choose_device(self.recipe.training.get("device", "auto")))
        objective = self.recipe.objective.bind(model.config, self.data.form)
        return HeldOut(tuple(measures), objective, self.data, self.evaluation_batch_size).all(model)

    @property
    def evaluation_batch_size(self) -> int:
        """Samples per forward pass of an evaluation: as many as one of training has."""
        training = self.recipe.training
        return int(training.get("micro_batch_size") or training.get("batch_size", 32))


def run_recipe(
    recipe: Recipe,
    output: str | Path,
    command: str,
    announce: Announce = print,
    jobs: int = 1,
    branches: Sequence[str] | None = None,
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
    directory = Path(output)
    check(recipe, directory / DATA)
    price_recipe(recipe, memory=False)
    with held(directory):
        claim_directory(recipe, directory, announce)
        run = prepared_run(recipe, directory, directory / DATA, announce)
        if jobs == 1:
            run = replace(run, course=run.course.of_branches(wanted))
            for name in wanted:
                run_branch(run, recipe.branch(name))
            return finish_run(run, command)
        failures = run_cells([Cell(directory, directory / DATA, recipe, name) for name in wanted], jobs, announce)
        results = finish_run(run, command, threads=1)
        raise_failures(failures)
        return results


def open_run(recipe: Recipe, output: str | Path, announce: Announce = print) -> Run:
    """Make the folder `output` ready for the branches of `recipe`: the recipe is checked, the corpus prepared.

    With `run_branch` and `finish_run`, several processes can share the work: one opens the run, each of the others
    goes by `prepared_run` and does other branches, none of which refers to one that is not finished.

    Raises:
        ConfigError, PlanError: as `run_recipe`.
    """
    directory = Path(output)
    check(recipe, directory / DATA)
    price_recipe(recipe, memory=False)
    with held(directory):
        claim_directory(recipe, directory, announce)
    return prepared_run(recipe, directory, directory / DATA, announce)


def prepared_run(recipe: Recipe, directory: Path, data_directory: Path, announce: Announce) -> Run:
    """The run of `recipe` in its folder `directory`, which is claimed; the data is prepared where it is not yet.

    Raises:
        ConfigError, PlanError: the recipe does not fit the data.
        DataError: it can't be prepared, or is damaged.
        Interrupted: a signal came.
    """
    with ended_by_signals("preparing the data"):
        data = DATASETS.find(recipe.data.kind).prepare(recipe.data, data_directory, True)
    announce("Data: " + "; ".join(f"{name}: {value}" for name, value in data.describe().items()))
    check_processors(recipe, data)
    # Again, now that it is known what the data decides.
    structures = stage_configs(recipe, data.form)
    price = price_recipe(recipe, memory=False, form=data.form, structures=structures)
    return Run(recipe, directory, data, structures, announce, Course.of(recipe, directory, price))


def finish_run(run: Run, command: str, threads: int | None = None) -> RunResults:
    """Gather what the finished branches of `run` measured, and write `results.json` and the report.

    Args:
        run: the run, of which at least one branch is finished.
        command: the command line that reproduces it.
        threads: with which the branches were run; None: this process's.
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


def rewrite_report(directory: str | Path) -> list[Path]:
    """Write `report.html` and `chart.svg` of the run in `directory` from its `results.json`; of one with several seeds
    `results.md` too, its tables as Markdown. Returns their paths.

    Raises:
        CheckpointError: the folder holds no finished run.
    """
    directory = Path(directory)
    try:
        values = json.loads((directory / RESULTS_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{directory}/{RESULTS_FILE} can't be read ({error}). Give the folder of a finished run."
        ) from error
    several = isinstance(values, dict) and "seeds" in values
    kind: type[RunResults | Comparison] = Comparison if several else RunResults
    results = kind.parse(values, source=f"{directory}/{RESULTS_FILE}")
    paths = [
        write_report(results, directory / "report.html"),
        write_chart_svg(results, directory / "chart.svg"),
    ]
    if isinstance(results, Comparison):
        paths.append(write_markdown(results, directory / "results.md"))
    return paths


def check_processors(recipe: Recipe, data: Dataset) -> None:
    """Make sure that adopted checkpoints meet the tokens they know.

    Raises:
        ConfigError: the data has another tokenizer than a checkpoint that a branch starts from, or that a stage's
            objective goes by.
    """
    own = data.processor()
    if not isinstance(own, PreTrainedTokenizerFast):
        return
    given = getattr(recipe.data, "tokenizer", None)
    # Saving a tokenizer with the data may have normalized it: the one that was loaded counts as well.
    tokenizers = [own, *([] if given is None else [read_tokenizer(given)])]
    for where, source in recipe.checkpoints():
        if not any((source / name).is_file() for name in TOKENIZER_FILES):
            continue
        found = read_tokenizer(source)
        if not any(same_tokens(found, tokenizer) for tokenizer in tokenizers):
            raise ConfigError(
                f"{where}: the checkpoint {source} has another tokenizer than the data, so that its embeddings "
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
        if not (directory / OUTCOME_FILE).exists():
            directory.mkdir(parents=True, exist_ok=True)
            # The branch is held, so what a stage has left without its outcome is of a process that is dead: of a run
            # that was stopped before the stage was complete.
            shutil.rmtree(directory / STAGE_CHECKPOINT, ignore_errors=True)
            sweep(directory)
            with ended_by_signals(f"doing the stage {branch.name}/{stage.name}"):
                checkpoint = run_stage(run, branch, stage, directory, previous)
            outcome = StageOutcome(
                name=stage.name, kind=stage.kind, checkpoint=checkpoint.relative_to(run.directory).as_posix()
            )
            write_text(directory / OUTCOME_FILE, outcome.model_dump_json(indent=2) + "\n")
        previous = run.checkpoint(branch.name, stage.name)
        run.announce(f"  {describe_last_stage(Ledger.load(previous))}")


def _take_back_damaged(run: Run, branch: Branch) -> None:
    """Let the finished stages be done again whose checkpoint the next one would start from and which is damaged; it is
    kept aside."""
    following = branch.stages[-1]
    for stage in reversed(branch.stages[:-1]):
        record, next_record = (run.stage_directory(branch, each) / OUTCOME_FILE for each in (stage, following))
        following = stage
        if not record.exists() or next_record.exists():
            continue
        checkpoint = left_checkpoint(run.directory, branch, stage)
        if (reason := damage(checkpoint)) is None:
            run.whole.add(checkpoint)
            return
        run.announce(
            f"  {checkpoint} is damaged: {reason}. It is kept aside, and the stage {stage.name} is done again."
        )
        if not isinstance(stage, TrainStage):  # that goes back to an earlier checkpoint, and keeps this one itself
            checkpoint.rename(aside_name(checkpoint))
        record.unlink()


def run_stage(run: Run, branch: Branch, stage: Stage, directory: Path, previous: Path | None) -> Path:
    """Do one stage of `branch` that starts from the checkpoint `previous`; returns the checkpoint it left."""
    if isinstance(stage, BuildStage):
        return build(run, stage, directory, run.config_to_build(branch, stage))
    assert previous is not None  # the schema: what does not begin with a build is forked
    if isinstance(stage, TrainStage):
        run.announce(f"  {run.course.describe_start(branch, stage, run.data, Ledger.load(previous))}")
        return train_stage(run, stage, directory, previous, run.course.place(branch, stage))
    if isinstance(stage, ChangeStage):
        return change(run, stage, directory, previous)
    return evaluate(run, stage, directory, previous)


def build(run: Run, stage: BuildStage, directory: Path, config: PreTrainedConfig) -> Path:
    """Make a model with random weights from the recipe's seed, or take over a checkpoint."""
    if stage.checkpoint is not None:
        output = directory / STAGE_CHECKPOINT
        return adopt(stage.checkpoint, output, config, run.data, stage.name, run.recipe.seed)
    with torch.random.fork_rng():
        torch.manual_seed(run.recipe.seed)
        model = new_model(config)
    record = StageRecord(name=stage.name, kind="build", parameters=count_parameters(model).total, seed=run.recipe.seed)
    return write_checkpoint_folder(
        directory / STAGE_CHECKPOINT, model=model, processor=run.data.processor(), ledger=Ledger().append(record)
    )


def train_stage(run: Run, stage: TrainStage, directory: Path, previous: Path, place: Place) -> Path:
    """Train on; the data goes on where the ancestors that learnt from the same data stopped."""
    ledger = Ledger.load(previous)
    flops = None
    if stage.flops_of is not None:
        flops = remaining_flops(
            stage, Ledger.load(run.final_checkpoint(stage.flops_of)).total_flops, ledger.total_flops
        )
    settings = run.recipe.training_settings(stage, flops=flops)
    carried = not stage.fresh_optimizer and (previous / TRAINING_FOLDER).exists()
    fingerprint = run.data.fingerprint
    trained = [record for record in ledger.stages if record.kind == "train"]
    seen = sum(record.units for record in trained if record.data_fingerprint == fingerprint)
    result = train(
        load_model(previous, dtype=torch.float32),
        run.data,
        settings,
        directory,
        measures=run.recipe.measures,
        measured_objective=run.recipe.objective,
        references=run.references(settings.objective, ledger),
        processor=own_processor(run, previous),
        optimizer_from=previous if carried else None,
        ledger=ledger,
        hooks=stage_hooks(stage, ledger),
        stage_name=stage.name,
        data_position=seen // run.data.form.amount(settings.batch_size),
        place=place,
    )
    return result.checkpoint


def own_processor(run: Run, checkpoint: Path) -> Processor | None:
    """What goes with the model in `checkpoint`: the run's, unless a change has changed the tokenizer. The data stays in
    the run's tokens, which the changed one begins with."""
    own = run.data.processor()
    if isinstance(own, PreTrainedTokenizerFast) and any((checkpoint / name).is_file() for name in TOKENIZER_FILES):
        found = read_tokenizer(checkpoint)
        return own if same_tokens(found, own) else found
    return own


def change(run: Run, stage: ChangeStage, directory: Path, previous: Path) -> Path:
    """Change the checkpoint `previous`, its optimizer's moments along with it, and measure before and after."""
    output = directory / STAGE_CHECKPOINT
    plan = change_plan(stage, run.bench(stage, load_model(previous), directory))
    for note in plan.notes:
        run.announce(f"  Note: {note}")
    change_checkpoint(
        plan,
        previous,
        output,
        stage_name=stage.name,
        measure=run.recipe.measures[0],
        value_of=lambda checkpoint: run.measured(checkpoint, run.recipe.measures[:1])[run.recipe.measures[0].kind],
        data_fingerprint=run.data.fingerprint,
    )
    return output


def evaluate(run: Run, stage: EvaluateStage, directory: Path, previous: Path) -> Path:
    """Measure on the held-out split; the checkpoint stays the one before, its ledger gains the measurement."""
    started = time.perf_counter()
    found = run.measured(previous, run.recipe.measures)
    first = run.recipe.measures[0].kind
    ledger = Ledger.load(previous)
    record = StageRecord(
        name=stage.name,
        kind="evaluate",
        parameters=ledger.stages[-1].parameters,
        measure=first,
        value_after=found[first],
        measures=found,
        data_fingerprint=run.data.fingerprint,
        seconds=time.perf_counter() - started,
    )
    output = directory / STAGE_CHECKPOINT
    with new_folder(output) as folder:
        shutil.copytree(previous, folder, dirs_exist_ok=True)
        ledger.append(record).save(folder)
        write_sums(folder)
    return output


def describe_last_stage(ledger: Ledger) -> str:
    """One line on what the last stage did and cost."""
    stage = ledger.stages[-1]
    parts = [f"{stage.name}: {stage.parameters:,} parameters"]
    if stage.kind == "train" or stage.units:
        parts.append(f"{stage.units:,} {stage.unit}s, {stage.flops:.3g} FLOPs, {stage.seconds:.0f} s")
    name = f"validation {(stage.measure or '').replace('_', ' ')}"
    if stage.kind == "change" and stage.value_before is not None and stage.value_after is not None:
        moved = stage.value_after - stage.value_before
        parts.append(f"{name} {stage.value_before:.6f}, changed by {moved:+.1e}")
    elif stage.value_after is not None:
        parts.append(f"{name} {stage.value_after:.4f}")
    return ", ".join(parts)
