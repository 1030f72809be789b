"""A run that several processes do together, started by torchrun: the leader does what a run does, from the corpus to
the report, and the others take part in its training.

They see the same files. What a follower needs for a stage it reads from the run's folder, as the leader does.
"""

import contextlib
import platform
from pathlib import Path
from typing import Any

from auxin.accounting.results import RunResults
from auxin.errors import AuxinError, ConfigError
from auxin.recipes.folder import DATA
from auxin.recipes.runner import prepared_run, run_recipe
from auxin.recipes.schema import Recipe, TrainStage
from auxin.recipes.stages import Run, train_stage
from auxin.training.ranks import Ranks, joined


def refuse_together(recipe: Recipe, jobs: int) -> None:
    """Refuse what several processes can't do together; ConfigError."""
    if recipe.seeds is not None:
        raise ConfigError(
            f"seeds: {recipe.seeds}: torchrun's processes train one model together, and seeds are run side by side. "
            "Give one seed at a time (--seed 0), or run several without torchrun (--seeds 0 1 --jobs 2)."
        )
    if jobs > 1:
        raise ConfigError(
            f"jobs: {jobs}: torchrun's processes train one model together, and jobs run branches side by side. Leave "
            "--jobs out, or start without torchrun."
        )


def run_together(recipe: Recipe, output: str | Path, command: str, **how: Any) -> RunResults | None:
    """`run_recipe` with whoever torchrun has started beside this process, or alone: what it returns where this process
    leads, None where it follows."""
    with joined() as ranks:
        if ranks.leads:
            return run_recipe(recipe, output, command, ranks=ranks, **how)
        follow(recipe, output, ranks)
        return None


def follow(recipe: Recipe, output: str | Path, ranks: Ranks) -> None:
    """Take part in the training stages of the leader's run of `recipe` into the folder `output`, until that ends.

    What goes wrong is the leader's to say: it has gone wrong there, too, or it has been told.
    """
    directory = Path(output)
    run: Run | None = None
    for order in ranks.orders():
        with contextlib.suppress(AuxinError):
            with ranks.together():
                if not directory.is_dir():
                    raise ConfigError(
                        f"{directory.absolute()}, the folder of the run, is not there on {platform.node()}. Give all "
                        "processes one folder that all of their machines see."
                    )
                run = run or prepared_run(recipe, directory, directory / DATA, _quietly, ranks)
            branch = recipe.branch(order["branch"])
            stage = branch.stage(order["stage"])
            assert isinstance(stage, TrainStage)
            train_stage(run, branch, stage, run.stage_directory(branch, stage), Path(order["previous"]))


def _quietly(line: str) -> None:
    pass
