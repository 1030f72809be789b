"""What a run needs beside its recipe, looked for before anything is made: sources of the data, devices, that several
processes can train what they are to, and that what an earlier run has built is what the recipe still builds."""

from collections.abc import Sequence
from pathlib import Path

from auxin.accounting import Ledger
from auxin.accounting.machine import choose_device
from auxin.data.pictures import read_processor
from auxin.data.settings import SourceSettings
from auxin.data.sources import source_files
from auxin.data.tokenizer import read_tokenizer
from auxin.edits.purpose import NOT_OF_THE_MODEL
from auxin.edits.structure import config_values, saved_and_read
from auxin.errors import CheckpointError, ConfigError, placed
from auxin.models.loading import load_config
from auxin.recipes.folder import is_done, left_checkpoint
from auxin.recipes.price import trained_skeleton
from auxin.recipes.references import planned_books, reference_shapes
from auxin.recipes.schema import BuildStage, Recipe, TrainStage
from auxin.recipes.stage_hooks import asked_hooks
from auxin.recipes.stage_models import estimated_stages, stage_configs
from auxin.recipes.stages import Run
from auxin.training.ranks import Ranks
from auxin.training.tensor_parallel import choose_any_strategy


def check_needs(recipe: Recipe, data_directory: Path) -> None:
    """Devices, and, where no data was prepared in `data_directory` yet, sources.

    Raises:
        ConfigError, DataError: as the two below.
    """
    check_devices(recipe)
    if not data_directory.exists():
        check_sources(recipe)


def check_sources(recipe: Recipe) -> None:
    """DataError when a file that the data is made of, or its tokenizer or image processor, is not there. Nothing is
    fetched: what is behind a name on the Hub is found out by the run."""
    data = recipe.data
    with recipe.at():
        if isinstance(data, SourceSettings) and data.source == "files":
            with placed("data.paths: "):
                source_files(data)
        tokenizer: Path | None = getattr(data, "tokenizer", None)
        if tokenizer is not None and not tokenizer.exists():
            with placed("data.tokenizer: "):
                read_tokenizer(tokenizer)
        processor: Path | None = getattr(data, "processor", None)
        if processor is not None and not processor.exists():
            with placed("data.processor: "):
                read_processor(processor)


def check_devices(recipe: Recipe) -> None:
    """ConfigError when a stage is to be trained on a device that this machine has not."""
    for branch in recipe.branches:
        for stage in branch.stages:
            if isinstance(stage, TrainStage):
                # The recipe's own device is every stage's.
                place = recipe.at(branch, stage) if "device" in stage.settings else recipe.at()
                with place, recipe.at_setting(stage):
                    choose_device(recipe.training_settings(stage, flops=1.0).device)


def check_strategies(recipe: Recipe, directory: Path, wanted: Sequence[str], ranks: Ranks) -> None:
    """Make sure that several processes can train what the branches `wanted` have still to train, by the strategies that
    are asked for; on shapes.

    Raises:
        ConfigError: they can't.
    """
    if not ranks.several:
        return
    with recipe.at():
        form = recipe.form()
    structures = stage_configs(recipe, form)
    for branch in recipe.branches:
        for stage in branch.stages if branch.name in wanted else ():
            if not isinstance(stage, TrainStage) or is_done(directory, branch, stage):
                continue
            with recipe.at(branch, stage):
                settings = recipe.training_settings(stage, flops=1.0)
                model = trained_skeleton(structures[branch.name][stage.name], stage.lora)
                references = reference_shapes(recipe, structures, branch, stage, settings.objective)
                objective = settings.objective.bind(model.config, form, references)
                before = planned_books(recipe, structures, branch.name, stage.name).stages[:-1]
                hooks = asked_hooks(stage, Ledger(stages=before))
                with recipe.at_setting(stage):
                    choose_any_strategy(settings, ranks, choose_device(settings.device), model, objective, hooks)


def check_builds(run: Run, wanted: Sequence[str]) -> None:
    """Make sure that what the branches `wanted` still build goes with what is built already: a version of auxin or
    transformers with other defaults may have built that from the same recipe, and the report would compare the two as
    if alike.

    Raises:
        ConfigError: it does not.
    """
    estimated = estimated_stages(run.recipe)
    builds = [
        (branch, stage)
        for branch in run.recipe.branches
        for stage in branch.stages
        if isinstance(stage, BuildStage) and stage.checkpoint is None and (branch.name, stage.name) not in estimated
    ]
    done = [(branch, stage) for branch, stage in builds if is_done(run.directory, branch, stage)]
    ahead = any(branch.name in wanted and (branch, stage) not in done for branch, stage in builds)
    for branch, stage in done if ahead else []:
        try:
            had = config_values(load_config(left_checkpoint(run.directory, branch, stage)))
        except CheckpointError:  # whatever is damaged is taken back when its branch is run
            continue
        now = config_values(saved_and_read(run.structures[branch.name][stage.name]))
        for key in sorted({*had, *now} - {*NOT_OF_THE_MODEL}):
            if had.get(key) != now.get(key):
                raise ConfigError(
                    f"{run.stage_directory(branch, stage)} holds a model with {key} = {had.get(key)!r}; the same "
                    f"recipe builds one with {key} = {now.get(key)!r} now, since defaults have changed, and other "
                    "branches are still to be built. Give another --output, to have all of them alike."
                )
