"""The models that the objective of a train stage goes by: finished ones, and their shapes before anything is run."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedConfig

from auxin.accounting import Ledger, StageRecord
from auxin.accounting.ledger import books_in
from auxin.edits.structure import edited_skeleton
from auxin.errors import CheckpointError, ConfigError, PlanError
from auxin.models.loading import load_config
from auxin.objectives import ObjectiveSettings, Reference
from auxin.planning.bench import Bench
from auxin.planning.lineage import changes_between, layers_made_from, resolved_in_turn, units_made_from
from auxin.recipes.schema import Branch, BuildStage, ChangeStage, Recipe, Stage
from auxin.recipes.stage_models import StageConfigs, change_plan


def reference_model(checkpoint: Path, ledger: Ledger) -> Reference:
    """The model in `checkpoint`, for one of `ledger` to go by: with the layers and units that the changes between the
    two made the other's of, where their books begin alike.

    Raises:
        CheckpointError: it can't be loaded.
    """
    found = Reference.read(checkpoint)
    return with_lineage(found, books_in(checkpoint), ledger)


def reference_shapes(
    recipe: Recipe, structures: StageConfigs, branch: Branch, stage: Stage, objective: ObjectiveSettings
) -> dict[str, Reference]:
    """The shapes of the models that `objective` goes by in `stage` of `branch`, before anything is run. Messages begin
    with the field.

    Raises:
        ConfigError: one is neither an earlier stage nor a checkpoint that is there.
    """
    found: dict[str, Reference] = {}
    for name in objective.references():
        other, _, other_stage = name.partition("/")
        try:
            config, books = _planned(recipe, structures, other, other_stage) or _on_disk(Path(name))
        except CheckpointError as error:
            raise ConfigError(
                f"settings.objective: {name!r} is no stage of the recipe, and no checkpoint: {error}"
            ) from error
        model = edited_skeleton(config)
        descendant = planned_books(recipe, structures, branch.name, stage.name)
        found[name] = with_lineage(Reference(model, fingerprint=""), books, descendant)
    return found


def with_lineage(reference: Reference, ancestor: Ledger, descendant: Ledger) -> Reference:
    """The same, with the layers and units that those of the model of `descendant` were made from, as far as the books
    tell and they are known of its architecture.

    Args:
        reference: the model of `ancestor`.
        ancestor, descendant: the books.
    """
    plans = changes_between(ancestor, descendant)
    if plans is None:
        return reference
    # Who needs what is not known is refused by name; logits can be learnt without.
    with contextlib.suppress(PlanError):
        changes = resolved_in_turn(plans, reference.model)
        reference = replace(reference, layers=layers_made_from(changes, reference.model))
        reference = replace(reference, units=units_made_from(changes, reference.model))
    return reference


def planned_books(recipe: Recipe, structures: StageConfigs, branch_name: str, stage_name: str) -> Ledger:
    """The books that a stage will leave, as far as changes and where they begin tell two models' ways apart."""
    records: list[StageRecord] = []
    config: PreTrainedConfig | None = None
    for branch, stage in _way(recipe, branch_name, stage_name):
        if isinstance(stage, BuildStage) and stage.checkpoint is not None:
            records += books_in(stage.checkpoint).stages
        plan = None
        if isinstance(stage, ChangeStage):
            assert config is not None  # the schema: a way begins with a build
            made = change_plan(stage, Bench(edited_skeleton(config), seed=recipe.seed))
            plan = made.model_dump(mode="json")
        name = f"{branch}/{stage.name}"
        records.append(StageRecord(name=name, kind=stage.kind, parameters=0, plan=plan, versions={}, started_at=""))
        config = structures[branch][stage.name]
    return Ledger(stages=records)


def _way(recipe: Recipe, branch_name: str, stage_name: str) -> Iterator[tuple[str, Stage]]:
    """The stages up to one, from the build on, each with its branch's name."""
    branch = recipe.branch(branch_name)
    if branch.fork is not None:
        yield from _way(recipe, *branch.fork.split("/", 1))
    for stage in branch.stages:
        yield branch.name, stage
        if stage.name == stage_name:
            return


def _planned(
    recipe: Recipe, structures: StageConfigs, branch: str, stage: str
) -> tuple[PreTrainedConfig, Ledger] | None:
    if stage not in structures.get(branch, {}):
        return None
    return structures[branch][stage], planned_books(recipe, structures, branch, stage)


def _on_disk(folder: Path) -> tuple[PreTrainedConfig, Ledger]:
    return load_config(folder), books_in(folder)
