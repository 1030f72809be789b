"""The folder of a run: whose it is, what of it is begun, and what of its recipe may still change."""

import contextlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from auxin.errors import CheckpointError, ConfigError, reason, shown
from auxin.files import make_folder
from auxin.locks import LOCK_FILE, exclusive
from auxin.recipes.schema import Branch, Recipe, Stage, TrainStage
from auxin.settings import Settings
from auxin.training.identity import MAY_CHANGE
from auxin.training.run_folder import LATEST_FILE
from auxin.training.settings import BUDGETS

RECIPE_FILE = "recipe.yaml"
OUTCOME_FILE = "stage.json"
BRANCHES = "branches"
DATA = "data"
SEED = "seed-"
"""What the folder of one seed's run begins with, in that of a run with several."""

NOT_SET = "not set"
DESCRIBING = frozenset({"title", "description", "main_branch"})
"""Fields that change what a report says, and nothing that is computed."""
PRICING = "electricity"
"""What changes the price alone."""


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
        outcome = StageOutcome.parse(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist: this stage is not finished. Run again.") from error
    except (ValueError, OSError) as error:  # broken JSON, broken UTF-8 and wrong fields are ValueErrors
        raise CheckpointError(f"{path} can't be read: {reason(error)}. {again}") from error
    checkpoint = directory / outcome.checkpoint
    if (outcome.name, outcome.kind) != (stage.name, stage.kind) or not checkpoint.is_relative_to(folder):
        raise CheckpointError(f"{path} is of another stage ({outcome.name}, {outcome.checkpoint}). {again}")
    if not checkpoint.is_dir():
        raise CheckpointError(f"{path} names the checkpoint {checkpoint}, which is gone. {again}")
    return checkpoint


def branch_checkpoint(directory: Path, branch: Branch) -> Path:
    """The checkpoint that the last stage of a finished branch left.

    Raises:
        CheckpointError: as `left_checkpoint`.
    """
    return left_checkpoint(directory, branch, branch.stages[-1])


def is_done(directory: Path, branch: Branch, stage: Stage) -> bool:
    """Whether `stage` of `branch` has left its outcome in the run's folder `directory`."""
    return (stage_directory(directory, branch, stage) / OUTCOME_FILE).exists()


def is_finished(directory: Path, branch: Branch) -> bool:
    """Whether every stage of `branch` is done in the run's folder `directory`."""
    return is_done(directory, branch, branch.stages[-1])


def seed_directory(directory: Path, seed: int) -> Path:
    """Where the run with one seed lies in the folder of a run with several: a run's folder of its own, without data."""
    return directory / f"{SEED}{seed}"


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold the folder of a run, which is made if it does not exist: a second process would remove what the first one
    has not recorded yet.

    Raises:
        ConfigError: it can't be made, or holds something else than a run; nothing is written there.
        TrainingError: another process holds it.
    """
    make_folder(directory)
    _refuse_strangers(directory)
    with exclusive(directory):
        yield


def _refuse_strangers(directory: Path) -> None:
    """Keep out of a folder that is somebody's and holds no run."""
    # A kill during the very first write leaves a temporary file.
    ours = {RECIPE_FILE, f".{RECIPE_FILE}.tmp", LOCK_FILE}
    if not directory.exists() or (directory / RECIPE_FILE).exists():
        return
    if (directory / BRANCHES).is_dir():
        raise ConfigError(
            f"{directory} holds a run without its {RECIPE_FILE}. Put the recipe back there, or give another --output."
        )
    if any(found.name not in ours for found in directory.iterdir()):
        raise ConfigError(f"{directory} is not empty and holds no run. Give another --output.")


def claim_directory(recipe: Recipe, directory: Path, announce: Callable[[str], None]) -> None:
    """Make `directory` the folder of `recipe`'s run, or make sure that it is.

    Until a stage was begun, another recipe takes the folder over. After that the recipe may change where nothing that
    was begun depends on it; what changed is announced.

    Raises:
        ConfigError: it holds the run of another recipe, one with several seeds where `recipe` has one or the other way
            round, or something else.
    """
    _check_kind(recipe, directory)
    path = directory / RECIPE_FILE
    if not path.exists():
        _refuse_strangers(directory)
        make_folder(directory)
    elif (directory / BRANCHES).exists():
        changes = allowed_changes(recipe, directory)
        for line in changes:
            announce(f"Recipe changed: {line}")
        if not changes:
            return
    elif _dumped(recipe)["data"] != _data_of(path):
        # Prepared for settings that no stage was begun with.
        shutil.rmtree(directory / DATA, ignore_errors=True)
    recipe.to_yaml(path)


def claim_seeds(recipe: Recipe, directory: Path, announce: Callable[[str], None]) -> None:
    """As `claim_directory`, for a recipe with several seeds: `directory` holds the data and, for each seed, a folder
    that is claimed for the run with that seed. Folders of other seeds stay as they are.

    Raises:
        ConfigError: as `claim_directory`, before anything is written.
    """
    seeds = recipe.seeds or []
    _check_kind(recipe, directory)
    begun = sorted(path.parent for path in directory.glob(f"{SEED}*/{BRANCHES}"))
    for folder in begun:
        saved = _data_of(folder / RECIPE_FILE)
        if saved is not None and (lines := differences(saved, _dumped(recipe)["data"], "data").values()):
            raise ConfigError(
                f"{directory} holds runs on other data: {'; '.join(lines)}. Give another --output, or the recipe as it "
                "was."
            )
    changes: dict[str, None] = {}
    for seed in seeds:
        if seed_directory(directory, seed) in begun:
            changes |= dict.fromkeys(allowed_changes(recipe.of_seed(seed), seed_directory(directory, seed)))
    claim_directory(recipe, directory, announce)
    for line in changes:
        announce(f"Recipe changed: {line}")
    for seed in seeds:
        claim_directory(recipe.of_seed(seed), seed_directory(directory, seed), lambda line: None)
    if others := [folder.name for folder in begun if folder.name not in {f"{SEED}{seed}" for seed in seeds}]:
        announce(f"Not among the seeds asked for, and left as they are: {', '.join(others)}")


def _check_kind(recipe: Recipe, directory: Path) -> None:
    """Keep runs with one seed and with several apart."""
    if directory.is_file():
        raise ConfigError(f"{directory} is a file, and a run needs a folder. Give another --output.")
    if recipe.seeds is None and any(directory.glob(f"{SEED}*/{RECIPE_FILE}")):
        raise ConfigError(
            f"{directory} holds a run with several seeds, and the recipe has one. Give --seeds (or the recipe seeds) "
            "to go on with it, or another --output."
        )
    if recipe.seeds is not None and (directory / BRANCHES).exists():
        raise ConfigError(
            f"{directory} holds a run with one seed, and the recipe has seeds {recipe.seeds}. Give another --output, "
            "or one seed to go on with it."
        )


def allowed_changes(recipe: Recipe, directory: Path) -> list[str]:
    """Where `recipe` differs from that of the begun run in `directory`, as lines to announce.

    Raises:
        ConfigError: it differs where something that was begun depends on it, or the saved one can't be read.
    """
    try:
        saved = Recipe.from_yaml(directory / RECIPE_FILE)
    except ConfigError as error:
        why = str(error).rstrip(".")
        raise ConfigError(
            f"{directory} holds a run that can't go on: {why}. Put its recipe back, or give another --output."
        ) from error
    changes = differences(_dumped(saved), _dumped(recipe))
    if refused := [line for field, line in changes.items() if not _may_change(field, saved, recipe, directory)]:
        raise ConfigError(
            f"{directory} holds a run of another recipe ({RECIPE_FILE}): {'; '.join(refused)}. What was begun can't "
            f"be changed. Give another --output, or the recipe as it was.{_how_to_go_on(saved, directory, changes)}"
        )
    return list(changes.values())


def _how_to_go_on(recipe: Recipe, directory: Path, changed: Iterable[str]) -> str:
    """Where a longer budget was asked for, a sentence that says how a model is trained on; else empty."""
    if not any(field.rpartition(".")[2] in BUDGETS for field in changed):
        return ""
    for branch in recipe.branches:
        with contextlib.suppress(CheckpointError):  # not finished, or damaged, which is not what is asked here
            checkpoint = branch_checkpoint(directory, branch)
            return f" To train a finished model on, start from it: auxin train --model {checkpoint} -o ANOTHER."
    return ""


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
    if field.partition(".")[0] in {*DESCRIBING, PRICING}:
        return True
    if field.startswith("training.") and _is_free_setting(field.removeprefix("training.")):
        return True
    if field.startswith("data.") and field.removeprefix("data.") in recipe.data.decide_no_sample:
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
    left = stage_directory(directory, branch, stage) / LATEST_FILE
    return is_done(directory, branch, stage) or left.exists()


def _dumped(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")


def _data_of(path: Path) -> dict[str, Any] | None:
    """The data settings of a recipe's file; None if it can't be read any more."""
    try:
        return dict(_dumped(Recipe.from_yaml(path))["data"])
    except ConfigError:
        return None


def _shown(value: Any) -> str:
    return NOT_SET if value is NOT_SET else shown(value)
