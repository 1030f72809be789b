"""Run a recipe once for each of several seeds, and its branches side by side, and compare what came out.

The folder of a comparison holds the recipe, the data that all seeds share, a run's folder for each seed, and the
results of all of them together.
"""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from auxin.accounting.comparison import compared
from auxin.accounting.results import RunResults
from auxin.errors import ConfigError
from auxin.files import write_text
from auxin.recipes.branch_order import with_ancestors
from auxin.recipes.folder import BRANCHES, DATA, RECIPE_FILE
from auxin.recipes.parallel import Announce, Cell, run_cells
from auxin.recipes.runner import RESULTS_FILE, finish_run, open_run, read_results, rewrite_report, run_branch
from auxin.recipes.schema import Recipe

SEED_FOLDER = "seed-{}"


def run_seeds(
    recipe: Recipe,
    output: str | Path,
    command: str,
    *,
    seeds: Sequence[int] = (),
    jobs: int = 1,
    branches: Iterable[str] | None = None,
    announce: Announce = print,
) -> RunResults:
    """Run `recipe` with every seed into the folder `output`, or go on where an earlier call stopped.

    Args:
        recipe: what to do.
        output: the folder; made if it does not exist.
        command: the command line that reproduces it, for the report.
        seeds: those to run; default: the recipe's. Seeds that are in the folder and not among them stay as they are.
        jobs: processes, of one thread each, at a time.
        branches: only these and what they need; None: all.
        announce: is told what happens, a line at a time.

    Returns:
        Means and intervals over the seeds; also written to `results.json` and `report.html` in `output`.

    Raises:
        ConfigError, PlanError: as `run_recipe`; a seed stands twice, or `output` holds a run without seeds.
        BranchesFailed: a branch failed; all that does not need it was finished.
        TrainingInterrupted: SIGINT or SIGTERM; training stages were saved.
    """
    directory, seeds = Path(output), list(seeds or recipe.seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds: {seeds}: give at least one, each once.")
    chosen = with_ancestors(recipe, branches)
    _claim(recipe, directory, seeds)
    cells = [cell for seed in seeds for cell in _cells(recipe, chosen, directory, seed, announce)]
    run_cells(cells, jobs, do_cell, announce)
    runs: dict[int, RunResults] = {}
    for seed in seeds:
        folder = directory / SEED_FOLDER.format(seed)
        run = open_run(_with_seed(recipe, seed), folder, _quiet, data_directory=directory / DATA)
        runs[seed] = finish_run(run, f"{command} (seed {seed})", with_ancestors(run.recipe, branches))
    results = compared(runs, command)
    write_text(directory / RESULTS_FILE, results.model_dump_json(indent=2) + "\n")
    rewrite_report(directory)
    return results


def run_parallel(recipe: Recipe, output: str | Path, command: str, jobs: int, announce: Announce = print) -> RunResults:
    """As `run_recipe`, with independent branches side by side in processes of one thread each."""
    run = open_run(recipe, output, announce)
    cells = [Cell(recipe, run.directory, run.directory / DATA, branch, branch.name) for branch in recipe.branches]
    run_cells(cells, jobs, do_cell, announce)
    return finish_run(run, command)


def finished_results(output: str | Path) -> dict[int, RunResults]:
    """What each seed of the comparison in `output` measured, by seed, as far as it is finished."""
    found = {}
    for folder in sorted(Path(output).glob(SEED_FOLDER.format("*"))):
        if (folder / RESULTS_FILE).is_file():
            results = read_results(folder)
            found[results.seed] = results
    return found


def do_cell(cell: Cell) -> None:
    """One branch of one run, in the present process."""
    run = open_run(
        cell.recipe, cell.directory, lambda line: None, data_directory=cell.data, label=cell.label, check=False
    )
    run_branch(run, cell.branch)


def _cells(recipe: Recipe, chosen: Recipe, directory: Path, seed: int, announce: Announce) -> list[Cell]:
    """The branches of one seed, whose folder is made ready."""
    own, data = _with_seed(recipe, seed), directory / DATA
    folder = directory / SEED_FOLDER.format(seed)
    open_run(own, folder, announce if not folder.exists() else _quiet, data_directory=data)
    names = {branch.name for branch in chosen.branches}
    mine = [branch for branch in own.branches if branch.name in names]
    return [Cell(own, folder, data, branch, f"seed {seed}, {branch.name}") for branch in mine]


def _with_seed(recipe: Recipe, seed: int) -> Recipe:
    return recipe.model_copy(update={"seed": seed, "seeds": []})


def _claim(recipe: Recipe, directory: Path, seeds: Sequence[int]) -> None:
    """Make `directory` the folder of a comparison; ConfigError when it holds a run of its own."""
    if (directory / BRANCHES).exists():
        raise ConfigError(f"{directory} holds a run without seeds. Give another --output, or leave out --seeds.")
    directory.mkdir(parents=True, exist_ok=True)
    begun = any(folder.is_dir() for folder in directory.glob(f"{SEED_FOLDER.format('*')}/{BRANCHES}"))
    path = directory / RECIPE_FILE
    if not begun and path.exists() and Recipe.from_yaml(path).data != recipe.data:
        shutil.rmtree(directory / DATA, ignore_errors=True)  # prepared for settings that no stage was begun with
    recipe.model_copy(update={"seeds": list(seeds)}).to_yaml(path)


def _quiet(line: str) -> None:
    """Say nothing."""
