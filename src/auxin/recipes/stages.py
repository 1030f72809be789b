"""The stages of a recipe, each done by itself: from the checkpoint before it to the one that it leaves."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from auxin.accounting import Ledger, StageRecord, count_parameters
from auxin.accounting.machine import choose_device
from auxin.data.dataset import Dataset, Processor
from auxin.data.tokenizer import has_tokenizer, read_tokenizer, same_tokens
from auxin.edits.folder_store import TRAINING_FOLDER
from auxin.errors import CheckpointError
from auxin.models.loading import load_config, load_model, new_model
from auxin.objectives.calibration import Calibration
from auxin.objectives.measures import Measure
from auxin.objectives.objective import ObjectiveSettings, Reference
from auxin.planning.bench import Bench
from auxin.recipes.adopting import adopt
from auxin.recipes.change import change_checkpoint
from auxin.recipes.course import Course
from auxin.recipes.folder import OUTCOME_FILE, left_checkpoint, stage_directory
from auxin.recipes.price import remaining_flops
from auxin.recipes.references import reference_model
from auxin.recipes.schema import Branch, BuildStage, ChangeStage, EvaluateStage, Recipe, Stage, TrainStage
from auxin.recipes.stage_hooks import stage_hooks
from auxin.recipes.stage_models import StageConfigs, built_config, change_data, change_plan, estimated_stages
from auxin.training import train, write_checkpoint_folder
from auxin.training.checkpoint import copy_checkpoint, read_state, refuse_damaged
from auxin.training.held_out import HeldOut
from auxin.training.lora import add_lora, merge_lora
from auxin.training.ranks import ALONE, Ranks

STAGE_CHECKPOINT = "checkpoint"
"""Folder in a stage's that holds what it left; a train stage keeps several in `checkpoints` instead, and here what a
LoRA has made of the model."""

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
    ranks: Ranks = ALONE
    """The processes that train each stage together."""

    def stage_directory(self, branch: Branch, stage: Stage) -> Path:
        """Where `stage` of `branch` keeps everything it writes."""
        return stage_directory(self.directory, branch, stage)

    def checkpoint(self, branch_name: str, stage_name: str) -> Path:
        """The checkpoint that a finished stage left, as it left it.

        Raises:
            CheckpointError: it is gone or damaged.
        """
        branch = self.recipe.branch(branch_name)
        stage = branch.stage(stage_name)
        checkpoint = left_checkpoint(self.directory, branch, stage)
        record = self.stage_directory(branch, stage) / OUTCOME_FILE
        refuse_damaged(checkpoint, f"Restore it from a copy, or remove {record} and run again: the stage is redone.")
        if isinstance(stage, TrainStage) and stage.lora is None and not read_state(checkpoint).get("finished", True):
            raise CheckpointError(
                f"{record} names {checkpoint.name}, with which the stage was not finished. Remove {record} and run "
                "again: the stage goes on."
            )
        return checkpoint

    def config_to_build(self, branch: Branch, stage: BuildStage) -> PreTrainedConfig:
        """The config of the model that `stage` of `branch` builds. Where it goes by the end of a branch that was only
        estimated before the run, by the checkpoint which that branch has left."""
        if (branch.name, stage.name) not in estimated_stages(self.recipe):
            return self.structures[branch.name][stage.name]
        names = {name for name in (stage.like, stage.parameters_of) if name is not None}
        ends = {name: {"": load_config(self.final_checkpoint(name))} for name in names}
        with self.recipe.at(branch, stage):
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


def run_stage(run: Run, branch: Branch, stage: Stage, directory: Path, previous: Path | None) -> Path:
    """Do one stage of `branch` that starts from the checkpoint `previous`; returns the checkpoint it left."""
    if isinstance(stage, BuildStage):
        return build(run, stage, directory, run.config_to_build(branch, stage))
    assert previous is not None  # the schema: what does not begin with a build is forked
    if isinstance(stage, TrainStage):
        run.announce(f"  {run.course.describe_start(branch, stage, run.data, Ledger.load(previous))}")
        run.ranks.order({"branch": branch.name, "stage": stage.name, "previous": str(previous)})
        with run.ranks.together():
            pass  # they prepare what this process has
        return train_stage(run, branch, stage, directory, previous)
    if isinstance(stage, ChangeStage):
        return change(run, branch, stage, directory, previous)
    return evaluate(run, stage, directory, previous)


def build(run: Run, stage: BuildStage, directory: Path, config: PreTrainedConfig) -> Path:
    """Make a model with random weights from the recipe's seed, or take over a checkpoint."""
    if stage.checkpoint is not None:
        output = adopt(stage.checkpoint, directory / STAGE_CHECKPOINT, config, run.data, stage.name, run.recipe.seed)
        for note in Ledger.load(output).stages[-1].notes:
            run.announce(f"  Note: {note}")
        return output
    with torch.random.fork_rng():
        torch.manual_seed(run.recipe.seed)
        model = new_model(config)
    record = StageRecord(name=stage.name, kind="build", parameters=count_parameters(model).total, seed=run.recipe.seed)
    return write_checkpoint_folder(
        directory / STAGE_CHECKPOINT, model=model, processor=run.data.processor(), ledger=Ledger().append(record)
    )


def train_stage(run: Run, branch: Branch, stage: TrainStage, directory: Path, previous: Path) -> Path:
    """Train on; the data goes on where the ancestors that learnt from the same data stopped. Several processes call it
    together."""
    with run.ranks.together():
        ledger = Ledger.load(previous)
        flops = None
        if stage.flops_of is not None:
            total = Ledger.load(run.final_checkpoint(stage.flops_of)).total_flops
            with run.recipe.at(branch, stage):
                flops = remaining_flops(stage, total, ledger.total_flops)
        settings = run.recipe.training_settings(stage, flops=flops)
        carried = stage.lora is None and not stage.fresh_optimizer and (previous / TRAINING_FOLDER).exists()
        model, processor = load_model(previous, dtype=torch.float32), own_processor(run, previous)
        if stage.lora is not None:
            with run.recipe.at(branch, stage):
                add_lora(model, stage.lora, settings.seed)
        references = run.references(settings.objective, ledger)
    result = train(
        model,
        run.data,
        settings,
        directory,
        measures=run.recipe.measures,
        measured_objective=run.recipe.objective,
        references=references,
        processor=processor,
        optimizer_from=previous if carried else None,
        ledger=ledger,
        hooks=stage_hooks(stage, ledger),
        stage_name=stage.name,
        data_position=ledger.units_seen(run.data.fingerprint) // run.data.form.amount(settings.batch_size),
        place=run.course.place(branch, stage),
        ranks=run.ranks,
    )
    if stage.lora is None or not run.ranks.leads:
        return result.checkpoint
    return merged(model, result.checkpoint, directory / STAGE_CHECKPOINT, processor)


def merged(model: PreTrainedModel, checkpoint: Path, output: Path, processor: Processor | None) -> Path:
    """Merge the LoRA of `model`, which was trained to `checkpoint`, and write the model that it makes."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    merge_lora(model)
    ledger = Ledger.load(checkpoint)
    last = ledger.stages[-1]
    note = f"a LoRA of {trained:,} parameters was trained, and merged at the end"
    record = last.model_copy(
        update={"parameters": count_parameters(model).total, "notes": [*last.notes, note]},
    )
    ledger = ledger.model_copy(update={"stages": [*ledger.stages[:-1], record]})
    return write_checkpoint_folder(output, model=model, processor=processor, ledger=ledger)


def own_processor(run: Run, checkpoint: Path) -> Processor | None:
    """What goes with the model in `checkpoint`: the run's, unless a change has changed the tokenizer. The data stays in
    the run's tokens, which the changed one begins with."""
    own = run.data.processor()
    if isinstance(own, PreTrainedTokenizerFast) and has_tokenizer(checkpoint):
        found = read_tokenizer(checkpoint)
        return own if same_tokens(found, own) else found
    return own


def change(run: Run, branch: Branch, stage: ChangeStage, directory: Path, previous: Path) -> Path:
    """Change the checkpoint `previous`, its optimizer's moments along with it, and measure before and after."""
    output = directory / STAGE_CHECKPOINT
    model = load_model(previous)
    with run.recipe.at(branch, stage):
        plan = change_plan(stage, run.bench(stage, model, directory))
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
    return copy_checkpoint(previous, directory / STAGE_CHECKPOINT, ledger.append(record))


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
