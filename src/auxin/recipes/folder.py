"""The folder of a run: whose it is, what of it is begun, and what of its recipe may still change."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from auxin.errors import CheckpointError, ConfigError
from auxin.recipes.schema import Branch, Recipe, Stage, TrainStage
from auxin.settings import Settings
from auxin.training.checkpoint import LATEST_FILE
from auxin.training.identity import MAY_CHANGE

RECIPE_FILE = "recipe.yaml"
OUTCOME_FILE = "stage.json"
BRANCHES = "branches"
DATA = "data"

NOT_SET = "not set"
DESCRIBING = frozenset({"title", "description", "main_branch"})
"""Fields that change what a report says, and nothing that is computed."""


class StageOutcome(Settings):
    """What a finished stage left; its presence in the stage's folder says that the stage is finished."""

    name: str
    kind: str
    checkpoint: str
    """The checkpoint's folder, relative to the run's."""


def stage_directory(directory: Path, branch: Branch, stage: Stage) -> Path:
    """Where `stage` of `branch` keeps everything it writes, in the run's folder `directory`."""
    return directory / BRANCHES / branch.name / f"{branch.stages.index(stage) + 1:02d}-{stage.name}"


def left_checkpoint(directory: Path, branch: Branch, stage: Stage) -> Path:
    """The checkpoint that a finished stage left.

    Raises:
        CheckpointError: the stage is not finished, its record is damaged, or the checkpoint is gone.
    """
    folder = stage_directory(directory, branch, stage)
    path = folder / OUTCOME_FILE
    again = f"Remove {folder} and run again: the stage is then done anew."
    try:
        outcome = StageOutcome.parse(json.loads(path.read_text(encoding="utf-8")), source=str(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist: this stage is not finished. Run again.") from error
    except (ValueError, OSError) as error:  # broken JSON, broken UTF-8 and wrong fields are ValueErrors
        raise CheckpointError(f"{path} can't be read: {error}. {again}") from error
    checkpoint = directory / outcome.checkpoint
    if not checkpoint.is_dir():
        raise CheckpointError(f"{path} names the checkpoint {checkpoint}, which is gone. {again}")
    return checkpoint


def is_finished(directory: Path, branch: Branch) -> bool:
    """Whether every stage of `branch` is done in the run's folder `directory`."""
    return (stage_directory(directory, branch, branch.stages[-1]) / OUTCOME_FILE).exists()


def claim_directory(recipe: Recipe, directory: Path, announce: Callable[[str], None]) -> None:
    """Make `directory` the folder of `recipe`'s run, or make sure that it is.

    Until a stage was begun, another recipe takes the folder over. After that the recipe may change where nothing that
    was begun depends on it; what changed is announced.

    Raises:
        ConfigError: it holds the run of another recipe, or something else.
    """
    path = directory / RECIPE_FILE
    if any(directory.glob("seed-*/" + RECIPE_FILE)):
        raise ConfigError(f"{directory} holds a comparison of seeds. Give --seeds as before, or another --output.")
    if not path.exists():
        # A kill during the very first write leaves a temporary file.
        if directory.exists() and any(found.name != f".{RECIPE_FILE}.tmp" for found in directory.iterdir()):
            raise ConfigError(f"{directory} is not empty and holds no run. Give another --output.")
        directory.mkdir(parents=True, exist_ok=True)
    elif (directory / BRANCHES).exists():
        try:
            saved = Recipe.from_yaml(path)
        except ConfigError as error:
            raise ConfigError(f"{directory} holds a run that can't go on: {error}. Give another --output.") from error
        changes = differences(_dumped(saved), _dumped(recipe))
        if refused := [line for field, line in changes.items() if not _may_change(field, saved, recipe, directory)]:
            raise ConfigError(
                f"{directory} holds a run of another recipe: {'; '.join(refused)}. What was begun can't be changed. "
                "Give another --output, or the recipe as it was."
            )
        for line in changes.values():
            announce(f"Recipe changed: {line}")
        if not changes:
            return
    elif _dumped(recipe)["data"] != _data_of(path):
        # Prepared for settings that no stage was begun with.
        shutil.rmtree(directory / DATA, ignore_errors=True)
    recipe.to_yaml(path)


def differences(old: Any, new: Any, field: str = "") -> dict[str, str]:
    """Where two nested values differ: dotted field (as `--set` writes it) -> "field: OLD there, NEW asked"."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {field: f"{field}: {_shown(old)} there, {_shown(new)} asked"}
    found: dict[str, str] = {}
    for key in [*old, *(key for key in new if key not in old)]:
        found |= differences(old.get(key, NOT_SET), new.get(key, NOT_SET), f"{field}.{key}" if field else str(key))
    return found


def _may_change(field: str, saved: Recipe, recipe: Recipe, directory: Path) -> bool:
    """Whether `field` may differ between the recipe saved in a begun run's `directory` and the one asked for."""
    if field in DESCRIBING or (_is_free_setting(field.removeprefix("training.")) and field.startswith("training.")):
        return True
    match = re.fullmatch(r"branches\.(\d+)(?:\.(.*))?", field)
    if match is None:
        return False
    number, rest = int(match[1]), match[2]
    if rest == "title" or number >= len(saved.branches):
        return True
    branch = saved.branches[number]
    begun = [_begun(directory, branch, stage) for stage in branch.stages]
    if not any(begun):
        return True
    stage_match = re.fullmatch(r"stages\.(\d+)(?:\.(.*))?", rest or "")
    if stage_match is None:
        return False
    stage, inner = int(stage_match[1]), stage_match[2] or ""
    if inner.startswith("settings.") and _is_free_setting(inner.removeprefix("settings.")):
        return True
    return not (stage < len(begun) and begun[stage]) and stage >= _relied_on(saved, directory).get(branch.name, 0)


def _is_free_setting(name: str) -> bool:
    return name.split(".")[0] in MAY_CHANGE


def _relied_on(recipe: Recipe, directory: Path) -> dict[str, float]:
    """How many stages of a branch decided something of a stage that was begun. All of them, those that may come too,
    where a size or a budget goes by the branch's end; those up to a teacher where an objective goes by that."""
    found: dict[str, float] = {}
    for branch in recipe.branches:
        for stage in branch.stages:
            if not _begun(directory, branch, stage):
                continue
            for field in ("like", "parameters_of", "flops_of"):
                if (name := getattr(stage, field, None)) is not None:
                    found[name] = math.inf
            for reference in recipe.references(stage) if isinstance(stage, TrainStage) else ():
                name, _, last = reference.partition("/")
                stages = [other.name for one in recipe.branches if one.name == name for other in one.stages]
                if last in stages:
                    found[name] = max(found.get(name, 0), stages.index(last) + 1)
    return found


def _begun(directory: Path, branch: Branch, stage: Stage) -> bool:
    """Whether something of `stage` is kept; a stage that was stopped before its first checkpoint starts anew."""
    folder = stage_directory(directory, branch, stage)
    return (folder / OUTCOME_FILE).exists() or (folder / LATEST_FILE).exists()


def _dumped(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")


def _data_of(path: Path) -> dict[str, Any] | None:
    """The data settings of a recipe's file; None if it can't be read any more."""
    try:
        return dict(_dumped(Recipe.from_yaml(path))["data"])
    except ConfigError:
        return None


def _shown(value: Any) -> str:
    return value if value is NOT_SET else repr(value)
