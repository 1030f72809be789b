"""The folder of a search: whose it is, what of it goes on, and what of it begins anew."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from auxin.accounting.ledger import books_in
from auxin.errors import CheckpointError, ConfigError
from auxin.files import remove_folder, write_text
from auxin.recipes import Recipe
from auxin.recipes.folder import BRANCHES, RECIPE_FILE, differences
from auxin.shrinking.settings import ShrinkSettings
from auxin.shrinking.trials import Records
from auxin.sums import damage, has_sums, names_without_sums
from auxin.training.checkpoint import copy_checkpoint

SETTINGS, TRIALS, FINGERPRINT, OUTCOME, PAGE, PICTURE, MODEL = (
    *("shrink.yaml", "trials.jsonl", "searched.txt", "outcome.json", "shrink.md", "front.svg", "model"),
)
"""Files and folders beside those of the run that mends."""
WHOLE = "whole"
"""The branch of the model as it is."""
MAY_GROW = ("trials", "minutes")
"""Settings that another call may change: the search goes on."""
OF_THE_WHOLE = ("model", "data", "training", "seed")
"""Settings that the measured whole model depends on. The others may change as long as nothing has reached the target:
there is nothing to keep then but reasons why not."""


def begin(settings: ShrinkSettings, output: Path, announce: Callable[[str], None]) -> None:
    """Make sure that a held folder is that of this search, or of one that reached nothing and makes way for it.

    Raises:
        ConfigError: it is another's.
        CheckpointError: a trial in it can't be read.
    """
    if not (output / SETTINGS).exists():
        if (output / BRANCHES).exists():
            raise ConfigError(f"{output} holds a run, and no search with its {SETTINGS}. Give another --output.")
        return
    saved = ShrinkSettings.from_yaml(output / SETTINGS)
    changed = differences(_compared(saved), _compared(settings))
    if not changed:
        return
    told, fields = "; ".join(changed.values()), {field.partition(".")[0] for field in changed}
    if any(trial.loss is not None for trial in Records(output / TRIALS).trials):
        raise ConfigError(
            f"{output} holds a search with other settings ({told}). Give another --output, or those of "
            f"{output / SETTINGS}; {' and '.join(MAY_GROW)} may be others."
        )
    if fields & set(OF_THE_WHOLE):
        raise ConfigError(
            f"{output} holds the whole model as measured with other settings ({told}). Give another --output, or "
            f"remove {output}: nothing in it has reached its target."
        )
    announce(f"No trial here has reached its target. The search begins anew ({told}).")
    (output / TRIALS).unlink(missing_ok=True)


def _compared(settings: ShrinkSettings) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude=set(MAY_GROW), exclude_none=True)


def refuse_other_model(output: Path, fingerprint: str, settings: ShrinkSettings) -> None:
    """Write down whose trials the folder holds.

    Raises:
        ConfigError: they are another model's.
    """
    path = output / FINGERPRINT
    if path.exists() and path.read_text(encoding="utf-8").strip() != fingerprint:
        raise ConfigError(
            f"{settings.model} is not the model that it was when the search in {output} began. Give another --output."
        )
    write_text(path, fingerprint + "\n")


def earlier_branches(output: Path) -> list[dict[str, Any]]:
    """The branches of ways that were chosen before, when there were fewer trials: a begun run keeps them."""
    path = output / RECIPE_FILE
    if not (output / SETTINGS).exists() or not path.exists():
        return []
    branches = Recipe.from_yaml(path).model_dump(mode="json", exclude_unset=True)["branches"]
    return [branch for branch in branches if branch["name"] != WHOLE]


def put_model(checkpoint: Path, target: Path) -> None:
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
